"""Copies of a program with System V objects and message queues: each has its own, by the same identifiers and names."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets, host_state
from kit.campaign import spare
from kit.host import descendants
from kit.talk import ANSWERS, Talk, snapshot_of

#: A segment that is attached and one that nobody has attached, a set with something to be undone, a queue of either kind.
SERVER = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
IPC_CREAT, IPC_NOWAIT, SEM_UNDO, GETVAL, SETVAL, IPC_RMID = 0o1000, 0o4000, 0x1000, 12, 16, 0
key = 0x71000000 + os.getpid()
queue_name = b"/torpor-test-%d" % os.getpid()

def must(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def attached(segment):
    address = must(libc.shmat(segment, None, 0))
    return (ctypes.c_int * 4).from_address(address)

def change(number, by, flags=0):
    must(libc.semop(sem, struct.pack("=Hhh", number, by, flags), 1))

shm = must(libc.shmget(key, 4096, IPC_CREAT | 0o600))
other = must(libc.shmget(key + 1, 8192, IPC_CREAT | 0o640))
memory = attached(shm)
memory[0] = 10
area = attached(other)
area[1] = 77
must(libc.shmdt(area))
sem = must(libc.semget(key, 2, IPC_CREAT | 0o600))
must(libc.semctl(sem, 0, SETVAL, 1))
must(libc.semctl(sem, 1, SETVAL, 5))
change(0, -1, SEM_UNDO)
msg = must(libc.msgget(key, IPC_CREAT | 0o600))
must(libc.msgsnd(msg, struct.pack("q", 7) + b"hello", 5, 0))
attributes = (ctypes.c_long * 8)(0, 4, 32)
mq = must(libc.mq_open(queue_name, os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o600, ctypes.addressof(attributes)))
must(libc.mq_send(mq, b"posted", 6, 1))

def counts():
    return [memory[0], *(must(libc.semctl(sem, number, GETVAL)) for number in (0, 1))]

def answer(line):
    if line == "look":
        found = attached(other)
        seen = [must(libc.shmget(key, 0, 0)) == shm, must(libc.semget(key, 0, 0)) == sem, *counts(), found[1]]
        must(libc.shmdt(found))
        return seen
    if line == "change":
        memory[0] += 1
        change(1, 1)
        return counts()
    if line == "receive":
        text, more = ctypes.create_string_buffer(100), ctypes.create_string_buffer(100)
        size = must(libc.msgrcv(msg, text, 80, 0, IPC_NOWAIT))
        length = must(libc.mq_receive(mq, more, 100, None))
        return [text.raw[8 : 8 + size], more.raw[:length]]
    if line == "send":
        again = must(libc.mq_open(queue_name, os.O_WRONLY, 0, None))
        must(libc.mq_send(again, b"anew", 4, 0))
        os.close(again)
        must(libc.msgsnd(msg, struct.pack("q", 9) + b"again", 5, 0))
        return True
    if line == "close":
        os.close(mq)
        return True
    if line == "undo":  # what a child does to a semaphore that is locked until we end
        child = os.fork()
        if child == 0:
            os._exit(libc.semop(sem, struct.pack("=Hhh", 0, -1, IPC_NOWAIT), 1) == 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if line == "remove":
        for remove, number in ((libc.shmctl, shm), (libc.shmctl, other), (libc.msgctl, msg)):
            must(remove(number, IPC_RMID, None))
        must(libc.semctl(sem, 0, IPC_RMID, 0))
        must(libc.mq_unlink(queue_name))
        return True
"""
LOOK = [True, True, 10, 0, 5, 77]


@pytest.fixture
def snapshot(start: Targets, images: str) -> Iterator[Target]:
    before = objects()
    target = start.python(SERVER + ANSWERS)
    with snapshot_of(target, images) as target:
        yield target
    remove(target, before)


def objects() -> set[tuple[str, str]]:
    """(letter of ipcrm, identifier) of all that there is in our IPC namespace."""
    found = set()
    for kind, name in zip("msq", ("shm", "sem", "msg"), strict=True):
        with open(f"/proc/sysvipc/{name}") as file:
            found |= {(kind, line.split()[1]) for line in file.readlines()[1:]}
    return found


def remove(target: Target, before: set[tuple[str, str]]) -> None:
    """Remove what the first program has made and what outlives it."""
    ctypes.CDLL(None).mq_unlink(b"/torpor-test-%d" % target.pid)
    for kind, number in objects() - before:
        subprocess.run(["ipcrm", f"-{kind}", number], check=True)


