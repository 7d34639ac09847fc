"""Memory that is not there yet when its task begins to run: the restoring process's side of a pager (engine/pager.py).

The pager is forked before there is any stub, and knows by then what it is to bring in. When the stubs wait at their
first stop, it is given their userfaultfds; when they are let go, it is told so. If the restore fails or this process
dies before that, the pager just ends.
"""

from __future__ import annotations

import os
import signal

from .. import log
from ..errors import Unsupported
from ..linux import sockets
from ..linux.call import call
from ..proc.read import root
from . import journal, pager, paging
from .programs import others

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .fill import Fill
    from .pending import Piece

START_TIMEOUT_MS = 10_000


class Handle:
    """A pager that was started for a restore that is under way."""

    def __init__(
        self, spaces: list[tuple[list[Piece], list[tuple[int, int]]]], files: Sequence[int], *, lazy: bool
    ) -> None:
        """``spaces``: what each will have to bring in, and the mappings that it is in; ``files``: our descriptors of
        the pages files, by the numbers that pieces have. Raises KernelError.
        """
        self._control, theirs = sockets.socketpair(sockets.SOCK_SEQPACKET)
        try:
            self._child = os.fork()
            if self._child == 0:
                _leave(theirs, spaces, [(fd, os.fstat(fd).st_size) for fd in files], lazy=lazy)
        finally:
            os.close(theirs)

    def part(self) -> None:
        """See the process in between end, by which the pager becomes a child of init, or of the subreaper above us. To
        be called before we are one ourselves: we have no use for it.
        """
        if self._child:
            try:
                os.waitpid(self._child, 0)
            except ChildProcessError:
                pass  # whoever we run in does not want to hear of children
        self._child = 0

    def hand_over(self, userfaultfd: int, pid: int) -> None:
        """Give it the memory of the next task. Raises KernelError."""
        pidfd = os.pidfd_open(pid)
        try:
            pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                sockets.send(self._control, b"s", (userfaultfd, pidfd, pagemap_fd))
            finally:
                os.close(pagemap_fd)
        finally:
            os.close(pidfd)

    def await_ready(self) -> None:
        """Wait until it serves. Raises Unsupported."""
        if not paging.readable(self._control, START_TIMEOUT_MS) or os.read(self._control, 1) != paging.READY:
            raise Unsupported("the pager could not be started", hint="its log says why; without --map there is none")

    def release(self) -> None:
        """The tasks are let go: from now on it is on its own. Raises Unsupported when it is not there any more."""
        try:
            os.write(self._control, paging.RELEASE)
        except OSError:
            raise Unsupported("the pager and its guard have died", hint="its log says why") from None
        os.close(self._control)
        self._control = -1

    def end(self) -> None:
        """End it, unless it was released, and see it gone."""
        if self._control < 0:
            return
        self.part()
        sockets.shutdown(self._control, 1)
        while paging.readable(self._control, START_TIMEOUT_MS):
            try:
                if not os.read(self._control, 1):
                    break
            except ConnectionError:
                break
        os.close(self._control)
        self._control = -1


def start(fills: Sequence[Fill], *, lazy: bool) -> Handle:
    """Start a pager for what is left to it, in this order. Raises KernelError."""
    files = sorted({piece[0] for one in fills for piece in one.mapped})
    numbers = {fd: number for number, fd in enumerate(files)}
    spaces = [
        ([(start, start + size, numbers[fd], offset) for fd, start, size, offset in one.mapped], one.mapped_spans)
        for one in fills
    ]
    return Handle(spaces, files, lazy=lazy)


def _leave(
    control: int, spaces: list[tuple[list[Piece], list[tuple[int, int]]]], files: list[tuple[int, int]], *, lazy: bool
) -> None:
    """In a child of the restoring process: leave it and become a pager. Does not return."""
    status = 1
    try:
        if os.fork():
            status = 0
            return
        os.setsid()
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        listener = paging.listen(os.getpid())
        log_fd = log.keep_for_long()
        kept = [control, listener, root(), *(fd for fd, _ in files), *([log_fd] if log_fd >= 0 else [])]
        for first, last in others(kept):
            call("close_range", first, last, 0)
        while (null := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) < 3:
            pass  # the numbers of the standard ones are for nothing else
        os.close(null)
        os.chdir("/")
        book = journal.Journal((1, [], []))
        wanted = paging.Wanted(control, listener, spaces, lazy=lazy)
        status = pager.Pair(book, files, wanted).run_pager()
    except BaseException as error:
        log.error(f"pager: {error!r}")
    finally:
        os._exit(status)
