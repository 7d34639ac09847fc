"""inotify(7): watches of inodes.

Image: file_entry.ify (inotify_file_entry). Events that nobody has read yet are lost, for the kernel does not show them
without taking them. In their place the program finds IN_Q_OVERFLOW, which says just that, and looks for itself how
things are. Kernel: fs/notify/inotify/inotify_user.c, fs/notify/notification.c
"""

from __future__ import annotations

import errno
import fcntl
import os

from ... import log
from ...errors import KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux.call import call
from ...proc import fdinfo_watches
from .. import watched
from ..base import FileResource
from ..fown import set_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

#: What a watch is asked for and shows: IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT.
USER_MASK = 0xFFF | 0x04000000 | 0x80000000
INOTIFY_IOC_SETNEXTWD = 0x40044900
IN_ACCESS, IN_MODIFY, EVENT_BYTES = 1, 2, 16
_PAIRS, _QUEUE_BYTES_MAX = 1024, 16 << 20


class Inotify(FileResource):
    """Its watches are made again when everything else is done, with the numbers they had."""

    FD_TYPE, FIELD = 8, "ify"
    LINKS = ("anon_inode:inotify",)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        for watch in fdinfo_watches.inotify(source.fdinfo):
            watched.find(watched.Watched(watch.ino, watch.sdev, watch.handle), source, ctx)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        entry = pb.inotify_file_entry(id=source.id, flags=source.flags, fown=ctx.fown(source))
        unread = watched.waiting_bytes(source.borrow())
        if unread:
            entry.unread = unread
            log.warning(
                f"fd {source.fd} ({source.link}): {unread} bytes of events wait to be read: the program will find "
                "IN_Q_OVERFLOW in their place"
            )
        for watch in fdinfo_watches.inotify(source.fdinfo):
            what = watched.Watched(watch.ino, watch.sdev, watch.handle)
            one = entry.wd.add(
                id=source.id, i_ino=watch.ino, mask=watch.mask, ignored_mask=0, s_dev=watch.sdev, wd=watch.wd
            )
            one.f_handle.CopyFrom(watched.handle_entry(what, source, ctx))
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        fd = call("inotify_init1", os.O_CLOEXEC)
        if entry.unread:
            _overflow(fd)
        set_flags(fd, entry.flags)
        watched.at_the_end(ctx, lambda: _prepare(entry, ctx))
        return fd


def _overflow(fd: int) -> None:
    """Have IN_Q_OVERFLOW be what is read next from a new descriptor.

    The kernel puts it behind as many events as a queue holds (fs.inotify.max_queued_events), which are made on a file
    of our own and read away. Alike events are one if nothing is between them.
    """
    hidden = os.memfd_create("torpor-inotify", os.MFD_CLOEXEC)
    try:
        os.write(hidden, b"x")
        path = b"/proc/self/fd/%d" % hidden
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # what is done to a memfd as it is made tells nobody
    finally:
        os.close(hidden)
    try:
        number = call("inotify_add_watch", fd, b"/proc/self/fd/%d\0" % file, IN_ACCESS | IN_MODIFY)
        waiting, full = 0, False
        while not full and waiting < _QUEUE_BYTES_MAX:
            for _ in range(_PAIRS):
                os.pread(file, 1, 0)
                os.pwrite(file, b"x", 0)
            before, waiting = waiting, watched.waiting_bytes(fd)
            full = waiting - before < 2 * _PAIRS * EVENT_BYTES
        call("inotify_rm_watch", fd, number)
    finally:
        os.close(file)
    if not full:
        log.warning(f"a queue holds over {waiting} bytes of events (fs.inotify.max_queued_events): it comes up empty")
    left = watched.waiting_bytes(fd) - (EVENT_BYTES if full else 0)
    while left:
        left -= len(os.read(fd, left))


def _prepare(entry: Message, ctx: BuildContext) -> Callable[[], None]:
    """Find what is to be watched; gives what watches it."""
    targets = [(watch, watched.target(watch.f_handle, watch.s_dev, watch.i_ino, ctx)) for watch in entry.wd]
    targets.sort(key=lambda pair: pair[0].wd)
    fd = ctx.built[entry.id]

    def watch_all() -> None:
        for watch, target in targets:
            with doing(f"inotify watch {watch.wd}"):
                _watch(fd, watch, target)

    return watch_all


def _watch(fd: int, watch: Message, target: int) -> None:
    path = b"/proc/self/fd/%d\0" % target
    mask = watch.mask & USER_MASK
    chosen = True
    try:
        fcntl.ioctl(fd, INOTIFY_IOC_SETNEXTWD, watch.wd)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise KernelError("ioctl(INOTIFY_IOC_SETNEXTWD)", error.errno or 0) from None
        chosen = False  # a kernel without CONFIG_CHECKPOINT_RESTORE: numbers are counted up
    while True:
        number = call("inotify_add_watch", fd, path, mask)
        if number == watch.wd:
            return
        if chosen or number > watch.wd:
            raise Unsupported(f"the kernel gives it the number {number}")
        call("inotify_rm_watch", fd, number)


RESOURCE = Inotify()
