"""Root directory, working directory and umask of a process. Image: fs-PID.img (fs_entry). Kernel:
fs/fs_struct.c"""

from __future__ import annotations

import os

from ..images import schema as pb
from .files import regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from ..remote.program import Program
    from .base import BuildContext, DumpContext


def dump(ctx: DumpContext, task: Any) -> Message:
    """The fs_entry of a SourceTask."""
    entry = pb.fs_entry(umask=task.status.Umask)
    entry.cwd_id = regular.file_id_for(ctx, task.pid, f"/proc/{task.pid}/cwd")
    entry.root_id = regular.file_id_for(ctx, task.pid, f"/proc/{task.pid}/root")
    return entry


def prepare(entry: Message, ctx: BuildContext) -> None:
    """Open the directories in the builder, which the tasks inherit."""
    for file_id in (entry.root_id, entry.cwd_id):
        ctx.once(("directory", file_id), lambda file_id=file_id: _open(ctx, file_id))  # type: ignore[misc]


def _open(ctx: BuildContext, file_id: int) -> int:
    return ctx.keep(regular.open_file(ctx, file_id, os.O_RDONLY | os.O_DIRECTORY))


def _emit_change(fd: int, own_mounts: bool, program: Program, why: str) -> None:
    """Emit a change to the directory behind ``fd``: by its name in a mount namespace that is a copy of ours, as
    getcwd(2) would call it unreachable.
    """
    name = os.readlink(f"/proc/self/fd/{fd}")
    try:
        if own_mounts and _same(os.stat(name), os.fstat(fd)):
            program.call("chdir", os.fsencode(name) + b"\0", why=why)
            return
    except OSError:
        pass  # it has no name any more
    program.call("fchdir", fd, why=why)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def emit(entry: Message, program: Program, ctx: BuildContext, *, own_mounts: bool = False) -> None:
    """Emit the calls that give a process its directories and umask, from descriptors that
    ``prepare`` opened.

    They need CAP_SYS_CHROOT where the root is another one than the builder's, and the descriptors
    still open. ``own_mounts``: the process is in a mount namespace of its own.
    """
    root, cwd = ctx.memo["directory", entry.root_id], ctx.memo["directory", entry.cwd_id]
    if not _same(os.stat("/"), os.fstat(root)):
        _emit_change(root, own_mounts, program, "root directory")
        program.call("chroot", b".\0")
        own_mounts = False  # names do not lead there any more
    _emit_change(cwd, own_mounts, program, "working directory")
    if entry.HasField("umask"):
        program.call("umask", entry.umask)
