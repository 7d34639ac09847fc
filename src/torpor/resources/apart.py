"""Doing something as another process would: with its number, its credentials, in a directory or root of its own.

The kernel notes who connects sockets (SO_PEERCRED) and who sends messages (SCM_CREDENTIALS). A child that
shares our descriptors does these things, so that what it makes is ours at once. Its number is free
again when it is done. Kernel: kernel/fork.c, CLONE_FILES; net/unix/af_unix.c, init_peercred()
"""

from __future__ import annotations

import errno
import gc
import marshal
import os
import signal
import struct

from ..errors import KernelError, TorporError
from ..linux.call import address_of, buffer, call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CLONE_FILES, WALL = 0x400, 0x40000000
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
    """What ``action()`` returns when a child process calls it: numbers, bytes, tuples and lists of such.

    ``root`` becomes its root directory, then ``folder`` its working directory. If the pid is in use, another one
    is taken. An OSError of the action is raised here. It must not import anything.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        child = _clone(who.pid if who else 0)
        if child == 0:
            _be_child(action, who, root, folder, writer)
        try:
            _, status = os.waitpid(child, WALL)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, WALL)
            raise
        answer = os.read(reader, 1 << 16) if status == 0 else b""
    finally:
        os.close(reader)
        os.close(writer)
    if not answer:
        raise KernelError(f"a helper process (it ended with status {status:#x})", errno.ECHILD)
    failed, number, result = marshal.loads(answer)
    if failed:
        raise KernelError(failed, number) if number else TorporError(failed)
    return result


def _clone(pid: int) -> int:
    number = buffer(4)
    struct.pack_into("<i", number, 0, pid)
    # No signal when it ends: the parent may have a handler that waits for its own children.
    chosen = (address_of(number), 1) if pid > 0 else (0, 0)
    args = struct.pack("<11Q", CLONE_FILES, 0, 0, 0, 0, 0, 0, 0, *chosen, 0)
    try:
        return call("clone3", args, len(args))
    except KernelError as error:
        if error.errno not in (errno.EEXIST, errno.EINVAL) or not pid:
            raise
        return _clone(0)


def _be_child(
    action: Callable[[], Any], who: Identity | None, root: str, folder: str, writer: int
) -> None:
    try:
        gc.disable()  # what it would close is the parent's too
        try:
            if root:
                os.chroot(root)
            if folder:
                os.chdir(folder)
            if who is not None and who.uid is not None:
                _become(who)
            answer = ("", 0, action())
        except OSError as error:
            what = error.call if isinstance(error, KernelError) else str(error.filename or "system call")
            answer = (what, error.errno or errno.EIO, None)
        except TorporError as error:
            answer = (str(error), 0, None)
        os.write(writer, marshal.dumps(answer))
        os._exit(0)
    finally:
        os._exit(1)


def _become(who: Identity) -> None:
    assert who.uid is not None and who.gid is not None
    call("setgroups", len(who.groups), struct.pack(f"={len(who.groups)}I", *who.groups))
    call("setresgid", _KEEP, who.gid, _KEEP)
    call("setresuid", _KEEP, who.uid, _KEEP)
    # With root's rights in the file system: what they have done before need not be allowed to them now.
    call("setfsuid", 0)
