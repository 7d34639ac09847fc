"""POSIX timers: timer_create(2), kernel/time/posix-timers.c.

/proc/PID/timers tells all about them but their times, which the process asks for itself. A timer
gets its number back through PR_TIMER_CREATE_RESTORE_IDS: Linux kernel commit ec2d0c04624b
("posix-timers: Provide a mechanism to allocate a given timer ID") (in v6.15). Earlier kernels
number the timers of a process from 0 on, so there the timers that are missing are made and
deleted again.

What the kernel does not tell and is lost: that a timer was set to an absolute time (it goes on
with the time that remains), the overrun count of the last signal, and which thread's CPU time a
timer on CLOCK_THREAD_CPUTIME_ID measures (the main thread's, after a restore).

Image: task_timers_entry.posix; timers_take_ids of task_core_entry, ours, for a process that restores timers itself.
"""

from __future__ import annotations

import errno
import struct

from ...errors import ImageError, KernelError, Unsupported
from ...linux.kernel import prctl
from ...proc.read import read
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...proc.timers import Timer
    from ...remote.program import Data, Program, Ref, Run
    from ..base import BuildContext, DumpContext

    Asked = list[tuple[Timer, Data, Ref]]

PR_TIMER_CREATE_RESTORE_IDS, OFF, ON, GET = 77, 0, 1, 2
ITIMERSPEC = struct.Struct("<4Q")
SIGEVENT = struct.Struct("<Qiii44x")  # value, signo, notify, thread id
SIGEV_NONE, SIGEV_THREAD_ID = 1, 4  # include/uapi/asm-generic/siginfo.h
NUMBERS_MAX = 1 << 16  # timers made only to be deleted, on a kernel that cannot be told the number


class PosixTimers(TaskResource):
    """The timers of timer_create(2)."""

    ORDER = 65

    def ask(self, program: Program, thread: Any) -> tuple[Ref, Asked]:
        from ...proc import timers

        takes = program.call("prctl", PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0, may_fail=(errno.EINVAL,))
        asked: Asked = []
        for timer in timers.parse(read(thread.task.pid, "timers")):
            area = program.out(ITIMERSPEC.size)
            program.call("timer_gettime", timer.ID, area)
            asked.append((timer, area, program.call("timer_getoverrun", timer.ID)))
        return takes, asked

    def varies(self, thread: Any) -> object:
        return read(thread.task.pid, "timers")

    def dump(self, thread: Any, run: Run, asked: tuple[Ref, Asked], core: Message, ctx: DumpContext) -> None:
        own_number = {other.tid: other.own_tid for other in thread.task.threads}
        core.tc.timers.SetInParent()
        takes, timers = asked
        if run.result(takes) == ON:
            core.tc.timers_take_ids = True
        for timer, area, overrun in timers:
            entry = core.tc.timers.posix.add(
                it_id=timer.ID, clock_id=timer.ClockID & 0xFFFFFFFF, si_signo=timer.signal,
                it_sigev_notify=timer.notify, sival_ptr=timer.sigval, overrun=run.result(overrun),
            )  # fmt: skip
            entry.isec, entry.insec, entry.vsec, entry.vnsec = ITIMERSPEC.unpack(run.bytes(area))
            if timer.notify & SIGEV_THREAD_ID and timer.target in own_number:
                entry.notify_thread_id = own_number[timer.target]

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for what is no timer, Unsupported for a number that it cannot get."""
        seen = set()
        for entry in core.tc.timers.posix:
            field = f"tc.timers.posix {entry.it_id}"
            if max(entry.insec, entry.vnsec) >= 10**9 or max(entry.isec, entry.vsec) >= 1 << 63:
                raise ImageError("core", field, "not a time")
            if entry.it_id >= 1 << 31 or entry.it_id in seen:
                raise ImageError("core", field, "number out of range or not unique")
            if max(entry.si_signo, entry.it_sigev_notify) >= 1 << 31:
                raise ImageError("core", field, "signal or notification out of range")
            seen.add(entry.it_id)
        if seen and max(seen) > NUMBERS_MAX and not _takes_numbers(ctx):
            raise Unsupported(
                f"POSIX timer {max(seen)}: the kernel cannot be told a timer's number",
                hint="Linux 6.15 can",
            )

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        entries = sorted(core.tc.timers.posix, key=lambda entry: int(entry.it_id))
        stays = bool(core.tc.timers_take_ids)
        if not entries and not stays:
            return
        tids = {other.own_tid for other in thread.task.threads}
        if _takes_numbers(ctx):
            program.call("prctl", PR_TIMER_CREATE_RESTORE_IDS, ON, 0, 0, 0, why="numbers as given")
            for entry in entries:
                _create(program, entry, tids)
            if not stays:
                program.call("prctl", PR_TIMER_CREATE_RESTORE_IDS, OFF, 0, 0, 0)
        elif entries:
            _create_by_counting(program, entries, tids)
        for entry in entries:
            _arm(program, entry)


def _takes_numbers(ctx: BuildContext) -> bool:
    def ask() -> bool:
        try:
            prctl(PR_TIMER_CREATE_RESTORE_IDS, GET)
        except KernelError:
            return False
        return True

    known: bool = ctx.once(("posix timers", "numbers"), ask)
    return known


def _create(program: Program, entry: Message, tids: set[int]) -> None:
    notify, target = entry.it_sigev_notify, entry.notify_thread_id
    if notify & SIGEV_THREAD_ID and target not in tids:
        notify = SIGEV_NONE  # the thread it was for had ended: nothing gets its signal
    event = SIGEVENT.pack(entry.sival_ptr, entry.si_signo, notify, target)
    number = struct.pack("<i", entry.it_id)
    program.call("timer_create", entry.clock_id, event, number, why=f"timer {entry.it_id}")


def _create_by_counting(program: Program, entries: list[Message], tids: set[int]) -> None:
    wanted = {entry.it_id: entry for entry in entries}
    for number in range(max(wanted) + 1):
        if number in wanted:
            _create(program, wanted[number], tids)
        else:
            program.call("timer_create", 1, 0, program.out(8))
            program.call("timer_delete", number)


def _arm(program: Program, entry: Message) -> None:
    interval, value = (entry.isec, entry.insec), (entry.vsec, entry.vnsec)
    armed = value if any(value) else interval  # as with interval timers: it has just expired
    # Done for a disarmed one as well: it fails if a timer did not get its number.
    program.call("timer_settime", entry.it_id, 0, ITIMERSPEC.pack(*interval, *armed), 0)


RESOURCE = PosixTimers()
