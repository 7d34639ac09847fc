"""Who takes back what a dump did to connections if it is killed half way: nothing that runs on may stay mute."""

from __future__ import annotations

import os
import select
import signal

from ..linux.call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Guard:
    """A child of ours that waits for our end. ``let_go()`` is called in it if tasks (``pidfds``) live on then.

    It has only the descriptors in ``fds`` and its own. If the tasks are dead nothing is done: their connections are
    held back until the restore.
    """

    __slots__ = ("_pid", "_pipe")

    def __init__(self, pidfds: Iterable[int], fds: Iterable[int], let_go: Callable[[], object]) -> None:
        reading, self._pipe = os.pipe()
        pidfds = list(pidfds)
        self._pid = os.fork()
        if self._pid:
            os.close(reading)
            return
        try:
            _wait(reading, pidfds, {reading, *pidfds, *fds}, let_go)
        finally:
            os._exit(0)

    def dismiss(self) -> None:
        """It is not needed any more: all is taken back, or the tasks are dead."""
        try:
            os.write(self._pipe, b"done")
            os.close(self._pipe)
            os.waitpid(self._pid, 0)
        except (ChildProcessError, BrokenPipeError):
            pass  # somebody has ended it, or waited for it


def _wait(reading: int, pidfds: list[int], keep: set[int], let_go: Callable[[], object]) -> None:
    os.setsid()  # what is meant for us is not for it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    first = 0
    for fd in sorted(keep):
        if fd > first:
            call("close_range", first, fd - 1, 0)
        first = fd + 1
    call("close_range", first, 0xFFFFFFFF, 0)
    if os.read(reading, 8):
        return
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    ended = poll.poll(100)
    if len(ended) < len(pidfds):
        let_go()
