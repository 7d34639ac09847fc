"""Reading an image set into a Snapshot, and refusing what is inconsistent before anything is created."""

from __future__ import annotations

import os

from .. import limits
from ..errors import ImageError
from ..images import schema as pb
from ..images.pages import Pages
from ..model.snapshot import HOST_SPACE, RestoredTask, RestoredThread, Snapshot
from . import pid_spaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from ..images.store import ImageReader

IMAGE_VERSION = 2
MACHINE_X86_64 = 1
PID_MAX = 1 << 22
STOPPING = (0, 19, 20, 21, 22)  # absent, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU
ADDRESS_END = 0x7FFFFFFFF000
PAGE = 4096


def load(reader: ImageReader, snapshot: Snapshot) -> None:
    """Fill in ``snapshot`` from an image set. Raises ImageError naming file and field.

    Whatever happens, the pages files of the tasks that are in it by then are open, for the caller to close.
    """
    snapshot.inventory = reader.read_one("inventory")
    if snapshot.inventory.img_version != IMAGE_VERSION:
        version = snapshot.inventory.img_version
        raise ImageError("inventory.img", "img_version", f"{version} is not supported, {IMAGE_VERSION} is")
    if not snapshot.inventory.fdinfo_per_id:
        raise ImageError("inventory.img", "fdinfo_per_id", "sets of this age are not supported")
    entries = _load_tree(reader, snapshot)
    files = snapshot.files
    for entry in reader.files():
        number = entry.id
        files[number] = _joined(files[number], entry) if number in files else entry
    known = _Known()
    for task in snapshot.tasks.values():
        if task.alive:
            _load_task(reader, task, snapshot, known)
    pid_spaces.load(snapshot, entries, snapshot.inventory.root_ids if snapshot.inventory.HasField("root_ids") else None)
    if any(task.space != HOST_SPACE for task in snapshot.tasks.values()):
        from . import pid_settings  # few trees have any

        pid_settings.load(reader, snapshot)


def _joined(other: Message, entry: Message) -> Message:
    """The file_entry of an id; a /dev/net/tun has two, one as the file that was opened. Raises ImageError."""
    whole, plain = (entry, other) if entry.type == pb.fd_types.TUNF else (other, entry)
    if (whole.type, plain.type) != (pb.fd_types.TUNF, pb.fd_types.REG) or whole.tunf.HasField("file"):
        raise ImageError("files.img", f"id {entry.id}", "it is there twice")
    whole.tunf.file.CopyFrom(plain.reg)
    return whole


class _Known:
    """What tasks have in common: descriptor tables, images with the same bytes, checked layouts."""

    __slots__ = ("images", "spans", "tables")

    def __init__(self) -> None:
        self.tables: dict[int, list[tuple[int, int, bool]]] = {}
        self.images: dict[str, dict[bytes, Message]] = {"fs": {}, "mm": {}, "ids": {}}
        #: id of a mm_entry → (start, end) of its mappings
        self.spans: dict[int, list[tuple[int, int]]] = {}


def _load_tree(reader: ImageReader, snapshot: Snapshot) -> list[Message]:
    entries = reader.read_all("pstree", required=True)
    if not entries:
        raise ImageError("pstree.img", "", "there is no task in it")
    tids: set[int] = set()
    for index, entry in enumerate(entries):
        place = f"entry {index}"
        for name in ("pid", "pgid", "sid"):
            if not 0 <= getattr(entry, name) < PID_MAX or (name == "pid" and entry.pid == 0):
                raise ImageError("pstree.img", f"{place}: {name}", f"{getattr(entry, name)} is no process id")
        if entry.pid in snapshot.tasks or entry.pid in tids:
            raise ImageError("pstree.img", f"{place}: pid", f"{entry.pid} is there twice")
        task = RestoredTask(entry.pid, entry.pgid, entry.sid)
        if index == 0:
            snapshot.root = task
        else:
            parent = snapshot.tasks.get(entry.ppid)
            if parent is None:
                raise ImageError("pstree.img", f"{place}: ppid", f"{entry.ppid} is no earlier task")
            if parent.zombie:
                raise ImageError("pstree.img", f"{place}: ppid", f"task {entry.ppid} has ended, it has no children")
            task.parent = parent
            parent.children.append(task)
        snapshot.tasks[entry.pid] = task
        task.core = _core(reader, entry.pid)
        tids.add(entry.pid)
        if not task.core.HasField("tc"):
            raise ImageError(f"core-{entry.pid}.img", "tc", "it is missing")
        task.threads.append(RestoredThread(task, entry.pid, task.core))
        for tid in () if task.zombie else entry.threads:
            if tid == entry.pid:
                continue
            if tid in tids or tid in snapshot.tasks or not 0 < tid < PID_MAX:
                raise ImageError("pstree.img", f"{place}: threads", f"{tid} is no thread id or there twice")
            tids.add(tid)
            task.threads.append(RestoredThread(task, tid, _core(reader, tid)))
    return entries


