"""audit: what the copies of a snapshot would have in common and should not, from the snapshot alone.

It names what is *known* to be shared: a secret in a place that nobody knows of is not seen. What a finding is called
(``what``) is stable, for scripts and for ``--allow-shared``.
"""

from __future__ import annotations

import os
import stat

from ..errors import Blockers, ImageError, Unsupported, UsageError, doing
from ..images import schema as pb
from ..images.pages import Pages
from ..images.store import ImageReader
from ..model import guest_page
from ..options import nearest
from ..resources import base, own_shm
from .audit_known import (
    FIXED,
    GO,
    KNOWN,
    MACHINE_ID_FILES,
    MACHINE_ID_LIBRARIES,
    NOTE,
    PYTHON,
    PYTHON_HASH,
    SECRET,
    SEVERITIES,
    STATE,
    Known,
    matches,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from ..options import Options

PROT_WRITE = 2
MADV_DONTDUMP, MADV_WIPEONFORK = 16, 18
TCP_ESTABLISHED, TCP_LISTEN, IPPROTO_TCP = 1, 10, 6
AF_INET = (2, 10)
#: Type and name of the linker's note with the build id (cmd/link/internal/ld/elf.go).
GO_NOTE = b"\x04\x00\x00\x00Go\x00\x00"
ELF_HEAD_BYTES = 8192


class Shared:
    """One thing that copies share.

    ``what`` is its name, ``severity`` one of "secret", "state", "fixed", "note" (audit_known.py), ``pids`` the tasks it
    is in, ``text`` what it is and ``advice`` what to do about it. ``renewed``: by what all those tasks renew it, "" if
    nobody does in one of them at least, which are then in ``open_pids``.
    """

    __slots__ = ("advice", "open_pids", "pids", "renewed", "severity", "text", "what")

    def __init__(self, what: str, severity: str, text: str, advice: str) -> None:
        self.what, self.severity, self.text, self.advice = what, severity, text, advice
        self.pids: list[int] = []
        self.open_pids: list[int] = []
        self.renewed = ""

    def __repr__(self) -> str:
        return f"<{self.severity}: {self.what} in {self.pids}, renewed by {self.renewed or 'nobody'}>"


class Audit:
    """What was found, the worst first. ``guests``: pids of the tasks that take part in snapshots."""

    __slots__ = ("guests", "shared")

    def __init__(self) -> None:
        self.shared: list[Shared] = []
        self.guests: list[int] = []

    def find(self, what: str) -> Shared | None:
        """The finding of this name."""
        return next((one for one in self.shared if one.what == what), None)

    def refused(self, allowed: Collection[str] = ()) -> list[Shared]:
        """What ``--strict`` does not let pass: secrets that nobody renews and nobody has allowed."""
        return [one for one in self.shared if one.severity == SECRET and not one.renewed and one.what not in allowed]


def audit(options: Options) -> Audit:
    """Look at the snapshot in ``options.images_dir``; of the options ``fresh`` and ``new_generation`` matter. Raises
    TorporError where it cannot be read.
    """
    with doing("audit"):
        try:
            directory = os.open(options.images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"images directory `{options.images_dir}`: {error.strerror}") from None
        try:
            return look(ImageReader(directory), options)
        finally:
            os.close(directory)


def check(reader: ImageReader, options: Options) -> None:
    """What ``--strict`` asks for, before anything is created: raise Unsupported for secrets that copies would share."""
    known = set(names())
    for name in options.allow_shared:
        if name not in known:
            raise UsageError(f"--allow-shared: nothing is called `{name}`", hint=nearest(name, known))
    refused = look(reader, options).refused(options.allow_shared)
    errors = []
    for one in refused:
        tasks = ", ".join(str(pid) for pid in one.open_pids)
        error = Unsupported(
            f"copies would share a secret that nobody renews: {one.what}: {one.text}",
            hint=f"{one.advice}; or --allow-shared {one.what}",
        )
        error.context.insert(0, f"task {tasks}")
        errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else Blockers(errors)


def names() -> list[str]:
    """All names that a finding can have."""
    found = [*KNOWN, PYTHON, PYTHON_HASH, GO]
    return [*(one.what for one in found), *(what for what, *_ in OWN.values())]


#: Those that are not libraries: key → (name, severity, text, advice)
OWN: dict[str, tuple[str, str, str, str]] = {
    "tls": (
        "tls-sessions", SECRET,
        "established TCP connections of a process with a TLS library: keys and record numbers of the sessions, with "
        "which two copies would encrypt different things alike",
        "close the connections before the snapshot (@before_snapshot), or restore with --tcp-close",
    ),
    "tcp": (
        "tcp-connections", STATE, "established TCP connections, on which every copy would go on talking",
        "close them before the snapshot, or restore with --tcp-close",
    ),
    "wiped": (
        "wipe-on-fork", SECRET, "memory that the program does not want a copy to have (MADV_WIPEONFORK)",
        "restore with --fresh, which lets it come up empty, as fork(2) does",
    ),
    "hidden": (
        "key-memory", STATE,
        "memory that is locked or kept out of core dumps, which is where libraries put keys: all copies have the same",
        "renew keys that are not meant to be shared",
    ),
    "files": (
        "shared-files", STATE,
        "memory that is mapped from files with names: what one copy writes, all read",
        "give each copy its own with --overlay and the directory that they are in",
    ),
    "machine": (
        "machine-id", NOTE, "the machine id, by which copies take themselves for one and the same machine",
        "give each copy an /etc/machine-id of its own where that matters",
    ),
    "layout": (
        "address-layout", FIXED, "where everything lies in memory: who has learned it from one copy knows it of all",
        "restart rather than clone what an adversary may crash again and again",
    ),
    "canary": (
        "stack-canary", FIXED,
        "the canary and the pointer guard of the C library, made of the 16 bytes behind AT_RANDOM when it was started",
        "as for address-layout",
    ),
}  # fmt: skip


def look(reader: ImageReader, options: Options) -> Audit:
    """The same for an open image set."""
    work = _Look(reader, options)
    for entry in reader.read_all("pstree", required=True):
        if reader.has(f"mm-{entry.pid}"):
            work.task(entry.pid)
    result = Audit()
    result.guests = sorted(work.guests)
    result.shared = sorted(work.found.values(), key=lambda one: (SEVERITIES.index(one.severity), one.what))
    return result


class _Look:
    """One look at a snapshot."""

    def __init__(self, reader: ImageReader, options: Options) -> None:
        self.reader = reader
        self.options = options
        self.files: dict[int, Any] = {entry.id: entry for entry in reader.files()}
        self.removed = {one.orig_id for one in reader.read_all("remap-fpath")}  # each copy has those for itself
        in_shm = [one for one in self.files.values() if own_shm.is_inside(one) and one.id not in self.removed]
        self.has_own_shm = all(own_shm.is_carried(one.reg) for one in in_shm)
        self.found: dict[str, Shared] = {}
        self.guests: set[int] = _guests(reader) if options.new_generation else set()

    def note(self, what: str, severity: str, text: str, advice: str, pid: int, renewed: str) -> None:
        """Task ``pid`` has something; ``renewed``: by what it is renewed there."""
        one = self.found.get(what)
        if one is None:
            one = self.found[what] = Shared(what, severity, text, advice)
        if pid in one.pids:
            return
        one.pids.append(pid)
        if not renewed:
            one.open_pids.append(pid)
        one.renewed = renewed if not one.open_pids else ""

    def task(self, pid: int) -> None:
        """Look at one task."""
        mm = self.reader.read_one(f"mm-{pid}")
        told = "the program, which is told" if pid in self.guests else ""
        generation = self._has_generation_file(mm)
        known = self._known(mm)
        for one in known:
            renewed = told if one.severity != FIXED else ""
            if one.what == "openssl" and not renewed and generation:
                renewed = "the library, by the generation file"  # AWS-LC under the name of OpenSSL
            self.note(one.what, one.severity, one.text, one.advice, pid, renewed)
        self._memory(pid, mm)
        self._sockets(pid, any(one.tls for one in known))
        paths = {self._path(vma.shmid) for vma in mm.vmas} | set(self._open_paths(pid))
        names = {path.rpartition("/")[2] for path in paths}
        if any(path in MACHINE_ID_FILES for path in paths) or any(
            name.startswith(MACHINE_ID_LIBRARIES) for name in names
        ):
            self.note(*OWN["machine"], pid, "")
        self.note(*OWN["layout"], pid, "")
        self.note(*OWN["canary"], pid, "")

    def _known(self, mm: Any) -> list[Known]:
        """The libraries and runtimes that a task has mapped."""
        executable = self._path(mm.exe_file_id)
        mapped = {self._path(vma.shmid) for vma in mm.vmas if vma.status & base.VMA_FILE_PRIVATE}
        found = [
            one
            for one in (*KNOWN, PYTHON)
            if matches(one, executable, executable=True) or any(matches(one, path) for path in mapped)
        ]
        if PYTHON in found:
            found.append(PYTHON_HASH)
        if any(bytes(vma.anon_name).startswith(b"Go: ") for vma in mm.vmas) or _is_go(executable):
            found.append(GO)
        return found

    def _memory(self, pid: int, mm: Any) -> None:
        for vma in mm.vmas:
            droppable = vma.flags & base.MAP_DROPPABLE
            if vma.status & (base.VMA_VDSO | base.VMA_VVAR | base.VMA_GUARD) or droppable:
                continue
            if vma.madv >> MADV_WIPEONFORK & 1:
                self.note(*OWN["wiped"], pid, "--fresh" if self.options.fresh else "")
            elif vma.status & base.VMA_ANON_PRIVATE and (vma.flags & base.MAP_LOCKED or vma.madv >> MADV_DONTDUMP & 1):
                self.note(*OWN["hidden"], pid, "")
            elif vma.status & base.VMA_FILE_SHARED and vma.prot & PROT_WRITE and self._is_common(vma.shmid):
                self.note(*OWN["files"], pid, "--overlay" if self._is_overlaid(self._path(vma.shmid)) else "")

    def _is_common(self, file_id: int) -> bool:
        """Do copies find a file by its name, all of them the same?"""
        entry = self.files.get(file_id)
        if entry is None or not entry.HasField("reg") or file_id in self.removed:
            return False
        if self.has_own_shm and own_shm.is_inside(entry):
            return False
        return stat.S_ISREG(entry.reg.mode) and not entry.reg.HasField("generation")

    def _is_overlaid(self, path: str) -> bool:
        return any(path.startswith(f"{folder.rstrip('/')}/") for folder in self.options.overlay)

    def _sockets(self, pid: int, tls: bool) -> None:
        for entry in self._open(pid):
            if not entry.HasField("isk") or entry.isk.family not in AF_INET or entry.isk.proto != IPPROTO_TCP:
                continue
            if entry.isk.state == TCP_ESTABLISHED:
                self.note(*OWN["tls" if tls else "tcp"], pid, "--tcp-close" if self.options.tcp_close else "")

    def _has_generation_file(self, mm: Any) -> bool:
        if not self.options.new_generation:
            return False
        entries = (self.files.get(vma.shmid) for vma in mm.vmas)
        return any(
            entry is not None
            and (entry.HasField("reg") and entry.reg.HasField("generation"))
            for entry in entries
        )

    def _open(self, pid: int) -> list[Any]:
        ids = self.reader.read_one(f"ids-{pid}") if self.reader.has(f"ids-{pid}") else None
        if ids is None:
            ids = self.reader.read_one(f"core-{pid}").ids
        entries = (self.files.get(one.id) for one in self.reader.read_all(f"fdinfo-{ids.files_id}"))
        return [entry for entry in entries if entry is not None]

    def _open_paths(self, pid: int) -> list[str]:
        return [self._path(entry.id) for entry in self._open(pid)]

    def _path(self, file_id: int) -> str:
        entry = self.files.get(file_id)
        return os.fsdecode(pb.get_bytes(entry.reg.name)) if entry is not None and entry.HasField("reg") else ""


def _guests(reader: ImageReader) -> set[int]:
    """The tasks that are told of their wake-up: the owners of guest pages."""
    found = set()
    for entry in reader.read_all("memfd"):
        if pb.get_bytes(entry.name) != guest_page.NAME or entry.size != guest_page.PAGE_BYTES:
            continue
        content = _first_page(reader, entry.shmid)
        try:
            page = guest_page.parse(content)
        except ValueError:
            continue  # it will not be told, see resources/generation.py
        if page.signal or page.eventfd >= 0 or page.state == guest_page.READY:
            found.add(page.pid)
    return found


def _first_page(reader: ImageReader, shmid: int) -> bytes:
    with Pages(reader, f"pagemap-shmem-{shmid}") as pages:
        for run in pages.runs():
            if run.vaddr == 0 and run.fd >= 0:
                return os.pread(run.fd, guest_page.PAGE_BYTES, run.offset)
    raise ImageError(f"pagemap-shmem-{shmid}.img", "0x0", "the page is not in the images")


def _is_go(path: str) -> bool:
    """Was the program linked by Go? Looks at the file, if it is here."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        head = os.pread(fd, ELF_HEAD_BYTES, 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return head[:4] == b"\x7fELF" and GO_NOTE in head


__all__ = ["FIXED", "NOTE", "SECRET", "STATE", "Audit", "Shared", "audit", "check", "look", "names"]
