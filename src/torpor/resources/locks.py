"""File locks: POSIX (fcntl), open file description (OFD), flock(2), and leases. Image:
filelocks.img (file_lock_entry).

A POSIX lock belongs to a process and a file, the others to an open file description. All show in
the ``lock:`` lines of fdinfo. Kernel: fs/locks.c, fs/proc/fd.c
"""

from __future__ import annotations

import errno
import os
import struct

from ..errors import ImageError, Unsupported, doing
from ..images import schema as pb
from ..proc import fdinfo, locks
from ..proc.read import read, read_system
from . import fown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from ..remote.program import Program
    from .base import BuildContext, DumpContext

# file_lock_entry.flag
POSIX, FLOCK, OFD, LEASE = 1, 2, 4, 8
KINDS = {locks.POSIX: POSIX, locks.FLOCK: FLOCK, locks.OFD: OFD, locks.LEASE: LEASE}
# file_lock_entry.type; fcntl.h
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
TYPES = {"READ": F_RDLCK, "WRITE": F_WRLCK, "UNLCK": F_UNLCK}
BREAKING = 4
F_SETLK, F_SETOWN, F_OFD_SETLK, F_SETLEASE = 6, 8, 37, 1024
LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4
AT_FDCWD = -100


# ---------------------------------------------------------------------- dump


def finish(ctx: DumpContext) -> None:
    """Write the locks of all tasks, whose descriptors have been dumped. Raises Unsupported without
    --file-locks.

    Whether there are any has shown with the descriptors, in ctx.memo["no locks"]: the list of all
    locks of the system would say so too, but takes 8 ms to read, for all processors are waited for.
    """
    known = ctx.memo.get("no locks")
    if known or (known is None and not read_system("locks").strip()):
        return
    seen: set[object] = set()
    for task in ctx.tasks.values():
        for fd in sorted(task.fds):
            found = fdinfo.parse(read(task.pid, f"fdinfo/{fd}"))
            with doing(f"task {task.pid}"), doing(f"fd {fd}"):
                for lock in found.locks:
                    _write(ctx, task, fd, lock, found.flags, seen)


def _write(
    ctx: DumpContext, task: Any, fd: int, lock: locks.Lock, flags: int, seen: set[object]
) -> None:
    # A lock of the parent's shows here too when it was taken through a description that both have.
    if lock.blocked or (lock.kind == locks.POSIX and lock.pid != task.pid):
        return
    what = (lock.kind, lock.dev, lock.inode, lock.type, lock.start, lock.end)
    owner = task.pid if lock.kind == locks.POSIX else ("description", task.fds[fd][0])
    if (owner, what) in seen:
        return
    if lock.kind not in KINDS or lock.mode == "BREAKER":
        raise Unsupported(f"a lock of kind {lock.kind} is held on it")
    if not ctx.options.file_locks:
        raise Unsupported(f"a file lock ({lock.kind}) is held on it", hint="--file-locks")
    if lock.kind == locks.POSIX and not _may_lock(flags, TYPES[lock.type]):
        return  # another descriptor of the task for the same file can
    seen.add((owner, what))
    ctx.images.append("filelocks", entry_of(lock, task.vpid, fd))


def _may_lock(flags: int, kind: int) -> bool:
    """Can a POSIX lock of that type be asked for through a description with these flags?"""
    mode = flags & os.O_ACCMODE
    return mode == os.O_RDWR or mode == (os.O_WRONLY if kind == F_WRLCK else os.O_RDONLY)


def entry_of(lock: locks.Lock, pid: int, fd: int) -> Message:
    """The file_lock_entry of a line of fdinfo; ``pid`` as the task itself sees it."""
    kind = TYPES[lock.type] | (BREAKING if lock.mode == "BREAKING" else 0)
    length = 0 if lock.end == locks.EOF else lock.end + 1 - lock.start
    return pb.file_lock_entry(
        flag=KINDS[lock.kind], type=kind, pid=pid, fd=fd, start=lock.start, len=length
    )


# ---------------------------------------------------------------------- restore


def emit(task: Any, program: Program, ctx: BuildContext) -> None:
    """Emit the calls by which a RestoredTask takes its locks; none without --file-locks, as in
    CRIU.

    They come after the last close(2) of the program, which would drop POSIX locks, before
    credentials are given up: breaking a lease takes its owner away for a moment.
    """
    if not ctx.options.file_locks:
        return
    by_pid: dict[int, list[Message]] = ctx.once("file locks", lambda: _by_pid(ctx))
    for entry in by_pid.get(task.pid, ()):
        _emit(entry, task, program, ctx)


def _by_pid(ctx: BuildContext) -> dict[int, list[Message]]:
    found: dict[int, list[Message]] = {}
    for entry in ctx.images.read_all("filelocks"):
        found.setdefault(entry.pid, []).append(entry)
    return found


def _emit(entry: Message, task: Any, program: Program, ctx: BuildContext) -> None:
    fd, kind = entry.fd, entry.type
    why = f"lock on fd {fd}"
    if entry.flag & FLOCK and kind in (F_RDLCK, F_WRLCK):
        program.call("flock", fd, (LOCK_SH if kind == F_RDLCK else LOCK_EX) | LOCK_NB, why=why)
    elif entry.flag & (POSIX | OFD) and kind in (F_RDLCK, F_WRLCK):
        request = struct.pack("<hhxxxxqqixxxx", kind, os.SEEK_SET, entry.start, entry.len, 0)
        program.call("fcntl", fd, F_SETLK if entry.flag & POSIX else F_OFD_SETLK, request, why=why)
    elif entry.flag & LEASE and kind & ~BREAKING in (F_RDLCK, F_WRLCK, F_UNLCK):
        file_id = next((number for other, number, _ in task.fds if other == fd), 0)
        if file_id not in ctx.files:
            raise _bad(entry, "no such descriptor")
        _emit_lease(entry, fd, ctx.files[file_id][1], program)
    else:
        raise _bad(entry, f"kind {entry.flag}, type {kind} are not known")


def _bad(entry: Message, why: str) -> ImageError:
    return ImageError("filelocks.img", f"lock of task {entry.pid}, fd {entry.fd}", why)


def _emit_lease(entry: Message, fd: int, own: Message, program: Program) -> None:
    """``own`` is the entry of the file: with its flags, and whom it sends signals to."""
    flags = own.flags
    target = entry.type & ~BREAKING
    if not entry.type & BREAKING:
        program.call("fcntl", fd, F_SETLEASE, target, why=f"lease on fd {fd}")
        return
    # What the lease was before somebody broke it: its holder reads, or it writes.
    held = F_RDLCK if flags & os.O_ACCMODE == os.O_RDONLY and target == F_UNLCK else F_WRLCK
    opening = os.O_WRONLY if target == F_UNLCK else os.O_RDONLY
    program.call("fcntl", fd, F_SETLEASE, held, why=f"lease on fd {fd}")
    # Its owner, who may be another process, was told long ago.
    program.call("fcntl", fd, F_SETOWN, 0, why="whose break nobody is told of")
    # Fails with EWOULDBLOCK always, and the lease is being broken. There is nothing to be closed.
    path = b"/proc/self/fd/%d\0" % fd
    program.call("openat", AT_FDCWD, path, opening | os.O_NONBLOCK, 0, may_fail=(errno.EAGAIN,))
    fown.emit(own.fown, fd, program)
