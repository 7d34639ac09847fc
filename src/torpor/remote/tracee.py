"""Stopping the threads of a tree and letting them go: ptrace(2), SEIZE style (Documentation: man ptrace).

A task is stopped by ptrace and not by a freezer, because a frozen task cannot run a program.
"""

from __future__ import annotations

import errno
import os
import time

from ..errors import KernelError, TaskGone, Unsupported
from ..linux import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP_STOPS = (19, 20, 21, 22)  # SIGSTOP SIGTSTP SIGTTIN SIGTTOU
SIGTRAP, SIGKILL = 5, 9
#: Between looks at a tracee while others can be waited for, and how long until it is asked whether it can end at all.
FIRST_PAUSE_S, PATIENCE_S = 0.00003, 0.02
STOPPED_WITHIN_S = 0.1
LOOKS = 100  # without a pause, which the kernel makes longer than asked for


class Stop:
    """How a tracee stopped: ``signal`` and ``event`` (ptrace.EVENT_*, 0 for a signal on its way)."""

    __slots__ = ("event", "signal")

    def __init__(self, status: int) -> None:
        self.signal = (status >> 8) & 0xFF
        self.event = status >> 16

    @property
    def by_interrupt(self) -> bool:
        """The stop that was asked for."""
        return self.event == ptrace.EVENT_STOP and self.signal == SIGTRAP

    @property
    def by_group(self) -> bool:
        """The task was stopped by job control when it was seized."""
        return self.event == ptrace.EVENT_STOP and self.signal in GROUP_STOPS

    def __repr__(self) -> str:
        return f"Stop(signal={self.signal}, event={self.event})"


class Dying(TaskGone):
    """It was killed and cannot end: what it has forked a moment ago is our tracee, and has to be reaped first."""


def wait_stop(tid: int) -> Stop:
    """Wait until ``tid``, a tracee, stops.

    Raises TaskGone when it ends instead. It is reaped as a tracee then; its parent still gets its exit status. Raises
    Dying, a TaskGone, when it is not reaped: an init that waits for its pid namespace to be empty, or a process whose
    thread we have not heard of (kernel/pid_namespace.c, zap_pid_ns_processes(); kernel/exit.c, delay_group_leader()).
    """
    pause_s, slept_s, looks = FIRST_PAUSE_S, 0.0, 0
    while True:
        stop = _wait(tid, os.WNOHANG)
        if stop is not None:
            return stop
        found = ptrace.wait_any()
        if found == tid:
            continue
        # Somebody else can be waited for, and will be by others: to wait for all would not block now.
        looks += 1
        if looks < LOOKS:
            os.sched_yield()
            continue
        time.sleep(pause_s)
        slept_s += pause_s
        pause_s = min(pause_s * 1.5, 0.002)
        if slept_s > PATIENCE_S and _is_dying(tid):
            raise Dying(f"task {tid} was killed")


def _is_dying(tid: int) -> bool:
    from ..proc import status
    from ..proc.read import read

    try:
        seen = status.parse(read(tid, "status"))
    except TaskGone:
        return False
    return seen.State == "Z" or bool((seen.SigPnd | seen.ShdPnd) >> (SIGKILL - 1) & 1)


def wait_stop_for(tid: int, timeout_s: float) -> Stop:
    """As :func:`wait_stop`, for a task that may sit in an uninterruptible state: raises Unsupported after
    ``timeout_s``.
    """
    for _ in range(200):
        stop = _wait(tid, os.WNOHANG)
        if stop is not None:
            return stop
        os.sched_yield()
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0001
    while time.monotonic() < deadline:
        time.sleep(pause_s)
        stop = _wait(tid, os.WNOHANG)
        if stop is not None:
            return stop
        pause_s = min(pause_s * 1.5, 0.005)
    raise Unsupported(
        f"task {tid} did not stop within {timeout_s:g} s",
        hint=f"it is in an uninterruptible wait, see /proc/{tid}/wchan and its state in /proc/{tid}/stat",
    )


def _wait(tid: int, flags: int) -> Stop | None:
    try:
        pid, status = ptrace.wait(tid, flags)
    except ChildProcessError:
        raise TaskGone(f"task {tid} is gone") from None
    if not pid:
        return None
    if os.WIFSTOPPED(status):
        return Stop(status)
    raise TaskGone(f"task {tid} ended ({_ending(status)})")


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _has_ended(tid: int) -> bool:
    from ..proc import stat
    from ..proc.read import read

    try:
        return stat.parse(read(tid, "stat")).state in "ZX"
    except TaskGone:
        return True


