"""The signal by which a program that knows of snapshots learns that it has been woken (docs/guest-protocol.md).

Nothing of it is in the images but the guest page itself. It is queued behind the signals that were pending, while all
are blocked: of several handlers that are entered at once the one of the highest signal runs first (kernel/signal.c,
dequeue_signal(): the lowest is taken first, and its frame lies below).
"""

from __future__ import annotations

import signal
import struct

from ... import log
from ...linux import ptrace
from .. import generation
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

SI_QUEUE = -1
SIG_DFL, SIG_IGN = 0, 1


class GuestSignal(TaskResource):
    """Tells the thread that asked for it."""

    PER = "thread"
    ORDER = 61  # after ``pending``

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        """There is nothing to be dumped."""

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        for number, alone in generation.signal_for(thread, ctx):
            task = thread.task
            if not _wanted(task.core, core, number):
                log.warning(f"guest of task {task.pid}: signal {number} would end it or do nothing: it is not sent")
                continue
            siginfo = struct.pack("<iii4xii", number, 0, SI_QUEUE, task.own_pid, 0).ljust(ptrace.SIGINFO_BYTES, b"\0")
            may_fail = (generation.QUEUE_FULL,)
            if alone:
                program.call(
                    "rt_tgsigqueueinfo", task.own_pid, thread.own_tid, number, siginfo, may_fail=may_fail, why="woken"
                )
            else:
                program.call("rt_sigqueueinfo", task.own_pid, number, siginfo, may_fail=may_fail, why="woken")


def _wanted(core: Message, own: Message, number: int) -> bool:
    """Has the task a handler for the signal, or does it wait for it with the signal blocked?"""
    if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTRAP):
        return False
    index = number - 1 - (number > signal.SIGKILL) - (number > signal.SIGSTOP)  # see sigactions.py
    if index < len(core.tc.sigactions) and core.tc.sigactions[index].sigaction not in (SIG_DFL, SIG_IGN):
        return True
    blocked = own.tc.blk_sigset if own.HasField("tc") else own.thread_core.blk_sigset
    return bool(blocked >> (number - 1) & 1)


RESOURCE = GuestSignal()
