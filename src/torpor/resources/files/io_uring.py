"""io_uring: rings that requests for I/O are submitted and completed by.

Image: file_entry.uring (io_uring_entry, ours: CRIU refuses them). Kernel: io_uring/io_uring.c. The rings' memory is
part of the entry, not of the task's pages; resources/memory/io_uring.py has the mappings, resources/uring.py says what
is refused, resources/uring_build.py how a ring is made again.
"""

from __future__ import annotations

import os
import time

from ...errors import Unsupported
from ...images import schema as pb
from ..base import FileResource, unsupported
from . import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile
    from ..uring import Ring, Rings

CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE = 1, 6


class IoUring(FileResource):
    """A ring. Some are made by the task, see resources/task/io_uring.py."""

    FD_TYPE, FIELD = 1000, "uring"
    LINKS = ("anon_inode:[io_uring]",)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        from ..uring import Rings  # few programs need it

        try:
            rings = Rings.of(ctx)
            ring = rings.ring(source.pid, source.fd)
            rings.check(ring)
            waiting = rings.in_the_way(ring)
        except Unsupported as error:
            raise unsupported(source, error.what, hint=error.hint) from None
        if waiting:
            raise unsupported(
                source,
                f"requests are under way that may never end and cannot be made again: {', '.join(waiting)}",
                hint="have the program cancel them before the dump",
            )

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        from ..uring import Rings

        try:
            rings = Rings.of(ctx)
            ring = rings.ring(source.pid, source.fd)
            rings.require_rest()
            rings.check(ring, tids=[thread.tid for task in ctx.tasks.values() for thread in task.threads])
        except Unsupported as error:
            raise unsupported(source, error.what, hint=error.hint) from None
        return _entry(source, rings, ring, ctx)

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        from ...linux import io_uring
        from .. import uring_build

        with uring_build.context(entry):
            uring_build.check(entry)
            if entry.request:
                ctx.memo.setdefault("io_uring requests", [])  # by then each has found its task
            if uring_build.made_by_task(entry):
                return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # keeps the number until the task makes it
            fd = uring_build.make(entry, ctx)
            if entry.setup & io_uring.SINGLE_ISSUER and not entry.setup & io_uring.R_DISABLED:
                hooks = ctx.memo.setdefault("after_restore", [])
                hooks.append(lambda: uring_build.finish(ctx.built[entry.id], entry))
            elif entry.setup & io_uring.SINGLE_ISSUER:
                uring_build.finish(fd, entry)
            return fd

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        from ..uring_build import made_by_task
        from ..uring_emit import emit_buffers

        if not made_by_task(entry):
            emit_buffers(entry, fd, program)

    def settle_each(self, entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext) -> None:
        """Rings that belong to a thread get ready in that thread's program."""
        from ...linux.io_uring import SINGLE_ISSUER
        from ..uring_build import has_more, made_by_task

        tids = [thread.tid for thread in task.threads]
        if any(one.thread in tids for one in entry.request):
            ctx.memo.setdefault("io_uring requests", []).append((task.pid, fd, entry))
        by_task = made_by_task(entry)
        if not by_task and not entry.setup & SINGLE_ISSUER:
            return
        tid = task.pid if by_task or not entry.submitter else entry.submitter
        if tid not in tids:
            raise Unsupported(f"fd {fd} (io_uring): thread {tid}, which alone may use it, is not one of its task's")
        cloexec = next(flag for number, _, flag in task.fds if number == fd)
        ctx.memo.setdefault(("io_urings", tid), {})[fd] = entry, cloexec
        if has_more(entry):
            ctx.memo.setdefault("io_uring completions", []).append((fd, entry, task, tid))
        ctx.memo.setdefault(("late fds", program.name), {})[fd] = []  # epoll watches it when it is there


# --------------------------------------------------------------------------------------------- dump


