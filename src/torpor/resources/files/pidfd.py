"""pidfd_open(2): a process or thread as a file descriptor.

Image: file_entry.pidfd (pidfd_entry); ``nspid`` is -1 when the process is gone, and ``ino`` then
tells which share one. Kernel: fs/pidfs.c.

The processes of the tree do not exist yet when files are made. So there is a stand-in at first; the
builder replaces its own copy when they do, and each holder fetches that one: it stays one
description, whoever shares it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct

from ...errors import ImageError
from ...images import schema as pb
from ...proc import fdinfo_kinds
from ..base import FileResource, make_group, unsupported
from ..fown import with_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

PIDFD_NONBLOCK, PIDFD_THREAD = os.O_NONBLOCK, os.O_EXCL
GONE = -1
#: include/uapi/linux/pidfd.h; the size in it is that of the first struct pidfd_info, 64 bytes
PIDFD_GET_INFO = 0xC040FF0B
PIDFD_INFO_EXIT = 1 << 3
#: No process ends by one of these.
_STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class Pidfd(FileResource):
    """A process of the tree, or one that is gone."""

    FD_TYPE, FIELD = 20, "pidfd"
    LINKS = ("anon_inode:[pidfd]",)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        if fdinfo_kinds.pidfd(source.fdinfo).Pid == 0:
            raise unsupported(source, "its process is in another pid namespace")

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        self.check(source, ctx)
        seen = fdinfo_kinds.pidfd(source.fdinfo)
        entry = pb.pidfd_entry(
            id=source.id, ino=source.stat.st_ino & 0xFFFFFFFF, nspid=GONE,
            flags=source.flags & ~os.O_ACCMODE, fown=ctx.fown(source),
        )  # fmt: skip
        if seen.Pid == GONE:
            status = _exit_status(source.borrow())
            if status:
                entry.exit_status = status
            return entry
        if not _is_in_tree(seen.Pid, ctx):
            raise unsupported(
                source,
                f"its process {seen.Pid} is not in the tree that is dumped",
                hint="close it before the dump, or dump a tree with that process in it",
            )
        entry.nspid = ctx.number(seen.Pid)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        if entry.nspid == GONE:
            made = ctx.once(("gone process", entry.ino), lambda: make_group(ctx, lambda: _make_gone(entry, ctx)))
            return int(made.pop(entry.id))
        if entry.nspid <= 0:
            raise ImageError(
                "files.img", f"file {entry.id}: pidfd: nspid", f"{entry.nspid} is no process id"
            )
        ctx.memo.setdefault("after_mappings", []).append(lambda: _replace(entry, ctx))
        return os.pidfd_open(os.getpid())

    def settle_each(
        self, entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext
    ) -> None:
        if entry.nspid == GONE:
            return
        held = {number for number, _, _ in task.fds}
        cloexec = next(cloexec for number, _, cloexec in task.fds if number == fd)
        # The kernel gives the lowest free number, so we know it; otherwise dup3 would fail.
        free = next(number for number in range(len(held) + 1) if number not in held)
        builder = ctx.built[entry.id]
        program.call(
            "pidfd_getfd", fd, builder, 0, why="from the builder, whom this stands for as yet"
        )
        program.call(
            "dup3", free, fd, os.O_CLOEXEC if cloexec else 0, why=f"pidfd of {entry.nspid}"
        )
        program.call("close", free)


def _is_in_tree(pid: int, ctx: DumpContext) -> bool:
    return pid in ctx.tasks or any(
        thread.tid == pid for task in ctx.tasks.values() for thread in task.threads
    )


def _exit_status(fd: int) -> int:
    """The wait status of a process that is gone; 0 where the kernel forgets it (before v6.15)."""
    info = bytearray(64)
    struct.pack_into("=Q", info, 0, PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(fd, PIDFD_GET_INFO, info)
    except OSError:
        return 0
    mask, status = struct.unpack_from("=Q", info)[0], struct.unpack_from("=i", info, 60)[0]
    return status & 0xFFFF if mask & PIDFD_INFO_EXIT else 0


def _open(pid: int, entry: Message) -> int:
    return with_flags(os.pidfd_open(pid, entry.flags & (PIDFD_NONBLOCK | PIDFD_THREAD)), entry.flags)


def _replace(entry: Message, ctx: BuildContext) -> None:
    """Now that the process exists, let the builder's number stand for it."""
    fd = _open(ctx.live.get(entry.nspid, entry.nspid), entry)
    try:
        os.dup2(fd, ctx.built[entry.id])
    finally:
        os.close(fd)


def _make_gone(entry: Message, ctx: BuildContext) -> dict[int, int]:
    """For all entries with this inode, one process that is gone: file id → descriptor."""
    entries = [
        other
        for kind, other in ctx.files.values()
        if kind.FD_TYPE == Pidfd.FD_TYPE and (other.nspid, other.ino) == (GONE, entry.ino)
    ] or [entry]
    made: dict[int, int] = {}
    pid = os.fork()
    if pid == 0:
        _end(entry.exit_status)
    try:
        # It cannot vanish before it is waited for.
        for other in entries:
            made[other.id] = _open(pid, other)
    except BaseException:
        for fd in made.values():
            os.close(fd)
        raise
    finally:
        os.waitpid(pid, 0)
    return made


def _end(status: int) -> None:
    """End the calling process in such a way that its parent sees ``status``."""
    try:
        number = status & 0x7F
        if number and number not in _STOP_SIGNALS:
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
            os.kill(os.getpid(), number)
    finally:
        os._exit(status >> 8 & 0xFF)


RESOURCE = Pidfd()
