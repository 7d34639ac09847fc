"""What this kernel says about descriptors that the test opens itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Callable

import pytest

from torpor.linux.call import call, try_call
from torpor.proc import fdinfo, locks
from torpor.proc import fdinfo_kinds as kinds
from torpor.proc import fdinfo_watches as watches

Keep = Callable[[int], int]
Look = Callable[[int], fdinfo.Fdinfo]

CLOCK_BOOTTIME = 7
TFD_TIMER_ABSTIME = 1
F_OFD_SETLK = 37


def kernel_device(fd: int) -> tuple[int, int]:
    device = os.fstat(fd).st_dev
    return os.major(device), os.minor(device)


def test_a_file(tmp_path: os.PathLike[str], keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(os.open(os.path.join(tmp_path, "f"), os.O_RDWR | os.O_CREAT | os.O_APPEND))
    os.write(fd, b"12345")
    info = fdinfo_of(fd)
    assert (info.pos, info.ino) == (5, os.fstat(fd).st_ino)
    assert info.flags & os.O_CLOEXEC
    assert info.flags & ~os.O_CLOEXEC == fcntl.fcntl(fd, fcntl.F_GETFL)
    os.set_inheritable(fd, True)
    assert not fdinfo_of(fd).flags & os.O_CLOEXEC


def test_locks(tmp_path: os.PathLike[str], keep: Keep, fdinfo_of: Look) -> None:
    path = os.path.join(tmp_path, "f")
    fd = keep(os.open(path, os.O_RDWR | os.O_CREAT))
    other = keep(os.open(path, os.O_RDONLY))
    fcntl.flock(fd, fcntl.LOCK_EX)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 100, 0, 0))
    place = (kernel_device(fd), os.fstat(fd).st_ino)
    found = {lock.kind: lock[3:] for lock in fdinfo_of(fd).locks}
    me = os.getpid()
    assert found == {
        "FLOCK": ("ADVISORY", "WRITE", me, *place, 0, locks.EOF),
        "POSIX": ("ADVISORY", "WRITE", me, *place, 5, 14),
        "OFDLCK": ("ADVISORY", "READ", -1, *place, 100, locks.EOF),
    }
    # A POSIX lock belongs to the process, and yet it shows where it was taken through.
    assert fdinfo_of(other).locks == []


def test_a_lease(tmp_path: os.PathLike[str], keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(os.open(os.path.join(tmp_path, "f"), os.O_RDONLY | os.O_CREAT))
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    [lease] = fdinfo_of(fd).locks
    assert (lease.kind, lease.mode, lease.type) == ("LEASE", "ACTIVE", "READ")
    assert (lease.pid, lease.inode) == (os.getpid(), os.fstat(fd).st_ino)


@pytest.mark.parametrize("semaphore", [False, True])
def test_eventfd(semaphore: bool, keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(os.eventfd(0, os.EFD_SEMAPHORE if semaphore else 0))
    os.eventfd_write(fd, 2**64 - 2)
    parsed = kinds.eventfd(fdinfo_of(fd))
    assert parsed.counter == 2**64 - 2
    assert parsed.semaphore in (semaphore, None)
    os.eventfd_read(fd)
    assert kinds.eventfd(fdinfo_of(fd)).counter == (2**64 - 3 if semaphore else 0)


def test_timerfd(keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(call("timerfd_create", CLOCK_BOOTTIME, 0))
    assert kinds.timerfd(fdinfo_of(fd)) == (CLOCK_BOOTTIME, 0, 0, (0, 0), (0, 0))
    call("timerfd_settime", fd, 0, struct.pack("4q", 5, 7, 1000, 9), None)
    armed = kinds.timerfd(fdinfo_of(fd))
    assert (armed.ticks, armed.settime_flags, armed.it_interval) == (0, 0, (5, 7))
    assert 900 < armed.it_value[0] < 1000
    call("timerfd_settime", fd, TFD_TIMER_ABSTIME, struct.pack("4q", 3600, 0, 1, 0), None)
    select.select([fd], [], [])
    late = kinds.timerfd(fdinfo_of(fd))
    assert (late.settime_flags, late.it_interval) == (TFD_TIMER_ABSTIME, (3600, 0))
    # What came to pass since the first expiration is counted only when somebody reads.
    assert 1 <= late.ticks <= struct.unpack("Q", os.read(fd, 8))[0]


def test_signalfd(keep: Keep, fdinfo_of: Look) -> None:
    mask = 1 << (signal.SIGUSR1 - 1) | 1 << 63
    fd = keep(call("signalfd4", -1, struct.pack("Q", mask), 8, 0))
    assert kinds.signalfd(fdinfo_of(fd)) == mask


def test_epoll(tmp_path: os.PathLike[str], keep: Keep, fdinfo_of: Look) -> None:
    reader, writer = map(keep, os.pipe())
    with select.epoll() as epoll:
        assert watches.epoll(fdinfo_of(epoll.fileno())) == []
        call("epoll_ctl", epoll.fileno(), 1, reader, struct.pack("=IQ", 0x80000001, 2**64 - 1))
        epoll.register(writer, select.EPOLLOUT)
        found = {target.tfd: target for target in watches.epoll(fdinfo_of(epoll.fileno()))}
    assert set(found) == {reader, writer}
    one = found[reader]
    # The kernel reports errors and hang-ups whether asked to or not.
    wanted = 0x80000001 | select.EPOLLERR | select.EPOLLHUP
    assert (one.events, one.data) == (wanted, 2**64 - 1)
    assert (one.ino, one.pos) == (os.fstat(reader).st_ino, 0)
    assert watches.device(one.sdev) == kernel_device(reader)
    assert found[writer].data & 0xFFFFFFFF == writer


def test_inotify(tmp_path: os.PathLike[str], keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(call("inotify_init1", 0))
    call("inotify_add_watch", fd, b"/proc", 2)
    numbers = [call("inotify_add_watch", fd, os.fsencode(tmp_path) + b"\0", 0x300)]
    found = {watch.wd: watch for watch in watches.inotify(fdinfo_of(fd))}
    assert set(found) == {1, *numbers}
    stat = os.stat(tmp_path)
    watch = found[numbers[0]]
    assert (watch.ino, watch.mask) == (stat.st_ino, 0x300)
    assert watches.device(watch.sdev) == (os.major(stat.st_dev), os.minor(stat.st_dev))
    handle = ctypes.create_string_buffer(struct.pack("Ii128x", 128, 0))
    mount = ctypes.c_int()
    path = os.fsencode(tmp_path) + b"\0"
    done = try_call("name_to_handle_at", -100, path, handle, ctypes.byref(mount), 0)
    if done != -errno.EOPNOTSUPP:
        assert done == 0
        length, kind = struct.unpack_from("Ii", handle.raw)
        assert watch.handle == (kind, handle.raw[8 : 8 + length])


FAN_CLASS_CONTENT, FAN_UNLIMITED_QUEUE = 4, 0x10
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM = 1, 0x10, 0x100
FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY = 0x20, 0x40
FAN_MODIFY, FAN_OPEN = 2, 0x20


def test_fanotify(tmp_path: os.PathLike[str], keep: Keep, fdinfo_of: Look) -> None:
    path = os.fsencode(tmp_path) + b"\0"
    flags = FAN_CLASS_CONTENT | FAN_UNLIMITED_QUEUE
    fd = keep(call("fanotify_init", flags, os.O_RDWR))
    call("fanotify_mark", fd, FAN_MARK_ADD, FAN_MODIFY, -100, path)
    ignored = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY
    call("fanotify_mark", fd, ignored, FAN_OPEN, -100, path)
    call("fanotify_mark", fd, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN, -100, path)
    call("fanotify_mark", fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_OPEN, -100, path)
    group = watches.fanotify(fdinfo_of(fd))
    assert group.flags == flags
    assert group.event_flags & os.O_ACCMODE == os.O_RDWR
    inode, mount, filesystem = group.marks
    stat = os.stat(tmp_path)
    device = (os.major(stat.st_dev), os.minor(stat.st_dev))
    assert (inode.kind, inode.ino, inode.mask) == ("inode", stat.st_ino, FAN_MODIFY)
    assert (inode.ignored_mask, inode.mflags) == (FAN_OPEN, FAN_MARK_IGNORED_SURV_MODIFY)
    assert watches.device(inode.sdev) == watches.device(filesystem.sdev) == device
    assert (mount.kind, mount.mask, filesystem.kind) == ("mount", FAN_OPEN, "filesystem")
    here = os.open(tmp_path, os.O_PATH)
    assert mount.mnt_id == fdinfo_of(keep(here)).mnt_id


def test_pidfd(child: Callable[..., int], keep: Keep, fdinfo_of: Look) -> None:
    pid = child()
    parsed = kinds.pidfd(fdinfo_of(keep(os.pidfd_open(pid))))
    assert (parsed.Pid, parsed.NSpid[0]) == (pid, pid)


def test_pidfd_of_a_process_that_has_ended(keep: Keep, fdinfo_of: Look) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    fd = keep(os.pidfd_open(pid))
    os.waitpid(pid, 0)
    assert kinds.pidfd(fdinfo_of(fd)).Pid == -1


def test_tty(keep: Keep, fdinfo_of: Look) -> None:
    master, slave = map(keep, os.openpty())
    assert kinds.tty_index(fdinfo_of(master)) == int(os.path.basename(os.ttyname(slave)))


def test_descriptors_in_flight(keep: Keep, fdinfo_of: Look) -> None:
    one, other = socket.socketpair()
    with one, other:
        assert kinds.scm_fds(fdinfo_of(other.fileno())) == 0
        socket.send_fds(one, [b"x"], [one.fileno(), other.fileno(), 0])
        assert kinds.scm_fds(fdinfo_of(other.fileno())) == 3


def test_memfd(keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(os.memfd_create("x", 0))
    os.lseek(fd, 7, os.SEEK_SET)
    info = fdinfo_of(fd)
    assert (info.pos, info.ino, info.flags & os.O_CLOEXEC) == (7, os.fstat(fd).st_ino, 0)


UFFDIO_API, UFFD_FEATURE_THREAD_ID = 0xC018AA3F, 1 << 8


def test_userfaultfd(keep: Keep, fdinfo_of: Look) -> None:
    fd = keep(call("userfaultfd", os.O_CLOEXEC))
    assert kinds.userfaultfd(fdinfo_of(fd)) == (0, 0, None)
    fcntl.ioctl(fd, UFFDIO_API, struct.pack("QQQ", 0xAA, UFFD_FEATURE_THREAD_ID, 0))
    assert kinds.userfaultfd(fdinfo_of(fd)) == (0, 0, UFFD_FEATURE_THREAD_ID)


IORING_REGISTER_BUFFERS, IORING_REGISTER_FILES = 0, 2


def test_io_uring(keep: Keep, fdinfo_of: Look, tmp_path: os.PathLike[str]) -> None:
    fd = keep(call("io_uring_setup", 8, ctypes.create_string_buffer(120)))
    ring = kinds.io_uring(fdinfo_of(fd))
    assert (ring.SqMask, ring.CqMask, ring.SqHead, ring.CqTail) == (7, 15, 0, 0)
    assert (ring.UserFiles, ring.user_files_size, ring.UserBufs) == ({}, 0, 0)
    path = os.path.join(os.fsencode(tmp_path), b"a b")
    file = keep(os.open(path, os.O_RDWR | os.O_CREAT))
    call("io_uring_register", fd, IORING_REGISTER_FILES, struct.pack("3i", 0, -1, file), 3)
    memory = ctypes.create_string_buffer(8192)
    vector = struct.pack("QQ", ctypes.addressof(memory), 8192)
    call("io_uring_register", fd, IORING_REGISTER_BUFFERS, vector, 1)
    ring = kinds.io_uring(fdinfo_of(fd))
    assert set(ring.UserFiles) == {0, 2}
    assert ring.UserFiles[2] in (path, path.replace(b" ", b"\\040"))
    assert (ring.user_files_size, ring.UserBufs, ring.busy) == (3, 1, False)
