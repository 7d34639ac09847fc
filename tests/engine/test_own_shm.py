"""Copies of a program with segments and semaphores in /dev/shm: each has its own, under the same names."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets, diff, host_state, wait_until
from kit.campaign import spare
from kit.faults import for_every_call
from kit.talk import ANSWERS, Talk, snapshot_of

#: A segment that is mapped and open, one that is only mapped, a semaphore.
SERVER = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
name = f"torpor-test-{os.getpid()}"
def segment(number, size):
    fd = os.open(f"/dev/shm/{name}-{number}", os.O_CREAT | os.O_RDWR, 0o640)
    os.ftruncate(fd, size)
    return fd, mmap.mmap(fd, size)
fd, open_one = segment(1, 8192)
other, mapped = segment(2, 4096)
os.close(other)
open_one[:5], mapped[:5] = b"first", b"other"
sem = ctypes.c_void_p(libc.sem_open(f"/{name}".encode(), os.O_CREAT, 0o600, 3))

def names():
    return sorted(os.listdir("/dev/shm"))

def answer(line):
    word, *rest = line.split()
    if word == "look":
        value = ctypes.c_int()
        libc.sem_getvalue(sem, ctypes.byref(value))
        with open(f"/dev/shm/{name}-2", "rb") as file:
            by_name = file.read(5)
        return [open_one[:5], os.pread(fd, 5, 0), mapped[:5], by_name, value.value]
    if word == "change":
        open_one[:5] = mapped[:5] = rest[0].encode()
        return [libc.sem_post(sem), libc.sem_post(sem)]
    if word == "names":
        return names()
    if word == "mode":
        seen = os.statvfs("/dev/shm"), os.stat("/dev/shm")
        return [oct(seen[1].st_mode), seen[1].st_uid, seen[0].f_blocks, seen[0].f_flag]
    if word == "make":
        with open("/dev/shm/of-a-copy", "w") as file:
            file.write("x")
        return True
    if word == "remove":
        os.unlink("/dev/shm/of-a-copy")
        return True
    if word == "unlink":
        for suffix in ("-1", "-2"):
            os.unlink(f"/dev/shm/{name}{suffix}")
        return libc.sem_unlink(f"/{name}".encode())
"""
LOOK = [b"first", b"first", b"other", b"other", 3]


def outside(target: Target) -> dict[str, bytes]:
    """The files that the first program has made, as they are in our /dev/shm."""
    found = {}
    for name in os.listdir("/dev/shm"):
        if f"torpor-test-{target.pid}" in name:
            with open(f"/dev/shm/{name}", "rb") as file:
                found[name] = file.read()
    return found


@pytest.fixture
def snapshot(start: Targets, images: str) -> Iterator[Target]:
    target = start.python(SERVER + ANSWERS)
    try:
        with snapshot_of(target, images) as target:
            yield target
    finally:
        for name in outside(target):
            os.unlink(f"/dev/shm/{name}")


def test_each_copy_has_its_own(snapshot: Target, images: str) -> None:
    before = outside(snapshot)
    assert len(before) == 3
    with torpor.template(images) as template:
        first, second = Talk(template), Talk(template)
        assert first.ask("look") == LOOK
        assert first.ask("change mine!") == [0, 0]
        assert first.ask("look") == [b"mine!"] * 4 + [5]
        assert second.ask("look") == LOOK
        assert second.ask("names") == sorted(before), "and nothing else"
        assert first.ask("unlink") == 0
        assert first.ask("names") == []
        third = Talk(template, fresh_pid=True)
        assert third.ask("look") == LOOK
        assert second.ask("look") == LOOK
        assert third.ask("mode") == [oct(os.stat("/dev/shm").st_mode), 0, *(
            getattr(os.statvfs("/dev/shm"), field) for field in ("f_blocks", "f_flag")
        )]  # fmt: skip
        for copy in (first, second, third):
            copy.end()
    assert outside(snapshot) == before


