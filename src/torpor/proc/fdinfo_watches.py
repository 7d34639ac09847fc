"""The watches in /proc/PID/fdinfo/FD of epoll, inotify and fanotify descriptors, one a line.

Kernel: fs/eventpoll.c, ep_show_fdinfo(); fs/notify/fdinfo.c. ``sdev`` is a device number in the
kernel's own form; :func:`device` takes it apart. Functions raise ValueError when a line is not
what the kernel writes.
"""

from __future__ import annotations

from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .fdinfo import Fdinfo


class EpollTarget(Record):
    """``tfd`` is the number under which the target was added: it may be another file by now.

    ``pos``, ``ino`` and ``sdev`` are those of the file that is watched.
    """

    tfd: int
    events: int
    data: int
    pos: int
    ino: int
    sdev: int


class FileHandle(Record):
    """What open_by_handle_at(2) takes: the type and the opaque bytes."""

    type: int
    data: bytes


class InotifyWatch(Record):
    """``handle`` is None where the file system has no file handles."""

    wd: int
    ino: int
    sdev: int
    mask: int
    handle: FileHandle | None


class FanotifyMark(Record):
    """``kind`` is inode, mount, filesystem or mntns. What does not belong to a kind is 0 or None.

    ``mflags`` are FAN_MARK_* that outlive the call, ``mask`` and ``ignored_mask`` are FAN_*.
    """

    kind: str
    mnt_id: int
    mnt_ns: int
    ino: int
    sdev: int
    mflags: int
    mask: int
    ignored_mask: int
    handle: FileHandle | None


class Fanotify(Record):
    """``flags`` and ``event_flags`` are the arguments of fanotify_init(2)."""

    flags: int
    event_flags: int
    marks: list[FanotifyMark]


def device(sdev: int) -> tuple[int, int]:
    """Return (major, minor): the kernel keeps 20 bits of minor. Kernel: include/linux/kdev_t.h."""
    return sdev >> 20, sdev & 0xFFFFF


def epoll(info: Fdinfo) -> list[EpollTarget]:
    """Return the targets in the kernel's order. All but ``tfd`` and ``pos`` are in hexadecimal."""
    targets = []
    for line in info.get(b"tfd", ()):
        try:
            tfd, _, events, _, data, *place = line.split()
            pos, ino, sdev = (word.partition(b":")[2] for word in place)
            targets.append(
                EpollTarget(
                    int(tfd), int(events, 16), int(data, 16), int(pos), int(ino, 16), int(sdev, 16)
                )
            )
        except ValueError as error:
            raise ValueError(f"fdinfo of epoll: cannot read {line!r}: {error}") from None
    return targets


def inotify(info: Fdinfo) -> list[InotifyWatch]:
    """Return the watches, newest first. All numbers, ``wd`` included, are in hexadecimal."""
    watches = []
    for line in info.get(b"inotify wd", ()):
        try:
            wd, ino, sdev, mask, *rest = line.split()
            watches.append(
                InotifyWatch(
                    int(wd, 16),
                    int(ino.removeprefix(b"ino:"), 16),
                    int(sdev.removeprefix(b"sdev:"), 16),
                    int(mask.removeprefix(b"mask:"), 16),
                    _handle(_values(rest)),
                )
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"fdinfo of inotify: cannot read {line!r}: {error}") from None
    return watches


def fanotify(info: Fdinfo) -> Fanotify:
    """Return the group and its marks, by kind and newest first.

    All numbers but ``mnt_ns`` are in hexadecimal.
    """
    line = b""
    try:
        [line] = info[b"fanotify flags"]
        group = _values((b"flags:" + line).split())
        marks = []
        # An inode's line has sdev as well, behind ino.
        for first, kind in _MARKS:
            for line in info.get(b"fanotify " + first, ()):
                marks.append(_mark(kind, _values((first + b":" + line).split())))
        return Fanotify(int(group[b"flags"], 16), int(group[b"event-flags"], 16), marks)
    except (KeyError, ValueError) as error:
        raise ValueError(f"fdinfo of fanotify: cannot read {line!r}: {error}") from None


# The key that a mark's line begins with tells what is marked.
_MARKS = (
    (b"ino", "inode"),
    (b"mnt_id", "mount"),
    (b"sdev", "filesystem"),
    (b"mnt_ns", "mntns"),
)


def _mark(kind: str, values: dict[bytes, bytes]) -> FanotifyMark:
    return FanotifyMark(
        kind,
        int(values.get(b"mnt_id", b"0"), 16),
        int(values.get(b"mnt_ns", b"0")),
        int(values.get(b"ino", b"0"), 16),
        int(values.get(b"sdev", b"0"), 16),
        int(values[b"mflags"], 16),
        int(values[b"mask"], 16),
        int(values[b"ignored_mask"], 16),
        _handle(values),
    )


def _handle(values: dict[bytes, bytes]) -> FileHandle | None:
    if b"f_handle" not in values:
        return None
    data = bytes.fromhex(values[b"f_handle"].decode("ascii"))
    if len(data) != int(values[b"fhandle-bytes"], 16):
        raise ValueError("a file handle of another length")
    return FileHandle(int(values[b"fhandle-type"], 16), data)


def _values(words: list[bytes]) -> dict[bytes, bytes]:
    return dict([word.split(b":", 1) for word in words])
