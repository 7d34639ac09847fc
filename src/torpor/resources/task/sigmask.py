"""The blocked signals of a thread.

The engine reads and sets them with PTRACE_GETSIGMASK and PTRACE_SETSIGMASK; here they only get
their place in the images: task_core_entry.blk_sigset for the main thread,
thread_core_entry.blk_sigset for the others.
"""

from __future__ import annotations

from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


def sigmask(core: Message) -> int:
    """The blocked signals of the thread that ``core`` describes; bit n - 1 is signal n."""
    return int(core.tc.blk_sigset if core.HasField("tc") else core.thread_core.blk_sigset)


class SignalMask(TaskResource):
    """The blocked signals."""

    PER = "thread"

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        if thread.tid == thread.task.pid:
            core.tc.blk_sigset = thread.sigmask
        else:
            core.thread_core.blk_sigset = thread.sigmask

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        pass


RESOURCE = SignalMask()
