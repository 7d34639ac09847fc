"""Deleted files that are still open: their content travels with the images, and they are made anew
at restore.

Image: ghost-file-N (ghost_file_entry, then the content or the runs of it that are no holes) and
remap-fpath, which says which entries of files.img are the same ghost. Kernel: fs/namei.c (a name
can be removed while the file is open).

At restore a ghost gets its name for the moment that it takes to open it by that name, so that its
/proc link reads as before. Everybody opens it through that descriptor afterwards, and nothing needs
to be cleaned up later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from ..errors import ImageError, KernelError
from ..images import schema as pb
from ..images.source import refused
from ..linux.call import call
from . import xattrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..images.schema import Message
    from ..images.store import ImageWriter
    from .base import BuildContext, DumpContext
    from .paths import Found

#: Content of at least this many bytes is stored without its holes, as CRIU does.
CHUNKS_FROM = 3 * 4096
COPY_BYTES = 1 << 20
KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400


# ---------------------------------------------------------------------- dump


def dump(found: Found, ctx: DumpContext) -> int:
    """Write the ghost image of a deleted file, once for each inode; its number."""
    key = ("ghost", found.stat.st_dev, found.stat.st_ino)
    if key not in ctx.memo:
        number = ctx.new_id("ghost")
        _write(found, number, ctx)
        ctx.memo[key] = number
    return int(ctx.memo[key])


def _write(found: Found, number: int, ctx: DumpContext) -> None:
    result = found.stat
    entry = pb.ghost_file_entry(uid=result.st_uid, gid=result.st_gid, mode=result.st_mode)
    entry.dev = os.major(result.st_dev) << 20 | os.minor(result.st_dev)
    entry.ino = result.st_ino
    if stat.S_ISCHR(result.st_mode) or stat.S_ISBLK(result.st_mode):
        entry.rdev = result.st_rdev
    for field, nanoseconds in ((entry.atim, result.st_atime_ns), (entry.mtim, result.st_mtime_ns)):
        field.tv_sec, field.tv_usec = nanoseconds // 10**9, nanoseconds % 10**9 // 1000
    chunked = stat.S_ISREG(result.st_mode) and result.st_size >= CHUNKS_FROM
    if chunked:
        entry.chunks, entry.size = True, result.st_size
    if stat.S_ISLNK(result.st_mode):
        pb.put_bytes(entry, "symlnk_target", _link_text(found))
    else:
        xattrs.dump(found.proc_link, entry.xattr)
    image = f"ghost-file-{number:x}"
    ctx.images.append(image, entry)
    if not stat.S_ISREG(result.st_mode):
        return
    # A description of our own: the position of theirs must not move, and it need not be readable.
    fd = open_quietly(found.proc_link)
    try:
        if not chunked:
            store(ctx.images, image, fd, 0, result.st_size)
            return
        for start, end in data_runs(fd, result.st_size):
            ctx.images.append(image, pb.ghost_chunk_entry(off=start, len=end - start))
            store(ctx.images, image, fd, start, end - start)
    finally:
        os.close(fd)


def open_quietly(path: str) -> int:
    """Open a file to be read without a change of its access time, where we may."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


def _link_text(found: Found) -> bytes:
    fd = os.open(found.proc_link, os.O_PATH | os.O_CLOEXEC)
    try:
        return os.readlink(b"", dir_fd=fd)
    finally:
        os.close(fd)


def data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of what is no hole in the first ``size`` bytes of a file. Moves its
    position."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            if error.errno != errno.EINVAL:
                raise
            start, end = end, size  # the file system does not tell
        if start >= size:
            return
        yield start, end


def store(images: ImageWriter, image: str, source: int, offset: int, size: int) -> int:
    """Copy from a file to the end of an image; how many bytes there were. Raises KernelError."""
    try:
        return copy(source, offset, images.fd(image), size)
    except OSError as error:
        raise refused(f"write `{image}.img`", error) from None


