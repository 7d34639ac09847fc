"""Attributes of a process that are set through its files in /proc, from outside: fs/proc/base.c.

Image: task_core_entry.oom_score_adj; coredump_filter is ours. The login uid, which only the task itself can write, is
in loginuid.py.
"""

from __future__ import annotations

import errno
import os

from ... import log
from ...errors import ImageError
from ...proc.read import open_file, read
from ...proc.scalars import parse_coredump_filter, parse_oom_score_adj
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

COREDUMP_FILTER_DEFAULT = 0x33


class ProcFiles(TaskResource):
    """OOM score adjustment, what a core file contains."""

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        pid = thread.task.pid
        core.tc.oom_score_adj = parse_oom_score_adj(read(pid, "oom_score_adj"))
        chosen = _read_if_there(pid, "coredump_filter")
        if chosen is not None and parse_coredump_filter(chosen) != COREDUMP_FILTER_DEFAULT:
            core.tc.coredump_filter = parse_coredump_filter(chosen)

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        pass

    def outside(self, task: Any, core: Message, ctx: BuildContext) -> None:
        """Write the files of the restored task; one that we may not write stays, with a warning."""
        if core.tc.HasField("oom_score_adj"):
            _write(task, "oom_score_adj", core.tc.oom_score_adj, parse_oom_score_adj)
        wanted = core.tc.coredump_filter or COREDUMP_FILTER_DEFAULT
        _write(task, "coredump_filter", wanted, parse_coredump_filter)


def _read_if_there(pid: int, name: str) -> bytes | None:
    try:
        return read(pid, name)
    except FileNotFoundError:
        return None


def _write(task: Any, name: str, value: int, parse: Any) -> None:
    pid = task.live_pid
    present = _read_if_there(pid, name)
    if present is None or parse(present) == value:
        return
    try:
        fd = open_file(pid, name, os.O_WRONLY)
        try:
            os.write(fd, b"%d" % value)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ImageError(
                f"core-{task.pid}.img", f"tc.{name}", f"the kernel does not take {value}"
            ) from None
        finally:
            os.close(fd)
    except PermissionError as error:
        log.warning(
            f"task {pid}: {name} stays {parse(present)}, {value} was wanted: {error.strerror}"
        )


RESOURCE = ProcFiles()
