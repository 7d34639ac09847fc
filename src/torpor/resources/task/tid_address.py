"""The word that the kernel clears when a thread ends: set_tid_address(2), kernel/fork.c.

Image: thread_info_x86.clear_tid_addr.
"""

from __future__ import annotations

import struct

from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Data, Program, Run
    from ..base import BuildContext, DumpContext

PR_GET_TID_ADDRESS = 40


class TidAddress(TaskResource):
    """clear_child_tid."""

    PER = "thread"
    ORDER = 30

    def ask(self, program: Program, thread: Any) -> Data:
        area = program.out(8)
        program.call("prctl", PR_GET_TID_ADDRESS, area, 0, 0, 0)
        return area

    def dump(self, thread: Any, run: Run, asked: Data, core: Message, ctx: DumpContext) -> None:
        (core.thread_info.clear_tid_addr,) = struct.unpack("<Q", run.bytes(asked))

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        program.call("set_tid_address", core.thread_info.clear_tid_addr)


RESOURCE = TidAddress()
