"""Kernel objects, one file each. The folder is the registry: nothing else lists them."""

from __future__ import annotations

import importlib
import os
import stat

from ..errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .base import FileResource, MappingResource, SourceFile, TaskResource

_found: dict[str, list[Any]] = {}


def load(folder: str) -> list[Any]:
    """The RESOURCE of every module in ``folder`` ("files", "task", "memory"), in the order of the modules' names."""
    if folder not in _found:
        package = importlib.import_module(f"{__name__}.{folder}")
        names = sorted(
            name[:-3] for name in os.listdir(package.__path__[0]) if name.endswith(".py") and name[0] != "_"
        )
        _found[folder] = [importlib.import_module(f"{package.__name__}.{name}").RESOURCE for name in names]
    return _found[folder]


class FileKinds:
    """Which resource an open file belongs to."""

    def __init__(self) -> None:
        self.by_link: dict[str, list[FileResource]] = {}
        self.by_mode: dict[int, list[FileResource]] = {}
        self.by_type: dict[int, FileResource] = {}
        for resource in sorted(load("files"), key=lambda resource: resource.PRIORITY):
            for link in resource.LINKS:
                self.by_link.setdefault(link, []).append(resource)
            for mode in resource.MODES:
                self.by_mode.setdefault(mode, []).append(resource)
            if resource.FIELD:
                assert resource.FD_TYPE not in self.by_type, f"two modules claim fd type {resource.FD_TYPE}"
                self.by_type[resource.FD_TYPE] = resource

    def find(self, source: SourceFile) -> FileResource:
        """The resource for a source file; raises Unsupported when there is none."""
        candidates = self.by_link.get(source.link, ()), self.by_mode.get(stat.S_IFMT(source.stat.st_mode), ())
        for some in candidates:
            for resource in some:
                if resource.claims(source):
                    return resource
        raise Unsupported(f"fd {source.fd} ({source.link}): a kind of file that Torpor does not know")


def task_resources() -> list[TaskResource]:
    """All parts of a task's state, in the order in which they are restored."""
    return sorted(load("task"), key=lambda resource: resource.ORDER)


class MappingKinds:
    """Which resource a mapping belongs to."""

    def __init__(self) -> None:
        self.all: list[MappingResource] = sorted(load("memory"), key=lambda resource: resource.PRIORITY)
        self.by_kind: dict[str, list[MappingResource]] = {}
        self._by_status: dict[int, MappingResource] = {}
        for resource in self.all:
            for kind in resource.KINDS:
                self.by_kind.setdefault(kind, []).append(resource)

    def find(self, mapping: Any) -> MappingResource:
        """The resource for a live mapping; raises Unsupported when there is none."""
        for resource in self.by_kind.get(mapping.vma.kind, ()):
            if resource.claims(mapping):
                return resource
        vma = mapping.vma
        raise Unsupported(
            f"mapping {vma.start:x}-{vma.end:x} ({vma.path.decode(errors='replace') or vma.kind}): "
            "a kind that Torpor cannot dump"
        )

    def of_entry(self, entry: Any) -> MappingResource:
        """The resource that restores a vma_entry; raises Unsupported when there is none."""
        status: int = entry.status
        known = self._by_status.get(status)
        if known is not None:
            return known
        for resource in self.all:
            if resource.restores(entry):
                self._by_status[status] = resource
                return resource
        raise Unsupported(f"mapping {entry.start:x}-{entry.end:x}: status {entry.status:#x} is not known")
