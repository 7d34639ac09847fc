"""System V shared memory that tasks have attached.

Image: vma_entry with ANON_SHARED and SYSVIPC, ``shmid`` is the segment's identifier; ipc_shm_entry
in ipcns-shm-N for the segment, N being the number of its IPC namespace, and its content in
pagemap-shmem-ID. Kernel: ipc/shm.c

In the host's IPC namespace a segment outlives the tasks. If the very same one (identifier, key,
size) is there at a restore it is used: with the content that it has if somebody is attached,
filled anew if not. Otherwise it is made, with the identifier that it had
(/proc/sys/kernel/shm_next_id).
"""

from __future__ import annotations

import os

from ...errors import ImageError, KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux.call import buffer, call, try_call
from ...proc import maps, sysvipc
from ...proc.read import read
from .. import ipc_space, sysv_ipc
from ..base import (
    MAP_ANONYMOUS,
    VMA_ANON_SHARED,
    VMA_REGULAR,
    VMA_SYSVIPC,
    MappingResource,
)
from ..files import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

IPC_CREAT, IPC_EXCL, IPC_RMID, IPC_SET, IPC_STAT, SHM_LOCK = 0o1000, 0o2000, 0, 1, 2, 11
SHM_RDONLY, SHM_REMAP, SHM_EXEC, SHM_HUGETLB = 0o10000, 0o40000, 0o100000, 0o4000
SHM_DEST, SHM_LOCKED = 0o1000, 0o2000  # in the mode
HUGE_SHIFT = 26
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
PAGE = 4096
PUNCH_HOLE_KEEP_SIZE = 3
NEXT_ID = "/proc/sys/kernel/shm_next_id"
_TRIES = 20


class SysvShared(MappingResource):
    """An attached segment, or a part of one."""

    KINDS = (maps.SYSV,)
    STATUS = VMA_SYSVIPC
    PRIVATE_PAGES = False

    def check(self, mapping: Any, pid: int, ctx: DumpContext) -> None:
        ipc_space.within(ctx, lambda: _find(mapping.vma.inode))

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        vma = mapping.vma
        entry.status = VMA_REGULAR | VMA_ANON_SHARED | VMA_SYSVIPC
        entry.flags |= MAP_ANONYMOUS
        entry.shmid = vma.inode
        # One that was attached for reading only may never be made writable.
        entry.fdflags = os.O_RDWR if "mw" in mapping.flags else os.O_RDONLY
        key = ("sysv shm", vma.inode)
        if key not in ctx.memo:
            ctx.memo[key] = True
            with doing(f"System V shared memory {vma.inode}"):
                row = ipc_space.within(ctx, lambda: _find(vma.inode))
                _write_segment(row, f"/proc/{task.pid}/map_files/{vma.start:x}-{vma.end:x}", ctx)

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        return False

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        _prepare(entry.shmid, ctx)

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        size: int = ctx.memo["sysv shm", entry.shmid]
        base = entry.start - entry.pgoff
        parts = [
            other
            for other in ctx.memo["mm"].vmas
            if other.status & VMA_SYSVIPC and other.shmid == entry.shmid and other.start - other.pgoff == base
        ]
        granted = _granted(parts)
        if entry.start == parts[0].start:
            end = base + _whole_pages(size)
            holes = _holes(base, end, parts)
            _check_holes(holes, base, entry.start, ctx)
            flags = SHM_REMAP | (0 if granted & PROT_WRITE else SHM_RDONLY)
            flags |= SHM_EXEC if granted & PROT_EXEC else 0
            program.call("shmat", entry.shmid, base, flags, why="attach")
            for low, high in holes:
                program.call("munmap", low, high - low, why="a part that the task had unmapped")
        if prot != granted:
            program.call("mprotect", entry.start, entry.end - entry.start, prot)


def _granted(parts: list[Message]) -> int:
    """The protection with which the segment is attached: what any part of it needs."""
    writable = any(part.fdflags == os.O_RDWR if part.HasField("fdflags") else part.prot & PROT_WRITE for part in parts)
    executable = any(part.prot & PROT_EXEC for part in parts)
    return PROT_READ | (PROT_WRITE if writable else 0) | (PROT_EXEC if executable else 0)


