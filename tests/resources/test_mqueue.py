"""POSIX message queues: each test has an IPC namespace of its own, in a child."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from kit.file_bench import Bench, alone_after, seen
from torpor.errors import ImageError, KernelError, Unsupported
from torpor.linux import mqueue_messages
from torpor.linux.call import call
from torpor.linux.nr import NR
from torpor.proc import mqueue as text

CLONE_NEWIPC = 0x08000000
_libc = ctypes.CDLL(None, use_errno=True)


alone = alone_after(lambda: call("unshare", CLONE_NEWIPC))


def kernel(name: str, *args: object) -> int:
    """A system call by the way of libc, not of the code under test."""
    words = [ctypes.c_void_p(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(ctypes.c_long(NR[name]), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def queue(name: bytes = b"q", flags: int = os.O_RDWR, size: tuple[int, int] = (8, 6000), mode: int = 0o640) -> int:
    return kernel("mq_open", name, flags | os.O_CREAT | os.O_EXCL, mode, struct.pack("<8q", 0, *size, 0, 0, 0, 0, 0))


def put(fd: int, body: bytes, priority: int = 0) -> None:
    kernel("mq_timedsend", fd, body, len(body), priority, None)


def take_all(fd: int) -> list[tuple[int, bytes]]:
    area, priority, found = ctypes.create_string_buffer(8192), ctypes.c_uint(), []
    with contextlib.suppress(BlockingIOError):
        while True:
            past = struct.pack("<2q", 0, 0)
            try:
                size = kernel("mq_timedreceive", fd, area, 8192, ctypes.byref(priority), past)
            except OSError as error:
                if error.errno in (errno.ETIMEDOUT, errno.EAGAIN):
                    break
                raise
            found.append((priority.value, area.raw[:size]))
    return found


def shown(fd: int) -> object:
    attr = ctypes.create_string_buffer(64)
    kernel("mq_getsetattr", fd, None, attr)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        return seen(fd), attr.raw[:32], os.read(again, 80)
    finally:
        os.close(again)


MESSAGES = [(9, b"x" * 5000), (9, b"second of nine"), (3, b""), (0, bytes(range(256)) * 20), (0, b"last")]


def filled(name: bytes = b"q", **options: int) -> int:
    fd = queue(name, **options)
    for priority, body in sorted(MESSAGES, key=lambda one: one[0]):  # stable: order within a priority stays
        put(fd, body, priority)
    return fd


@contextlib.contextmanager
def dumped(*fds: int) -> Iterator[tuple[Bench, list[int]]]:
    with Bench() as bench:
        for fd in fds:
            bench.check(fd)
        yield bench, [bench.dump(fd) for fd in fds]


@alone
def test_a_queue_that_is_gone_is_made_again() -> None:
    fd = filled(flags=os.O_RDWR | os.O_NONBLOCK)
    os.fchown(fd, 44, 55)
    os.fchmod(fd, 0o460)
    writer = kernel("mq_open", b"q", os.O_WRONLY, 0, None)
    before = shown(fd), shown(writer)
    with dumped(fd, writer) as (bench, numbers):
        assert (shown(fd), shown(writer)) == before  # nothing was taken out
        kernel("mq_unlink", b"q")
        bench.commit()
        copies = [bench.build(number) for number in numbers]
        assert tuple(map(shown, copies)) == before
        assert os.fstat(copies[0]).st_ino == os.fstat(copies[1]).st_ino != os.fstat(fd).st_ino
        put(copies[1], b"new", 1)
        assert take_all(copies[0]) == [*MESSAGES[:3], (1, b"new"), *MESSAGES[3:]]
        assert take_all(fd) == MESSAGES


@alone
def test_a_queue_without_a_name() -> None:
    fd = filled()
    kernel("mq_unlink", b"q")
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.lseek(other, 7, os.SEEK_SET)
    before = shown(fd), shown(other)
    with dumped(fd, other) as (bench, numbers):
        taken = queue(b"q")  # somebody else has the name by now
        bench.commit()
        copies = [bench.build(number) for number in numbers]
        assert os.fstat(copies[0]).st_ino == os.fstat(copies[1]).st_ino != os.fstat(fd).st_ino
        assert os.fstat(copies[0]).st_nlink == 0
        assert [os.lseek(copy, 0, os.SEEK_CUR) for copy in copies] == [0, 7]
        assert take_all(copies[1]) == MESSAGES and take_all(taken) == []
        kernel("mq_unlink", b"q")
    with dumped(fd, other) as (bench, numbers):
        bench.commit()
        assert tuple(shown(bench.build(number)) for number in numbers) == before


@alone
def test_the_same_queue_is_used_as_it_is() -> None:
    fd = filled()
    with dumped(fd) as (bench, [number]):
        take_all(fd)
        put(fd, b"since then")
        bench.commit()
        copy = bench.build(number)
        assert os.fstat(copy).st_ino == os.fstat(fd).st_ino
        assert take_all(copy) == [(0, b"since then")]
        bench.building.on_failure.roll_back()
        assert kernel("mq_open", b"q", os.O_RDONLY, 0, None)


@alone
def test_another_queue_of_the_name() -> None:
    for change in ("size", "mode", "messages", "owner"):
        fd = filled(mode=0o600)
        with dumped(fd) as (bench, [number]):
            kernel("mq_unlink", b"q")
            size = (7, 6000) if change == "size" else (8, 6000)
            other = queue(b"q", size=size, mode=0o640 if change == "mode" else 0o600)
            if change != "messages":
                for priority, body in MESSAGES:
                    put(other, body, priority)
            if change == "owner":
                os.fchown(other, 1, 0)
            bench.commit()
            with pytest.raises(Unsupported, match="another queue has its name") as caught:
                bench.build(number)
            assert "remove it if nobody needs it" in caught.value.hint
            assert os.fstat(other).st_nlink == 1
            kernel("mq_unlink", b"q")


@alone
def test_a_failed_restore_removes_what_it_made() -> None:
    fd = filled()
    with dumped(fd) as (bench, [number]):
        kernel("mq_unlink", b"q")
        bench.commit()
        bench.build(number)
        bench.building.on_failure.roll_back()
        with pytest.raises(FileNotFoundError):
            kernel("mq_open", b"q", os.O_RDONLY, 0, None)


@alone
def test_a_queue_that_cannot_be_had() -> None:
    fd = queue(size=(10, 100))
    with dumped(fd) as (bench, [number]):
        kernel("mq_unlink", b"q")
        with open("/proc/sys/fs/mqueue/msg_max", "w") as file:
            file.write("5")
        bench.commit()
        os.setresuid(0, 1000, 0)  # without the capability to do it all the same
        with pytest.raises(KernelError) as caught:
            bench.build(number)
        os.setresuid(0, 0, 0)
        assert caught.value.errno == errno.EINVAL and "fs.mqueue.msg_max=10" in caught.value.hint


@alone
def test_nothing_is_dumped_that_could_not_be_read() -> None:
    fd = filled()
    mqueue_messages._possible[os.getpid()] = False
    with Bench() as bench, pytest.raises(Unsupported, match="5 messages wait in it") as caught:
        bench.check(fd)
    assert "CAP_BPF" in caught.value.hint
    take_all(fd)
    with Bench() as bench:
        bench.check(fd)


@alone
def test_notification_by_a_thread_is_refused() -> None:
    import socket

    fd = queue()
    ready, wait = os.pipe(), os.pipe()
    child = os.fork()  # whoever closes a descriptor of the queue is notified no more: so not we
    if child == 0:
        link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        cookie = ctypes.create_string_buffer(32)
        kernel("mq_notify", fd, struct.pack("<Qii48x", ctypes.addressof(cookie), link.fileno(), 2))
        os.write(ready[1], b"x")
        os.read(wait[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with Bench() as bench:
        bench.check(fd)  # not by a task of the tree
        bench.dumping.memo["pids"] = [child]
        with pytest.raises(Unsupported, match="SIGEV_THREAD"):
            bench.check(fd)
    os.write(wait[1], b"x")
    os.waitpid(child, 0)


@alone
def test_a_large_file_of_the_size_of_a_queue_is_none() -> None:
    with Bench() as bench:
        name = os.path.join(bench.folder.name, "file")
        fd = os.open(name, os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(80))
        bench.check(fd)
        number = bench.dump(fd)
        bench.commit()
        assert bench.building.files[number][0].FIELD == "reg"


@alone
def test_damaged_entries() -> None:
    def damaged(change: Callable[[object], object], message: str) -> None:
        fd = filled()
        with dumped(fd) as (bench, [number]):
            kernel("mq_unlink", b"q")
            bench.commit()
            change(bench.building.files[number][1])
            with pytest.raises(ImageError, match=message):
                bench.build(number)

    damaged(lambda entry: setattr(entry.queue, "name", "a/b"), "no name of a queue")
    damaged(lambda entry: setattr(entry.queue, "name", ".."), "no name of a queue")
    damaged(lambda entry: setattr(entry.queue, "maxmsg", 0), "maxmsg, msgsize")
    damaged(lambda entry: setattr(entry.queue, "maxmsg", 2), "5 wait")
    damaged(lambda entry: setattr(entry.queue, "msgsize", 10), "larger than the queue takes")
    damaged(lambda entry: entry.ClearField("queue"), "it is open and not there")


def test_text() -> None:
    line = b"QSIZE:129     NOTIFY:2    SIGNO:0    NOTIFY_PID:8260  \n"
    assert text.parse(line) == (129, 2, 0, 8260)
    for bad in (b"", b"QSIZE:1", line.replace(b"129", b"x")):
        with pytest.raises(ValueError, match="mqueue"):
            text.parse(bad)
