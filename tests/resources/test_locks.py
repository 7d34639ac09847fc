"""File locks: what fdinfo shows of them is the same after a restore."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.file_bench import Bench, in_child, run_here
from torpor.errors import TorporError, Unsupported
from torpor.images import schema as pb
from torpor.remote.program import Program
from torpor.resources import locks

OFD_SETLK, SETLK, SETLEASE, GETLEASE = 37, 6, 1024, 1025
READ, WRITE, NONE = 0, 1, 2
END = (1 << 63) - 1


def shown(fd: int) -> list[list[str]]:
    """The locks that the kernel shows for a descriptor, without their running number and owner."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = [line.split()[2:] for line in file if line.startswith("lock:")]
    return sorted([line[:3] + line[4:] for line in lines])


def lock(fd: int, command: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))


def round_trip(path: str, flags: int, take: Callable[[int], object]) -> None:
    """Take locks on a file, dump, drop them, restore, compare. In this process."""
    with Bench(file_locks=True) as bench:
        fd = os.open(path, flags)
        take(fd)
        file_id = bench.dump(fd)
        before = shown(fd)
        assert before, "no lock was taken"
        task = SimpleNamespace(pid=os.getpid(), vpid=os.getpid(), fds={fd: (file_id, False)})
        bench.dumping.tasks = {task.pid: task}
        locks.finish(bench.dumping)
        os.close(fd)
        ctx = bench.commit()
        copy = bench.build(file_id)
        os.dup2(copy, fd)
        os.close(copy)
        ctx.kept.remove(copy)
        assert shown(fd) == []
        program = Program()
        locks.emit(bench.task((fd, file_id)), program, ctx)
        run_here(program)
        assert shown(fd) == before
        os.close(fd)


def fresh(tmp_path: object) -> str:
    path = f"{tmp_path}/file"
    with open(path, "w") as file:
        file.write("content")
    return path


@pytest.mark.parametrize("operation", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_flock(tmp_path: object, operation: int) -> None:
    path = fresh(tmp_path)
    in_child(lambda: round_trip(path, os.O_RDONLY, lambda fd: fcntl.flock(fd, operation)))


ranges = st.lists(
    st.tuples(st.sampled_from([READ, WRITE]), st.integers(0, 1 << 40), st.integers(0, 1 << 20)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15)
@given(wanted=ranges, command=st.sampled_from([SETLK, OFD_SETLK]))
def test_ranges(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[int, int, int]], command: int
) -> None:
    path = fresh(tmp_path_factory.mktemp("locks"))

    def take(fd: int) -> None:
        for kind, start, length in wanted:
            lock(fd, command, kind, start, length)

    in_child(lambda: round_trip(path, os.O_RDWR, take))


@pytest.mark.parametrize(
    ("flags", "kind"), [(os.O_RDONLY, READ), (os.O_RDWR, WRITE), (os.O_WRONLY, WRITE)]
)
def test_lease(tmp_path: object, flags: int, kind: int) -> None:
    path = fresh(tmp_path)
    in_child(lambda: round_trip(path, flags, lambda fd: fcntl.fcntl(fd, SETLEASE, kind)))


@pytest.mark.parametrize(
    ("flags", "kind", "opening", "target"),
    [
        (os.O_RDONLY, READ, os.O_WRONLY, NONE),
        (os.O_RDWR, WRITE, os.O_RDONLY, READ),
        (os.O_RDWR, WRITE, os.O_RDWR, NONE),
    ],
)
def test_lease_being_broken(
    tmp_path: object, flags: int, kind: int, opening: int, target: int
) -> None:
    path = fresh(tmp_path)

    def take(fd: int) -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(fd, SETLEASE, kind)
        with pytest.raises(BlockingIOError):
            os.open(path, opening | os.O_NONBLOCK)
        assert fcntl.fcntl(fd, GETLEASE) == target
        signal.signal(signal.SIGIO, signal.SIG_DFL)  # would end us if the restore let it through

    def work() -> None:
        round_trip(path, flags, take)
        time.sleep(0.05)

    in_child(work)


def test_refused_without_the_option(tmp_path: object) -> None:
    with Bench() as bench:
        fd = os.open(fresh(tmp_path), os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        task = SimpleNamespace(pid=os.getpid(), vpid=os.getpid(), fds={fd: (1, False)})
        bench.dumping.tasks = {task.pid: task}
        with pytest.raises(Unsupported, match=r"FLOCK.*--file-locks"):
            locks.finish(bench.dumping)
        os.close(fd)


def test_ignored_at_restore_without_the_option() -> None:
    with Bench() as bench:
        bench.writer.append(
            "filelocks", pb.file_lock_entry(flag=2, type=1, pid=os.getpid(), fd=1, start=0, len=0)
        )
        program = Program()
        locks.emit(bench.task((1, 1)), program, bench.commit())
        assert len(program) == 0


def test_locks_of_the_parent_are_not_the_childs(tmp_path: object) -> None:
    """A POSIX lock shows at every description that was locked through, but belongs to one
    process."""
    path = fresh(tmp_path)

    def work() -> None:
        fd = os.open(path, os.O_RDWR)
        lock(fd, SETLK, WRITE, 0, 5)
        fcntl.flock(fd, fcntl.LOCK_SH)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        with Bench(file_locks=True) as bench:
            tasks = [
                SimpleNamespace(pid=one, vpid=one + 1000, fds={fd: (7, False)})
                for one in (os.getpid(), pid)
            ]
            bench.dumping.tasks = {task.pid: task for task in tasks}
            locks.finish(bench.dumping)
            found = bench.commit().images.read_all("filelocks")
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert sorted(
            (entry.flag, entry.type, entry.pid, entry.start, entry.len) for entry in found
        ) == [
            (1, WRITE, os.getpid() + 1000, 0, 5),
            (2, READ, os.getpid() + 1000, 0, 0),
        ]

    in_child(work)


def test_posix_lock_is_taken_through_a_descriptor_that_can(tmp_path: object) -> None:
    path = fresh(tmp_path)

    def work() -> None:
        reader, writer = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
        lock(writer, SETLK, WRITE, 3, 4)
        with Bench(file_locks=True) as bench:
            task = SimpleNamespace(
                pid=os.getpid(), vpid=os.getpid(), fds={reader: (1, False), writer: (2, False)}
            )
            bench.dumping.tasks = {task.pid: task}
            locks.finish(bench.dumping)
            [found] = bench.commit().images.read_all("filelocks")
            assert found.fd == writer

    in_child(work)


@pytest.mark.parametrize("broken", [{"flag": 16}, {"type": 77}, {"flag": 8, "type": 1, "fd": 9999}])
def test_unknown_locks_are_refused(broken: dict[str, int]) -> None:
    with Bench(file_locks=True) as bench:
        values = {"flag": 1, "type": 1, "pid": os.getpid(), "fd": 0, "start": 0, "len": 0, **broken}
        bench.writer.append("filelocks", pb.file_lock_entry(**values))
        with pytest.raises(TorporError, match=r"filelocks\.img"):
            locks.emit(bench.task((0, 1)), Program(), bench.commit())