def test_each_copy_has_its_own(snapshot: Target, images: str) -> None:
    ours = objects()
    with torpor.template(images) as template:
        first, second = Talk(template), Talk(template)
        for copy in (first, second):
            assert copy.ask("look") == LOOK
            assert copy.ask("change") == [11, 0, 6]
            assert copy.ask("undo") == 0, "the semaphore is locked"
            assert copy.ask("receive") == [b"hello", b"posted"]
        assert first.ask("send")
        assert first.ask("receive") == [b"again", b"anew"]
        assert first.ask("remove")
        assert second.ask("change") == [12, 0, 7]
        third = Talk(template, fresh_pid=True)
        assert third.ask("look") == LOOK
        assert objects() == ours, "what is outside has not changed"
        for copy in (first, second, third):
            copy.end()


def test_restored_side_by_side(start: Targets, images: str) -> None:
    """Each in namespaces of its own; what the first program has left is not theirs."""
    before = objects()
    target = start.python(SERVER + "ready()\ntime.sleep(1000)\n")
    with snapshot_of(target, images):
        made = objects() - before
        copies = [torpor.restore(images, own_pids=True) for _ in range(2)]
        inodes = {os.stat(f"/proc/{copy.pid}/ns/ipc").st_ino for copy in copies}
        assert len(inodes | {os.stat("/proc/self/ns/ipc").st_ino}) == 3
        remove(target, before)
        for copy in copies:
            seen = subprocess.run(["nsenter", f"--ipc=/proc/{copy.pid}/ns/ipc", "ipcs"], capture_output=True, check=True)
            assert set(seen.stdout.split()) >= {number.encode() for _, number in made}
        assert objects() == before


def test_a_copy_is_dumped_with_all_that_is_in_its_namespace(
    snapshot: Target, images: str, tmp_path: os.PathLike[str]
) -> None:
    again = os.path.join(tmp_path, "again")
    os.mkdir(again)
    with torpor.template(images) as template:
        copy = Talk(template)
        assert copy.ask("change") == [11, 0, 6]
        torpor.dump(copy.copy.pid, again)
        assert copy.copy.wait() == 137
    with torpor.template(again) as template:
        for _ in range(2):
            other = Talk(template)
            assert other.ask("look") == [True, True, 11, 0, 6, 77]
            assert other.ask("receive") == [b"hello", b"posted"]
            other.end()


def test_queues_are_mounted_where_they_were(snapshot: Target, images: str, tmp_path: os.PathLike[str]) -> None:
    """Where there is a mount of our queues, a copy finds its own there, and is dumped all the same."""
    place, again = os.path.join(tmp_path, "queues"), os.path.join(tmp_path, "again")
    os.mkdir(place)
    os.mkdir(again)
    subprocess.run(["mount", "-t", "mqueue", "none", place], check=True)
    try:
        with torpor.template(images) as template:
            copy = Talk(template)
            assert os.listdir(f"/proc/{copy.copy.pid}/root{place}") == [f"torpor-test-{snapshot.pid}"]
            assert copy.ask("remove")
            assert os.listdir(f"/proc/{copy.copy.pid}/root{place}") == []
            assert f"torpor-test-{snapshot.pid}" in os.listdir(place)
            torpor.dump(copy.copy.pid, again)
            copy.copy.wait()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_failed_copy_leaves_none(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        Talk(template).end()
        before, ours = host_state(), objects()
        with pytest.raises(torpor.TorporError):
            Talk(template, cgroup=("/nonexistent",))
        assert objects() == ours
        left = set(descendants(os.getpid())) - {template.pid, *spare(template)}
        assert left <= set(before["processes"])
        copy = Talk(template)
        assert copy.ask("look") == LOOK
        copy.end()


def test_a_queue_that_no_task_has_open_is_refused(snapshot: Target, images: str, tmp_path: os.PathLike[str]) -> None:
    with torpor.template(images) as template:
        copy = Talk(template)
        assert copy.ask("close")
        with pytest.raises(torpor.Unsupported, match=f"message queue /torpor-test-{snapshot.pid} .* no task has it open"):
            torpor.dump(copy.copy.pid, os.fspath(tmp_path))
        assert copy.ask("change") == [11, 0, 6], "it goes on"
        copy.end()
