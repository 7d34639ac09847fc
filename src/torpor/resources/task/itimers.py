"""The three interval timers of a process: setitimer(2), kernel/time/itimer.c.

Image: task_timers_entry.real, virt, prof: interval and time that remains, seconds and microseconds.
"""

from __future__ import annotations

import struct

from ...errors import ImageError
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Data, Program, Run
    from ..base import BuildContext, DumpContext

TIMERS = ("real", "virt", "prof")  # their place is their number
ITIMERVAL = struct.Struct("<4Q")


class IntervalTimers(TaskResource):
    """ITIMER_REAL, ITIMER_VIRTUAL and ITIMER_PROF."""

    ORDER = 66

    def ask(self, program: Program, thread: Any) -> Data:
        area = program.out(ITIMERVAL.size * len(TIMERS))
        for which in range(len(TIMERS)):
            program.call("getitimer", which, area.at(which * ITIMERVAL.size))
        return area

    def dump(self, thread: Any, run: Run, asked: Data, core: Message, ctx: DumpContext) -> None:
        for name, value in zip(TIMERS, ITIMERVAL.iter_unpack(run.bytes(asked)), strict=True):
            entry = getattr(core.tc.timers, name)
            entry.isec, entry.iusec, entry.vsec, entry.vusec = value

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for times that setitimer(2) does not take."""
        for name in TIMERS:
            entry = getattr(core.tc.timers, name)
            if max(entry.iusec, entry.vusec) >= 10**6 or max(entry.isec, entry.vsec) >= 1 << 63:
                raise ImageError("core", f"tc.timers.{name}", "not a time")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if not core.tc.HasField("timers"):
            return
        for which, name in enumerate(TIMERS):
            entry = getattr(core.tc.timers, name)
            interval, value = (entry.isec, entry.iusec), (entry.vsec, entry.vusec)
            # The kernel forgets an interval that comes without a value. A timer that had just
            # expired has its signal among the pending ones; what follows is due one interval later.
            armed = value if any(value) else interval
            if any(armed):
                program.call("setitimer", which, ITIMERVAL.pack(*interval, *armed), 0, why=name)


RESOURCE = IntervalTimers()
