"""The kernel's memory, read by address: what it says about ourselves is what we know otherwise."""

from __future__ import annotations

import itertools
import os
import struct

import pytest

from torpor.errors import KernelError, Unsupported
from torpor.linux import bpf, btf
from torpor.linux.kernel_memory import KernelMemory
from torpor.resources.memory.aio import possible_processors

AT = ("task_struct.pid", "task_struct.comm", "task_struct.group_leader", "task_struct{}")


@pytest.fixture(scope="module")
def memory() -> KernelMemory:
    return KernelMemory()


@pytest.fixture(scope="module")
def at() -> dict[str, int]:
    return btf.lookup(AT)


@pytest.fixture(scope="module")
def leader(memory: KernelMemory, at: dict[str, int]) -> int:
    [data] = memory.walk([bpf.Place(at["task_struct.group_leader"], 8)], os.getpid())
    return int.from_bytes(data, "little")


def test_many_places_are_read_at_once(memory: KernelMemory, at: dict[str, int], leader: int) -> None:
    with open("/proc/self/comm", "rb") as file:
        comm = file.read().rstrip(b"\n")
    spans = [(leader + at["task_struct.pid"], 4), (leader + at["task_struct.comm"], 16), (0, 4)] * 700
    found = memory.read(spans)
    assert len(found) == len(spans)
    assert set(found[::3]) == {struct.pack("<i", os.getpid())}
    assert {one.rstrip(b"\0") for one in found[1::3]} == {comm}
    assert set(found[2::3]) == {b""}


def test_a_long_span_is_whole(memory: KernelMemory, at: dict[str, int], leader: int) -> None:
    size = at["task_struct{}"]
    [whole] = memory.read([(leader, size)])
    assert len(whole) == size > 1000
    assert whole[at["task_struct.pid"] :][:4] == struct.pack("<i", os.getpid())
    [longer] = memory.read([(leader, 30_000)])
    assert len(longer) == 30_000 and longer[at["task_struct.pid"] :][:4] == struct.pack("<i", os.getpid())


def test_what_is_not_mapped_reads_as_zeros(memory: KernelMemory) -> None:
    assert memory.read([(0x1000, 16)]) == [bytes(16)]


def test_a_task_that_is_gone(memory: KernelMemory, at: dict[str, int]) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises((Unsupported, KernelError)):
        memory.walk([bpf.Place(at["task_struct.pid"], 4)], pid)


def test_each_processor_has_an_offset(memory: KernelMemory) -> None:
    offsets = memory.per_cpu_offsets(possible_processors())
    assert len(set(offsets)) == len(offsets) >= 1
    gaps = {later - earlier for earlier, later in itertools.pairwise(offsets)}
    assert all(not gap % 4096 for gap in gaps)


def test_optional_answers_are_minus_one() -> None:
    found = btf.lookup(["task_struct.no_such_field?", "task_struct.pid?"])
    assert found["task_struct.no_such_field?"] == -1 and found["task_struct.pid?"] > 0
