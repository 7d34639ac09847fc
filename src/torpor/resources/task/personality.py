"""The execution domain: personality(2), kernel/exec_domain.c.

It is a thread's. Image: task_core_entry.personality, the main thread's; thread_core_entry.personality, ours, where
another thread has another one.
"""

from __future__ import annotations

from ...proc.read import read
from ...proc.scalars import parse_personality
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class Personality(TaskResource):
    """The personality."""

    PER = "thread"
    ORDER = 45

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        task = thread.task
        found = parse_personality(read(task.pid, f"task/{thread.tid}/personality"))
        if thread.tid == task.pid:
            core.tc.personality = task.answers["personality"] = found
        elif found != task.answers["personality"]:
            core.thread_core.personality = found

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = core.thread_core
        program.call("personality", own.personality if own.HasField("personality") else thread.task.core.tc.personality)


RESOURCE = Personality()