def _holes(base: int, end: int, parts: list[Message]) -> list[tuple[int, int]]:
    """The parts of [base, end) that the task had unmapped, or mapped something else over."""
    found: list[tuple[int, int]] = []
    for part in parts:
        if part.start > base:
            found.append((base, part.start))
        base = part.end
    if base > end:
        raise ImageError("mm", f"mapping {parts[-1].start:x}", "it reaches beyond the end of its segment")
    return [*found, (base, end)] if base < end else found


def _check_holes(holes: list[tuple[int, int]], base: int, first: int, ctx: BuildContext) -> None:
    """A segment is attached whole. What lies higher is mapped over it later on; not so what lies
    lower.
    """
    if not holes:
        return
    what = "the task had unmapped a part of the segment, and"
    arena = ctx.memo.get("arena")
    if arena is None or any(low < arena[1] and arena[0] < high for low, high in holes):
        raise Unsupported(f"{what} the gap is needed for the restore itself")
    below = [vma for vma in ctx.memo["mm"].vmas if vma.start < first and base < vma.end]
    if base < 0 or below:
        raise Unsupported(f"{what} something else is mapped in front of what was left of it")


def _whole_pages(size: int) -> int:
    return (size + PAGE - 1) & -PAGE


def _find(shmid: int) -> sysvipc.Shm:
    found = next((row for row in sysv_ipc.segments() if row.shmid == shmid), None)
    if found is None:
        raise Unsupported(f"System V shared memory {shmid} is of another IPC namespace")
    return found


# -------------------------------------------------------------------------------------------- dump


def write_rest(rows: Iterable[sysvipc.Shm], ctx: DumpContext) -> None:
    """Write those of the segments that no task has attached. We are in their IPC namespace."""
    for row in rows:
        if ("sysv shm", row.shmid) not in ctx.memo:
            with doing(f"System V shared memory {row.shmid}"), _Attached(row.shmid) as link:
                _write_segment(row, link, ctx)


def _write_segment(row: sysvipc.Shm, link: str, ctx: DumpContext) -> None:
    shmid = row.shmid
    entry = pb.ipc_shm_entry(size=row.size, in_pagemaps=True)
    entry.desc.CopyFrom(sysv_ipc.desc_of(row, shmid))
    # The link leads to the file behind the segment, which is read without being attached.
    fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_blksize > PAGE:
            entry.hugetlb_flag = SHM_HUGETLB | (status.st_blksize.bit_length() - 1) << HUGE_SHIFT
        ctx.images.append(f"ipcns-shm-{sysv_ipc.HOST_IPC}", entry)
        memfd.write_content(ctx, fd, shmid, _whole_pages(max(row.size, status.st_size)))
    finally:
        os.close(fd)


# ----------------------------------------------------------------------------------------- restore


def _segments(ctx: BuildContext) -> dict[int, Message]:
    """All segments of the images by identifier."""
    found: dict[int, Message] = {}
    for name in ctx.images.names():
        if name.startswith("ipcns-shm-"):
            for entry, _ in ctx.images.iter_with_payload(name):
                found[entry.desc.id] = entry
    return found


def prepare_rest(ctx: BuildContext) -> None:
    """See to it that the segments exist that no task has attached. What is there is left as it is."""
    there = {row.shmid for row in sysv_ipc.segments()}
    for shmid in ctx.once(("sysv shm", "all"), lambda: _segments(ctx)):
        if shmid not in there:
            _prepare(shmid, ctx)


def _prepare(shmid: int, ctx: BuildContext) -> None:
    def make() -> int:
        with doing(f"System V shared memory {shmid}"):
            return _segment(shmid, ctx)

    ctx.once(("sysv shm", shmid), make)


