"""Whether a process goes without transparent huge pages: PR_SET_THP_DISABLE, kernel/sys.c.

Image: mm_entry.thp_disabled, which is the engine's to write: dump() leaves it in
``task.answers["thp_disabled"]``. The flags of Linux 6.18 (all but what is advised) are in
task_core_entry.thp_disable_flags, ours.
"""

from __future__ import annotations

from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program, Ref, Run
    from ..base import BuildContext, DumpContext

PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42
DISABLED = 1  # the rest of the answer are the flags


class HugePages(TaskResource):
    """Transparent huge pages switched off."""

    ORDER = 10

    def ask(self, program: Program, thread: Any) -> Ref:
        return program.call("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0)

    def dump(self, thread: Any, run: Run, asked: Ref, core: Message, ctx: DumpContext) -> None:
        answer = run.result(asked)
        thread.task.answers["thp_disabled"] = bool(answer & DISABLED)
        if answer & ~DISABLED:
            core.tc.thp_disable_flags = answer & ~DISABLED

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        # Said in either case, for a child inherits it from us.
        disabled = bool(thread.task.mm and thread.task.mm.thp_disabled)
        flags = core.tc.thp_disable_flags if disabled else 0
        program.call(
            "prctl", PR_SET_THP_DISABLE, disabled, flags, 0, 0, why="transparent huge pages"
        )


RESOURCE = HugePages()
