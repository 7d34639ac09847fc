"""Doing something as another process would: with its number, its credentials, in a directory or root of its own.

The kernel notes who connects sockets (SO_PEERCRED) and who sends messages (SCM_CREDENTIALS). A child that
shares our descriptors does these things, so that what it makes is ours at once. Its number is free
again when it is done. Kernel: kernel/fork.c, CLONE_FILES and CLONE_VFORK; net/unix/af_unix.c, init_peercred()
"""

from __future__ import annotations

import errno
import os
import struct

from ..errors import KernelError, TorporError
from ..linux.call import call
from ..linux.launch import aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

WALL = 0x40000000
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
_KEEP = (1 << 32) - 1


class Identity:
    """Who: ``pid`` (0: any), effective ids ``uid`` and ``gid`` (None: ours) and supplementary ``groups``."""

    __slots__ = ("gid", "groups", "pid", "uid")

    def __init__(
        self, pid: int = 0, uid: int | None = None, gid: int | None = None, groups: tuple[int, ...] = ()
    ) -> None:
        self.pid = pid
        self.uid = uid
        self.gid = gid
        self.groups = groups

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equals."""
        return self.pid, self.uid, self.gid, self.groups


def apart(action: Callable[[], Any], who: Identity | None = None, *, root: str = "", folder: str = "") -> Any:
    """What ``action()`` returns when a child process calls it.

    ``root`` becomes its root directory, then ``folder`` its working directory. If the pid is in use, another one
    is taken. What the action raises is raised here. It shares our memory: other threads may be at anything meanwhile.
    """
    answer: list[Any] = []
    failure: list[BaseException] = []

    def be_child() -> None:
        try:
            if root:
                os.chroot(root)
            if folder:
                os.chdir(folder)
            if who is not None and who.uid is not None:
                _become(who)
            answer.append(action())
        except BaseException as error:
            failure.append(error)

    # Kernel: commit_creds() in kernel/cred.c takes it from the memory, which is ours, when ids change.
    dumpable = call("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0)
    child = _clone(be_child, who.pid if who else 0)
    os.waitpid(child, WALL)
    if who is not None and who.uid is not None and dumpable < 2:
        call("prctl", PR_SET_DUMPABLE, dumpable, 0, 0, 0)
    if failure:
        error = failure[0]
        if isinstance(error, OSError) and not isinstance(error, TorporError):
            raise KernelError(str(error.filename or "system call"), error.errno or errno.EIO) from error
        raise error
    return answer[0]


def _clone(action: Callable[[], None], pid: int) -> int:
    try:
        return aside(action, pid)
    except KernelError as error:
        if error.errno not in (errno.EEXIST, errno.EINVAL) or not pid:
            raise
        return aside(action, 0)


def _become(who: Identity) -> None:
    assert who.uid is not None and who.gid is not None
    call("setgroups", len(who.groups), struct.pack(f"={len(who.groups)}I", *who.groups))
    call("setresgid", _KEEP, who.gid, _KEEP)
    call("setresuid", _KEEP, who.uid, _KEEP)
    # With root's rights in the file system: what they have done before need not be allowed to them now.
    call("setfsuid", 0)
