"""Many descriptors, which are looked at all at once by BPF where that works, and one by one where it is refused: both
ways have to give the same images, and a program that is content.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

import torpor
from kit import Target, Targets, Verbs, round_trip
from torpor.errors import KernelError
from torpor.images.store import ImageReader
from torpor.linux import task_files
from torpor.resources import descriptors

# Of each kind more than one, descriptions that are shared in all ways (dup, fork, in flight), a table that two
# processes share and what fcntl and flock can do to a description. 300 in all, and twice as many in the children.
PROGRAM = """
import fcntl, pty, select, socket

made = []
def add(fd, *, flags=None, pos=None):
    made.append(fd)
    if flags is not None:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    if pos is not None:
        os.lseek(fd, pos, 0)
    os.set_inheritable(fd, len(made) % 3 == 0)
    return fd

for n in range(30):
    name = f"file{n % 7}"
    fd = add(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND * (n % 2)), pos=n * 1000)
    add(os.dup(fd))
    if n % 5 == 0:
        fcntl.flock(fd, fcntl.LOCK_SH)
    if n == 8:
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    deleted = add(os.open(f"gone{n}", os.O_RDWR | os.O_CREAT), pos=3)
    os.write(deleted, b"x" * n)
    os.unlink(f"gone{n}")
    ends = os.pipe()
    os.write(ends[1], b"y" * n)
    add(ends[0], flags=os.O_NONBLOCK * (n % 2))
    add(ends[1])
    counter = add(os.eventfd(n, os.EFD_SEMAPHORE * (n % 2) | os.EFD_NONBLOCK * (n % 3 == 0)))
    add(os.dup(counter))
os.makedirs("a" * 200 + "/" + "b" * 200)
for n in range(4):
    add(os.open("a" * 200 + "/" + "b" * 200, os.O_RDONLY | os.O_DIRECTORY))
    add(os.open("/dev/null", os.O_RDWR))
    add(os.open("file0", os.O_PATH))
    add(os.memfd_create(f"mine{n}"))
    watched = select.epoll()
    watched.register(made[3], select.EPOLLIN)
    add(os.dup(watched.fileno()))
for n in range(6):
    left, right = socket.socketpair()
    # In flight: one that is open as well, twice, and one that is not.
    hidden = os.open("file1", os.O_RDONLY)
    socket.send_fds(left, [b"z"], [made[0], hidden, made[5], made[0]])
    os.close(hidden)
    add(left.detach()), add(right.detach())
master, slave = pty.openpty()
add(master), add(slave)

def state(fd):
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
        at = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        at = None
    info = os.stat(fd)
    lines = open(f"/proc/self/fdinfo/{fd}").read().splitlines()
    link = os.readlink(f"/proc/self/fd/{fd}")
    kind = link.partition("[")[0] if "[" in link and not link.startswith("anon") else link
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    owner = 0 if flags & os.O_PATH else fcntl.fcntl(fd, fcntl.F_GETOWN)
    counter = [line for line in lines if line.startswith(("eventfd-count", "eventfd-sem"))]
    return at, info.st_mode, info.st_size, kind, os.get_inheritable(fd), flags, owner, counter

looked, gate = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.set_inheritable(made[1], not os.get_inheritable(made[1]))
    extra = os.open("file2", os.O_RDONLY)
before = [state(fd) for fd in made]
if child:
    os.read(looked[0], 1)  # by then it has everything open that it will have
    ready()
else:
    os.write(looked[1], b"!")
wait_told("go")
after = [state(fd) for fd in made]
assert before == after, [pair for pair in zip(before, after) if pair[0] != pair[1]]
if child == 0:
    os.read(gate[0], 1)  # until the other has looked
    os.lseek(made[1], 4321, os.SEEK_SET)
    os._exit(0)
os.write(gate[1], b"!")
assert os.waitpid(child, 0) == (child, 0)
assert os.lseek(made[0], 0, os.SEEK_CUR) == 4321
data, fds, *_ = socket.recv_fds(socket.socket(fileno=made[-3]), 1, 4)
os.lseek(fds[0], 99, os.SEEK_SET)
assert os.lseek(fds[3], 0, os.SEEK_CUR) == os.lseek(made[1], 0, os.SEEK_CUR) == 99
done(len(fds) == 4)
"""
OPTIONS = {"file_locks": True}


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """BPF is refused, as to a user without CAP_BPF."""

    def load(*_: object) -> int:
        raise KernelError("bpf", 1)

    monkeypatch.setattr(task_files.bpf, "load", load)


def all_images(folder: str) -> dict[str, list[Any]]:
    """What a set says about files, with numbers of the kernel's that every pipe and socket has."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        reader = ImageReader(directory)
        names = [name for name in reader.names() if name.startswith(("fdinfo", "files", "filelocks", "remap"))]
        return {name: [str(message) for message in reader.read_all(name)] for name in names}
    finally:
        os.close(directory)


