"""Who is told when a message comes into an empty POSIX message queue: mq_notify(3), ipc/mqueue.c.

Image: mq_queue_entry.notify, ours, which files/mqueue.py writes. Whoever asked for it loses it when he closes any
descriptor of the queue: so it is asked for again when the builder's descriptors are closed.
"""

from __future__ import annotations

from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class MqNotify(TaskResource):
    """Notification of a process by signal, or (SIGEV_NONE) just its place."""

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        pass  # it is seen at the queue

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        task = thread.task
        for fd, event in ctx.memo.get("mq notify", {}).get((task.ids.files_id, task.pid), {}).values():
            program.call("mq_notify", fd, event, why="to be told of messages")


RESOURCE = MqNotify()
