"""What the kernel itself tells about open files, against what /proc and kcmp(2) say of the same."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from torpor.linux.kernel import KCMP_FILE, kcmp
from torpor.linux.task_files import PATH_BYTES, OpenFile, TaskFiles
from torpor.proc import fdinfo
from torpor.proc.read import read


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Descriptors of ours of many kinds, by what they are."""
    name = str(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    long = tmp_path / ("x" * 200) / ("y" * 200)
    long.mkdir(parents=True)
    made: dict[str, int] = {}
    made["plain"] = os.open(name, os.O_RDWR | os.O_CREAT)
    made["appending"] = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    made["twice"] = os.dup(made["plain"])
    made["path"] = os.open(name, os.O_PATH)
    made["removed"] = os.open(tmp_path / "removed", os.O_RDWR | os.O_CREAT)
    os.unlink(tmp_path / "removed")
    made["odd name"] = os.open(os.fsencode(tmp_path) + b"/\xff\n", os.O_RDWR | os.O_CREAT)
    made["directory"] = os.open(tmp_path, os.O_RDONLY)
    made["long name"] = os.open(long, os.O_RDONLY)
    made["fifo"] = os.open(tmp_path / "fifo", os.O_RDWR)
    made["reader"], made["writer"] = os.pipe()
    made["null"] = os.open("/dev/null", os.O_RDWR)
    made["eventfd"] = os.eventfd((1 << 31) + 5, 0)
    made["semaphore"] = os.eventfd(7, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    made["memfd"] = os.memfd_create("mine")
    made["socket"] = socket.socket(socket.AF_INET).detach()
    os.eventfd_write(made["eventfd"], 1 << 40)
    os.lseek(made["plain"], 1 << 33, os.SEEK_SET)
    os.set_inheritable(made["twice"], True)
    os.set_inheritable(made["socket"], True)
    fcntl.fcntl(made["reader"], fcntl.F_SETOWN, os.getpid())
    fcntl.flock(made["removed"], fcntl.LOCK_EX)
    yield made
    for fd in made.values():
        os.close(fd)


@pytest.fixture
def seen(opened: dict[str, int]) -> dict[str, OpenFile]:
    files = TaskFiles()
    try:
        found = files.read(os.getpid())
    finally:
        files.close()
    assert found is not None
    assert [one.fd for one in found] == sorted(one.fd for one in found)
    by_fd = {one.fd: one for one in found}
    return {what: by_fd[fd] for what, fd in opened.items()}


def test_as_in_proc(seen: dict[str, OpenFile]) -> None:
    for what, one in seen.items():
        shown = fdinfo.parse(read(os.getpid(), f"fdinfo/{one.fd}"))
        link = os.readlink(f"/proc/self/fd/{one.fd}")
        assert one.link == (None if what == "long name" else link), what
        assert one.pos == shown.pos, what
        assert one.flags & ~os.O_CLOEXEC == shown.flags & ~os.O_CLOEXEC, what
        assert bool(one.cloexec) is not os.get_inheritable(one.fd), what
    assert len(os.readlink(f"/proc/self/fd/{seen['long name'].fd}")) >= PATH_BYTES


def test_identity_is_that_of_kcmp(seen: dict[str, OpenFile]) -> None:
    own = os.getpid()
    for a in seen.values():
        for b in seen.values():
            assert (a.file == b.file) == (kcmp(own, own, KCMP_FILE, a.fd, b.fd) == 0)
            same = os.path.sameopenfile(a.fd, b.fd)
            assert (a.inode == b.inode) == same, (a.link, b.link)


def test_owners_and_locks(seen: dict[str, OpenFile]) -> None:
    assert [what for what, one in seen.items() if one.owner] == ["reader"]
    assert [what for what, one in seen.items() if one.locks] == ["removed"]


def test_counters(seen: dict[str, OpenFile]) -> None:
    assert seen["eventfd"].count == (1 << 31) + 5 + (1 << 40)
    assert not seen["eventfd"].event_flags & os.EFD_SEMAPHORE
    assert seen["semaphore"].count == 7
    assert seen["semaphore"].event_flags & os.EFD_SEMAPHORE


def test_another_task_and_one_that_is_gone() -> None:
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(ready, 777)
            os.closerange(0, 700)
        finally:
            os.kill(os.getpid(), 19)
            os._exit(0)
    files = TaskFiles()
    try:
        os.waitpid(pid, os.WUNTRACED)
        found = files.read(pid)
        assert found is not None
        assert [(one.fd, one.link) for one in found] == [(777, os.readlink(f"/proc/self/fd/{ready}"))]
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        assert files.read(pid) is None
    finally:
        files.close()
        os.close(ready)
        os.close(told)