def copy(source: int, offset: int, target: int, size: int) -> int:
    """Copy ``size`` bytes from ``offset`` of one file to the position of another; how many there
    were."""
    left = size
    while left:
        try:
            count = os.sendfile(target, source, offset, min(left, COPY_BYTES))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            count = os.write(target, os.pread(source, min(left, COPY_BYTES), offset))
        if count == 0:
            break
        offset += count
        left -= count
    return size - left


# ---------------------------------------------------------------------- restore


class Anchors:
    """A file without a lasting name, held by descriptors of the builder.

    ``by_name`` has an O_PATH descriptor for each name that it is known by, ``ready`` descriptions
    that could only be made while the name was there, by the id of their file_entry.
    """

    __slots__ = ("by_name", "ready")

    def __init__(self) -> None:
        self.by_name: dict[bytes, int] = {}
        self.ready: dict[int, int] = {}


class Brief:
    """Names that exist for a moment; leaving the ``with`` block removes them, and the directories
    made for them."""

    def __init__(self) -> None:
        self._made: list[tuple[bytes, bool]] = []

    def parents(self, name: bytes) -> None:
        """Make the directories that lead to ``name`` where they are missing."""
        missing = []
        parent = os.path.dirname(name)
        while not os.path.lexists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for path in reversed(missing):
            os.mkdir(path, 0o700)
            self._made.append((path, True))

    def made(self, name: bytes, is_dir: bool = False) -> None:
        """``name`` exists now and is to be removed."""
        self._made.append((name, is_dir))

    def __enter__(self) -> Brief:
        return self

    def __exit__(self, *_: object) -> None:
        failed: OSError | None = None
        again: list[tuple[bytes, bool]] = []
        while self._made:
            name, is_dir = self._made.pop()
            try:
                os.rmdir(name) if is_dir else os.unlink(name)
            except OSError as error:
                failed = failed or error
                again.append((name, is_dir))
        for name, is_dir in again:  # nothing of ours is to stay behind for one failed call
            with contextlib.suppress(OSError):
                os.rmdir(name) if is_dir else os.unlink(name)
        if failed is not None:
            raise failed


def anchors(ctx: BuildContext, number: int, users: list[Message]) -> Anchors:
    """The ghost ``number``, made the first time. ``users`` are all the reg_file_entry that are this
    ghost."""
    made: Anchors = ctx.once(("ghost", number), lambda: _make(ctx, number, users))
    return made


