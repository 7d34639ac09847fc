"""Pipes: what is in them, in the pieces in which it lies there, and the descriptions of their ends.

Image: file_entry.pipe (pipe_entry), one for each description; pipes-data (pipe_data_entry and the
bytes), one for each pipe. Kernel: fs/pipe.c, fs/splice.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from ...errors import ImageError, KernelError
from ...images import schema as pb
from ...linux.call import call
from ..base import FileResource, make_group, reopen, unsupported
from ..fown import O_LARGEFILE, set_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

PAGE = os.sysconf("SC_PAGE_SIZE")
DEFAULT_BYTES = 16 * PAGE  # PIPE_DEF_BUFFERS
PRIVATE_MODE = 0o600
_SPLICE_F_NONBLOCK = 2
_ALL = 1 << 30
_PIECE_BYTES_MAX = DEFAULT_BYTES

#: (bytes, is it a packet?): what one buffer of a pipe holds.
Piece = tuple[bytes, bool]


class Pipe(FileResource):
    """An end of a pipe; or both, where one was opened again for reading and writing."""

    FD_TYPE, FIELD = 2, "pipe"
    MODES = (stat.S_IFIFO,)
    PRIORITY = 20

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("pipe:[") and not source.flags & os.O_PATH

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        check_size(source)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        number = source.stat.st_ino
        if ("pipe", number) not in ctx.memo:
            ctx.memo["pipe", number] = True
            save_contents(source, number, "pipes-data", ctx)
        return pb.pipe_entry(
            id=source.id, pipe_id=number, flags=source.flags, fown=ctx.fown(source)
        )

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        given = ctx.inherited.get(f"pipe:[{entry.pipe_id}]")
        if given is not None:
            return _inherit(given, entry.flags)
        made = ctx.once(("pipe", entry.pipe_id), lambda: make_group(ctx, lambda: _make_all(entry, ctx)))
        return int(made.pop(entry.id))


# --------------------------------------------------------------------------------------------- dump


def check_size(source: SourceFile) -> None:
    """Raise Unsupported if the pipe is larger than this machine lets us make one."""
    fd = source.borrow()
    size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    if size > DEFAULT_BYTES:
        for end in _pair(size, source):
            os.close(end)


def save_contents(source: SourceFile, number: int, image: str, ctx: DumpContext) -> None:
    """Write the pipe_data_entry of a pipe: size, owner, bytes. Nothing is taken out of the pipe."""
    fd = source.borrow()
    size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    pieces = _contents(source, fd, size)
    data = b"".join(content for content, _ in pieces)
    entry = pb.pipe_data_entry(pipe_id=number, bytes=len(data), size=size)
    if not _is_natural(pieces):
        entry.buffer.extend(len(content) << 1 | packet for content, packet in pieces)
    if source.link.startswith("pipe:["):
        # Whoever may open it again by /proc/self/fd. A FIFO's are in the file system.
        entry.uid, entry.gid = source.stat.st_uid, source.stat.st_gid
        entry.mode = stat.S_IMODE(source.stat.st_mode)
    ctx.images.append(image, entry, data)


def _contents(source: SourceFile, fd: int, size: int) -> list[Piece]:
    own = -1
    if source.flags & os.O_ACCMODE == os.O_WRONLY:
        if source.flags & os.O_ASYNC and not _has_readers(fd):
            # Nobody can read what is in it, and a reader who comes and goes would raise SIGIO.
            return []
        own = fd = reopen(fd, os.O_RDONLY | os.O_NONBLOCK)
    ends: tuple[int, ...] = ()
    try:
        ends = _pair(size, source)
        try:
            call("tee", fd, ends[1], _ALL, _SPLICE_F_NONBLOCK)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            return []
        return take_pieces(ends[0])
    finally:
        for end in (own, *ends):
            if end >= 0:
                os.close(end)


def _has_readers(fd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _pair(size: int, source: SourceFile | None = None) -> tuple[int, int]:
    """A pipe of ours for ``size`` bytes, neither end of which blocks."""
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _resize(ends[1], size)
    except BaseException as error:
        for end in ends:
            os.close(end)
        if source is not None and isinstance(error, KernelError) and error.errno == errno.EPERM:
            raise unsupported(source, f"a pipe of {size} bytes", hint=error.hint) from None
        raise
    return ends


def _resize(fd: int, size: int) -> None:
    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == size:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
    except OSError as error:
        assert error.errno is not None
        limits = "/proc/sys/fs/pipe-max-size (and pipe-user-pages-soft, -hard)"
        hint = f"raise {limits}, or have CAP_SYS_RESOURCE" if error.errno == errno.EPERM else ""
        raise KernelError(f"fcntl(F_SETPIPE_SZ, {size})", error.errno, hint=hint) from None


def take_pieces(reader: int) -> list[Piece]:
    """Empty the pipe ``reader``, which nobody writes to; gives what it held, buffer by buffer.

    A pipe of one buffer, filled from it, tells where its first buffer ends; one that holds the same
    buffer twice tells by a read(2) whether it is a packet, for a read stops behind a packet.
    """
    pieces: list[Piece] = []
    one = _pair(PAGE)
    try:
        two = _pair(2 * PAGE)
    except BaseException:
        os.close(one[0])
        os.close(one[1])
        raise
    try:
        while True:
            try:
                length = call("tee", reader, one[1], _ALL, _SPLICE_F_NONBLOCK)
            except KernelError as error:
                if error.errno != errno.EAGAIN:
                    raise
                return pieces
            if not length:
                return pieces
            for _ in range(2):
                call("tee", reader, two[1], length, _SPLICE_F_NONBLOCK)
            content = os.read(two[0], 2 * length)
            packet = len(content) == length
            if packet:
                os.read(two[0], length)
            os.read(one[0], length)
            os.read(reader, length)
            pieces.append((content[:length], packet))
    finally:
        for end in (*one, *two):
            os.close(end)


def _is_natural(pieces: list[Piece]) -> bool:
    """Would one write(2) of all the bytes leave them in these pieces?"""
    full = all(len(content) == PAGE for content, _ in pieces[:-1])
    return full and all(len(content) <= PAGE and not packet for content, packet in pieces)


# ------------------------------------------------------------------------------------------ restore


def _make_all(entry: Message, ctx: BuildContext) -> dict[int, int]:
    """Make the pipe and all descriptions of it that the images have: file id → descriptor."""
    number = entry.pipe_id
    entries = ctx.once(("pipe ends",), lambda: _ends(ctx)).get(number)
    ends = dict(
        zip((os.O_RDONLY, os.O_WRONLY), os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK), strict=True)
    )
    made: dict[int, int] = {}
    try:
        any_end = ends[os.O_WRONLY]
        fill(any_end, number, "pipes-data", ctx)
        # Those that pipe(2) made first: the other ones are made from what they stand for.
        for other in sorted(entries or [entry], key=lambda other: bool(other.flags & O_LARGEFILE)):
            access = other.flags & os.O_ACCMODE
            if access in ends and not other.flags & O_LARGEFILE:
                made[other.id] = ends.pop(access)
            else:
                made[other.id] = reopen(any_end, access | os.O_NONBLOCK)
        for other in entries or [entry]:
            set_flags(made[other.id], other.flags)
    except BaseException:
        for fd in made.values():
            os.close(fd)
        raise
    finally:
        # An end that nobody holds has to be gone, so that the other one shows it.
        for fd in ends.values():
            os.close(fd)
    return made


def _ends(ctx: BuildContext) -> dict[int, list[Message]]:
    """The descriptions of each pipe."""
    found: dict[int, list[Message]] = {}
    for kind, entry in ctx.files.values():
        if kind.FD_TYPE == Pipe.FD_TYPE:
            found.setdefault(entry.pipe_id, []).append(entry)
    return found


def fill(fd: int, number: int, image: str, ctx: BuildContext) -> None:
    """Give the empty pipe ``fd`` (for writing, not blocking) what ``image`` has for ``number``."""
    found = ctx.once((image,), lambda: _all_contents(image, ctx)).get(number)
    if found is None:
        return
    entry, data = found
    try:
        if entry.size:
            _resize(fd, entry.size)
        pieces = _pieces_of(entry, data, image)
        if _is_natural(pieces):
            if os.write(fd, data) != len(data):
                raise BlockingIOError
        else:
            _put_pieces(fd, pieces)
        if image == "pipes-data":  # a FIFO is a file of the file system, and not to be changed
            _set_owner(fd, entry)
    except BlockingIOError:
        why = f"{len(data)} bytes do not go into a pipe of {entry.size or DEFAULT_BYTES}"
        raise ImageError(f"{image}.img", f"pipe {number}", why) from None


def _set_owner(fd: int, entry: Message) -> None:
    if entry.HasField("uid") and (entry.uid, entry.gid) != (os.geteuid(), os.getegid()):
        os.fchown(fd, entry.uid, entry.gid)
    if entry.HasField("mode"):
        if entry.mode != stat.S_IMODE(entry.mode):
            why = f"{entry.mode:#o} is more than permissions"
            raise ImageError("pipes-data.img", f"pipe {entry.pipe_id}: mode", why)
        os.fchmod(fd, entry.mode)


def _all_contents(image: str, ctx: BuildContext) -> dict[int, tuple[Message, bytes]]:
    return {entry.pipe_id: (entry, data) for entry, data in ctx.images.iter_with_payload(image)}


def _pieces_of(entry: Message, data: bytes, image: str) -> list[Piece]:
    lengths = list(entry.buffer)
    if not lengths:
        return [(data[at : at + PAGE], False) for at in range(0, len(data), PAGE)]
    sizes = [length >> 1 for length in lengths]
    if sum(sizes) != len(data) or not all(0 < size <= _PIECE_BYTES_MAX for size in sizes):
        raise ImageError(
            f"{image}.img", f"pipe {entry.pipe_id}: buffer", f"does not add up to {len(data)} bytes"
        )
    pieces, at = [], 0
    for length, size in zip(lengths, sizes, strict=True):
        pieces.append((data[at : at + size], bool(length & 1)))
        at += size
    return pieces


def _put_pieces(fd: int, pieces: list[Piece]) -> None:
    """One buffer for each piece: write(2) adds to the last one, what splice(2) moves stays one."""
    ends = _pair(DEFAULT_BYTES)
    try:
        for content, packet in pieces:
            set_flags(ends[1], os.O_NONBLOCK | (os.O_DIRECT if packet else 0))
            left = os.write(ends[1], content)
            while left:
                left -= os.splice(ends[0], fd, left, flags=_SPLICE_F_NONBLOCK)
    finally:
        for end in ends:
            os.close(end)


def _inherit(given: int, flags: int) -> int:
    """A description of what the caller gave for the pipe, one of our own where we can have it."""
    kind = stat.S_IFMT(os.fstat(given).st_mode)
    if kind in (stat.S_IFIFO, stat.S_IFCHR):
        try:
            fd = reopen(given, flags & os.O_ACCMODE | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            pass  # not ours to open, or not to be opened that way: then we share the caller's
        else:
            set_flags(fd, flags)
            return fd
    return os.dup(given)


RESOURCE = Pipe()