def _segment(shmid: int, ctx: BuildContext) -> int:
    """See to it that the segment exists; its size in bytes."""
    entry = ctx.once(("sysv shm", "all"), lambda: _segments(ctx)).get(shmid)
    if entry is None:
        raise ImageError(f"ipcns-shm-{sysv_ipc.HOST_IPC}.img", "", f"segment {shmid} is mapped and not there")
    if not entry.in_pagemaps:
        raise Unsupported("its content is stored in the form of CRIU before 3.14")
    rows = sysv_ipc.segments()
    present = next((row for row in rows if row.shmid == shmid), None)
    size: int = entry.size
    if present is not None:
        if (present.key & 0xFFFFFFFF, present.size) != (entry.desc.key, size):
            raise Unsupported(
                f"another segment has this identifier (key {present.key:#x}, {present.size} bytes)",
                hint=f"remove it if nobody needs it: ipcrm -m {shmid}",
            )
        if present.nattch == 0:
            _fill(shmid, size, ctx, empty_first=True)
        return size
    key = entry.desc.key
    if key and any(row.key & 0xFFFFFFFF == key for row in rows):
        raise Unsupported(f"another segment has its key {key:#x}", hint=f"remove it: ipcrm -M {key:#x}")
    _create(entry)
    ctx.on_failure.add(f"remove segment {shmid}", lambda: call("shmctl", shmid, IPC_RMID, None))
    _set_owner(entry.desc)
    if entry.desc.mode & SHM_LOCKED:
        call("shmctl", shmid, SHM_LOCK, None)
    _fill(shmid, size, ctx, empty_first=False)
    if entry.desc.mode & SHM_DEST:  # removed already: it lasts as long as somebody is attached
        ctx.memo.setdefault("after_mappings", []).append(
            lambda: ipc_space.within(ctx, lambda: call("shmctl", shmid, IPC_RMID, None))
        )
    return size


def _create(entry: Message) -> None:
    desc = entry.desc
    flags = IPC_CREAT | IPC_EXCL | desc.mode & 0o777 | entry.hugetlb_flag
    key = sysv_ipc.signed(desc.key)
    for _ in range(_TRIES):
        with open(NEXT_ID, "w") as file:
            file.write(str(desc.id))
        number = sysv_ipc.as_creator(desc.cuid, desc.cgid, "shmget", key, entry.size, flags)
        if number == desc.id:
            return
        # Somebody else's shmget(2) came in between, or the slot is occupied.
        call("shmctl", number, IPC_RMID, None)
    raise Unsupported("its identifier cannot be had", hint="another segment may be in its slot: ipcs -m")


def _set_owner(desc: Message) -> None:
    area = buffer(sysv_ipc.STAT_BYTES)
    call("shmctl", desc.id, IPC_STAT, area)
    sysv_ipc.pack_owner(area, desc)
    call("shmctl", desc.id, IPC_SET, area)


def _fill(shmid: int, size: int, ctx: BuildContext, *, empty_first: bool) -> None:
    """Write the content."""
    with _Attached(shmid) as link:
        fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
        try:
            whole = _whole_pages(size)
            if empty_first:
                call("fallocate", fd, PUNCH_HOLE_KEEP_SIZE, 0, whole)
            memfd.read_content(ctx, fd, shmid, whole)
        finally:
            os.close(fd)


class _Attached:
    """A context in which a segment is attached here; gives the link by which the file behind it can be opened."""

    __slots__ = ("_address", "_shmid")

    def __init__(self, shmid: int) -> None:
        self._shmid = shmid

    def __enter__(self) -> str:
        self._address = try_call("shmat", self._shmid, None, 0)
        if -4096 < self._address < 0:
            raise KernelError("shmat", -self._address)
        try:
            vma = next(vma for vma in maps.parse(read(os.getpid(), "maps")) if vma.start == self._address)
        except BaseException:
            self.__exit__()
            raise
        return f"/proc/{os.getpid()}/map_files/{vma.start:x}-{vma.end:x}"

    def __exit__(self, *error: object) -> None:
        try_call("shmdt", self._address)


RESOURCE = SysvShared()
