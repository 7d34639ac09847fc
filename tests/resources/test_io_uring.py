"""io_uring by its parts: what is read of the kernel, counters that are brought to where they were, bad images."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.limits import RING_REQUESTS_MAX
from torpor.linux import io_uring
from torpor.proc.read import read
from torpor.resources import uring, uring_build, uring_emit
from torpor.resources.memory.aio import possible_processors
from torpor.resources.uring_state import Kernel


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return Kernel(possible_processors())


@contextlib.contextmanager
def ring(entries: int, flags: int = 0, cq_entries: int = 0) -> Iterator[tuple[int, io_uring.Rings]]:
    params = io_uring.Params(flags | (io_uring.CQSIZE if cq_entries else 0), cq_entries)
    fd = io_uring.setup(entries, params)
    rings = io_uring.Rings(fd, params)
    try:
        yield fd, rings
    finally:
        rings.close()
        os.close(fd)


def nops(fd: int, rings: io_uring.Rings, count: int, *, reap: bool = True) -> None:
    for _ in range(count):
        rings.set_sq("tail", rings.sq("tail") + 1)
        assert io_uring.enter(fd, 1) == 1
        if reap:
            rings.set_cq("head", rings.cq("tail"))


def address(kernel: Kernel, fd: int) -> int:
    return kernel.private_data(kernel.files_of(os.getpid(), [fd]).values())[0]


def poll_add(rings: io_uring.Rings, fd: int) -> None:
    rings.sqes[:64] = struct.pack("<BBHiQQIIQ", 6, 0, 0, fd, 0, 0, 0, 1, 7).ljust(64, b"\0")
    rings.set_sq("tail", rings.sq("tail") + 1)


def test_the_kernel_tells_of_a_ring(kernel: Kernel) -> None:
    with ring(8, io_uring.SUBMIT_ALL, 64) as (fd, rings):
        nops(fd, rings, 5)
        [state] = kernel.read([address(kernel, fd)])
        assert state.flags == io_uring.SUBMIT_ALL | io_uring.CQSIZE
        assert [state.numbers[name] for name in ("sq_entries", "cq_entries", "sq_head", "cq_tail")] == [8, 64, 5, 5]
        assert not state.files and not state.buffers and not state.eventfd and not state.submitter


def test_the_kernel_tells_of_what_is_registered(kernel: Kernel) -> None:
    pipe, event = os.pipe(), os.eventfd(0)
    with ring(8) as (fd, _):
        io_uring.register_files(fd, [-1, pipe[0], -1, pipe[1]], [0, 0, 0, 0])
        io_uring.register(fd, io_uring.REGISTER_EVENTFD_ASYNC, struct.pack("<i", event), 1)
        [state] = kernel.read([address(kernel, fd)])
        known = kernel.files_of(os.getpid(), [*pipe, event])
        assert [file for file, _ in state.files] == [0, known[pipe[0]], 0, known[pipe[1]]]
        assert [state.eventfd] == kernel.private_data([known[event]]) and state.eventfd_async
    for one in (*pipe, event):
        os.close(one)


def test_requests_under_way_are_counted_and_named(kernel: Kernel) -> None:
    pipe = os.pipe()
    with ring(8) as (fd, rings), ring(8) as (other, _):
        where = [address(kernel, fd), address(kernel, other)]
        nops(fd, rings, 3)
        (user,), _ = kernel.users(where)
        assert (user.tid, user.under_way) == (os.getpid(), 0)
        for _ in range(2):
            poll_add(rings, pipe[0])
            io_uring.enter(fd, 1)
        (user,), (same,) = kernel.users(where)
        assert user.under_way == same.under_way == 2
        state, idle = kernel.read(where)
        assert not kernel.waiting(idle)
        file = kernel.files_of(os.getpid(), [pipe[0]])[pipe[0]]
        assert [(one.name, one.file) for one in kernel.waiting(state)] == [("poll_add", file)] * 2
        os.write(pipe[1], b"x")
        io_uring.enter(fd, 0, io_uring.ENTER_GETEVENTS)
        assert [user.under_way for user in kernel.users(where)[0]] == [0]
    os.close(pipe[0])
    os.close(pipe[1])


def entry_of(taken: int, posted: int, reaped: int, *, flags: int = 0, entries: int = 8, cq_entries: int = 16) -> Any:
    layout = uring.layout(flags, entries, cq_entries)
    memory = bytearray(layout.ring_bytes)

    def put(at: int, value: int) -> None:
        struct.pack_into("<I", memory, at, value)

    put(layout.sq_off["head"], taken)
    put(layout.sq_off["tail"], taken)
    put(layout.cq_off["head"], reaped)
    put(layout.cq_off["tail"], posted)
    put(layout.sq_off["ring_mask"], entries - 1)
    put(layout.sq_off["ring_entries"], entries)
    put(layout.cq_off["ring_mask"], cq_entries - 1)
    put(layout.cq_off["ring_entries"], cq_entries)
    for index in range(reaped, posted):
        place = layout.cq_off["cqes"] + (index & (cq_entries - 1)) * io_uring.cqe_bytes(flags)
        struct.pack_into("<QiI", memory, place, index, -index, 0)
    return pb.io_uring_entry(
        id=1, flags=os.O_RDWR, setup=flags, sq_entries=entries, cq_entries=cq_entries, sq_head=taken, cq_tail=posted,
        offsets=layout.offsets, rings=bytes(memory), sqes=b"\1\2\3",
    )  # fmt: skip


class Context:
    """As much of a BuildContext as a ring without files needs."""


@settings(max_examples=40)
@given(
    taken=st.integers(0, 300), posted=st.integers(0, 300), waiting=st.integers(0, 16),
    flags=st.sampled_from([0, io_uring.NO_SQARRAY, io_uring.SQE128 | io_uring.CQE32, io_uring.SUBMIT_ALL]),
)  # fmt: skip
def test_any_counters_can_be_reached(taken: int, posted: int, waiting: int, flags: int) -> None:
    """Seen through fdinfo and the ring itself; and the next completions never overwrite one that waits."""
    reaped = max(0, posted - waiting)
    entry = entry_of(taken, posted, reaped, flags=flags)
    uring_build.check(entry)
    fd = uring_build.make(entry, Context())  # type: ignore[arg-type]
    params = uring_build.params(entry)
    params.unpack_offsets(entry.sq_entries, list(entry.offsets))
    rings = io_uring.Rings(fd, params)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        assert [int(lines[name]) for name in ("CachedSqHead", "CachedCqTail", "CqHead")] == [taken, posted, reaped]
        assert rings.ring[:] == entry.rings and rings.sqes[:3] == b"\1\2\3"
        rings.sqes[:] = bytes(len(rings.sqes))
        for _ in range(20):
            rings.set_sq("tail", rings.sq("tail") + 1)
            assert io_uring.enter(fd, 1) == 1
        for index in range(reaped, posted):
            at = params.cq_off["cqes"] + (index & 15) * io_uring.cqe_bytes(flags)
            assert struct.unpack_from("<Qi", rings.ring, at) == (index, -index)
        assert rings.cq("tail") - reaped == min(16, posted - reaped + 20)
    finally:
        rings.close()
        os.close(fd)


@given(taken=st.integers(0, 1 << 20), posted=st.integers(0, 1 << 20), waiting=st.integers(0, 1 << 16))
def test_the_steps_add_up(taken: int, posted: int, waiting: int) -> None:
    reaped = max(0, posted - waiting)
    first, sent, held, sent_held, silent = steps = uring_build.Target(taken, posted, reaped).steps()
    assert min(steps) >= 0
    assert (first + held + silent, first + sent, held + sent_held) == (taken, reaped, posted - reaped)


def damaged(**fields: object) -> Any:
    entry = entry_of(10, 10, 8)
    for name, value in fields.items():
        if isinstance(value, list):
            for one in value:
                getattr(entry, name).add(**one)
        else:
            setattr(entry, name, value)
    return entry


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sq_entries": 7}, "sq_entries"),
        ({"sq_entries": 1 << 20}, "sq_entries"),
        ({"cq_entries": 0}, "cq_entries"),
        ({"setup": 1 << 30}, "setup"),
        ({"setup": io_uring.REGISTERED_FD_ONLY}, "setup"),
        ({"setup": io_uring.NO_MMAP}, "memory"),
        ({"memory": [{"id": 1, "offset": 0}] * 2}, "memory"),
        ({"setup": io_uring.NO_MMAP, "memory": [{"id": 1, "offset": 0}, {"id": 1, "offset": 7}]}, "memory"),
        ({"setup": io_uring.NO_MMAP | io_uring.SQPOLL, "memory": [{"id": 1, "offset": 0}] * 2}, "memory"),
        ({"cq_tail": 7}, "cq_tail"),
        ({"cq_tail": 100}, "cq_tail"),
        ({"setup": io_uring.SINGLE_ISSUER, "sq_head": 3, "cq_tail": (1 << 20) + 3}, "cq_tail"),
    ],
)
def test_a_bad_image_is_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ImageError, match=named):
        uring_build.check(damaged(**fields))


@pytest.mark.parametrize(
    ("sqes", "setup", "said"),
    [
        ([bytes(64)], 0, "operation 0 does not wait"),
        ([b"\x06" * 63], 0, "63 bytes"),
        ([b"\x06".ljust(64, b"\0")] * 11, 0, "11 are more"),
        ([b"\x06".ljust(64, b"\0")], io_uring.SQPOLL, "ring of this kind"),
    ],
)
def test_a_bad_request_is_named(sqes: list[bytes], setup: int, said: str) -> None:
    entry = damaged(setup=setup)
    for sqe in sqes:
        entry.request.add(thread=1, sqe=sqe)
    with pytest.raises(ImageError, match=said):
        uring_build.check(entry)


def test_what_makes_a_request_again(kernel: Kernel) -> None:
    """The entry that was submitted, as far as anything depends on it; and what it waits for is found."""
    pipe = os.pipe()
    with ring(8) as (fd, rings):
        sent = struct.pack("<BBHiQQIIQHHI", 22, 0, 0, pipe[0], 0, 0x1000, 5, 0, 99, 0, 0, 0).ljust(64, b"\0")
        rings.sqes[:64] = sent
        rings.set_sq("tail", 1)
        io_uring.enter(fd, 1)
        [state] = kernel.read([address(kernel, fd)])
        [one] = kernel.waiting(state)
        assert one.sqe[:4] + struct.pack("<i", pipe[0]) + one.sqe[8:] == sent
        assert not one.trouble and not one.triggered and one.behind is None
        [user] = kernel.users([state.address])[0]
        assert one.context == user.context
        os.write(pipe[1], b"x")  # this thread has not been to the kernel's end of it yet, or has already
        assert [two.triggered for two in kernel.waiting(state)] in ([], [True])
    os.close(pipe[0])
    os.close(pipe[1])


def test_another_layout_and_too_many_requests_are_refused() -> None:
    with pytest.raises(Unsupported, match="lays out"):
        uring_build.check_layout(damaged(), uring.layout(0, 16, 32))
    with pytest.raises(Unsupported, match="requests"):
        uring_build.check(damaged(sq_head=RING_REQUESTS_MAX + 1))
    entry = damaged()
    entry.offsets[0] = 64
    fd = -1
    with pytest.raises(Unsupported, match="lays out"):
        fd = uring_build.make(entry, Context())  # type: ignore[arg-type]
    assert fd == -1


def test_a_ring_of_another_size_is_not_filled() -> None:
    entry = entry_of(0, 0, 0)
    memory = bytearray(entry.rings)
    struct.pack_into("<I", memory, entry.offsets[2], 15)
    entry.rings = bytes(memory)
    with pytest.raises(ImageError, match="ring_mask"):
        uring_build.make(entry, Context())  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(16, 1000), st.integers(1, 50)), max_size=8))
def test_all_room_but_what_is_occupied_is_found(pieces: list[tuple[int, int]]) -> None:
    spans = sorted((start * 4096, (start + length) * 4096) for start, length in pieces)
    rooms = list(uring_emit._gaps(spans))
    inside = {page for start, end in spans for page in range(start, end, 4096)}
    free = {page for start, end in rooms for page in range(start, min(end, 4096 * 1100), 4096)}
    assert free == set(range(uring_emit.LOWEST_ADDRESS, 4096 * 1100, 4096)) - inside


@pytest.mark.parametrize(("silent", "fails"), [(5, False), (10**9, True)])
def test_a_ring_that_is_in_use_is_looked_at_again(monkeypatch: pytest.MonkeyPatch, silent: int, fails: bool) -> None:
    """The kernel shows nothing of a ring whose lock is held."""
    looks = []

    def read_(pid: int, name: str) -> bytes:
        looks.append(name)
        text = read(pid, name)
        return text[: text.index(b"SqMask")] if len(looks) <= silent else text

    monkeypatch.setattr(uring, "read", read_)
    monkeypatch.setattr(uring, "BETWEEN_LOOKS_S", 0)
    with ring(8) as (fd, rings):
        nops(fd, rings, 3)
        found = uring.Ring(fd, 0)
        if fails:
            with pytest.raises(Unsupported, match="in use"):
                found.look()
        else:
            assert found.look().CachedSqHead == 3 and len(looks) == silent + 1
