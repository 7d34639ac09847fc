"""A mount namespace for one copy, made before the copy: some directories lie under overlays in it. An IPC namespace may
come with it.

What a copy has open is opened by us. So that it is opened through the overlays, a thread of ours enters the namespace
for as long as it takes; the thread ends with that, since it cannot come back to what it shares with our others
(setns(2) wants a root and working directory of its own). Whoever is born for the copy enters the namespace as the
first thing it does, and keeps it. Nothing of it has to be removed: the namespace ends with the last process in it, an
overlay with its namespace, and the tmpfs that holds what was written with the overlay.
"""

from __future__ import annotations

import errno
import os
import signal

from ..errors import KernelError
from ..linux import mounts
from ..remote import stub
from ..resources import ipc_space
from ..undo import Undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from ..remote.program import Program
    from ..resources.base import BuildContext

    T = TypeVar("T")

_SIGNALS = [int(number) for number in signal.valid_signals()]


class Annex:
    """The namespace. ``fd`` and ``root_fd``: descriptors of ours for it and for our root in it; ``ipc_fd``: for the IPC
    namespace, -1 if that is ours.
    """

    def __init__(self, ctx: BuildContext, furnish: Callable[[], None], *, ipc: bool = False) -> None:
        """``furnish()`` is called in it; ``ipc``: in an IPC namespace as well. Raises KernelError and what that raises.
        It is closed by ``ctx.undo``; whoever is in the namespaces by then stays there.
        """
        self.ctx = ctx
        self.fd = self.root_fd = self.ipc_fd = -1
        ctx.undo.add("mount namespace of the copy", self._close)

        def found() -> None:
            self.fd, self.root_fd = mounts.unshare()
            if ipc:
                self.ipc_fd = ipc_space.unshare()
                ctx.memo["ipc space"] = ipc_space.IpcSpace(self.ipc_fd)
            furnish()

        self._in_thread(found)
        ctx.memo["annex"] = self

    def _close(self) -> None:
        for fd in (self.fd, self.root_fd, self.ipc_fd):
            if fd >= 0:
                os.close(fd)
        self.ctx.memo.pop("annex", None)
        self.ctx.memo.pop("ipc space", None)

    def run(self, action: Callable[[], T]) -> T:
        """What ``action()`` gives or raises when a thread in the namespace calls it."""

        def inside() -> T:
            mounts.enter(self.fd, self.root_fd)
            if self.ipc_fd >= 0:
                ipc_space.enter(self.ipc_fd)
            return action()

        return self._in_thread(inside)

    def build(self, action: Callable[[], T]) -> T:
        """As :meth:`run`, for what makes things of the copy: what it leaves to be taken back after a failure is taken
        back in the namespace as well, as names mean something else outside.
        """
        outside, self.ctx.on_failure = self.ctx.on_failure, Undo()
        inside = self.ctx.on_failure
        outside.add("what was made under overlays", lambda: self.run(inside.roll_back))
        try:
            return self.run(action)
        except KernelError as error:
            if error.errno == errno.ENOSPC and not error.hint:
                error.hint = "files that are open for writing are copied first: --overlay-size or --overlay-upper"
            raise
        finally:
            self.ctx.on_failure = outside

    @staticmethod
    def _in_thread(action: Callable[[], T]) -> T:
        import threading

        results: list[T] = []
        failures: list[BaseException] = []

        def work() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                results.append(action())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, name="torpor-annex", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise KernelError("a thread in the mount namespace of the copy", errno.EAGAIN) from None
        interruption: BaseException | None = None
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:  # by a signal: what is half done has to be done first
                interruption = error
        if interruption is not None:
            raise interruption
        if failures:
            raise failures[0]
        return results[0]

    def emit(self, program: Program, *, own_pids: bool = True) -> None:
        """Emit what whoever is born for the copy does first. ``own_pids``: it is in a pid namespace of its own."""
        stub.emit_entry(program, self.fd, self.root_fd, self.ipc_fd)
        if own_pids:
            stub.emit_proc(program)
