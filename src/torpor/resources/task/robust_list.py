"""The list of futexes that the kernel releases when a thread ends: set_robust_list(2),
kernel/futex/syscalls.c.

Image: thread_core_entry.futex_rla (address of the list's head) and futex_rla_len.
"""

from __future__ import annotations

from ...linux.call import buffer, call
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class RobustList(TaskResource):
    """The robust futex list."""

    PER = "thread"
    ORDER = 30

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        head, length = buffer(8), buffer(8)
        call("get_robust_list", thread.tid, head, length)
        core.thread_core.futex_rla = int.from_bytes(head.raw, "little")
        core.thread_core.futex_rla_len = int.from_bytes(length.raw, "little")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = core.thread_core
        if own.futex_rla and own.futex_rla_len:
            program.call("set_robust_list", own.futex_rla, own.futex_rla_len)


RESOURCE = RobustList()
