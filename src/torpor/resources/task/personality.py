"""The execution domain: personality(2), kernel/exec_domain.c.

It is a thread's, but the images have room for the process's only (task_core_entry.personality):
all threads get that.
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
        if thread.tid == thread.task.pid:
            core.tc.personality = parse_personality(read(thread.tid, "personality"))

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        program.call("personality", thread.task.core.tc.personality)


RESOURCE = Personality()
