"""Files that inotify and fanotify watch: the kernel tells their inode and a handle, a restore wants a name.

Image: fh_entry (the handle, and the path where there is one). Kernel: fs/notify/fdinfo.c,
fs/fhandle.c, fs/exportfs/expfs.c
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..errors import KernelError, TaskGone, Unsupported, doing
from ..images import schema as pb
from ..linux.call import buffer, call
from ..proc import fdinfo, mountinfo
from ..proc.fdinfo_watches import device
from ..proc.read import numbers, read
from . import ghost, remap
from .paths import below, namespace_root, within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ..images.schema import Message
    from ..proc.fdinfo_watches import FileHandle
    from ..proc.mountinfo import Mount
    from .base import BuildContext, DumpContext, SourceFile

HANDLE_WORDS = 16
#: Where CRIU looks for a watched file whose handle says nothing.
HINTS = (
    "/etc", "/var/spool", "/var/log", "/usr/share/dbus-1/services", "/usr/share/dbus-1/system-services",
    "/var/lib/polkit-1/localauthority", "/usr/share/polkit-1/actions", "/lib/udev",
)  # fmt: skip
#: So many names are looked at, at most, on a mount whose files have no handles.
SEARCH_MAX = 500_000
FIONREAD = 0x541B


class Watched:
    """An inode to be watched: its number, ``sdev`` (device in the kernel's form) and ``handle``, if there is one."""

    __slots__ = ("handle", "ino", "sdev")

    def __init__(self, ino: int, sdev: int, handle: FileHandle | None) -> None:
        self.ino = ino
        self.sdev = sdev
        self.handle = handle

    def __str__(self) -> str:
        major, minor = device(self.sdev)
        return f"inode {self.ino} on device {major}:{minor}"


# ---------------------------------------------------------------------- dump


def handle_entry(watched: Watched, source: SourceFile, ctx: DumpContext) -> Message:
    """The fh_entry of a watched inode. Raises Unsupported when a restore could not find it."""
    path = find(watched, source, ctx)
    entry = pb.fh_entry(bytes=0, type=0)
    if watched.handle is not None:
        data = watched.handle.data
        entry.bytes, entry.type = len(data), watched.handle.type
        entry.handle.extend(struct.unpack(f"<{HANDLE_WORDS}Q", data.ljust(8 * HANDLE_WORDS, b"\0")))
    else:
        entry.handle.extend([0] * HANDLE_WORDS)
    if path:
        pb.put_bytes(entry, "path", path)
    return entry


def find(watched: Watched, source: SourceFile, ctx: DumpContext) -> bytes:
    """A path of the inode; b"" if it has none, but will be found: deleted, or by its handle alone."""
    key = ("watched", watched.sdev, watched.ino)
    if key not in ctx.memo:
        hint = ctx.hints.get(key)
        known = hint and _is_there(hint, watched, namespace_root(ctx, source.holder), ctx.memo)
        ctx.memo[key] = ctx.hints[key] = hint if known else _find(watched, source, ctx)
    path: bytes | None = ctx.memo[key]
    if path is None:
        raise Unsupported(
            f"fd {source.fd} ({source.link}): no name is known for {watched}, which it watches",
            hint="--irmap-scan-path PATH tells where to look for it",
        )
    return path


def _find(watched: Watched, source: SourceFile, ctx: DumpContext) -> bytes | None:
    root = namespace_root(ctx, source.holder)
    opened = False
    for mount in _mounts(watched.sdev, source.holder, ctx.memo):
        at = _directory(mount, source.holder, root, ctx)
        fd, links = _open_handle(watched, at) if at >= 0 else (-1, 0)
        if fd < 0:
            continue
        try:
            opened = True
            if not links:
                return b""
            path = os.readlink(b"/proc/self/fd/%d" % fd)
        finally:
            os.close(fd)
        if _is_there(path, watched, root, ctx.memo):
            return path
    options = ctx.options
    places = [*options.irmap_scan_path, *HINTS]
    if not opened or options.force_irmap:
        found = _search(watched, [os.fsencode(place) for place in places], root, ctx.memo)
        if found:
            return found
    if opened:
        return b""
    for path in _known_paths(source.holder):
        if _is_there(path, watched, root, ctx.memo):
            return path
    mountpoints = [mount.mountpoint for mount in _mounts(watched.sdev, source.holder, ctx.memo)]
    return _search(watched, mountpoints, root, ctx.memo)


def _mounts(sdev: int, pid: int, memo: dict[object, Any]) -> list[Mount]:
    """The mounts of a device that a task has; read once."""
    key = ("mounts by device", pid)
    if key not in memo:
        by_device: dict[tuple[int, int], list[Mount]] = {}
        for one in mountinfo.parse(read(pid, "mountinfo")):
            by_device.setdefault(one.dev, []).append(one)
        memo[key] = by_device
    found: list[Mount] = memo[key].get(device(sdev), [])
    return found


def _directory(mount: Mount, pid: int, root: int, ctx: DumpContext) -> int:
    """A descriptor of the mount point, the context's; -1 if it cannot be opened."""
    key = ("mount point", pid, mount.mnt_id)
    if key not in ctx.memo:
        ctx.memo[key] = _open_mount(mount, root)
        if ctx.memo[key] >= 0:
            ctx.adopt(ctx.memo[key])
    return int(ctx.memo[key])


def _open_mount(mount: Mount, root: int) -> int:
    try:
        return os.open(below(mount.mountpoint), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    except OSError:
        return -1


def _open_handle(watched: Watched, at: int) -> tuple[int, int]:
    """(O_PATH descriptor of the inode by its handle, how many names it has); -1 where that does not work on the mount
    that ``at`` is on.
    """
    if watched.handle is None:
        return -1, 0
    data = watched.handle.data
    try:
        handle = struct.pack("=Ii", len(data), watched.handle.type) + data
        fd = call("open_by_handle_at", at, handle, os.O_PATH | os.O_CLOEXEC)
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise
        return -1, 0
    here = os.fstat(fd)
    if here.st_ino == watched.ino:
        return fd, here.st_nlink
    os.close(fd)
    return -1, 0


def _is_there(path: bytes, watched: Watched, root: int, memo: dict[object, Any]) -> bool:
    """Is ``path`` the name of the inode? It may be on a mount whose files show other devices (btrfs, overlayfs)."""
    try:
        here = os.stat(below(path), dir_fd=root, follow_symlinks=False)
        if here.st_ino != watched.ino:
            return False
        if here.st_dev == os.makedev(*device(watched.sdev)):
            return True
        fd = os.open(below(path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_ino != watched.ino:
            return False
        number = int(fdinfo.parse(read(os.getpid(), f"fdinfo/{fd}")).mnt_id)
        return any(one.mnt_id == number for one in _mounts(watched.sdev, os.getpid(), memo))
    finally:
        os.close(fd)


def _search(watched: Watched, places: list[bytes], root: int, memo: dict[object, Any]) -> bytes | None:
    for place in places:
        if _is_there(place, watched, root, memo):
            return place
    left = SEARCH_MAX
    for path, inode in _walk(places, root):
        left -= 1
        if not left:
            return None
        if inode == watched.ino and _is_there(path, watched, root, memo):
            return path
    return None


def _walk(places: list[bytes], root: int) -> Iterator[tuple[bytes, int]]:
    """(path, inode) of everything below the places, nearest first."""
    waiting = list(places)
    at = 0
    while at < len(waiting):
        folder = waiting[at]
        at += 1
        try:
            fd = os.open(below(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        except OSError:
            continue
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    path = os.path.join(folder, os.fsencode(entry.name))
                    yield path, entry.inode()
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)


def _known_paths(pid: int) -> Iterator[bytes]:
    """What the task has open, where it is, and the directories above."""
    seen: set[bytes] = set()
    try:
        links = ["cwd", "root", "exe", *(f"fd/{fd}" for fd in numbers(pid, "fd"))]
    except TaskGone:
        return
    for link in links:
        try:
            path = os.readlink(os.fsencode(f"/proc/{pid}/{link}"))
        except OSError:
            continue
        while path.startswith(b"/") and path not in seen:
            seen.add(path)
            yield path
            path = os.path.dirname(path)


# ---------------------------------------------------------------------- restore


def target(entry: Message, sdev: int, ino: int, ctx: BuildContext) -> int:
    """A descriptor (O_PATH), the context's, of what is to be watched. Raises Unsupported when it is not found."""
    ghostly = _ghost(sdev, ino, ctx)
    if ghostly >= 0:
        return ghostly
    path = pb.get_bytes(entry.path)
    if path:
        return named_target(path, entry.mnt_id if entry.HasField("mnt_id") else None, ctx)
    from ..proc.fdinfo_watches import FileHandle

    data = struct.pack(f"<{len(entry.handle)}Q", *entry.handle)[: entry.bytes]
    watched = Watched(ino, sdev, FileHandle(entry.type, data))
    root = ctx.once("own root", lambda: ctx.keep(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
    for mount in _mounts(sdev, os.getpid(), ctx.memo):
        at = _open_mount(mount, root)
        try:
            fd, _ = _open_handle(watched, at) if at >= 0 else (-1, 0)
        finally:
            if at >= 0:
                os.close(at)
        if fd >= 0:
            return ctx.keep(fd)
    raise Unsupported(f"{watched}, which was watched, is not here", hint="dump with --force-irmap to have its name")


def named_target(path: bytes, mnt_id: int | None, ctx: BuildContext) -> int:
    """A descriptor (O_PATH), the context's, of a path to be watched."""
    name, where = within(ctx, mnt_id, path)
    with doing(f"watch of {os.fsdecode(path)}"):
        return ctx.keep(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where))


def _ghost(sdev: int, ino: int, ctx: BuildContext) -> int:
    """The descriptor of a deleted file that the tasks have open and that comes with the images; -1 if it is none."""
    numbers_by_inode = ctx.once("ghosts by inode", lambda: _ghosts(ctx))
    number = numbers_by_inode.get((sdev, ino))
    if number is None:
        return -1
    found = ghost.anchors(ctx, number, remap._users(ctx, remap.GHOST, number))
    return next(iter(found.by_name.values()))


def _ghosts(ctx: BuildContext) -> dict[tuple[int, int], int]:
    remaps: remap.Remaps = ctx.once("remaps", lambda: remap.Remaps(ctx))
    found = {}
    for kind, number in set(remaps.by_file.values()):
        if kind == remap.GHOST:
            for span in ctx.images.spans(f"ghost-file-{number:x}", required=True):
                found[span.message.dev, span.message.ino] = number
                break
    return found


def at_the_end(ctx: BuildContext, resolve: Callable[[], Callable[[], None]]) -> None:
    """Look for what is to be watched when all files are there, watch it when everything else is done.

    So nobody is told of what the restore itself does to the files.
    """

    def hook() -> None:
        watch = resolve()
        ctx.memo.setdefault("after_restore", []).append(watch)

    ctx.memo.setdefault("after_build", []).append(hook)


def waiting_bytes(fd: int) -> int:
    """Bytes of events that wait to be read."""
    area = buffer(4)
    fcntl.ioctl(fd, FIONREAD, area)
    return int.from_bytes(area.raw, "little")
