"""The lines of fs/proc/fd.c and of the kernel's own kinds of files, recorded or printed here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.proc import fdinfo, locks
from torpor.proc import fdinfo_kinds as kinds
from torpor.proc import fdinfo_watches as watches

HEAD = b"pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1038\n"
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def parse(rest: bytes) -> fdinfo.Fdinfo:
    return fdinfo.parse(HEAD + rest)


def test_the_common_lines() -> None:
    info = fdinfo.parse(b"pos:\t-5\nflags:\t02100002\nmnt_id:\t27\nino:\t2146467\n")
    assert (info.pos, info.flags, info.mnt_id, info.ino) == (-5, 0o2100002, 27, 2146467)
    assert info.locks == []
    assert info[b"pos"] == [b"-5"]


def test_a_kernel_that_does_not_tell_the_inode() -> None:
    assert fdinfo.parse(b"pos:\t0\nflags:\t02\nmnt_id:\t17\n").ino is None


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), U32, U64)
def test_common_lines_as_printed(pos: int, flags: int, mnt_id: int, ino: int) -> None:
    info = fdinfo.parse(
        b"pos:\t%d\nflags:\t0%o\nmnt_id:\t%d\nino:\t%d\n" % (pos, flags, mnt_id, ino)
    )
    assert (info.pos, info.flags, info.mnt_id, info.ino) == (pos, flags, mnt_id, ino)


@pytest.mark.parametrize("text", [b"", b"pos:\t0\n", b"flags:\t02\nmnt_id:\t1\n", b"x: y\n" + HEAD])
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="fdinfo"):
        fdinfo.parse(text)


def test_locks() -> None:
    info = parse(
        b"lock:\t1: FLOCK  ADVISORY  WRITE 4242 fe:00:2146467 0 EOF\n"
        b"lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:2146467 100 149\n"
    )
    assert info.locks == [
        locks.Lock(1, False, "FLOCK", "ADVISORY", "WRITE", 4242, (254, 0), 2146467, 0, locks.EOF),
        locks.Lock(2, False, "OFDLCK", "ADVISORY", "READ", -1, (254, 0), 2146467, 100, 149),
    ]


def test_unknown_lines_are_kept() -> None:
    info = parse(b"drm-driver:\tx y\nthing: 1\nthing: 2\n  detail\n")
    assert info[b"drm-driver"] == [b"x y"]
    assert info[b"thing"] == [b"1", b"2", b"detail"]


@given(U64, st.integers(0, 2**31 - 1), st.booleans())
def test_eventfd(counter: int, number: int, semaphore: bool) -> None:
    text = b"eventfd-count: %16x\neventfd-id: %d\neventfd-semaphore: %d\n"
    info = parse(text % (counter, number, semaphore))
    assert kinds.eventfd(info) == (counter, number, semaphore)


def test_eventfd_of_an_old_kernel() -> None:
    assert kinds.eventfd(parse(b"eventfd-count:               1f\n")) == (31, None, None)


@given(U32, U64, st.integers(0, 7), st.tuples(U64, U32), st.tuples(U64, U32))
def test_timerfd(
    clockid: int, ticks: int, flags: int, value: tuple[int, int], interval: tuple[int, int]
) -> None:
    text = b"clockid: %d\nticks: %d\nsettime flags: 0%o\nit_value: (%d, %d)\n"
    text += b"it_interval: (%d, %d)\n"
    info = parse(text % (clockid, ticks, flags, *value, *interval))
    assert kinds.timerfd(info) == (clockid, ticks, flags, value, interval)


@given(U64)
def test_signalfd(mask: int) -> None:
    assert kinds.signalfd(parse(b"sigmask:\t%016x\n" % mask)) == mask


def test_pidfd() -> None:
    assert kinds.pidfd(parse(b"Pid:\t42\nNSpid:\t42\t7\t1\n")) == (42, [42, 7, 1])
    assert kinds.pidfd(parse(b"Pid:\t-1\nNSpid:\t-1\n")) == (-1, [-1])
    assert kinds.pidfd(parse(b"Pid:\t0\n")) == (0, [])


def test_single_values() -> None:
    assert kinds.tty_index(parse(b"tty-index:\t12\n")) == 12
    assert kinds.scm_fds(parse(b"scm_fds: 3\n")) == 3
    assert kinds.tun_name(parse(b"iff:\ttap0\n")) == b"tap0"
    assert kinds.tun_name(parse(b"iff:\t\n")) == b""


def test_userfaultfd() -> None:
    fresh = b"pending:\t0\ntotal:\t0\nAPI:\taa:0:80000000000001ff\n"
    assert kinds.userfaultfd(parse(fresh)) == (0, 0, None)
    agreed = b"pending:\t1\ntotal:\t2\nAPI:\taa:80008001:80000000000001ff\n"
    assert kinds.userfaultfd(parse(agreed)) == (1, 2, 0x8001)


RING = b"""\
SqMask:\t0x7
SqHead:\t3
SqTail:\t4
CachedSqHead:\t3
CqMask:\t0xf
CqHead:\t1
CqTail:\t4294967295
CachedCqTail:\t2
SQEs:\t1
    3: opcode:POLL_ADD, fd:5, flags:0, off:0, addr:0x0, rw_flags:0x0, buf_index:0 user_data:7
CQEs:\t0
SqThread:\t-1
SqThreadCpu:\t-1
SqTotalTime:\t0
SqWorkTime:\t0
UserFiles:\t4
    0: /dev/ptmx
    1: <none>
    2: /a:\\040b
    3: anon_inode:[io_uring]
UserBufs:\t1
    0: 0x55cb84283e00/8192