def _core(reader: ImageReader, tid: int) -> Message:
    core = reader.read_one(f"core-{tid}")
    if core.mtype != MACHINE_X86_64:
        raise ImageError(f"core-{tid}.img", "mtype", f"machine {core.mtype} is not this one (x86-64)")
    return core


def _load_task(reader: ImageReader, task: RestoredTask, snapshot: Snapshot, known: _Known) -> None:
    for thread in task.threads:
        for field in ("thread_info", "thread_core"):
            if not thread.core.HasField(field):
                raise ImageError(thread.image, field, "it is missing")
    if task.stopped and task.core.tc.stop_signo not in STOPPING:
        raise ImageError(task.threads[0].image, "tc.stop_signo", f"{task.core.tc.stop_signo} does not stop a task")
    task.ids = reader.read_known(f"ids-{task.pid}", known.images["ids"])
    task.fs = reader.read_known(f"fs-{task.pid}", known.images["fs"])
    task.mm = reader.read_known(f"mm-{task.pid}", known.images["mm"])
    table, tables = task.ids.files_id, known.tables
    if table not in tables:
        # CRIU takes a missing one for an empty one, we always write it.
        if snapshot.inventory.HasField("torpor") and not reader.has(f"fdinfo-{table}"):
            raise ImageError(f"fdinfo-{table}.img", "", "missing")
        tables[table] = _load_fds(reader, table, snapshot)
    task.fds = tables[table]
    if id(task.mm) not in known.spans:
        _check_mappings(task)
        known.spans[id(task.mm)] = [
            (entry.start, entry.end) for entry in task.mm.vmas if not entry.status & 0x10004
        ]
    task.pages = Pages(reader, f"pagemap-{task.pid}")
    task.runs = list(task.pages.runs())
    _check_runs(task, known.spans[id(task.mm)])


def _load_fds(reader: ImageReader, table: int, snapshot: Snapshot) -> list[tuple[int, int, bool]]:
    found = [(entry.fd, entry.id, entry.flags & 1 == 1) for entry in reader.read_all(f"fdinfo-{table}")]
    seen: set[int] = set()
    files = snapshot.files
    for fd, file_id, _ in found:
        if fd in seen or not 0 <= fd < limits.FD_MAX:
            raise ImageError(f"fdinfo-{table}.img", f"entry {len(seen)}: fd", f"{fd} is there twice or out of range")
        if file_id not in files:
            raise ImageError(f"fdinfo-{table}.img", f"entry {len(seen)}: id", f"file {file_id} is not in files.img")
        seen.add(fd)
    return found


def _check_mappings(task: RestoredTask) -> None:
    end = 0
    for index, entry in enumerate(task.mm.vmas):
        if entry.status & 0x10004:  # guard regions and vsyscall stand outside of the order
            continue
        aligned = not (entry.start | entry.end) % PAGE
        if not aligned or not end <= entry.start < entry.end <= ADDRESS_END:
            where = f"{entry.start:#x}-{entry.end:#x}"
            raise ImageError(f"mm-{task.pid}.img", f"vmas {index}", f"{where} is out of order or range")
        if entry.fdflags > os.O_ACCMODE:
            raise ImageError(f"mm-{task.pid}.img", f"vmas {index}: fdflags", f"{entry.fdflags:#x} is no way to open")
        end = entry.end


def _check_runs(task: RestoredTask, spans: list[tuple[int, int]]) -> None:
    index = 0
    for address, count, _, fd, _, same_as in task.runs:
        end = address + count * PAGE
        if fd < 0 and not same_as:
            raise ImageError(f"pagemap-{task.pid}.img", f"page {address:#x}", "its content is not in the images")
        while address < end:
            while index < len(spans) and spans[index][1] <= address:
                index += 1
            if index == len(spans) or address < spans[index][0]:
                raise ImageError(f"pagemap-{task.pid}.img", f"page {address:#x}", "no mapping of the task holds it")
            address = spans[index][1]
