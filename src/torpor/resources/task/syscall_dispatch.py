"""System calls that a thread has sent back to itself: PR_SET_SYSCALL_USER_DISPATCH,
kernel/entry/syscall_user_dispatch.c.

A thread that does that (Wine's do) cannot run our getters without getting them as SIGSYS, so it
is refused.
"""

from __future__ import annotations

from ...errors import Unsupported
from ...linux import ptrace
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class SyscallDispatch(TaskResource):
    """Syscall user dispatch: found, not restored."""

    PER = "thread"

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        if ptrace.syscall_user_dispatch(thread.tid)[0]:
            raise Unsupported(f"thread {thread.tid} uses syscall user dispatch")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        pass


RESOURCE = SyscallDispatch()
