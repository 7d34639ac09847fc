"""May others trace this process and does it leave a core file: PR_SET_DUMPABLE, kernel/sys.c.

It belongs to the memory, so its place in the images is mm_entry.dumpable, which is the engine's
to write: dump() leaves it in ``task.answers["dumpable"]``. Each thread's change of credentials
resets it, so each thread sets it again.
"""

from __future__ import annotations

from ...proc.read import read_system
from ..base import TaskResource
from .creds import same_as_own

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program, Ref, Run
    from ..base import BuildContext, DumpContext

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
BY_ROOT_ONLY = 2  # a value that prctl(2) does not take: only a change of credentials leads to it


class Dumpable(TaskResource):
    """The dumpable attribute."""

    PER = "thread"
    ORDER = 92

    def ask(self, program: Program, thread: Any) -> Ref | None:
        if thread.tid != thread.task.pid:
            return None
        return program.call("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0)

    def dump(
        self, thread: Any, run: Run, asked: Ref | None, core: Message, ctx: DumpContext
    ) -> None:
        if asked is not None:
            thread.task.answers["dumpable"] = run.result(asked)

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        mm = thread.task.mm
        if mm is None or not mm.HasField("dumpable"):
            return
        value = mm.dumpable
        if value == BY_ROOT_ONLY:
            changed = not same_as_own(core.thread_core.creds, ctx)
            if changed and int(read_system("sys/fs/suid_dumpable")) == BY_ROOT_ONLY:
                return  # the change of credentials has just led to it
            value = 0  # the next best: no core file at all
        program.call("prctl", PR_SET_DUMPABLE, value, 0, 0, 0, why="dumpable")


RESOURCE = Dumpable()