PollList:
  op=6, task_works=0
  op=6, task_works=1
CqOverflowList:
  user_data=1, res=0, flags=0
NAPI:\tdisabled
"""


def test_io_uring() -> None:
    ring = kinds.io_uring(parse(RING))
    assert (ring.SqMask, ring.SqHead, ring.SqTail, ring.CachedSqHead) == (7, 3, 4, 3)
    assert (ring.CqMask, ring.CqHead, ring.CqTail, ring.CachedCqTail) == (15, 1, 2**32 - 1, 2)
    assert (ring.SqThread, ring.SqThreadCpu) == (-1, -1)
    assert ring.UserFiles == {0: b"/dev/ptmx", 2: b"/a:\\040b", 3: b"anon_inode:[io_uring]"}
    assert (ring.user_files_size, ring.UserBufs) == (4, 1)
    assert (ring.PollList, ring.CqOverflowList, ring.busy) == (2, 1, False)


def test_io_uring_that_is_busy() -> None:
    ring = kinds.io_uring(parse(b""))
    assert (ring.busy, ring.SqHead, ring.UserFiles, ring.PollList) == (True, -1, {}, 0)


TARGETS = st.builds(
    watches.EpollTarget, st.integers(0, 2**31 - 1), U32, U64, st.integers(-1, 2**63 - 1), U64, U32
)


@given(st.lists(TARGETS))
def test_epoll(targets: list[watches.EpollTarget]) -> None:
    text = b"tfd: %8d events: %8x data: %16x  pos:%d ino:%x sdev:%x\n"
    assert watches.epoll(parse(b"".join(text % target for target in targets))) == targets


HANDLES = st.none() | st.builds(
    watches.FileHandle, st.integers(0, 255), st.binary(min_size=1, max_size=128)
)


def show(handle: watches.FileHandle | None) -> bytes:
    if handle is None:
        return b""
    form = b"fhandle-bytes:%x fhandle-type:%x f_handle:%s"
    return form % (len(handle.data), handle.type, handle.data.hex().encode())


@given(st.lists(st.builds(watches.InotifyWatch, U32, U64, U32, U32, HANDLES)))
def test_inotify(expected: list[watches.InotifyWatch]) -> None:
    text = b"".join(
        b"inotify wd:%x ino:%x sdev:%x mask:%x ignored_mask:0 %s\n"
        % (*watch[:4], show(watch.handle))
        for watch in expected
    )
    assert watches.inotify(parse(text)) == expected


def test_fanotify() -> None:
    group = watches.fanotify(
        parse(
            b"fanotify flags:4 event-flags:8000\n"
            b"fanotify ino:3f7e8 sdev:fe00001 mflags:40 mask:2 ignored_mask:20 "
            b"fhandle-bytes:8 fhandle-type:1 f_handle:e8f7030000000000\n"
            b"fanotify mnt_id:1b mflags:0 mask:20 ignored_mask:0\n"
            b"fanotify sdev:fe00000 mflags:0 mask:8000020 ignored_mask:0\n"
            b"fanotify mnt_ns:4026531841 mflags:0 mask:1000000 ignored_mask:0\n"
        )
    )
    handle = watches.FileHandle(1, bytes.fromhex("e8f7030000000000"))
    mark = watches.FanotifyMark
    assert (group.flags, group.event_flags) == (4, 0x8000)
    assert group.marks == [
        mark("inode", 0, 0, 0x3F7E8, 0xFE00001, 0x40, 2, 0x20, handle),
        mark("mount", 0x1B, 0, 0, 0, 0, 0x20, 0, None),
        mark("filesystem", 0, 0, 0, 0xFE00000, 0, 0x8000020, 0, None),
        mark("mntns", 0, 4026531841, 0, 0, 0, 0x1000000, 0, None),
    ]


def test_device() -> None:
    assert watches.device(0xFE00001) == (0xFE, 1)
    assert watches.device(0x15) == (0, 0x15)


@pytest.mark.parametrize(
    ("parser", "rest"),
    [
        (kinds.eventfd, b""),
        (kinds.eventfd, b"eventfd-count: z\n"),
        (kinds.timerfd, b"clockid: 1\n"),
        (kinds.timerfd, b"clockid: 1\nticks: 0\nsettime flags: 00\nit_value: 1\nit_interval: 1\n"),
        (kinds.signalfd, b"sigmask:\t\n"),
        (kinds.pidfd, b"NSpid:\t1\n"),
        (kinds.tty_index, b""),
        (kinds.scm_fds, b"scm_fds: many\n"),
        (kinds.tun_name, b""),
        (kinds.userfaultfd, b"pending:\t0\ntotal:\t0\nAPI:\taa\n"),
        (kinds.io_uring, b"SqMask:\tz\nUserFiles:\t0\n"),
        (kinds.io_uring, b"UserFiles:\t1\n  what\n"),
        (watches.epoll, b"tfd: 1 events: 1\n"),
        (watches.epoll, b"tfd: 1 events: 1 data: 1  pos:0 ino:g sdev:0\n"),
        (watches.inotify, b"inotify wd:1 ino:1\n"),
        (
            watches.inotify,
            b"inotify wd:1 ino:1 sdev:1 mask:1 fhandle-bytes:2 fhandle-type:1 f_handle:00\n",
        ),
        (watches.fanotify, b""),
        (watches.fanotify, b"fanotify flags:0 event-flags:0\nfanotify ino:1 sdev:1\n"),
    ],
)
def test_broken_lines_are_refused(parser: object, rest: bytes) -> None:
    with pytest.raises(ValueError, match=r"^fdinfo of "):
        parser(parse(rest))  # type: ignore[operator]
