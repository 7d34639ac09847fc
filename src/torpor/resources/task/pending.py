"""Signals on their way: those sent to a thread and those sent to the process as a whole.

They are read from outside (PTRACE_PEEKSIGINFO) and queued again by the thread itself, since only
to itself may a task send a siginfo that claims to come from the kernel (kernel/signal.c,
do_rt_sigqueueinfo()). Every signal is blocked while that happens; a blocked signal is kept even
if it will be ignored.

Image: task_core_entry.signals_s and thread_core_entry.signals_p, struct siginfo as it is (128
bytes).
"""

from __future__ import annotations

import signal
import struct

from ...errors import ImageError
from ...linux import ptrace
from ...proc import status
from ...proc.read import read
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

#: What a task's program does not queue itself: SIGSTOP cannot be blocked, and with SIGTRAP it tells its tracer of a
#: stop. The first is sent by the engine, at the very end, the other queued by the task after its last stop.
HELD_BACK = (signal.SIGSTOP, signal.SIGTRAP)


def stops(core: Message) -> bool:
    """Is a SIGSTOP to be sent to the thread when it is let go?"""
    return is_pending(core, signal.SIGSTOP)


def late(core: Message) -> list[tuple[bool, bytes]]:
    """The SIGTRAPs to be queued after the last stop: (is it the process's, its siginfo)."""
    queues = ((True, core.tc.signals_s), (False, core.thread_core.signals_p))
    return [
        (shared, bytes(entry.siginfo))
        for shared, queue in queues for entry in queue.signals if _number(entry) == signal.SIGTRAP
    ]  # fmt: skip


class PendingSignals(TaskResource):
    """Queued signals."""

    PER = "thread"
    ORDER = 60

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        main = thread.tid == thread.task.pid
        private = ptrace.pending_signals(thread.tid, shared=False)
        shared = ptrace.pending_signals(thread.tid, shared=True) if main else []
        lost = _without_siginfo(thread, private, shared, main)
        _fill(core.thread_core.signals_p, private + [_bare(n) for n in lost[0]])
        if main:
            _fill(core.tc.signals_s, shared + [_bare(n) for n in lost[1]])

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for anything that is not a siginfo."""
        for name, queue in (
            ("tc.signals_s", core.tc.signals_s),
            ("thread_core.signals_p", core.thread_core.signals_p),
        ):
            for entry in queue.signals:
                if len(entry.siginfo) != ptrace.SIGINFO_BYTES or not 1 <= _number(entry) <= 64:
                    raise ImageError("core", name, f"{len(entry.siginfo)} bytes are no siginfo")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if core.HasField("tc"):
            for entry in _sendable(core.tc.signals_s):
                program.call("rt_sigqueueinfo", thread.task.own_pid, _number(entry), entry.siginfo)
        for entry in _sendable(core.thread_core.signals_p):
            program.call(
                "rt_tgsigqueueinfo", thread.task.own_pid, thread.own_tid, _number(entry), entry.siginfo
            )


def _number(entry: Message) -> int:
    return int.from_bytes(entry.siginfo[:4], "little")


def _sendable(queue: Message) -> list[Message]:
    return [entry for entry in queue.signals if _number(entry) not in (signal.SIGKILL, *HELD_BACK)]


def is_pending(core: Message, number: int) -> bool:
    """Is a signal pending, for the thread or its process?"""
    queues = core.thread_core.signals_p, core.tc.signals_s
    return any(_number(entry) == number for queue in queues for entry in queue.signals)


def _fill(queue: Message, signals: list[bytes]) -> None:
    queue.SetInParent()  # an empty queue is written too: its absence means an image of the old kind
    for siginfo in signals:
        queue.signals.add(siginfo=siginfo)


def _bare(number: int) -> bytes:
    # What collect_signal() gives the task for a signal that has no siginfo: SI_USER from pid 0.
    return struct.pack("<i", number).ljust(ptrace.SIGINFO_BYTES, b"\0")


def _without_siginfo(
    thread: Any, private: list[bytes], shared: list[bytes], main: bool
) -> tuple[list[int], list[int]]:
    """Signals that are pending without an entry: there was no memory for one, or were too many."""

    def missing(seen: status.Status) -> tuple[list[int], list[int]]:
        return _missing(seen.SigPnd, private), _missing(seen.ShdPnd, shared) if main else []

    lost = missing(thread.status)
    if any(lost):  # or they were delivered after the status was read
        lost = missing(status.parse(read(thread.task.pid, f"task/{thread.tid}/status")))
    return lost


def _missing(mask: int, queue: list[bytes]) -> list[int]:
    queued = {int.from_bytes(siginfo[:4], "little") for siginfo in queue}
    numbers = (n for n in range(1, 65) if mask >> (n - 1) & 1)
    return [n for n in numbers if n not in queued and n != signal.SIGKILL]


RESOURCE = PendingSignals()
