"""Which pages of another task are written from a moment on, by asynchronous write protection.

The task is stopped, makes a userfaultfd, which we take, and closes it: a userfaultfd serves the memory of whoever made
it. When we close ours, or die, the kernel forgets everything about it. To write to a page for the first time costs the
task a fault of about a microsecond, and splits a huge page.

What the kernel writes to pages that are pinned (requests of io_uring and AIO that are under way) is not seen: whoever
tracks has to see to it that there are none. Kernel: fs/userfaultfd.c; fs/proc/task_mmu.c, pagemap_scan_pmd_entry()
"""

from __future__ import annotations

import os

from .. import log
from ..errors import Unsupported
from ..linux import kernel, userfault
from ..remote.program import Program
from .spans import joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import FileIO

    from ..model.source import SourceTask
    from ..remote.guest import Guest
    from ..remote.program import Run


class Tracker:
    """Watches parts of the address space of one task; close() ends it."""

    def __init__(self, pid: int, userfaultfd: int) -> None:
        self._pid = pid
        self._userfaultfd = userfaultfd

    def protect(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """From now on watch the mappings ``spans``; returns the runs of pages in them that are there. The task must be
        stopped. A mapping that cannot be watched is left out.
        """
        with self._pagemap() as pagemap:
            return joined(run for start, end in spans for run in self._protect(pagemap.fileno(), start, end))

    def _protect(self, pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
        try:
            userfault.register(self._userfaultfd, start, end, userfault.REGISTER_MODE_WP)
            regions = kernel.present_pages(
                pagemap, start, end, also=kernel.PM_GUARD,
                flags=kernel.PM_SCAN_WP_MATCHING | kernel.PM_SCAN_CHECK_WPASYNC,
            )  # fmt: skip
        except OSError as error:
            log.debug(f"tracking: {start:x}-{end:x}: {error}")
            return []
        return [(low, high) for low, high, what in regions if not what & kernel.PM_GUARD]

    def written(self, start: int, end: int) -> list[tuple[int, int]]:
        """The runs of pages between that may have been written since, those in mappings that are not watched (any more)
        among them.
        """
        with self._pagemap() as pagemap:
            regions = kernel.pagemap_scan(
                pagemap.fileno(), start, end, mask=kernel.PM_WRITTEN, anyof=kernel.PM_PRESENT | kernel.PM_SWAPPED,
                wanted=kernel.PM_WRITTEN,
            )  # fmt: skip
        return [(low, high) for low, high, _ in regions]

    def _pagemap(self) -> FileIO:
        """Opened anew each time: an open one stays with the address space that the task had, before an execve(2)."""
        return open(f"/proc/{self._pid}/pagemap", "rb", buffering=0)

    def close(self) -> None:
        """Stop watching: the task's memory is as if nobody ever had."""
        os.close(self._userfaultfd)


def start(task: SourceTask, guest: Guest) -> Tracker | None:
    """Make a tracker of a stopped task; None where the kernel does not let the task have one. Raises TorporError and
    OSError when the task has to be let go first.
    """
    main = task.threads[0]
    program = Program("tracker")
    made = program.call("userfaultfd", userfault.FLAGS | userfault.USER_MODE_ONLY)
    guest.pause(main.own_tid, program)
    program.call("close", made)
    taken: list[int] = []

    def take(run: Run) -> None:
        taken.append(kernel.pidfd_getfd(task.pidfd, run.result(made)))

    try:
        guest.run(main.tid, main.own_tid, program, main.regs, main.sigmask, take)
        userfault.start(taken[0], userfault.FEATURE_WP_ASYNC)
        return Tracker(task.pid, taken.pop())
    except (OSError, Unsupported) as error:
        if guest.unclean:  # it has still to find its way back: nobody may dump it meanwhile
            raise
        log.info(f"task {task.pid}: what it writes cannot be watched: {error}")
        return None
    finally:
        for fd in taken:
            os.close(fd)
