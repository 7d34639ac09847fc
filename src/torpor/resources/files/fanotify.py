"""fanotify(7): marks on inodes, mounts and file systems.

Image: file_entry.ffy (fanotify_file_entry). Events that nobody has read yet are lost. In their place the program finds
FAN_Q_OVERFLOW, which says just that (fanotify_queue.py). Kernel: fs/notify/fanotify/fanotify_user.c
"""

from __future__ import annotations

from ... import log
from ...errors import ImageError, doing
from ...images import schema as pb
from ...linux.call import call
from ...proc import fdinfo_watches, mountinfo
from ...proc.fdinfo_watches import device
from ...proc.read import read
from .. import fanotify_queue, watched
from ..base import FileResource, unsupported
from ..fown import set_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...images.schema import Message
    from ...proc.fdinfo_watches import FanotifyMark
    from ..base import BuildContext, DumpContext, SourceFile

INODE, MOUNT = 1, 2
AT_FDCWD = -100
# include/uapi/linux/fanotify.h
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY = 0x1, 0x10, 0x20, 0x40
FAN_MARK_FILESYSTEM, FAN_MARK_EVICTABLE, FAN_MARK_IGNORE = 0x100, 0x200, 0x400
FAN_UNLIMITED_QUEUE = 0x10
#: FAN_OPEN_PERM, ACCESS_PERM, OPEN_EXEC_PERM, PRE_ACCESS: others wait until the group answers.
PERMISSION_EVENTS = 0x10000 | 0x20000 | 0x40000 | 0x100000


class Fanotify(FileResource):
    """Its marks are made again when everything else is done."""

    FD_TYPE, FIELD = 12, "ffy"
    LINKS = ("anon_inode:[fanotify]",)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        for mark in fdinfo_watches.fanotify(source.fdinfo).marks:
            _check(mark, source)
            if mark.kind == "inode":
                watched.find(watched.Watched(mark.ino, mark.sdev, mark.handle), source, ctx)
            else:
                _mountpoint(mark, source)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        group = fdinfo_watches.fanotify(source.fdinfo)
        entry = pb.fanotify_file_entry(
            id=source.id, flags=source.flags, fown=ctx.fown(source),
            faflags=group.flags, evflags=group.event_flags,
        )  # fmt: skip
        unread = watched.waiting_bytes(source.borrow())
        if unread:
            entry.unread = unread
            told = group.flags & FAN_UNLIMITED_QUEUE == 0
            log.warning(
                f"fd {source.fd} ({source.link}): {unread} bytes of events wait to be read: "
                + ("the program will find FAN_Q_OVERFLOW in their place" if told else "they will be lost")
            )
        for mark in group.marks:
            _check(mark, source)
            one = entry.mark.add(
                id=source.id, type=INODE if mark.kind == "inode" else MOUNT, s_dev=mark.sdev,
                mflags=mark.mflags, mask=mark.mask, ignored_mask=mark.ignored_mask,
            )  # fmt: skip
            if mark.kind == "inode":
                one.ie.i_ino = mark.ino
                what = watched.Watched(mark.ino, mark.sdev, mark.handle)
                one.ie.f_handle.CopyFrom(watched.handle_entry(what, source, ctx))
                continue
            one.me.mnt_id, path, one.s_dev = _mountpoint(mark, source)
            pb.put_bytes(one.me, "path", path)
            if mark.kind == "filesystem":
                one.me.filesystem = True
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        fd = call("fanotify_init", entry.faflags, entry.evflags)
        if entry.unread and not entry.faflags & FAN_UNLIMITED_QUEUE:
            fanotify_queue.overflow(fd)
        set_flags(fd, entry.flags)
        watched.at_the_end(ctx, lambda: _prepare(entry, ctx))
        return fd


def _check(mark: FanotifyMark, source: SourceFile) -> None:
    if mark.kind == "mntns":
        raise unsupported(source, "it watches a mount namespace")
    if (mark.mask | mark.ignored_mask) & PERMISSION_EVENTS:
        raise unsupported(
            source,
            "it is asked for permission (FAN_OPEN_PERM and the like): other processes wait for its answers",
            hint="end the program that grants access before the dump",
        )


def _mountpoint(mark: FanotifyMark, source: SourceFile) -> tuple[int, bytes, int]:
    """(mount id, path, device in the kernel's form) of what is marked."""
    for mount in mountinfo.parse(read(source.holder, "mountinfo")):
        same = mount.mnt_id == mark.mnt_id if mark.kind == "mount" else mount.dev == device(mark.sdev)
        if same:
            return mount.mnt_id, mount.mountpoint, mount.dev[0] << 20 | mount.dev[1]
    raise unsupported(source, "it watches a mount that the task does not see")


# ---------------------------------------------------------------------- restore


def _prepare(entry: Message, ctx: BuildContext) -> Callable[[], None]:
    """Find what is to be marked; gives what marks it."""
    # The kernel shows the newest first, and so they are in the image.
    targets = [(mark, _target(mark, ctx)) for mark in reversed(entry.mark)]
    fd = ctx.built[entry.id]

    def mark_all() -> None:
        for mark, target in targets:
            with doing("fanotify mark"):
                _mark(fd, mark, target)

    return mark_all


def _target(mark: Message, ctx: BuildContext) -> int:
    if mark.type == INODE:
        return watched.target(mark.ie.f_handle, mark.s_dev, mark.ie.i_ino, ctx)
    if mark.type == MOUNT:
        path = pb.get_bytes(mark.me.path)
        return watched.named_target(path if path.startswith(b"/") else b"/" + path, mark.me.mnt_id, ctx)
    raise ImageError("files.img", "ffy: mark: type", f"{mark.type} is not known")


def _mark(fd: int, mark: Message, target: int) -> None:
    path = b"/proc/self/fd/%d\0" % target
    flags = FAN_MARK_ADD
    if mark.type == MOUNT:
        flags |= FAN_MARK_FILESYSTEM if mark.me.filesystem else FAN_MARK_MOUNT
    flags |= mark.mflags & FAN_MARK_EVICTABLE
    if mark.mask:
        call("fanotify_mark", fd, flags, mark.mask, AT_FDCWD, path)
    if mark.ignored_mask:
        way = mark.mflags & FAN_MARK_IGNORE or FAN_MARK_IGNORED_MASK
        ignoring = flags | way | mark.mflags & FAN_MARK_IGNORED_SURV_MODIFY
        call("fanotify_mark", fd, ignoring, mark.ignored_mask, AT_FDCWD, path)


RESOURCE = Fanotify()
