"""What the kernel takes back from System V semaphores when a task ends: SEM_UNDO, ipc/sem.c.

Image: ipc_sem_entry.undo, ours, which resources/sysv_ipc.py writes and reads. A task can be given such an adjustment
by an operation of its own only.
"""

from __future__ import annotations

from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext
    from ..sysv_ipc import Adjustment

SEMBUF_BYTES = 6


class SemUndo(TaskResource):
    """The adjustments of a process, which its threads share."""

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        pass  # it is seen at the semaphores

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        wanted: dict[int, list[Adjustment]] = ctx.memo.get("sem undo", {})
        for one in wanted.get(thread.task.pid, ()):
            operations = one.operations()
            count = len(operations) // SEMBUF_BYTES
            program.call("semop", one.semid, operations, count, why="to be undone when it ends")


RESOURCE = SemUndo()