def stops_soon(tid: int, deadline: float) -> bool:
    """Wait until a task that is to be stopped by job control is stopped, or has ended; False if it is not so by the
    ``deadline`` (time.monotonic()). Who is let go in the middle of a stop comes to it again by itself, a moment later
    (kernel/ptrace.c, __ptrace_unlink()).
    """
    from ..proc import stat
    from ..proc.read import read

    try:
        while stat.parse(read(tid, "stat")).state not in "TZX":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)
    except (TaskGone, OSError):
        pass
    return True


def see_stopped(tids: Iterable[int]) -> None:
    """Wait until tasks are stopped by job control, or else were told to continue meanwhile."""
    deadline = time.monotonic() + STOPPED_WITHIN_S
    for tid in tids:
        stops_soon(tid, deadline)


class Seized:
    """A set of seized threads. Leaving it lets every thread go on, whatever happened.

    ``stops`` maps each tid to the stop that it is in.
    """

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.stops: dict[int, Stop] = {}
        self.redeliver: list[tuple[int, int]] = []
        self.timeout_s = timeout_s
        self._pending: set[int] = set()

    def seize(self, tids: Iterable[int], options: int = 0) -> list[int]:
        """Seize and stop the threads; returns those that are stopped now (a thread may have ended meanwhile)."""
        sent: list[int] = []
        for tid in tids:
            try:
                self._seize(tid, options)
                self._pending.add(tid)
                ptrace.interrupt(tid)
            except KernelError as error:
                # kernel/ptrace.c: a zombie gives EPERM as well.
                if error.errno == errno.ESRCH or (error.errno == errno.EPERM and _has_ended(tid)):
                    self._pending.discard(tid)
                    continue
                if error.errno == errno.EPERM:
                    raise self._refused(tid) from error
                raise
            sent.append(tid)
        return [tid for tid in sent if self._wait_interrupt(tid)]

    def _seize(self, tid: int, options: int) -> None:
        """Seize, with seccomp suspended where the kernel allows it to us: our getters are not the task's calls."""
        try:
            ptrace.seize(tid, options | ptrace.O_SUSPEND_SECCOMP)
        except KernelError as error:
            if error.errno == errno.ESRCH:
                raise
            ptrace.seize(tid, options)

    def _refused(self, tid: int) -> Unsupported:
        from ..proc.read import read
        from ..proc.status import parse

        try:
            tracer = parse(read(tid, "status")).TracerPid
        except TaskGone:
            tracer = 0
        if tracer:
            return Unsupported(f"task {tid} is traced by process {tracer}", hint="detach the debugger or strace first")
        return Unsupported(f"task {tid}: tracing it is not permitted", hint="run as root or with CAP_SYS_PTRACE")

    def _wait_interrupt(self, tid: int) -> bool:
        try:
            while True:
                stop = wait_stop_for(tid, self.timeout_s)
                if stop.event == ptrace.EVENT_STOP:
                    self._pending.discard(tid)
                    self.stops[tid] = stop
                    return True
                # A signal that was on its way when we came. Its stop may have taken the place of the one that was asked
                # for, which is forgotten then, and so for ever if signals keep coming: it is asked for again. Now that
                # the task is stopped it comes before any other signal (kernel/signal.c, ptrace_stop, get_signal).
                ptrace.interrupt(tid)
                ptrace.resume(tid, stop.signal)
        except TaskGone:
            self._pending.discard(tid)
            return False

    def release(self, tid: int) -> None:
        """Let one thread go on, and have the signal that it has stopped for, if that is why."""
        stop = self.stops.pop(tid, None)
        if stop is not None:
            try:
                ptrace.detach(tid, 0 if stop.event else stop.signal)
            except KernelError as error:
                if error.errno != errno.ESRCH:
                    raise

    def release_all(self) -> None:
        """Let all threads go on. Threads that were stopped by job control stay so."""
        for tid in list(self._pending):
            # It was asked to stop and did not yet: only a stopped task can be detached.
            self._pending.discard(tid)
            try:
                self.stops[tid] = wait_stop_for(tid, 1.0)
            except (TaskGone, Unsupported):
                continue
        stopped = [tid for tid, stop in self.stops.items() if stop.by_group]
        for tid in list(self.stops):
            self.release(tid)
        see_stopped(stopped)
        for tid, signal in self.redeliver:
            try:
                os.kill(tid, signal)
            except ProcessLookupError:
                pass
        self.redeliver.clear()

    def forget(self, tid: int) -> None:
        """The thread is dead: nothing to let go."""
        self.stops.pop(tid, None)
