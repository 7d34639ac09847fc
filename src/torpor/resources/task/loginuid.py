"""Whom the audit system takes a task for: /proc/PID/loginuid, fs/proc/base.c, kernel/audit.c.

Only a task itself can set it, in its own file, and its children inherit it: so a task whose parent has another one sets
it before it makes any child or changes its root, by :func:`emit`. Whoever has one already needs CAP_AUDIT_CONTROL for
it, and may be denied even so (AUDIT_FEATURE_LOGINUID_IMMUTABLE, AUDIT_FEATURE_ONLY_UNSET_LOGINUID): then it stays, with
a warning. The session id that comes with it is the kernel's choice.

Image: task_core_entry.loginuid.
"""

from __future__ import annotations

import errno
import os

from ... import log
from ...proc.read import read, read_system
from ...proc.scalars import LOGINUID_UNSET, parse_loginuid
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

AT_FDCWD = -100


class LoginUid(TaskResource):
    """The login uid."""

    INHERITED = False  # each copy is given it

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        found = _of(thread.task.pid)
        if found is not None:
            core.tc.loginuid = found

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        pass  # it has it since its birth

    def outside(self, task: Any, core: Message, ctx: BuildContext) -> None:
        """Say so if the kernel has not let the task have its login uid."""
        wanted = core.tc.loginuid if core.tc.HasField("loginuid") else None
        if wanted is None or (task.parent is None and wanted == ctx.once("own loginuid", _own)):
            return  # the second: it was born with it
        found = _of(task.live_pid)
        if found not in (None, wanted):
            log.warning(f"task {task.live_pid}: loginuid stays {_show(found)}, {_show(wanted)} was wanted")


def emit(task: Any, program: Program, ctx: BuildContext) -> None:
    """Emit the change of the login uid that a RestoredTask is born with, where it needs one.

    The task has no descriptors yet but the builder's, and the root directory of the builder.
    """
    born_with, sharing = ctx.once("own loginuid", _own), False
    if task.parent is not None:
        inherited = _wanted(task.parent)
        born_with = born_with if inherited is None else inherited
        sharing = task.parent.alive and task.ids.files_id == task.parent.ids.files_id
    wanted = _wanted(task)
    # Those who share a table of descriptors fill it at the same time: no number in it is known to be free.
    if wanted is None or born_with is None or wanted == born_with or sharing:
        return
    # A result can be passed on once, but the number is known: the lowest that is free.
    number = next(number for number in range(len(ctx.kept) + 1) if number not in ctx.kept)
    missing = (errno.ENOENT, errno.EBADF)  # nothing is mounted on /proc
    fd = program.call("openat", AT_FDCWD, b"/proc/self/loginuid\0", os.O_WRONLY, 0, may_fail=missing, why="login uid")
    text = b"%d" % wanted
    program.call("write", fd, text, len(text), may_fail=(errno.EPERM, errno.EINVAL, *missing))
    program.call("close", number, may_fail=missing)


def _wanted(task: Any) -> int | None:
    """The login uid of a RestoredTask; what it was made to have if it is a helper; None: unknown."""
    while task is not None and task.core is None:
        task = task.parent
    if task is None or not task.core.tc.HasField("loginuid"):
        return None
    return int(task.core.tc.loginuid)


def _of(pid: int) -> int | None:
    """LOGINUID_UNSET for none; None where the kernel has no such thing (CONFIG_AUDIT)."""
    try:
        return _number(read(pid, "loginuid"))
    except FileNotFoundError:
        return None


def _own() -> int | None:
    try:
        return _number(read_system("self/loginuid"))
    except FileNotFoundError:
        return None


def _number(text: bytes) -> int:
    found = parse_loginuid(text)
    return LOGINUID_UNSET if found is None else found


def _show(number: int | None) -> str:
    return "unset" if number == LOGINUID_UNSET else str(number)


RESOURCE = LoginUid()
