"""System V semaphores and message queues that are gone at the restore: whose they were, and how much they took.

In an IPC namespace of the test's own.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.files import slurp_text

CLONE_NEWIPC = 0x08000000
IPC_RMID, IPC_STAT = 0, 2
QBYTES = 88  # where it lies in struct msqid64_ds
LIBC = ctypes.CDLL(None, use_errno=True)

PROGRAM = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def ok(n):
    if n < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return n
def belongs(ctl, *which):
    area = ctypes.create_string_buffer(256)
    ok(ctl(*which, 2, area))
    struct.pack_into("II", area, 4, 88, 99); struct.pack_into("I", area, 20, 0o462)
    if ctl is libc.msgctl: struct.pack_into("Q", area, 88, 5000)
    ok(ctl(*which, 1, area))
os.setegid(77); os.seteuid(66)
sem, queue = ok(libc.semget(0x7ab1, 3, 0o1640)), ok(libc.msgget(0x7ab2, 0o1640))
os.seteuid(0); os.setegid(0)
belongs(libc.semctl, sem, 0); belongs(libc.msgctl, queue)
ok(libc.semop(sem, struct.pack("Hhh", 1, 5, 0), 1)); ok(libc.msgsnd(queue, struct.pack("q", 7) + b"words", 5, 0))
tell("numbers", f"{sem} {queue}")
ready(); wait_told("go")
text = ctypes.create_string_buffer(99)
done(libc.semctl(sem, 1, 12) == 5 and libc.msgrcv(queue, text, 9, 7, 0) == 5 and text.raw[8:13] == b"words", "they are not as they were")
"""


@pytest.fixture(autouse=True)
def own_namespace() -> Iterator[None]:
    ours = os.open("/proc/self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    assert LIBC.unshare(CLONE_NEWIPC) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert LIBC.setns(ours, CLONE_NEWIPC) == 0
        os.close(ours)


def shown(kind: str, *columns: str) -> list[list[str]]:
    head, *rows = (line.split() for line in slurp_text(f"/proc/sysvipc/{kind}").splitlines())
    return [[row[head.index(column)] for column in columns] for row in rows]


def seen(queue: int) -> object:
    area = ctypes.create_string_buffer(256)
    assert LIBC.msgctl(queue, IPC_STAT, area) == 0
    whose = ("key", "perms", "uid", "gid", "cuid", "cgid")
    return shown("sem", "semid", "nsems", *whose), shown("msg", "msqid", *whose), struct.unpack_from("Q", area, QBYTES)


def test_owners_makers_and_room_come_back(start: Targets, library: Library, images: str) -> None:
    target = start.python(PROGRAM)
    sem, queue = map(int, target.read("numbers").split())
    before = seen(queue)
    assert before == (
        [[str(sem), "3", str(0x7AB1), "462", "88", "99", "66", "77"]],
        [[str(queue), str(0x7AB2), "462", "88", "99", "66", "77"]],
        (5000,),
    )
    library.dump(target.pid, images)
    target.wait_gone()
    assert LIBC.semctl(sem, 0, IPC_RMID) == 0 and LIBC.msgctl(queue, IPC_RMID, None) == 0
    library.restore(images)
    assert seen(queue) == before
    target.go()
