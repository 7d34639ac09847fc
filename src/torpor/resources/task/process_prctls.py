"""Attributes of a process that are one number each: kernel/sys.c, kernel/sched/membarrier.c.

Image: task_core_entry.child_subreaper, membarrier_registration_mask; memory_merge (KSM) is ours.
"""

from __future__ import annotations

import errno
import struct

from ...linux.call import try_call
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Data, Program, Ref, Run
    from ..base import BuildContext, DumpContext

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 67, 68
#: Answers with the commands that register, as bits. Linux kernel commit 544a4f2ecd45 ("sched/membarrier: Introduce
#: MEMBARRIER_CMD_GET_REGISTRATIONS") (in v6.3).
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9
#: Private barriers: plain, with SYNC_CORE, with RSEQ. EPERM unless registered for, by the command of the next bit.
PRIVATE_EXPEDITED = (1 << 3, 1 << 5, 1 << 7)


class ProcessAttributes(TaskResource):
    """Child subreaper, merging of equal pages, membarrier registrations."""

    ORDER = 25

    def ask(self, program: Program, thread: Any) -> tuple[Data, Ref, Ref, list[Ref]]:
        subreaper = program.out(4)
        program.call("prctl", PR_GET_CHILD_SUBREAPER, subreaper, 0, 0, 0)
        missing = (errno.EINVAL, errno.ENOSYS)  # not in this kernel
        # Where the kernel does not tell, a barrier does; the registration for global ones stays unknown then.
        tells = try_call("membarrier", MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0) >= 0
        return (
            subreaper,
            program.call("prctl", PR_GET_MEMORY_MERGE, 0, 0, 0, 0, may_fail=missing),
            program.call("membarrier", MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0, may_fail=missing),
            [
                program.call("membarrier", command, 0, 0, may_fail=(errno.EPERM, *missing))
                for command in (() if tells else PRIVATE_EXPEDITED)
            ],
        )

    def dump(
        self, thread: Any, run: Run, asked: tuple[Data, Ref, Ref, list[Ref]], core: Message, ctx: DumpContext
    ) -> None:
        subreaper, merge, membarrier, tried = asked
        core.tc.child_subreaper = struct.unpack("<i", run.bytes(subreaper)) != (0,)
        if run.result(merge) > 0:
            core.tc.memory_merge = True
        registered = max(run.result(membarrier), 0)
        for command, barrier in zip(PRIVATE_EXPEDITED, tried, strict=False):
            if run.result(barrier) == 0:
                registered |= command << 1
        if registered:
            core.tc.membarrier_registration_mask = registered

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        program.call(
            "prctl", PR_SET_CHILD_SUBREAPER, core.tc.child_subreaper, 0, 0, 0, why="subreaper"
        )
        if core.tc.memory_merge:
            # It saves memory, nothing else: where KSM is not to be had the task is as right.
            program.call(
                "prctl", PR_SET_MEMORY_MERGE, 1, 0, 0, 0, may_fail=(errno.EPERM, errno.EINVAL)
            )
        registered = core.tc.membarrier_registration_mask
        for bit in range(registered.bit_length()):
            if registered >> bit & 1:
                program.call("membarrier", 1 << bit, 0, 0, why="register")


RESOURCE = ProcessAttributes()
