"""Bringing the io_urings of a stopped tree to rest: nothing is under way but what waits and can be made again.

The tree stands still, but what it has asked for goes on: disk I/O ends, kernel threads take entries. What has ended is
posted by the thread that asked, on its way back from the kernel, so the thread is made to go there: it asks for
completions and waits for none. That is what its own next call would do.
"""

from __future__ import annotations

import errno
import time

from .. import log
from ..errors import Unsupported
from ..proc import maps as proc_maps
from ..remote.program import Program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..model.source import SourceTask, SourceThread
    from ..remote.guest import Guest
    from ..resources.base import DumpContext
    from ..resources.uring import Rings

LINK = b"anon_inode:[io_uring]"
WAIT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0005, 0.05
TOLERATED = (errno.EINTR, errno.EBUSY, errno.EAGAIN, errno.EEXIST, errno.ENXIO)


def look(tasks: dict[int, SourceTask], ctx: DumpContext) -> None:
    """Find out what the getters are asked about rings."""
    if any(_has_ring(task) for task in tasks.values() if not task.zombie):
        from ..resources.uring import Rings  # few programs need it

        Rings.of(ctx).busy()


def require_stillness(ctx: DumpContext) -> None:
    """Raise Unsupported if a request has gone on since the rings were brought to rest."""
    rings: Rings | None = ctx.memo.get("io_urings")
    if rings is None or not rings.at_rest:
        return
    for ring, before, now in zip(rings.all.values(), rings.counts_at_rest, rings.counts(), strict=True):
        if now != before:
            pid, fd = ring.holders[0]
            raise Unsupported(
                f"task {pid}: fd {fd} (io_uring): requests went on while it was being dumped", hint="please report this"
            )


def await_end(ctx: DumpContext) -> None:
    """The tree has been killed: wait until what it had asked for has let go of its files, for a second at most."""
    rings: Rings | None = ctx.memo.get("io_urings")
    if rings is None:
        return
    deadline = time.monotonic() + 1.0
    for ring in rings.all.values():
        while ring.requests and rings.kernel.waiting(ring.state) and time.monotonic() < deadline:
            time.sleep(FIRST_PAUSE_S)


def bring_to_rest(tasks: dict[int, SourceTask], ctx: DumpContext, guest_of: Callable[[SourceTask], Guest]) -> None:
    """Wait until no request of the tree does more than wait. Raises Unsupported, naming those that do, after 5 seconds.
    """
    alive = [task for task in tasks.values() if not task.zombie]
    if not any(_has_ring(task) for task in alive):
        return
    from ..resources.uring import Rings  # few programs need it

    rings = Rings.of(ctx)
    threads = {thread.tid: thread for task in alive for thread in task.threads}
    started, pause_s = time.monotonic(), FIRST_PAUSE_S
    while busy := rings.busy():
        for tid in {tid for _, counts in busy for tid in counts}:
            if tid in threads:
                _ask(rings, threads[tid], guest_of)
        if not (busy := rings.busy()):
            break
        if time.monotonic() - started > WAIT_S:
            raise Unsupported(
                f"requests are under way that do not end: {rings.explain_busy(busy)}",
                hint="have the program cancel them before the dump",
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    rings.read_again()
    rings.note_rest()
    log.info(f"io_uring: {len(rings.all)} rings at rest after {(time.monotonic() - started) * 1e3:.1f} ms")


def _has_ring(task: SourceTask) -> bool:
    return any(one.vma.kind == proc_maps.ANON_INODE and one.vma.path == LINK for one in task.mappings)


def _ask(rings: Rings, thread: SourceThread, guest_of: Callable[[SourceTask], Guest]) -> None:
    """Have a thread collect what has ended of its requests."""
    from ..linux import io_uring

    program = Program("rest")
    for ring in rings.all.values():
        held = [fd for pid, fd in ring.holders if pid == thread.task.pid]
        if held and not ring.state.flags & io_uring.R_DISABLED:
            program.call("io_uring_enter", held[0], 0, 0, io_uring.ENTER_GETEVENTS, 0, 0, may_fail=TOLERATED)
    guest = guest_of(thread.task)
    try:
        guest.run(thread.tid, thread.own_tid, program, thread.regs, thread.sigmask)
    finally:
        guest.leave()
