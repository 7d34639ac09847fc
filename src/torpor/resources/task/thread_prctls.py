"""Attributes of a thread that are one value each: kernel/sys.c, arch/x86/kernel/process.c.

Image: thread_core_entry.comm (task_core_entry.comm for the main thread); timerslack_ns, tsc_mode,
cpuid_faults, speculation, io_flusher and mce_kill are ours, and absent where a thread has what every thread
begins with.
"""

from __future__ import annotations

import errno
import struct

from ...errors import Unsupported
from ...images import schema as pb
from ..base import TaskResource
from ._own import CAP_SYS_RESOURCE, capable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Data, Program, Ref, Run
    from ..base import BuildContext, DumpContext

PR_SET_NAME, PR_GET_TSC, PR_SET_TSC, PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 15, 25, 26, 29, 30
PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_GET, MCE_KILL_DEFAULT = 33, 1, 34, 2
PR_GET_SPECULATION_CTRL, PR_SET_SPECULATION_CTRL, PR_SET_IO_FLUSHER = 52, 53, 57
SPECULATION_KINDS = (0, 1, 2)  # store bypass, indirect branch, L1D flush on context switch
SPEC_PRCTL = 1  # in an answer: it is up to the thread
TSC_ENABLE = 1
ARCH_GET_CPUID, ARCH_SET_CPUID = 0x1011, 0x1012
IO_FLUSHER_FLAGS = 0x80000 | 0x100000  # PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE (include/linux/sched.h)
NAME_BYTES = 16


class Asked:
    """Where the getters' results are."""

    __slots__ = ("cpuid", "mce_kill", "slack", "speculation", "tsc")

    def __init__(self, program: Program) -> None:
        self.slack: Ref = program.call("prctl", PR_GET_TIMERSLACK, 0, 0, 0, 0)
        self.tsc: Data = program.out(4)
        program.call("prctl", PR_GET_TSC, self.tsc, 0, 0, 0)
        self.cpuid: Ref = program.call("arch_prctl", ARCH_GET_CPUID, 0)
        self.speculation: list[Ref] = [
            program.call(
                "prctl",
                PR_GET_SPECULATION_CTRL,
                kind,
                0,
                0,
                0,
                may_fail=(errno.ENODEV, errno.EINVAL),
            )
            for kind in SPECULATION_KINDS
        ]
        self.mce_kill: Ref = program.call("prctl", PR_MCE_KILL_GET, 0, 0, 0, 0)


class ThreadAttributes(TaskResource):
    """Name, timer slack, TSC, CPUID, speculation, IO flusher, machine check policy."""

    PER = "thread"
    ORDER = 40

    def ask(self, program: Program, thread: Any) -> Asked:
        return Asked(program)

    def dump(self, thread: Any, run: Run, asked: Asked, core: Message, ctx: DumpContext) -> None:
        own = core.thread_core
        pb.put_bytes(own, "comm", thread.status.Name)
        if thread.tid == thread.task.pid:
            pb.put_bytes(core.tc, "comm", thread.status.Name)
        if run.result(asked.slack) > 0:  # 0 for a real-time thread, which has none
            own.timerslack_ns = run.result(asked.slack)
        (tsc,) = struct.unpack("<i", run.bytes(asked.tsc))
        if tsc != TSC_ENABLE:
            own.tsc_mode = tsc
        if run.result(asked.cpuid) == 0:
            own.cpuid_faults = True
        chosen = [max(run.result(ref), 0) for ref in asked.speculation]
        if any(value & SPEC_PRCTL for value in chosen):
            own.speculation.extend(value if value & SPEC_PRCTL else 0 for value in chosen)
        if thread.stat.flags & IO_FLUSHER_FLAGS == IO_FLUSHER_FLAGS:
            own.io_flusher = True
        if run.result(asked.mce_kill) != MCE_KILL_DEFAULT:
            own.mce_kill = run.result(asked.mce_kill)

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise Unsupported for an IO flusher without the capability that it takes."""
        if core.thread_core.io_flusher and not capable(ctx, CAP_SYS_RESOURCE):
            raise Unsupported("an IO flusher (PR_SET_IO_FLUSHER) needs CAP_SYS_RESOURCE")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = core.thread_core
        name = pb.get_bytes(own.comm if own.HasField("comm") else core.tc.comm)
        program.call("prctl", PR_SET_NAME, name[: NAME_BYTES - 1].ljust(NAME_BYTES, b"\0"), 0, 0, 0)
        if own.timerslack_ns:
            program.call("prctl", PR_SET_TIMERSLACK, own.timerslack_ns, 0, 0, 0, why="timer slack")
        if own.tsc_mode:
            program.call("prctl", PR_SET_TSC, own.tsc_mode, 0, 0, 0, why="TSC")
        if own.cpuid_faults:
            program.call("arch_prctl", ARCH_SET_CPUID, 0, why="CPUID faults")
        for kind, value in zip(SPECULATION_KINDS, own.speculation, strict=False):
            if value & SPEC_PRCTL:
                # Another processor may have nothing to choose.
                lacking = (errno.ENODEV, errno.ENXIO)
                choice = value & ~SPEC_PRCTL
                program.call("prctl", PR_SET_SPECULATION_CTRL, kind, choice, 0, 0, may_fail=lacking)
        if own.io_flusher:
            program.call("prctl", PR_SET_IO_FLUSHER, 1, 0, 0, 0)
        if own.HasField("mce_kill"):
            program.call("prctl", PR_MCE_KILL, PR_MCE_KILL_SET, own.mce_kill, 0, 0)


RESOURCE = ThreadAttributes()