def dump(target: Target, folder: str) -> dict[str, list[Any]]:
    os.mkdir(folder)
    torpor.dump(target.pid, folder, leave_running=True, **OPTIONS)
    return all_images(folder)


def test_both_ways_give_the_same_images(start: Targets, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = start.python(PROGRAM)
    read: list[int] = []
    whole = task_files.TaskFiles.read

    def counted(self: task_files.TaskFiles, pid: int) -> list[task_files.OpenFile] | None:
        read.append(pid)
        return whole(self, pid)

    with monkeypatch.context() as patch:
        patch.setattr(task_files.TaskFiles, "read", counted)
        seen = dump(target, f"{images}/seen")
    assert set(read) == set(target.pids()), "it was not looked at by BPF"
    with monkeypatch.context() as patch:
        refuse(patch)
        one_by_one = dump(target, f"{images}/one")
    assert seen.keys() == one_by_one.keys()
    for name, messages in one_by_one.items():
        assert messages == seen[name], name
    assert len(seen["files"]) > 150
    target.go()


@pytest.mark.parametrize("refused", [False, True])
def test_all_is_as_before(
    start: Targets, images: str, verbs: Verbs, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    if refused:
        if verbs.name == "command":
            pytest.skip("it cannot be refused to another process")
        refuse(monkeypatch)
    target = start.python(PROGRAM)
    round_trip(verbs, target, images, dump=OPTIONS, restore=OPTIONS)
    target.go()


def test_a_program_with_few_is_not_worth_it(start: Targets, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: object, pid: int) -> None:
        raise AssertionError("a program was loaded for a handful of descriptors")

    monkeypatch.setattr(task_files.TaskFiles, "read", read)
    assert descriptors.BULK_FROM > 20
    target = start.python("ready()\nwait_told('go')\ndone(True)")
    torpor.dump(target.pid, images, leave_running=True)
    target.go()

# Numbers with holes, in another order than they were made in: descriptors that lie where ours do, one above a hole of
# thirty, duplicates below and above what they are of, flags of both kinds.
ONE_TABLE = """
import fcntl
names = [n for n in range(3, 60) if n % 7] + [90, 91, 200]
made = {}
for n in reversed(names):
    kind = n % 4
    fd = os.open(f"file{n}", os.O_RDWR | os.O_CREAT) if kind == 0 else os.eventfd(n) if kind == 1 else None
    if fd is None:
        fd = os.dup(made[n + 40 if n + 40 in made else 200 if made else 0]) if made else os.memfd_create("mine")
    made[n] = fcntl.fcntl(fd, fcntl.F_DUPFD, 300)
    os.close(fd)
for n, high in made.items():
    os.dup2(high, n, inheritable=n % 3 == 0)
    os.close(high)
for n in names:
    if n % 4 == 0:
        os.lseek(n, n, os.SEEK_SET)
def state(n):
    return os.get_inheritable(n), os.fstat(n).st_mode, os.readlink(f"/proc/self/fd/{n}")
before = {n: state(n) for n in names}
open_then = sorted(map(int, os.listdir("/proc/self/fd")))
ready()
wait_told("go")
assert sorted(map(int, os.listdir("/proc/self/fd"))) == open_then
assert {n: state(n) for n in names} == before
for n in names:
    if n % 4 == 0:
        assert os.lseek(n, 0, os.SEEK_CUR) == n, n
    elif n % 4 == 1:
        assert os.read(n, 8)[0] == n or any(os.readlink(f"/proc/self/fd/{n}").startswith(x) for x in "/")
done(True)
"""


def test_one_table_with_holes(start: Targets, images: str, verbs: Verbs) -> None:
    """Descriptors are made under their own numbers where those are free here: the outcome is the same for all."""
    taken = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(9)]
    for fd in taken[::2]:
        os.close(fd)
    try:
        target = start.python(ONE_TABLE)
        round_trip(verbs, target, images)
        target.go()
    finally:
        for fd in taken[1::2]:
            os.close(fd)
