"""Who is told by signal that a file is ready, and the status flags of open file descriptions: what
all kinds of files have.

Image: fown_entry, in every entry of files.img. Kernel: fs/fcntl.c (f_setown, setfl).
"""

from __future__ import annotations

import fcntl
import os
import struct

from ..errors import Unsupported
from ..images import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..images.schema import Message
    from ..remote.program import Program
    from .base import SourceFile

# include/uapi/asm-generic/fcntl.h
F_SETFL, F_SETSIG, F_GETSIG, F_SETOWN_EX, F_GETOWN_EX, F_GETOWNER_UIDS = 4, 10, 11, 15, 16, 17
#: Shown for every description made by open(2) on a 64-bit kernel; glibc calls it 0.
O_LARGEFILE = 0o100000
#: What F_SETFL can change: SETFL_MASK in fs/fcntl.c, without O_ASYNC.
SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME

PR_SET_DUMPABLE = 4
_KEEP = (1 << 32) - 1  # setresuid(2): leave this one as it is


def dump(source: SourceFile, number: Callable[[int], int] = lambda pid: pid) -> Message:
    """The fown_entry of a description; all zero where nobody asked for signals. ``number`` makes of
    a number of ours that of the tree, 0 for an owner that it does not see.
    """
    entry = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    if source.seen is not None and not source.seen.owner:
        return entry
    if source.flags & os.O_PATH:
        return entry  # fcntl(2) knows no owner of such a descriptor: EBADF
    fd = source.borrow()
    entry.signum = fcntl.fcntl(fd, F_GETSIG)
    kind, pid = struct.unpack("ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    pid = number(pid) if pid else 0
    if pid:
        entry.pid_type, entry.pid = kind, pid
        entry.uid, entry.euid = struct.unpack("II", fcntl.fcntl(fd, F_GETOWNER_UIDS, bytes(8)))
    return entry


def emit(entry: Message, fd: int, program: Program, flags: int = 0, owner: int | None = None) -> None:
    """Emit the calls by which a task makes ``fd``'s description have this owner.

    The task must still be root in all three of its ids and dumpable, and the owner must exist.
    ``flags`` are the status flags of the description: with O_ASYNC among them they are set here,
    because the kernel notes the number of the descriptor by which it is switched on, and tells it
    in si_fd. ``owner``: how the task sees the owner, if not by its number in the images. Raises Unsupported where it
    cannot see it.
    """
    if entry.signum:
        program.call("fcntl", fd, F_SETSIG, entry.signum, why="signal of the owner")
    if entry.pid:
        # The saved id stays root, which is the way back.
        other = entry.uid or entry.euid
        if other:
            program.call("setresuid", entry.uid, entry.euid, _KEEP, why="the owner's credentials")
        if owner == 0:
            raise Unsupported(f"fd {fd}: its owner {entry.pid} (F_SETOWN) is outside of the task's pid namespace")
        argument = struct.pack("iI", entry.pid_type, entry.pid if owner is None else owner)
        program.call("fcntl", fd, F_SETOWN_EX, argument, why="owner")
        if other:
            program.call("setresuid", 0, 0, _KEEP, why="back")
            program.call("prctl", PR_SET_DUMPABLE, 1, why="a change of credentials cleared it")
    if flags & os.O_ASYNC:
        program.call("fcntl", fd, F_SETFL, flags & (SETTABLE | os.O_ASYNC), why="O_ASYNC")


def set_flags(fd: int, flags: int) -> None:
    """Give our own ``fd`` those status flags that F_SETFL can change. O_ASYNC is left to
    :func:`emit`.
    """
    if (fcntl.fcntl(fd, fcntl.F_GETFL) ^ flags) & SETTABLE:
        fcntl.fcntl(fd, F_SETFL, flags & SETTABLE)


def with_flags(fd: int, flags: int) -> int:
    """A descriptor that was just made, with these status flags (:func:`set_flags`); closed if it cannot have them."""
    try:
        set_flags(fd, flags)
    except BaseException:
        os.close(fd)
        raise
    return fd
