"""The stack of a thread's signal handlers: sigaltstack(2), kernel/signal.c.

A thread that is running on it has SS_ONSTACK in what it is told, which is not part of the
setting. One that got there with SS_AUTODISARM has the setting disabled for now; the handler's
frame brings it back.
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

STACK = struct.Struct("<QIxxxxQ")  # ss_sp, ss_flags, ss_size
SS_ONSTACK = 1


class SignalStack(TaskResource):
    """The alternate signal stack."""

    PER = "thread"
    ORDER = 35

    def ask(self, program: Program, thread: Any) -> Data:
        area = program.out(STACK.size)
        program.call("sigaltstack", 0, area)
        return area

    def dump(self, thread: Any, run: Run, asked: Data, core: Message, ctx: DumpContext) -> None:
        sas = core.thread_core.sas
        sas.ss_sp, sas.ss_flags, sas.ss_size = STACK.unpack(run.bytes(asked))

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if core.thread_core.HasField("sas"):
            sas = core.thread_core.sas
            stack = STACK.pack(sas.ss_sp, sas.ss_flags & ~SS_ONSTACK, sas.ss_size)
            program.call("sigaltstack", stack, 0)


RESOURCE = SignalStack()
