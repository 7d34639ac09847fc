"""Rings of asynchronous I/O: made, used, taken away and made again in a child."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.file_bench import Bench, in_child, run_here
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.linux.call import call
from torpor.model.source import Mapping
from torpor.proc import maps
from torpor.remote.program import Program
from torpor.resources.memory import aio

EVENT = struct.Struct("<QQqq")


def in_a_child(test: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        in_child(test)

    run.__name__ = test.__name__
    return run


def setup(requests: int) -> int:
    context = ctypes.c_uint64(0)
    call("io_setup", requests, ctypes.byref(context))
    return context.value


def submit(context: int, *marks: int) -> None:
    """Reads of one byte of /dev/zero, each with a number of its own, which complete at once."""
    fd = os.open("/dev/zero", os.O_RDONLY)
    byte = ctypes.create_string_buffer(1)
    for mark in marks:
        block = struct.pack("<QIIHhIQQqQII", mark, 0, 0, 0, 0, fd, ctypes.addressof(byte), 1, 0, 0, 0, 0)
        memory = ctypes.create_string_buffer(block, 64)
        pointer = ctypes.c_uint64(ctypes.addressof(memory))
        assert call("io_submit", context, 1, ctypes.byref(pointer)) == 1
    os.close(fd)


def fetch(context: int, most: int = 1000) -> list[int]:
    """The numbers of the requests that have completed."""
    area = ctypes.create_string_buffer(EVENT.size * most)
    count = call("io_getevents", context, 0, most, area, None)
    events = [EVENT.unpack_from(area, index * EVENT.size) for index in range(count)]
    assert all(result == 1 for _, _, result, _ in events)
    return [mark for mark, *_ in events]


def advance(context: int, count: int) -> None:
    for mark in range(count):
        submit(context, mark)
        assert fetch(context) == [mark]


def mapping(context: int) -> Mapping:
    with open("/proc/self/maps", "rb") as file:
        vma = next(vma for vma in maps.parse(file.read()) if vma.start == context)
    assert vma.kind == maps.AIO
    return Mapping(vma, frozenset())


def moved(context: int, *, prot: int = 3) -> bytes:
    """Dump the ring, destroy it, make it again; what it held without what the new one has its
    own of.
    """
    found = mapping(context)
    vma = found.vma
    entry = pb.vma_entry(
        start=vma.start, end=vma.end, pgoff=0, shmid=0, prot=vma.prot, flags=vma.flags, status=0, fd=-1
    )  # fmt: skip
    with Bench() as bench:
        task = SimpleNamespace(pid=os.getpid())
        aio.RESOURCE.check(found, task.pid, bench.dumping)
        aio.RESOURCE.dump(found, task, bench.dumping, entry)
        content = ctypes.string_at(context, vma.end - vma.start)
        mm = pb.mm_entry(aios=[pb.aio_ring_entry(**ring) for ring in bench.dumping.memo["aios", task.pid]])
        call("io_destroy", context)
        ctx = bench.commit()
        pages = os.memfd_create("pages")
        os.write(pages, b"before" + content)
        ctx.memo.update(mm=mm, pieces=[(pages, vma.start, len(content), 6)])
        program = Program()
        aio.RESOURCE.prepare(entry, ctx)
        aio.RESOURCE.restore(entry, prot, program, ctx)
        run_here(program)
        os.close(pages)
    return content[8:]


@in_a_child
def test_events_wait_again_and_the_ring_goes_on() -> None:
    setup(1)  # so that the new ring's id is another one
    context = setup(10)
    places = struct.unpack_from("<8I", ctypes.string_at(context, 32))[1]
    advance(context, places - 20)
    submit(context, *range(1000, 1005))
    assert fetch(context, 2) == [1000, 1001]
    content = moved(context)
    assert ctypes.string_at(context + 8, len(content)) == content
    submit(context, 2000)
    assert fetch(context) == [1002, 1003, 1004, 2000]
    for start in range(0, 3 * places, 10):  # the tail wraps around
        submit(context, *range(start, start + 10))
        assert fetch(context) == list(range(start, start + 10))
    call("io_destroy", context)


@in_a_child
def test_events_that_wrap_around() -> None:
    context = setup(3)
    places = struct.unpack_from("<8I", ctypes.string_at(context, 32))[1]
    advance(context, places - 3)
    submit(context, *range(10))
    _, _, head, tail, *_ = struct.unpack_from("<8I", ctypes.string_at(context, 32))
    assert tail < head
    moved(context)
    submit(context, 77)
    assert fetch(context) == [*range(10), 77]


@in_a_child
def test_a_full_ring_and_a_fresh_one() -> None:
    context = setup(200)
    moved(context)
    submit(context, *range(400))
    moved(context)
    assert fetch(context) == list(range(400))


@in_a_child
def test_protection() -> None:
    context = setup(1)
    moved(context, prot=1)
    assert mapping(context).vma.prot == 1


@in_a_child
def test_a_spoilt_ring_is_refused() -> None:
    context = setup(1)
    ctypes.memmove(context + 12, b"\xff\xff", 2)
    with Bench() as bench, pytest.raises(Unsupported, match="a ring for asynchronous I/O: 127 places"):
        aio.RESOURCE.check(mapping(context), os.getpid(), bench.dumping)


def test_pages_that_are_missing() -> None:
    size = aio.size_for(1, aio.possible_processors())
    entry = pb.vma_entry(start=1 << 40, end=(1 << 40) + size, pgoff=0, shmid=0, prot=3, flags=1, status=0x2000, fd=-1)
    with Bench() as bench:
        ctx = bench.commit()
        ctx.memo.update(mm=pb.mm_entry(), pieces=[])
        with pytest.raises(ImageError, match="is missing"):
            aio.RESOURCE.restore(entry, 3, Program(), ctx)


@given(requests=st.integers(1, 70000), processors=st.integers(1, 512))
def test_asking_for_a_ring_of_the_same_size(requests: int, processors: int) -> None:
    size = aio.size_for(requests, processors)
    assert aio.size_for(aio.requests_for(size), processors) == size


@given(requests=st.sampled_from([1, 8, 63, 64, 200, 1000, 4096]))
def test_sizes_are_the_kernels(requests: int) -> None:
    context = setup(requests)
    try:
        vma = mapping(context).vma
        assert vma.end - vma.start == aio.size_for(requests, aio.possible_processors())
    finally:
        call("io_destroy", context)
