"""io_urings that belong to a thread, and the thread's own table of rings (IORING_REGISTER_RING_FDS).

A ring that a kernel thread polls is made by the main thread: that thread has the memory, the descriptors and the
credentials of its maker, so this comes after ``creds``. So is one with registered buffers. One with
IORING_SETUP_SINGLE_ISSUER was made disabled and belongs to whoever enables it; only that thread can bring its counters
to where they were (resources/uring_build.py).

Image: io_uring_entry, thread_core_entry.registered_ring. Kernel: io_uring/register.c, io_uring/tctx.c
"""

from __future__ import annotations

import struct

from ...errors import ImageError, Unsupported
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

REGISTER_RING_FDS, PLACES = 20, 16  # include/uapi/linux/io_uring.h, include/linux/io_uring_types.h


class ThreadRings(TaskResource):
    """The rings of one thread."""

    PER = "thread"
    ORDER = 91

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        rings = ctx.memo.get("io_urings")
        if rings is None:
            return
        for index, file in enumerate(rings.tables.get(thread.tid, ())):
            if not file:
                continue
            held = rings.all[file].holders if file in rings.all else []
            fd = next((fd for pid, fd in held if pid == thread.task.pid), -1)
            if fd < 0:
                raise Unsupported(
                    f"an io_uring is registered with thread {thread.tid} that its task has closed",
                    hint="keep the descriptor open",
                )
            core.thread_core.registered_ring.add(index=index, fd=fd)

    def check(self, core: Message, ctx: BuildContext) -> None:
        for one in core.thread_core.registered_ring:
            if one.index >= PLACES or one.fd >> 31:
                raise ImageError("core", "thread_core.registered_ring", f"{one.index}: fd {one.fd}")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = ctx.memo.get(("io_urings", thread.tid))
        if own:
            from ..uring_thread import emit

            emit(own, thread.task, program, ctx)
        for one in core.thread_core.registered_ring:
            update = struct.pack("<IIQ", one.index, 0, one.fd)
            program.call("io_uring_register", one.fd, REGISTER_RING_FDS, update, 1, why="the thread's table")


RESOURCE = ThreadRings()
