"""Unix sockets that are bound to a path: where the socket's file is, and how it comes to be there again.

Kernel: net/unix/af_unix.c, unix_bind_bsd(): the address is the path that was given, whatever becomes
of the file afterwards: it may be removed, renamed, or replaced by another.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from ..errors import KernelError, Unsupported, doing
from ..images import schema as pb
from ..linux import sockets
from ..linux.call import call
from .apart import apart
from .base import patiently
from .paths import strip_deleted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from .base import BuildContext

SIOCUNIXFILE = 0x89E0
RENAMED = "unix renamed"  # a key of ctx.memo: name in the images → name now, see unix_remap.py


class BoundFile:
    """The file of a bound socket: ``path`` of it now, ``stat``, and whether its name is ``gone``."""

    __slots__ = ("gone", "path", "stat")

    def __init__(self, path: bytes, result: os.stat_result, gone: bool) -> None:
        self.path = path
        self.stat = result
        self.gone = gone


def bound_file(fd: int) -> BoundFile | None:
    """The file that a socket is bound to; None for an abstract name or none."""
    try:
        file = fcntl.ioctl(fd, SIOCUNIXFILE)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    try:
        result = os.fstat(file)
        link = os.readlink(b"/proc/self/fd/%d" % file)
    finally:
        os.close(file)
    # Directories have two links or one; a file has none when it is removed.
    return BoundFile(strip_deleted(link) if not result.st_nlink else link, result, not result.st_nlink)


def is_path(name: bytes) -> bool:
    """Is it a path (as against an abstract name, or none)?"""
    return bool(name) and name[0] != 0


def address(name: bytes) -> bytes:
    """What to give to bind(2) or connect(2) for the name in an entry."""
    return name.rstrip(b"\0") if is_path(name) else name


def show(name: bytes) -> str:
    """A name for people: abstract ones begin with @."""
    if not name:
        return "no name"
    return os.fsdecode(address(name)) if is_path(name) else "@" + os.fsdecode(name[1:].replace(b"\0", b"@"))


# ---------------------------------------------------------------------- restore


def bind(fd: int, entry: Message, ctx: BuildContext) -> int:
    """Bind a socket as its entry says. Gives a descriptor (O_PATH) of its file, -1 for an abstract name."""
    name = address(entry.name)
    with doing(f"socket {show(entry.name)}"):
        if not is_path(name):
            patiently(lambda: _bind_abstract(fd, name))
            return -1
        folder = pb.get_bytes(entry.name_dir) or b"/"
        natural = os.path.join(folder, name)
        final = pb.get_bytes(entry.path) or natural
        if entry.deleted:
            anchor = _bind_deleted(fd, name, folder, natural, ctx)
        elif final != natural:
            anchor = _bind_elsewhere(fd, name, final, ctx, keep=True)
        else:
            _make_way(final, ctx)
            _bind_here(fd, name, folder)
            _forget_on_failure(final, ctx)
            anchor = _open(final, ctx)
        if entry.HasField("file_perms"):
            link = f"/proc/self/fd/{anchor}"
            os.chown(link, entry.file_perms.uid, entry.file_perms.gid)
            os.chmod(link, stat.S_IMODE(entry.file_perms.mode))
        return anchor


def _bind_abstract(fd: int, name: bytes) -> None:
    try:
        sockets.bind(fd, name)
    except KernelError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise Unsupported(
            "another socket has that name now",
            hint="abstract names are those of a network namespace: end its process, or for a copy one of its own "
            "(torpor clone --net new)",
        ) from None


def _open(path: bytes, ctx: BuildContext) -> int:
    return ctx.keep(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))


def _bind_here(fd: int, name: bytes, folder: bytes) -> None:
    if name.startswith(b"/"):
        sockets.bind(fd, name)
    else:
        apart(lambda: sockets.bind(fd, name), folder=os.fsdecode(folder))


def _forget_on_failure(path: bytes, ctx: BuildContext) -> None:
    ctx.on_failure.add(f"socket {os.fsdecode(path)}", lambda: os.unlink(path))


def _refuse_used(path: bytes, ctx: BuildContext) -> None:
    if _is_used(path):
        folder = os.fsdecode(os.path.dirname(path))
        raise Unsupported(
            "another process has bound a socket to its name",
            hint=f"--overlay {folder} gives each copy files of its own there, --remap-address {os.fsdecode(path)}=NEW "
            "another name" if ctx.options.own_pids
            else "end that process; removing the file would cut it off from its clients",
        )  # fmt: skip


def _make_way(path: bytes, ctx: BuildContext) -> None:
    """Remove what a bound socket left behind when it was closed. Raises Unsupported if anything else is there."""
    try:
        left = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(left.st_mode):
        raise Unsupported("a file that is no socket has its name now", hint="move that file away")
    patiently(lambda: _refuse_used(path, ctx))
    os.unlink(path)

    def put_back() -> None:
        os.mknod(path, stat.S_IFSOCK | stat.S_IMODE(left.st_mode))
        os.chown(path, left.st_uid, left.st_gid)
        os.chmod(path, stat.S_IMODE(left.st_mode))

    ctx.on_failure.add(f"socket file {os.fsdecode(path)}", put_back)


def _is_used(path: bytes) -> bool:
    """Does anybody have a socket that is bound to this file?

    A datagram socket is never connected to one of another type, so that nobody notices being asked.
    """
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    probe = sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM)
    try:
        sockets.connect(probe, b"/proc/self/fd/%d" % file)
    except KernelError as error:
        if error.errno == errno.ECONNREFUSED:
            return False
        if error.errno not in (errno.EPROTOTYPE, errno.EPERM):
            raise
    finally:
        os.close(probe)
        os.close(file)
    return True


def _bind_deleted(fd: int, name: bytes, folder: bytes, path: bytes, ctx: BuildContext) -> int:
    """Bind it to a name that is removed again at once."""
    if not os.path.lexists(path) and os.path.isdir(os.path.dirname(path)):
        _bind_here(fd, name, folder)
        try:
            return _open(path, ctx)
        finally:
            os.unlink(path)
    return _bind_elsewhere(fd, name, path, ctx, keep=False)


def _bind_elsewhere(fd: int, name: bytes, final: bytes, ctx: BuildContext, *, keep: bool) -> int:
    """Bind it to a path that is another file's, or leads nowhere, below a root directory of its own.

    The file is then moved to ``final``, or removed unless ``keep``.
    """
    import tempfile

    beside = os.path.dirname(final)
    while not keep and not os.path.isdir(beside):
        beside = os.path.dirname(beside)
    # Names with ".." must not lead out of it.
    inner = b"/" if name.startswith(b"/") else b"/" + b"d/" * (name.split(b"/").count(b"..") + 1)
    root = tempfile.mkdtemp(prefix=b".torpor-", dir=beside)
    here = os.path.normpath(root + os.path.join(inner, name))
    try:
        os.makedirs(root + inner, exist_ok=True)
        os.makedirs(os.path.dirname(root + os.path.join(inner, name)), exist_ok=True)
        apart(lambda: sockets.bind(fd, name), root=os.fsdecode(root), folder=os.fsdecode(inner))
        anchor = _open(here, ctx)
        if keep:
            _make_way(final, ctx)
            call("renameat2", -100, here + b"\0", -100, final + b"\0", 1)  # RENAME_NOREPLACE
            _forget_on_failure(final, ctx)
        return anchor
    finally:
        import shutil

        shutil.rmtree(root)
