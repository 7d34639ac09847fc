"""Kernel objects, one file each. The folder is the registry: ``heads`` only saves to load the modules of kinds that are
not met, and is made from them.
"""

from __future__ import annotations

import importlib
import os
import stat

from ..errors import Unsupported
from . import heads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from .base import FileResource, MappingResource, SourceFile, TaskResource

    FileHead: TypeAlias = tuple[int, str, tuple[str, ...], tuple[int, ...], int, bool]
    MappingHead: TypeAlias = tuple[tuple[str, ...], int, int, int]

_names: dict[str, list[str]] = {}
#: (folder, module) → its RESOURCE
_found: dict[tuple[str, str], Any] = {}


def load(folder: str) -> list[Any]:
    """The RESOURCE of every module in ``folder`` ("files", "task", "memory"), in the order of the modules' names."""
    return [load_one(folder, name) for name in modules(folder)]


def load_one(folder: str, name: str) -> Any:
    """The RESOURCE of one module."""
    key = folder, name
    if key not in _found:
        _found[key] = importlib.import_module(f"{__name__}.{folder}.{name}").RESOURCE
    return _found[key]


def modules(folder: str) -> list[str]:
    """The names of all modules in ``folder``, sorted."""
    if folder not in _names:
        package = importlib.import_module(f"{__name__}.{folder}")
        names = (name[:-3] for name in os.listdir(package.__path__[0]) if name.endswith(".py") and name[0] != "_")
        _names[folder] = sorted(names)
    return _names[folder]


def file_head(resource: FileResource) -> FileHead:
    """What ``heads`` says about a module of files: FD_TYPE, FIELD, LINKS, MODES, PRIORITY, and whether its links say
    all that is to be known before a dump.
    """
    from .base import FileResource

    kind = type(resource)
    plain = kind.check is FileResource.check and kind.claims is FileResource.claims
    return resource.FD_TYPE, resource.FIELD, resource.LINKS, resource.MODES, resource.PRIORITY, plain


def mapping_head(resource: MappingResource) -> MappingHead:
    """What ``heads`` says about a module of memory: KINDS, STATUS, STATUS_NOT, PRIORITY."""
    return resource.KINDS, resource.STATUS, resource.STATUS_NOT, resource.PRIORITY


def _head(folder: str, name: str, known: dict[str, Any], read: Callable[[Any], Any]) -> Any:
    """The head of a module; one that ``heads`` does not know yet is loaded for it."""
    return known[name] if name in known else read(load_one(folder, name))


class FileKinds:
    """Which resource an open file belongs to. Its module is loaded when the first such file is met."""

    def __init__(self) -> None:
        self._by_link: dict[str, list[str]] = {}
        self._by_mode: dict[int, list[str]] = {}
        self._by_type: dict[int, str] = {}
        #: What was found for an inode that was seen by BPF, under this name.
        self._found: dict[tuple[int, str, int], FileResource] = {}
        #: Links that say all: such files need not be looked at before a dump.
        self.plain: set[str] = set()
        known = [(name, _head("files", name, heads.FILES, file_head)) for name in modules("files")]
        for name, (fd_type, field, links, modes, _, plain) in sorted(known, key=lambda pair: pair[1][4]):
            for link in links:
                self._by_link.setdefault(link, []).append(name)
            for mode in modes:
                self._by_mode.setdefault(mode, []).append(name)
            if field:
                assert fd_type not in self._by_type, f"two modules claim fd type {fd_type}"
                self._by_type[fd_type] = name
            if plain:
                self.plain.update(links)

    def of_type(self, fd_type: int) -> FileResource | None:
        """The resource that restores a file_entry of this type; None when there is none."""
        name = self._by_type.get(fd_type)
        return None if name is None else load_one("files", name)

    def expect(self, link: str) -> None:
        """A file of ``link``, one of ``plain``, will have to be dumped while its task is frozen."""
        for name in self._by_link[link]:
            load_one("files", name)

    def find(self, source: SourceFile) -> FileResource:
        """The resource for a source file; raises Unsupported when there is none."""
        seen = source.seen
        if seen is None:
            return self._find(source)
        key = seen.inode, source.link, seen.flags & os.O_PATH
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._find(source)
        return found

    def _find(self, source: SourceFile) -> FileResource:
        by_mode = self._by_mode.get(stat.S_IFMT(source.stat.st_mode), ())
        for name in (*self._by_link.get(source.link, ()), *by_mode):
            resource: FileResource = load_one("files", name)
            if resource.claims(source):
                return resource
        raise Unsupported(f"fd {source.fd} ({source.link}): a kind of file that Torpor does not know")


def task_resources() -> list[TaskResource]:
    """All parts of a task's state, in the order in which they are restored."""
    return sorted(load("task"), key=lambda resource: resource.ORDER)


class MappingKinds:
    """Which resource a mapping belongs to. Its module is loaded when the first such mapping is met."""

    def __init__(self) -> None:
        known = [(name, _head("memory", name, heads.MEMORY, mapping_head)) for name in modules("memory")]
        self._all = sorted(known, key=lambda pair: pair[1][3])
        self._by_kind: dict[str, list[str]] = {}
        self._by_status: dict[int, MappingResource] = {}
        for name, (kinds, *_) in self._all:
            for kind in kinds:
                self._by_kind.setdefault(kind, []).append(name)

    def find(self, mapping: Any) -> MappingResource:
        """The resource for a live mapping; raises Unsupported when there is none."""
        for name in self._by_kind.get(mapping.vma.kind, ()):
            resource: MappingResource = load_one("memory", name)
            if resource.claims(mapping):
                return resource
        from .files.refused import known

        vma = mapping.vma
        path = vma.path.decode(errors="replace")
        why, hint = known(f"{path} (deleted)" if vma.deleted else path) or ("a kind that Torpor cannot dump", "")
        raise Unsupported(f"mapping {vma.start:x}-{vma.end:x} ({path or vma.kind}): {why}", hint=hint)

    def of_entry(self, entry: Any) -> MappingResource:
        """The resource that restores a vma_entry; raises Unsupported when there is none."""
        status: int = entry.status
        known = self._by_status.get(status)
        if known is not None:
            return known
        for name, (_, mask, unless, _) in self._all:
            if status & mask and not status & unless:
                resource: MappingResource = load_one("memory", name)
                self._by_status[status] = resource
                return resource
        raise Unsupported(f"mapping {entry.start:x}-{entry.end:x}: status {entry.status:#x} is not known")
