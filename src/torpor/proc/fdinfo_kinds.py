"""What /proc/PID/fdinfo/FD says about files of the kernel's own kinds.

Every function takes the :class:`.fdinfo.Fdinfo` of such a file and raises ValueError when the
lines are not what the kernel writes for that kind. Watches (epoll, inotify, fanotify) are in
:mod:`.fdinfo_watches`.
"""

from __future__ import annotations

from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .fdinfo import Fdinfo


class Eventfd(Record):
    """``id`` and ``semaphore`` are None where the kernel does not tell (before v5.2 and v6.5)."""

    counter: int
    id: int | None
    semaphore: bool | None


class Timerfd(Record):
    """``it_value``, which is what is left, and ``it_interval`` are (seconds, nanoseconds).

    Nothing is left of a timer that is not armed. ``ticks`` are expirations not read yet.
    ``settime_flags`` are those of timerfd_settime(2).
    """

    clockid: int
    ticks: int
    settime_flags: int
    it_value: tuple[int, int]
    it_interval: tuple[int, int]


class Pidfd(Record):
    """``Pid`` is -1 of a reaped process and 0 of one outside of the procfs' PID namespace.

    ``NSpid`` are its numbers from that namespace inwards; empty where the kernel shows none.
    """

    Pid: int
    NSpid: list[int]


class Userfaultfd(Record):
    """``pending`` and ``total`` count faults that wait, unread ones and all.

    ``features`` are those agreed on (UFFD_FEATURE_*), None before UFFDIO_API.
    """

    pending: int
    total: int
    features: int | None


class IoUring(Record):
    """A summary of the ring. Counters of a ring wrap at 2**32.

    ``UserFiles`` maps the index of a registered file to its path, with the kernel's escapes.
    ``UserBufs`` counts registered buffers, ``PollList`` and ``CqOverflowList`` the entries of
    these lists. ``busy`` marks a ring whose lock was held, so that the kernel showed no lists or
    nothing; what it left out is -1 or empty. ``SqThread`` is -1 without IORING_SETUP_SQPOLL.
    """

    SqMask: int
    SqHead: int
    SqTail: int
    CachedSqHead: int
    CqMask: int
    CqHead: int
    CqTail: int
    CachedCqTail: int
    SqThread: int
    SqThreadCpu: int
    UserFiles: dict[int, bytes]
    user_files_size: int
    UserBufs: int
    PollList: int
    CqOverflowList: int
    busy: bool


def eventfd(info: Fdinfo) -> Eventfd:
    """Kernel: fs/eventfd.c. The count is in hexadecimal, without a prefix."""
    with _reading("eventfd", info):
        number, semaphore = info.get(b"eventfd-id"), info.get(b"eventfd-semaphore")
        return Eventfd(
            int(info[b"eventfd-count"][0], 16),
            None if number is None else int(number[0]),
            None if semaphore is None else int(semaphore[0]) != 0,
        )


def timerfd(info: Fdinfo) -> Timerfd:
    """Kernel: fs/timerfd.c. The flags are in octal."""
    with _reading("timerfd", info):
        return Timerfd(
            int(info[b"clockid"][0]),
            int(info[b"ticks"][0]),
            int(info[b"settime flags"][0], 8),
            _timespec(info[b"it_value"][0]),
            _timespec(info[b"it_interval"][0]),
        )


def signalfd(info: Fdinfo) -> int:
    """Return the mask that the descriptor accepts, signal n at bit n - 1. Kernel: fs/signalfd.c."""
    with _reading("signalfd", info):
        return int(info[b"sigmask"][0], 16)


def pidfd(info: Fdinfo) -> Pidfd:
    """Kernel: fs/pidfs.c, pidfd_show_fdinfo()."""
    with _reading("pidfd", info):
        inner = info[b"NSpid"][0].split() if b"NSpid" in info else ()
        return Pidfd(int(info[b"Pid"][0]), [*map(int, inner)])


def tty_index(info: Fdinfo) -> int:
    """Return the number of the slave of a /dev/ptmx.

    Kernel: drivers/tty/pty.c, pty_show_fdinfo().
    """
    with _reading("tty", info):
        return int(info[b"tty-index"][0])


def scm_fds(info: Fdinfo) -> int:
    """Return how many descriptors are in flight in a unix socket's queue.

    Kernel: net/unix/af_unix.c, unix_show_fdinfo().
    """
    with _reading("unix socket", info):
        return int(info[b"scm_fds"][0])


def tun_name(info: Fdinfo) -> bytes:
    """Return the interface that a /dev/net/tun is attached to; empty if to none.

    Kernel: drivers/net/tun.c, tun_chr_show_fdinfo().
    """
    with _reading("tun", info):
        return info[b"iff"][0]


# The kernel's mark of a descriptor that has done UFFDIO_API, since v5.15.
_UFFD_INITIALIZED = 1 << 31


def userfaultfd(info: Fdinfo) -> Userfaultfd:
    """Kernel: fs/userfaultfd.c."""
    with _reading("userfaultfd", info):
        # The version, the features of this descriptor, and all features and ioctls there are.
        _, word, _ = info[b"API"][0].split(b":")
        features = int(word, 16)
        return Userfaultfd(
            int(info[b"pending"][0]),
            int(info[b"total"][0]),
            features & ~_UFFD_INITIALIZED if features & _UFFD_INITIALIZED else None,
        )


def io_uring(info: Fdinfo) -> IoUring:
    """Kernel: io_uring/fdinfo.c."""
    with _reading("io_uring", info):
        size, *files = info.get(b"UserFiles", [b"0"])
        return IoUring(
            SqMask=_number(info, b"SqMask"),
            SqHead=_number(info, b"SqHead"),
            SqTail=_number(info, b"SqTail"),
            CachedSqHead=_number(info, b"CachedSqHead"),
            CqMask=_number(info, b"CqMask"),
            CqHead=_number(info, b"CqHead"),
            CqTail=_number(info, b"CqTail"),
            CachedCqTail=_number(info, b"CachedCqTail"),
            SqThread=_number(info, b"SqThread"),
            SqThreadCpu=_number(info, b"SqThreadCpu"),
            UserFiles=dict(_user_file(line) for line in files if not line.endswith(_NO_FILE)),
            user_files_size=int(size),
            UserBufs=int(info.get(b"UserBufs", [b"0"])[0]),
            PollList=len(info.get(b"PollList", [b""])) - 1,
            CqOverflowList=len(info.get(b"CqOverflowList", [b""])) - 1,
            busy=b"UserFiles" not in info,
        )


def _number(info: Fdinfo, key: bytes) -> int:
    # The masks have a prefix of hexadecimal numbers, the rest is decimal.
    return int(info[key][0], 0) if key in info else -1


# How kernels before v6.13 show an empty place.
_NO_FILE = b": <none>"


def _user_file(line: bytes) -> tuple[int, bytes]:
    number, path = line.split(b":", 1)
    return int(number), path.strip()


def _timespec(text: bytes) -> tuple[int, int]:
    seconds, nanoseconds = text.strip(b"()").split(b",")
    return int(seconds), int(nanoseconds)


class _reading:
    """Turn what goes wrong with missing or odd lines into one ValueError that names the file."""

    __slots__ = ("info", "kind")

    def __init__(self, kind: str, info: Fdinfo) -> None:
        self.kind = kind
        self.info = info

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, KeyError):
            raise ValueError(f"fdinfo of {self.kind}: no line {error} in {self.info}") from None
        if isinstance(error, ValueError):
            raise ValueError(f"fdinfo of {self.kind}: cannot read {self.info}: {error}") from None
