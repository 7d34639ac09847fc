"""The refusal to make memory executable that was writable: PR_SET_MDWE, kernel/sys.c.

It cannot be taken back, so it follows all that has to do with memory. Image:
task_core_entry.mdwe, ours.
"""

from __future__ import annotations

import errno

from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program, Ref, Run
    from ..base import BuildContext, DumpContext

PR_SET_MDWE, PR_GET_MDWE = 65, 66


class MemoryDenyWriteExecute(TaskResource):
    """Memory-deny-write-execute."""

    ORDER = 82

    def ask(self, program: Program, thread: Any) -> Ref:
        return program.call("prctl", PR_GET_MDWE, 0, 0, 0, 0, may_fail=(errno.EINVAL,))

    def dump(self, thread: Any, run: Run, asked: Ref, core: Message, ctx: DumpContext) -> None:
        if run.result(asked) > 0:
            core.tc.mdwe = run.result(asked)

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if core.tc.mdwe:
            program.call("prctl", PR_SET_MDWE, core.tc.mdwe, 0, 0, 0)


RESOURCE = MemoryDenyWriteExecute()