def _entry(source: SourceFile, rings: Rings, ring: Ring, ctx: DumpContext) -> Message:
    from ...linux.io_uring import SQPOLL
    from ..uring_build import word

    state, memory = ring.state, ring.map()
    numbers = state.numbers
    entry = pb.io_uring_entry(
        id=source.id, flags=source.flags, setup=state.flags, sq_entries=numbers["sq_entries"],
        cq_entries=numbers["cq_entries"], sq_head=numbers["sq_head"], cq_tail=numbers["cq_tail"],
        offsets=ring.layout.offsets, rings=bytes(memory.ring).rstrip(b"\0"), sqes=bytes(memory.sqes).rstrip(b"\0"),
    )  # fmt: skip
    for spot in ring.spots or ():
        entry.memory.add(id=memfd.file_id_for(ctx, spot.link, flags=os.O_RDWR), offset=spot.offset)
    waiting = entry.cq_tail - word(entry, "cq head")
    if not 0 <= waiting <= entry.cq_entries:
        raise unsupported(source, "the program has put the head of its completions where it cannot be")
    if state.submitter:
        threads = (thread for task in ctx.tasks.values() for thread in task.threads)
        entry.submitter = next(thread.vtid for thread in threads if thread.tid == state.submitter)
    if state.flags & SQPOLL:
        _add_polling(entry, ring, ctx)
    _add_requests(entry, rings, ring, source, ctx)
    files, eventfds = rings.open_files(), rings.eventfds() if state.eventfd else {}
    for file, tag in state.files:
        entry.file.add(id=_file_id(files[file], source, ctx) if file else 0, tag=tag)
    for address, length, tag in state.buffers:
        entry.buffer.add(address=address, length=length, tag=tag)
    for user_data, res, flags in ring.overflow():
        entry.overflow.add(user_data=user_data, res=res, flags=flags)
    if state.eventfd:
        entry.eventfd = _file_id(eventfds[state.eventfd], source, ctx)
        entry.eventfd_async = state.eventfd_async
    if numbers["clockid"] != CLOCK_MONOTONIC:
        entry.clockid = numbers["clockid"]
    if numbers["bounded"] or numbers["unbounded"]:
        entry.max_workers.extend((numbers["bounded"], numbers["unbounded"]))
    span = numbers["alloc_start"], numbers["alloc_end"]
    if state.files and span != (0, len(state.files)):
        entry.alloc_range.extend((span[0], span[1] - span[0]))
    return entry


def _add_polling(entry: Message, ring: Ring, ctx: DumpContext) -> None:
    from ...linux.io_uring import SQ_AFF

    state = ring.state
    second = round(1 / time.clock_getres(CLOCK_MONOTONIC_COARSE))  # jiffies
    entry.idle_ms = state.numbers["idle"] * 1000 // second
    if state.flags & SQ_AFF:
        entry.sq_cpu = state.sq_cpu
    leaders = ctx.memo.setdefault("io_uring threads", {})
    leader = leaders.setdefault(state.numbers["sq_data"], entry.id)
    if leader != entry.id:
        entry.polled_as = leader


def _add_requests(entry: Message, rings: Rings, ring: Ring, source: SourceFile, ctx: DumpContext) -> None:
    threads = {thread.tid: thread for task in ctx.tasks.values() for thread in task.threads}
    for tid, request in ring.requests:
        thread = threads[tid]
        if not rings.is_mapped(ring, thread.task):  # the entries are written there
            raise unsupported(
                source, f"a request waits ({request.name}), and task {thread.task.pid} has unmapped the ring"
            )
        if thread.task.stopped:
            raise unsupported(
                source, f"a request waits ({request.name}), and task {thread.task.pid} is stopped", hint="SIGCONT"
            )
        for one in (request, request.behind):
            if one is not None:
                entry.request.add(thread=thread.vtid, sqe=one.sqe, time_ns=one.time_ns)


def _file_id(holder: tuple[int, int], source: SourceFile, ctx: DumpContext) -> int:
    """The id of a file that a task of the tree has open."""
    pid, fd = holder
    return ctx.file_id(ctx.borrow(ctx.tasks[pid], fd), source)


RESOURCE = IoUring()
