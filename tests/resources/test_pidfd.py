"""pidfds through the images: processes of the tree, zombies, threads, processes that are gone."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kit import Targets, Verbs, round_trip
from kit.file_bench import Bench, run_here, seen, source
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.remote.program import Program
from torpor.resources.files.pidfd import RESOURCE

PIDFD_THREAD = os.O_EXCL


def lines(fd: int) -> tuple[bytes, ...]:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return tuple(line for line in file if line.startswith((b"Pid", b"NSpid")))


def exit_code(fd: int) -> int | None:
    """PIDFD_GET_INFO with PIDFD_INFO_EXIT"""
    info = bytearray(64)
    struct.pack_into("=Q", info, 0, 8)
    try:
        fcntl.ioctl(fd, 0xC040FF0B, info)
    except OSError:
        return None
    return struct.unpack_from("=i", info, 60)[0] if info[0] & 8 else None


@pytest.fixture
def child(ends_all: None) -> Callable[[], int]:
    def make() -> int:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        return pid

    return make


def gone(end: Callable[[], object]) -> int:
    """A pidfd of a process that did ``end`` and was waited for."""
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        end()
        os._exit(77)
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    return fd


def tree(bench: Bench, *pids: int, threads: tuple[int, ...] = ()) -> None:
    for pid in pids:
        bench.dumping.tasks[pid] = SimpleNamespace(
            pid=pid, vpid=pid, threads=[SimpleNamespace(tid=tid, vtid=tid) for tid in threads]
        )


def settle(bench: Bench, number: int, fd: int, *others: tuple[int, int]) -> None:
    """What the engine does: the processes are there now, and each holder fetches its pidfd."""
    for hook in bench.building.memo.get("after_mappings", ()):
        hook()
    fetch(bench, number, fd, *others)


def fetch(bench: Bench, number: int, fd: int, *others: tuple[int, int]) -> None:
    program = Program()
    opened = [(int(name), 0, False) for name in os.listdir("/proc/self/fd")]
    opened = [
        (name, *rest)
        for name, *rest in opened
        if name != fd and os.path.exists(f"/proc/self/fd/{name}")
    ]
    task = SimpleNamespace(
        pid=os.getpid(), fds=[*opened, (fd, number, bool(fcntl.fcntl(fd, fcntl.F_GETFD)))]
    )
    RESOURCE.settle_each(bench.building.files[number][1], fd, task, program, bench.building)
    run_here(program)


@pytest.mark.parametrize("flags", [0, os.O_NONBLOCK])
def test_a_process_of_the_tree(child: Callable[[], int], flags: int) -> None:
    pid = child()
    fd = os.pidfd_open(pid, flags)
    with Bench() as bench:
        tree(bench, pid)
        number = bench.dump(fd)
        bench.commit()
        copy = os.dup(bench.build(number))
        opened = os.listdir("/proc/self/fd")
        settle(bench, number, copy)
        assert os.listdir("/proc/self/fd") == opened
        assert lines(copy) == lines(fd) != lines(os.pidfd_open(os.getpid()))
        assert seen(copy) == seen(fd)
        assert not os.get_inheritable(copy)
        signal.pidfd_send_signal(copy, signal.SIGKILL)
        assert select.select([copy, fd], [], [], 5)[0] == [copy, fd]
        os.close(copy)
    os.close(fd)


def test_holders_share_one_description(child: Callable[[], int]) -> None:
    pid = child()
    fd = os.pidfd_open(pid)
    with Bench() as bench:
        tree(bench, pid)
        number = bench.dump(fd)
        bench.commit()
        first, second = os.dup(bench.build(number)), os.dup(bench.build(number))
        os.set_inheritable(second, True)
        settle(bench, number, first)
        fetch(bench, number, second)
        os.set_blocking(first, False)
        assert not os.get_blocking(second)
        assert os.get_inheritable(second)
        os.close(first)
        os.close(second)
    os.close(fd)


def test_a_thread_of_the_tree() -> None:
    ids, done = [], threading.Event()
    thread = threading.Thread(target=lambda: (ids.append(threading.get_native_id()), done.wait()))
    thread.start()
    while not ids:
        pass
    fd = os.pidfd_open(ids[0], PIDFD_THREAD)
    with Bench() as bench:
        tree(bench, os.getpid(), threads=(os.getpid(), ids[0]))
        number = bench.dump(fd)
        bench.commit()
        copy = os.dup(bench.build(number))
        settle(bench, number, copy)
        assert lines(copy) == lines(fd) and seen(copy) == seen(fd)
        os.close(copy)
    done.set()
    thread.join()
    os.close(fd)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: os._exit(0), 0),
        (lambda: os._exit(3), 3 << 8),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 9),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 15),
    ],
)
@pytest.mark.parametrize("flags", [0, os.O_NONBLOCK])
def test_a_process_that_is_gone(end: Callable[[], object], status: int, flags: int) -> None:
    fd = gone(end)
    os.set_blocking(fd, not flags)
    with Bench() as bench:
        number = bench.dump(fd)
        bench.commit()
        copy = bench.build(number)
        assert lines(copy) == lines(fd) == (b"Pid:\t-1\n", b"NSpid:\t-1\n")
        assert seen(copy) == seen(fd)
        assert exit_code(copy) == exit_code(fd) == status
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(copy, 0)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
    os.close(fd)


def test_processes_that_are_gone_stay_different_and_the_same() -> None:
    one, other = gone(lambda: None), gone(lambda: None)
    with Bench() as bench:
        ids = [bench.dump(fd) for fd in (one, other)]
        again = bench.dumping.new_id("file")
        copied = RESOURCE.dump(source(one, again), bench.dumping)
        bench.writer.append("files", pb.file_entry(type=20, id=again, pidfd=copied))
        bench.commit()
        inodes = [os.fstat(bench.build(number)).st_ino for number in (*ids, again)]
        assert inodes[0] == inodes[2] != inodes[1]
    os.close(one)
    os.close(other)


def test_a_process_outside_of_the_tree_is_named(child: Callable[[], int]) -> None:
    pid = child()
    fd = os.pidfd_open(pid)
    with Bench() as bench, pytest.raises(Unsupported, match=f"process {pid} is not in the tree"):
        bench.dump(fd)
    os.close(fd)


@pytest.mark.parametrize("status", [signal.SIGSTOP, 127, 0xFF00, 0xFFFFFFFF])
def test_an_end_that_no_process_has_does_not_stop_us(status: int) -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    entry = pb.pidfd_entry(id=1, ino=1, flags=0, nspid=-1, fown=owner, exit_status=status)
    with Bench() as bench:
        fd = RESOURCE.restore(entry, bench.commit())
        assert lines(fd)[0] == b"Pid:\t-1\n"
        os.close(fd)


@pytest.mark.parametrize("number", [0, -2])
def test_a_number_that_is_none_is_an_image_error(number: int) -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    with Bench() as bench:
        ctx = bench.commit()
        with pytest.raises(ImageError, match="nspid"):
            RESOURCE.restore(pb.pidfd_entry(id=1, ino=1, flags=0, nspid=number, fown=owner), ctx)


TREE = """
import errno, os, select, signal
up, down = os.pipe(), os.pipe()
parent = os.pidfd_open(os.getpid())
dead = os.fork()
if dead == 0:
    os._exit(3)
