"""The signal that a thread gets when its parent ends: PR_SET_PDEATHSIG, kernel/sys.c.

Any change of credentials clears it, so it follows them. Image: thread_core_entry.pdeath_sig, if
there is one.
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

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2


class ParentDeathSignal(TaskResource):
    """The parent-death signal."""

    PER = "thread"
    ORDER = 92

    def ask(self, program: Program, thread: Any) -> Data:
        area = program.out(4)
        program.call("prctl", PR_GET_PDEATHSIG, area, 0, 0, 0)
        return area

    def dump(self, thread: Any, run: Run, asked: Data, core: Message, ctx: DumpContext) -> None:
        (number,) = struct.unpack("<i", run.bytes(asked))
        if number:
            core.thread_core.pdeath_sig = number

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if core.thread_core.pdeath_sig:
            program.call("prctl", PR_SET_PDEATHSIG, core.thread_core.pdeath_sig, 0, 0, 0)


RESOURCE = ParentDeathSignal()