def _make(ctx: BuildContext, number: int, users: list[Message]) -> Anchors:
    image = f"ghost-file-{number:x}"
    spans = list(ctx.images.spans(image, required=True))
    if not spans:
        raise ImageError(f"{image}.img", "", "it is empty")
    entry = spans[0].message
    kind = stat.S_IFMT(entry.mode)
    if kind not in KINDS:
        why = f"{entry.mode:#o} is no kind of file that can be a ghost"
        raise ImageError(f"{image}.img", "mode", why)
    found = Anchors()
    with Brief() as brief:
        first = _unnamed(ctx, users, found) if kind == stat.S_IFREG else b""
        for user in users:
            name = pb.get_bytes(user.name)
            if name in found.by_name:
                continue
            brief.parents(name)
            shown = _link(first, name, number) if first else _create(name, entry, number)
            brief.made(shown, kind == stat.S_IFDIR)
            first = first or shown
            found.by_name[name] = ctx.keep(os.open(shown, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
            open_now(
                ctx, found, [other for other in users if pb.get_bytes(other.name) == name], shown
            )
    fill(ctx, image, spans, next(iter(found.by_name.values())))
    return found


def open_now(ctx: BuildContext, found: Anchors, users: list[Message], shown: bytes) -> None:
    """Open those descriptions that cannot be opened through a link of /proc, which O_NOFOLLOW
    forbids."""
    for user in users:
        if user.flags & os.O_NOFOLLOW:
            found.ready[user.id] = ctx.keep(os.open(shown, opening_flags(user.flags)))


def opening_flags(flags: int) -> int:
    """What to open an existing file with so that its description has these status flags."""
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        flags &= ~os.O_TMPFILE
    return flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | os.O_NOCTTY | os.O_CLOEXEC


def _unnamed(ctx: BuildContext, users: list[Message], found: Anchors) -> bytes:
    """A file that never had a name is made that way again: its owner may still give it one with
    linkat(2).

    Gives a path that it can be linked from, b"" where no user asked for it or the file system has
    no such files.
    """
    for user in users:
        if user.flags & os.O_TMPFILE != os.O_TMPFILE:
            continue
        name = pb.get_bytes(user.name)
        flags = user.flags & ~(os.O_CREAT | os.O_TRUNC | os.O_EXCL) | os.O_CLOEXEC
        try:
            fd = os.open(os.path.dirname(name), flags, 0o600)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                return b""
            raise
        found.ready[user.id] = ctx.keep(fd)
        path = f"/proc/self/fd/{found.ready[user.id]}"
        found.by_name[name] = ctx.keep(os.open(path, os.O_PATH | os.O_CLOEXEC))
        return path.encode()
    return b""


def _link(target: bytes, name: bytes, number: int) -> bytes:
    """Another name for ``target``; the one that was free."""
    for candidate in _candidates(name, number):
        try:
            # os.link() follows symbolic links only if a directory is given.
            follow = AT_SYMLINK_FOLLOW if target.startswith(b"/proc/self/fd/") else 0
            call("linkat", AT_FDCWD, target + b"\0", AT_FDCWD, candidate + b"\0", follow)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            continue
        return candidate
    raise AssertionError("unreachable")


def _create(name: bytes, entry: Message, number: int) -> bytes:
    for candidate in _candidates(name, number):
        try:
            _create_at(candidate, entry)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")


def _candidates(name: bytes, number: int) -> Iterator[bytes]:
    """Names to try: its own first. Somebody else's file of that name is not touched."""
    yield name
    suffix = b".cr.%x.ghost" % number
    parent, last = os.path.split(name)
    yield os.path.join(parent, last[: 255 - len(suffix)] + suffix)
    for attempt in range(1 << 16):
        yield os.path.join(parent, b".cr.%x.%x.ghost" % (number, attempt))
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)


def _create_at(path: bytes, entry: Message) -> None:
    # Nobody else may open it while it has a name: the mode comes later.
    kind = stat.S_IFMT(entry.mode)
    if kind == stat.S_IFREG:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    elif kind == stat.S_IFDIR:
        os.mkdir(path, 0o700)
    elif kind == stat.S_IFLNK:
        os.symlink(pb.get_bytes(entry.symlnk_target), path)
    else:
        os.mknod(path, kind | 0o600, entry.rdev)


def _fill_regular(source: int, image: str, spans: list[Any], path: str) -> None:
    entry = spans[0].message
    target = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if entry.chunks:
            os.ftruncate(target, entry.size)
        for span in spans[1:] if entry.chunks else spans:
            os.lseek(target, span.message.off if entry.chunks else 0, os.SEEK_SET)
            if copy(source, span.offset, target, span.size) != span.size:
                raise ImageError(f"{image}.img", "", "it shrinks as it is read")
    finally:
        os.close(target)


def fill(ctx: BuildContext, image: str, spans: list[Any], anchor: int) -> None:
    """Give a new file (our descriptor ``anchor``, which nobody finds by a name) content, owner, mode and times."""
    entry = spans[0].message
    path = f"/proc/self/fd/{anchor}"
    if stat.S_ISREG(entry.mode):
        source = ctx.images.open(image)
        try:
            _fill_regular(source, image, spans, path)
        finally:
            os.close(source)
    os.chown(path, entry.uid, entry.gid)
    if not stat.S_ISLNK(entry.mode):
        os.chmod(path, stat.S_IMODE(entry.mode))
        xattrs.restore(path, entry.xattr)
    if entry.HasField("atim"):
        times = [time.tv_sec * 10**9 + time.tv_usec * 1000 for time in (entry.atim, entry.mtim)]
        if max(times) >= 1 << 63:  # the year 2262
            raise ImageError(f"{image}.img", "atim, mtim", "beyond all times")
        os.utime(path, ns=(times[0], times[1]))