gone = os.pidfd_open(dead)
os.waitpid(dead, 0)
zombie_pid = os.fork()
if zombie_pid == 0:
    os._exit(4)
zombie = os.pidfd_open(zombie_pid)
os.waitid(os.P_PID, zombie_pid, os.WEXITED | os.WNOWAIT)
child = os.fork()
if child == 0:
    os.read(down[0], 1)
    os.set_blocking(parent, False)          # a flag of the description that we share
    signal.pidfd_send_signal(parent, signal.SIGUSR1)
    os.write(up[1], b"x")
    signal.pause()
high = 70
os.dup2(os.pidfd_open(child), high, inheritable=False)
watch = select.epoll()
watch.register(high, select.EPOLLIN)        # an epoll below what it watches
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
ready()
wait_told("go")
why = []
os.write(down[1], b"x")
os.read(up[0], 1)
if not got: why.append("the child cannot signal its parent")
if os.get_blocking(parent): why.append("two descriptions where there was one")
if os.get_inheritable(high): why.append("close-on-exec")
if watch.poll(0): why.append("the child is alive")
signal.pidfd_send_signal(high, signal.SIGKILL)
if watch.poll(5) != [(high, select.EPOLLIN)]: why.append("the child is dead")
if os.waitid(os.P_PIDFD, high, os.WEXITED).si_pid != child: why.append("another child")
if os.waitid(os.P_PIDFD, zombie, os.WEXITED).si_status != 4: why.append("the zombie")
try:
    signal.pidfd_send_signal(gone, 0)
    why.append("gone")
except ProcessLookupError:
    pass
done(not why, "; ".join(why))
"""


def test_a_tree_that_holds_pidfds_of_itself(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.python(TREE)
    round_trip(verbs, target, images)
    target.go()
