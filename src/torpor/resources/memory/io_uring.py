"""The mapped memory of an io_uring: its rings and its submission entries.

Image: vma_entry with our own IO_URING in its status, shmid is the id of the file, pgoff says which part of it. What is
in there is part of the file's entry. Kernel: io_uring/memmap.c
"""

from __future__ import annotations

from ...errors import ImageError, Unsupported
from ...proc import maps
from ..base import MAP_FIXED, MAP_SHARED, MappingResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext
    from ..uring import Ring

VMA_IO_URING = 0x1000000
PARTS = (0, 0x8000000, 0x10000000)  # IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES


class UringMapping(MappingResource):
    """A mapping of a ring's descriptor."""

    KINDS = (maps.ANON_INODE,)
    STATUS = VMA_IO_URING
    FIRST = True
    PRIVATE_PAGES = False

    def claims(self, mapping: Any) -> bool:
        return bool(mapping.vma.path == b"anon_inode:[io_uring]")

    def check(self, mapping: Any, pid: int, ctx: DumpContext) -> None:
        try:
            _ring(mapping.vma, pid, ctx)
        except Unsupported as error:
            vma = mapping.vma
            raise Unsupported(f"mapping {vma.start:x}-{vma.end:x}: {error.what}", hint=error.hint) from None

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        ring = _ring(mapping.vma, task.pid, ctx)
        pid, fd = ring.holders[0]
        entry.shmid = ctx.file_id(ctx.borrow(ctx.tasks[pid], fd), _Holder(pid))  # type: ignore[arg-type]
        entry.status = VMA_IO_URING
        entry.flags = MAP_SHARED

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        return False

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        resource, _ = ctx.files.get(entry.shmid, (None, None))
        if getattr(resource, "FIELD", "") != "uring" or entry.pgoff not in PARTS:
            place = f"mapping {entry.start:x}-{entry.end:x}"
            raise ImageError("mm", place, f"file {entry.shmid} at {entry.pgoff:#x} is no part of an io_uring")
        ctx.build(entry.shmid)
        ctx.memo.setdefault(("io_uring mappings", entry.shmid), {})[entry.start] = entry

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        from .. import uring_build
        from ..uring_emit import RESERVED, emit_mapping

        _, ring = ctx.files[entry.shmid]
        if uring_build.made_by_task(ring):
            size = entry.end - entry.start
            program.call("mmap", entry.start, size, 0, RESERVED | MAP_FIXED, -1, 0, why="place of an io_uring")
        else:
            emit_mapping(entry, ctx.built[entry.shmid], prot, ctx.memo["occupied"], program)


class _Holder:
    """Who has the ring, as DumpContext.file_id() wants to know it."""

    def __init__(self, pid: int) -> None:
        self.holder = pid


def _ring(vma: Any, pid: int, ctx: DumpContext) -> Ring:
    from ...linux import io_uring
    from ..uring import Rings

    rings = Rings.of(ctx)
    if vma.pgoff not in PARTS:
        raise Unsupported(f"a part of an io_uring ({vma.pgoff:#x}) that is not supported")
    ring = rings.mapped_at(pid, vma.start)
    holders = [holder for holder, _ in ring.holders]
    bound = ring.state.flags & (io_uring.SQPOLL | io_uring.SINGLE_ISSUER)
    if (bound or any(length for _, length, _ in ring.state.buffers)) and pid not in holders:
        raise Unsupported(
            f"an io_uring that belongs to task {holders[0]} alone",
            hint="MADV_DONTFORK keeps it from being inherited",
        )
    return ring


RESOURCE = UringMapping()
