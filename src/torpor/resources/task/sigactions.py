"""What a process does about each signal: rt_sigaction(2), kernel/signal.c do_sigaction().

Image: task_core_entry.sigactions, the 62 signals from 1 to 64 without SIGKILL and SIGSTOP, in
their order, each with the four words of x86's struct kernel_sigaction.
"""

from __future__ import annotations

import signal
import struct

from ...errors import ImageError, Unsupported
from ..base import TaskResource
from ._own import own_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Data, Program, Run
    from ..base import BuildContext, DumpContext

SIGNALS = tuple(n for n in range(1, 65) if n not in (signal.SIGKILL, signal.SIGSTOP))
ACTION = struct.Struct("<4Q")  # handler, flags, restorer, mask
SET_BYTES = 8


class SignalActions(TaskResource):
    """The table of signal actions."""

    ORDER = 20

    def ask(self, program: Program, thread: Any) -> Data:
        area = program.out(ACTION.size * len(SIGNALS))
        for index, number in enumerate(SIGNALS):
            program.call("rt_sigaction", number, 0, area.at(index * ACTION.size), SET_BYTES)
        return area

    def dump(self, thread: Any, run: Run, asked: Data, core: Message, ctx: DumpContext) -> None:
        for handler, flags, restorer, mask in ACTION.iter_unpack(run.bytes(asked)):
            core.tc.sigactions.add(
                sigaction=handler, flags=flags, restorer=restorer, mask=mask, compat_sigaction=False
            )

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for an incomplete table, Unsupported for one of a 32-bit task."""
        if core.HasField("tc") and len(core.tc.sigactions) not in (0, len(SIGNALS)):
            count = len(core.tc.sigactions)
            raise ImageError("core", "tc.sigactions", f"{count} entries, {len(SIGNALS)} expected")
        if any(entry.compat_sigaction for entry in core.tc.sigactions):
            raise Unsupported("signal actions of a 32-bit task")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        # Where a signal is ignored, by default too, setting the action throws away what is pending
        # of it (flush_sigqueue_mask() in do_sigaction()): so this removes what the making of
        # children has left.
        default = program.put(bytes(ACTION.size))
        program.call("rt_sigaction", signal.SIGCHLD, default, 0, SET_BYTES, why="drop SIGCHLD")
        ignored = own_status(ctx).SigIgn & ~(1 << (signal.SIGCHLD - 1))
        for number, entry in zip(SIGNALS, core.tc.sigactions, strict=False):
            action = entry.sigaction, entry.flags, entry.restorer, entry.mask
            if action != (ignored >> (number - 1) & 1, 0, 0, 0):  # what execve(2) has left of ours
                program.call("rt_sigaction", number, ACTION.pack(*action), 0, SET_BYTES)


def ignores(core: Message, number: int) -> bool:
    """Does the process ignore a signal (SIG_IGN)?"""
    actions = core.tc.sigactions
    return bool(actions) and actions[SIGNALS.index(number)].sigaction == int(signal.SIG_IGN)


RESOURCE = SignalActions()
