"""Segments of a process's own: modify_ldt(2), arch/x86/kernel/ldt.c.

Programs for Windows and DOS make some. What uses them is mostly 16- and 32-bit code, which is refused, and so are they.
"""

from __future__ import annotations

import errno

from ...errors import Unsupported
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program, Ref, Run
    from ..base import BuildContext, DumpContext

READ, ENTRY_BYTES = 0, 8


class LocalDescriptors(TaskResource):
    """The local descriptor table."""

    def ask(self, program: Program, thread: Any) -> Ref:
        # Answers with the number of bytes that are asked for, 0 where there is no table.
        return program.call("modify_ldt", READ, program.out(ENTRY_BYTES), ENTRY_BYTES, may_fail=(errno.ENOSYS,))

    def dump(self, thread: Any, run: Run, asked: Ref, core: Message, ctx: DumpContext) -> None:
        if run.result(asked) > 0:
            raise Unsupported("it has a local descriptor table (modify_ldt)", hint="only 64-bit programs can be dumped")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        pass


RESOURCE = LocalDescriptors()
