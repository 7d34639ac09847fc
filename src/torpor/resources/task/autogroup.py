"""The nice value of a session as a whole: /proc/PID/autogroup, sched(7), kernel/sched/autogroup.c.

Each session that setsid(2) makes is scheduled as a group of its own (kernel.sched_autogroup_enabled), whose weight is
written to the file of any of its members, from outside. Here it belongs to the leader: a session without its leader in
the tree is somebody else's.

Image: task_core_entry.autogroup_nice, ours, absent where it is 0.
"""

from __future__ import annotations

import os

from ... import log
from ...proc.read import open_file, read
from ...proc.scalars import parse_autogroup
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class Autogroup(TaskResource):
    """The nice value of an autogroup."""

    INHERITED = False  # each copy makes a session of its own

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        task = thread.task
        nice = _of(task.pid) if task.status.NSsid[-1] == task.own_pid else 0
        if nice:
            core.tc.autogroup_nice = nice

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        pass

    def outside(self, task: Any, core: Message, ctx: BuildContext) -> None:
        """Write it; where we may not, it stays, with a warning."""
        wanted = core.tc.autogroup_nice
        if not wanted or _of(task.live_pid) in (None, wanted):
            return
        fd = open_file(task.live_pid, "autogroup", os.O_WRONLY)
        try:
            os.write(fd, b"%d" % wanted)
        except OSError as error:  # EAGAIN: too many a second for whoever has not got CAP_SYS_ADMIN
            log.warning(f"task {task.live_pid}: the nice value {wanted} of its session is not set: {error.strerror}")
        finally:
            os.close(fd)


def _of(pid: int) -> int | None:
    """None where sessions are not scheduled as groups."""
    try:
        return parse_autogroup(read(pid, "autogroup"))
    except FileNotFoundError:  # a kernel without CONFIG_SCHED_AUTOGROUP
        return None


RESOURCE = Autogroup()
