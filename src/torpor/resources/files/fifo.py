"""Named pipes (FIFOs).

Image: file_entry.fifo (fifo_entry); its ``regf_id`` is a REG entry with the path, the flags and the
owner. fifo-data holds what was in it, as pipes-data does for pipes. Kernel: fs/pipe.c, fifo_open().
"""

from __future__ import annotations

import os
import stat

from ...errors import ImageError
from ...images import schema as pb
from ...linux.call import buffer
from ..base import FileResource, SourceFile, reopen
from ..fown import emit, set_flags
from . import pipe, regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

FIONREAD = 0x541B


class Fifo(FileResource):
    """A description of a FIFO that was opened by its name."""

    FD_TYPE, FIELD = 3, "fifo"
    MODES = (stat.S_IFIFO,)
    PRIORITY = 30

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("/") and not source.flags & os.O_PATH

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        pipe.check_size(source)
        regular.RESOURCE.check(source, ctx)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        name = SourceFile(
            source.pid, source.fd, source.link, source.stat, source.borrow, ctx.new_id("file")
        )
        whole = pb.file_entry(type=pb.fd_types.REG, id=name.id)
        whole.reg.CopyFrom(regular.RESOURCE.dump(name, ctx))
        ctx.images.append("files", whole)
        key = ("fifo", source.stat.st_dev, source.stat.st_ino)
        if key not in ctx.memo:
            ctx.memo[key] = _number(source.stat.st_ino, ctx)
            pipe.save_contents(source, ctx.memo[key], "fifo-data", ctx)
        return pb.fifo_entry(id=source.id, pipe_id=ctx.memo[key], regf_id=name.id)

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        named = entry.regf_id if entry.HasField("regf_id") else entry.id
        # Opened both ways it does not wait for its other end, and then nor does the real opening.
        both = regular.open_file(ctx, named, os.O_RDWR | os.O_NONBLOCK)
        try:
            if not stat.S_ISFIFO(os.fstat(both).st_mode):
                raise ImageError("files.img", f"file {named}", "a FIFO is needed, and it is none")
            ctx.once(("fifo filled", entry.pipe_id), lambda: _fill(both, entry.pipe_id, ctx))
            flags = ctx.files[named][1].flags
            fd = reopen(both, flags & os.O_ACCMODE | os.O_NONBLOCK)
        finally:
            os.close(both)
        try:
            set_flags(fd, flags)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        named = ctx.files[entry.regf_id if entry.HasField("regf_id") else entry.id][1]
        emit(named.fown, fd, program, named.flags)


def _number(inode: int, ctx: DumpContext) -> int:
    """A number for the pipe in a FIFO: the inode's, or the next one that no other FIFO has."""
    taken = ctx.memo.setdefault(("fifo numbers",), set())
    number = inode & 0xFFFFFFFF
    while number in taken:
        number = (number + 1) & 0xFFFFFFFF
    taken.add(number)
    return number


def _fill(fd: int, number: int, ctx: BuildContext) -> bool:
    import fcntl

    held = buffer(4)
    fcntl.ioctl(fd, FIONREAD, held)
    # A process outside of the tree has kept the pipe alive, and with it what was in it.
    if not any(held.raw):
        pipe.fill(fd, number, "fifo-data", ctx)
    return True


RESOURCE = Fifo()