def test_the_files_need_not_be_there_any_more(snapshot: Target, images: str) -> None:
    for name in outside(snapshot):
        os.unlink(f"/dev/shm/{name}")
    with torpor.template(images) as template:
        copies = [Talk(template) for _ in range(3)]
        assert [copy.ask("look") for copy in copies] == [LOOK] * 3
        for copy in copies:
            copy.end()
    assert outside(snapshot) == {}


def test_restored_side_by_side(start: Targets, images: str) -> None:
    target = start.python(SERVER + "ready()\ntime.sleep(1000)\n")
    with snapshot_of(target, images):
        before = outside(target)
        copies = [torpor.restore(images, own_pids=True) for _ in range(2)]
        places = [f"/proc/{copy.pid}/root/dev/shm" for copy in copies]
        assert [sorted(os.listdir(place)) for place in places] == [sorted(before)] * 2
        assert len({os.stat(place).st_dev for place in (*places, "/dev/shm")}) == 3
        assert outside(target) == before
        for name in before:
            os.unlink(f"/dev/shm/{name}")


def test_a_copy_is_dumped_again(snapshot: Target, images: str, tmp_path: os.PathLike[str]) -> None:
    again = os.path.join(tmp_path, "again")
    os.mkdir(again)
    before = outside(snapshot)
    with torpor.template(images) as template:
        copy = Talk(template)
        assert copy.ask("change mine!") == [0, 0]
        assert copy.ask("make")
        with pytest.raises(torpor.Unsupported, match="/dev/shm/of-a-copy is in a file system of its own, and no task"):
            torpor.dump(copy.copy.pid, again)
        assert copy.ask("remove")
        torpor.dump(copy.copy.pid, again)
        assert copy.copy.wait() == 137
    with torpor.template(again) as template:
        for _ in range(2):
            other = Talk(template)
            assert other.ask("look") == [b"mine!"] * 4 + [5]
            other.end()
    assert outside(snapshot) == before


def test_an_overlay_does_the_same_and_shows_the_rest(snapshot: Target, images: str) -> None:
    with torpor.template(images, overlay=["/dev/shm"]) as template:
        first, second = Talk(template), Talk(template)
        assert set(first.ask("names")) > set(outside(snapshot)), "our images lie there, too"
        assert first.ask("change mine!") == [0, 0]
        assert second.ask("look") == LOOK
        first.end()
        second.end()


LARGE = """
import mmap
fd = os.open(f"/dev/shm/torpor-test-{os.getpid()}", os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 1 << 20)
area = mmap.mmap(fd, 1 << 20)
area[:] = b"x" * (1 << 20)
def answer(line):
    return os.fstat(fd).st_dev
"""


def test_what_the_snapshot_does_not_hold_is_common_and_said_so(
    start: Targets, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("torpor.resources.own_shm.log.warning", said.append)
    target = start.python(LARGE + ANSWERS)
    keep = target.pid
    torpor.dump(target.pid, images, ghost_limit=1 << 16)
    target.wait_gone()
    target.tell("go")
    with torpor.template(images) as template:
        assert any("copies have what is in /dev/shm in common" in text for text in said)
        copy = Talk(template)
        assert copy.ask("device") == os.stat("/dev/shm").st_dev
        copy.end()
    os.unlink(f"/dev/shm/torpor-test-{keep}")


def test_a_failed_copy_leaves_none(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        Talk(template).end()
        before = host_state()
        del before["processes"]
        files = outside(snapshot)

        def attempt() -> None:
            copy = template.clone()
            copy.kill()
            copy.wait()

        for name, error in for_every_call(attempt):
            after = host_state()
            left = set(after.pop("processes")) - {template.pid, *spare(template)}
            assert not left, (name, error)
            assert diff(before, after) == [], (name, error)
            assert outside(snapshot) == files, (name, error)
        wait_until("all are gone", lambda: len(host_state()["processes"]) <= 3)
