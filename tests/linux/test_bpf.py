from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Iterator

import pytest

from torpor.errors import KernelError
from torpor.linux import bpf, btf


@pytest.fixture
def sleeper() -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def reader(*places: bpf.Place) -> bpf.TaskReader:
    return bpf.TaskReader(btf.lookup(["bpf_iter_task()"])["bpf_iter_task()"], places)


def at(path: str) -> int:
    return btf.lookup([f"task_struct.{path}"])[f"task_struct.{path}"]


def test_it_reads_the_task_that_was_asked_for(sleeper: int) -> None:
    tasks = reader(bpf.Place(at("pid"), 4), bpf.Place(at("comm"), 16), bpf.Place(at("tgid"), 4))
    try:
        for pid in (sleeper, os.getpid()):
            record = tasks.read(pid)
            assert record is not None
            with open(f"/proc/{pid}/comm", "rb") as file:
                assert record.fields[1].rstrip(b"\0") == file.read().rstrip(b"\n")
            assert record.fields[0] == record.fields[2] == struct.pack("<i", pid)
    finally:
        tasks.close()


def test_pointers_are_followed_and_long_places_read_whole(sleeper: int) -> None:
    size = 3 * bpf.CHUNK + 40
    tasks = reader(
        bpf.Place(0, size),
        bpf.Place(at("group_leader"), 8),
        bpf.Place(0, size, through=(at("group_leader"),)),
        bpf.Place(at("pid"), 4),
    )
    try:
        record = tasks.read(sleeper)
    finally:
        tasks.close()
    assert record is not None
    assert struct.unpack("<Q", record.fields[1])[0] == record.address
    assert record.fields[0] == record.fields[2] and len(record.fields[0]) == size
    assert any(record.fields[0])
    assert record.fields[3] == struct.pack("<i", sleeper)


def test_it_tells_the_time_of_reading(sleeper: int) -> None:
    tasks = reader(bpf.Place(at("pid"), 4))
    try:
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        record = tasks.read(sleeper)
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    finally:
        tasks.close()
    assert record is not None
    assert before[0] <= record.monotonic <= after[0]
    assert before[1] <= record.boottime <= after[1]


def test_a_task_that_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    tasks = reader(bpf.Place(at("pid"), 4))
    try:
        assert tasks.read(pid) is None
    finally:
        tasks.close()


def test_it_leaves_no_descriptor(sleeper: int) -> None:
    before = os.listdir("/proc/self/fd")
    tasks = reader(bpf.Place(at("pid"), 4))
    tasks.read(sleeper)
    tasks.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(KernelError):
        bpf.TaskReader(1, [bpf.Place(0, 8)])
