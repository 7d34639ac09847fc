"""FAN_Q_OVERFLOW as what is read next from a new fanotify group: it says that events are lost, and they are.

The kernel puts it behind as many events as a queue holds (fs.fanotify.max_queued_events). Alike events are one, so
there is a file for each, in a file system of our own that nobody else sees; they are read away again. The descriptors
that come with them are closed. Kernel: fs/notify/fanotify/fanotify.c, fanotify_user.c, fs/notify/notification.c
"""

from __future__ import annotations

import os
import struct

from .. import log
from ..errors import KernelError
from ..linux import mounts
from ..linux.call import call
from . import watched

# include/uapi/linux/fanotify.h
FAN_MARK_ADD, FAN_MARK_REMOVE, FAN_MARK_FILESYSTEM, FAN_OPEN = 1, 2, 0x100, 0x20
_INFO_TYPE_PIDFD = 4
#: struct fanotify_event_metadata: bytes of the event, version, bytes of this head, mask, descriptor, pid
_EVENT = struct.Struct("=IBxHQii")
_INFO = struct.Struct("=BxH")  # struct fanotify_event_info_header: type, bytes
_FILES, _FILES_MAX = 1024, 1 << 18
_AT_ONCE, _FIRST_BYTES = 64, 512


def overflow(fd: int) -> None:
    """Do so with the group ``fd``, which has no marks yet, nor afterwards. It does not block then (O_NONBLOCK)."""
    os.set_blocking(fd, False)
    try:
        place = mounts.make("tmpfs", {})
    except KernelError as error:
        _give_up(str(error))
        return
    try:
        call("fanotify_mark", fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_OPEN, place, b".\0")
        made = _fill(fd, place)
        call("fanotify_mark", fd, FAN_MARK_REMOVE | FAN_MARK_FILESYSTEM, FAN_OPEN, place, b".\0")
    except (KernelError, OSError) as error:
        _give_up(str(error))
        made = 0
    finally:
        os.close(place)
    waiting = _waiting(fd)
    full = waiting < made
    if made and not full:
        _give_up(f"a queue holds over {waiting} events (fs.fanotify.max_queued_events)")
    _read_away(fd, waiting - full)


def _give_up(why: str) -> None:
    log.warning(f"fanotify: that events are lost cannot be told to the program: {why}")


def _waiting(fd: int) -> int:
    """How many events wait: each is counted as its head (fanotify_ioctl())."""
    return watched.waiting_bytes(fd) // _EVENT.size


def _fill(fd: int, place: int) -> int:
    """Open new files until no more events fit; how many they were."""
    made = 0
    while made < _FILES_MAX:
        for number in range(made, made + _FILES):
            os.close(os.open(f"{number:06d}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, dir_fd=place))
        made += _FILES
        if _waiting(fd) < made:
            break
    return made


def _read_away(fd: int, count: int) -> None:
    """Take so many events out, all of which are as long as the first."""
    size = 0
    while count > 0:
        try:
            data = os.read(fd, size * min(count, _AT_ONCE) or _FIRST_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            size, _, head, _, file, _ = _EVENT.unpack_from(data, at)
            if file >= 0:
                os.close(file)
            _close_pidfds(data[at + head : at + size])
            at += size
            count -= 1


def _close_pidfds(data: bytes) -> None:
    at = 0
    while at + _INFO.size <= len(data):
        kind, size = _INFO.unpack_from(data, at)
        if kind == _INFO_TYPE_PIDFD:
            (pidfd,) = struct.unpack_from("=i", data, at + _INFO.size)
            if pidfd >= 0:
                os.close(pidfd)
        at += max(size, _INFO.size)
