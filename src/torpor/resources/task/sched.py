"""How a thread is scheduled: policy, priority, nice value, processors, I/O priority (sched(7),
ioprio_set(2)).

All of it is read from outside. A real-time thread's nice value is kept too, for the day it is one
no more.

Image: thread_core_entry.sched_policy (with SCHED_RESET_ON_FORK), sched_prio, sched_nice. Ours:
sched_attr for what a deadline thread or one with utilization clamps has besides; affinity, where
not all processors are allowed; ioprio.
"""

from __future__ import annotations

import errno
import os
import struct

from ... import log
from ...linux.call import buffer, call
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

ATTR = struct.Struct("<IIQiIQQQII")  # include/uapi/linux/sched/types.h
ATTR_BYTES_V0 = 48  # without the utilization clamps
FIFO, RR, DEADLINE = 1, 2, 6
RESET_ON_FORK = 0x40000000
FLAG_RESET_ON_FORK, FLAG_UTIL_CLAMP = 1, 0x20 | 0x40
UTIL_FULL = 1024
PRIO_PROCESS, IOPRIO_WHO_PROCESS = 0, 1


class Scheduling(TaskResource):
    """Policy, priority, nice value, affinity, I/O priority."""

    PER = "thread"
    ORDER = 75

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        area = buffer(ATTR.size)
        call("sched_getattr", thread.tid, area, ATTR.size, 0)
        size, policy, flags, _, priority, runtime, deadline, period, low, high = ATTR.unpack(
            area.raw
        )
        own = core.thread_core
        own.sched_policy = policy | (RESET_ON_FORK if flags & FLAG_RESET_ON_FORK else 0)
        own.sched_nice = thread.stat.nice
        if policy in (FIFO, RR):
            own.sched_prio = priority
        if policy == DEADLINE:
            own.sched_attr.flags = flags & ~(FLAG_RESET_ON_FORK | FLAG_UTIL_CLAMP)
            own.sched_attr.runtime, own.sched_attr.deadline, own.sched_attr.period = (
                runtime,
                deadline,
                period,
            )
        elif (
            size >= ATTR.size
            and policy not in (FIFO, RR)
            and (low, high) not in ((0, UTIL_FULL), (0, 0))
        ):
            own.sched_attr.util_min, own.sched_attr.util_max = low, high
        if io := call("ioprio_get", IOPRIO_WHO_PROCESS, thread.tid):
            own.ioprio = io
        allowed = os.sched_getaffinity(thread.tid)
        if len(allowed) < (os.cpu_count() or 1):
            bits = sum(1 << cpu for cpu in allowed)
            own.affinity = bits.to_bytes(bits.bit_length() // 64 * 8 + 8, "little")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = core.thread_core
        if own.affinity:
            # None of them may be here, or in the cpuset; then it runs where it may.
            program.call(
                "sched_setaffinity", 0, len(own.affinity), own.affinity, may_fail=(errno.EINVAL,)
            )
        if own.ioprio:
            program.call("ioprio_set", IOPRIO_WHO_PROCESS, 0, own.ioprio)
        if own.HasField("sched_nice"):
            program.call("setpriority", PRIO_PROCESS, 0, own.sched_nice)
        if own.HasField("sched_policy"):
            _restore_policy(own, program)


def _restore_policy(own: Message, program: Program) -> None:
    policy, attr = own.sched_policy & ~RESET_ON_FORK, own.sched_attr
    if policy == DEADLINE and not attr.runtime:
        log.warning("sched: SCHED_DEADLINE without its times in the images: left out")
        return
    flags, size = attr.flags, ATTR_BYTES_V0
    if own.sched_policy & RESET_ON_FORK:
        flags |= FLAG_RESET_ON_FORK
    if attr.HasField("util_max"):
        flags, size = flags | FLAG_UTIL_CLAMP, ATTR.size
    priority = own.sched_prio if policy in (FIFO, RR) else 0
    packed = ATTR.pack(
        size, policy, flags, own.sched_nice, priority, attr.runtime, attr.deadline, attr.period,
        attr.util_min, attr.util_max,
    )  # fmt: skip
    program.call("sched_setattr", 0, packed, 0)


RESOURCE = Scheduling()
