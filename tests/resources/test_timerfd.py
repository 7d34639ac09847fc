"""timerfd through the images: all clocks and modes, what is left, expirations not read yet."""

from __future__ import annotations

import ctypes
import os
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.file_bench import Bench, run_here, seen
from torpor.errors import ImageError
from torpor.images import schema as pb
from torpor.proc import fdinfo, fdinfo_kinds
from torpor.remote.program import Program
from torpor.resources.files.timerfd import RESOURCE

libc = ctypes.CDLL(None, use_errno=True)
REALTIME, MONOTONIC, BOOTTIME, REALTIME_ALARM, BOOTTIME_ALARM = 0, 1, 7, 8, 9
ABSTIME, CANCEL_ON_SET = 1, 2
SECONDS = 1000


def make(clock: int) -> int:
    fd = libc.timerfd_create(clock, 0)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)


def arm(fd: int, flags: int, value: tuple[int, int], interval: tuple[int, int] = (0, 0)) -> None:
    assert libc.timerfd_settime(fd, flags, struct.pack("4q", *interval, *value), None) == 0


def shown(fd: int) -> fdinfo_kinds.Timerfd:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return fdinfo_kinds.timerfd(fdinfo.parse(file.read()))


def nanoseconds(spec: tuple[int, int]) -> int:
    return spec[0] * 10**9 + spec[1]


def same(new: int, old: int) -> None:
    """The new one runs as the old one did a moment ago."""
    a, b = shown(new), shown(old)
    assert (a.clockid, a.ticks, a.settime_flags, a.it_interval) == (
        b.clockid,
        b.ticks,
        b.settime_flags,
        b.it_interval,
    )
    assert seen(new) == seen(old)
    assert (a.it_value == (0, 0)) == (b.it_value == (0, 0))
    assert 0 <= nanoseconds(a.it_value) - nanoseconds(b.it_value) < 10 * 10**9


def trip(fd: int, settle: bool = True) -> int:
    """The copy of a timer, settled as by a task."""
    with Bench() as bench:
        number = bench.dump(fd)
        ctx = bench.commit()
        copy = os.dup(bench.build(number))
        if settle:
            program = Program()
            RESOURCE.settle(ctx.files[number][1], copy, program, ctx)
            run_here(program)
        return copy


@pytest.mark.parametrize("clock", [REALTIME, MONOTONIC, BOOTTIME, REALTIME_ALARM, BOOTTIME_ALARM])
@pytest.mark.parametrize("flags", [0, ABSTIME, ABSTIME | CANCEL_ON_SET, CANCEL_ON_SET])
@pytest.mark.parametrize("interval", [(0, 0), (3, 7)])
@pytest.mark.parametrize("settle", [False, True])
def test_a_running_timer_runs_on(
    clock: int, flags: int, interval: tuple[int, int], settle: bool
) -> None:
    fd = make(clock)
    start = time.clock_gettime({8: 0, 9: 7}.get(clock, clock)) if flags & ABSTIME else 0
    arm(fd, flags, (int(start) + SECONDS, 5), interval)
    copy = trip(fd, settle)
    same(copy, fd)
    assert abs(nanoseconds(shown(copy).it_value) - SECONDS * 10**9) < 10 * 10**9
    os.close(fd)
    os.close(copy)


@given(
    value=st.tuples(st.integers(30, 2**33), st.integers(0, 10**9 - 1)),
    interval=st.tuples(st.integers(0, 2**33), st.integers(0, 10**9 - 1)),
)
def test_any_time_that_is_left(value: tuple[int, int], interval: tuple[int, int]) -> None:
    fd = make(MONOTONIC)
    arm(fd, 0, value, interval)
    copy = trip(fd)
    same(copy, fd)
    os.close(fd)
    os.close(copy)


@pytest.mark.parametrize("interval", [(0, 0), (5, 0)])
def test_a_timer_that_is_off(interval: tuple[int, int]) -> None:
    fd = make(REALTIME)
    arm(fd, ABSTIME, (0, 0), interval)
    copy = trip(fd)
    assert shown(copy) == shown(fd)
    assert shown(copy).it_value == (0, 0) and shown(copy).settime_flags == ABSTIME
    os.close(fd)
    os.close(copy)


def test_an_expiration_that_nobody_has_read() -> None:
    fd = make(MONOTONIC)
    arm(fd, 0, (0, 1))
    while not shown(fd).ticks:
        time.sleep(0.001)
    copy = trip(fd)
    assert shown(copy) == shown(fd)
    assert struct.unpack("=Q", os.read(copy, 8)) == (1,)
    os.close(fd)
    os.close(copy)


@pytest.mark.parametrize("flags", [0, ABSTIME])
def test_a_periodic_timer_that_stands_expired_goes_on(flags: int) -> None:
    """fdinfo shows it as if it were off: 1 expiration, nothing left."""
    fd = make(MONOTONIC)
    first = time.clock_gettime_ns(MONOTONIC) + 10**6 if flags else 10**6
    arm(fd, flags, divmod(first, 10**9), (SECONDS, 0))
    while not shown(fd).ticks:
        time.sleep(0.001)
    assert shown(fd).it_value == (0, 0)
    copy = trip(fd)
    same(copy, fd)
    assert nanoseconds(shown(copy).it_value) > 10**9
    assert struct.unpack("=Q", os.read(copy, 8)) == (1,)
    os.close(fd)
    os.close(copy)


def test_many_expirations_are_all_counted() -> None:
    fd = make(MONOTONIC)
    arm(fd, 0, (0, 10**6), (0, 10**6))
    time.sleep(0.05)
    copy = trip(fd)
    assert struct.unpack("=Q", os.read(copy, 8))[0] >= 40
    before = shown(copy).ticks
    time.sleep(0.02)
    assert before <= 20 and struct.unpack("=Q", os.read(copy, 8))[0] >= 10
    os.close(fd)
    os.close(copy)


def test_dumping_takes_nothing_from_the_timer() -> None:
    fd = make(MONOTONIC)
    arm(fd, 0, (0, 10**6), (SECONDS, 0))
    time.sleep(0.01)
    os.close(trip(fd))
    assert struct.unpack("=Q", os.read(fd, 8)) == (1,)
    assert SECONDS - 5 <= shown(fd).it_value[0] < SECONDS
    os.close(fd)


def test_a_relative_timer_starts_when_the_task_settles() -> None:
    fd = make(MONOTONIC)
    arm(fd, 0, (SECONDS, 0))
    with Bench() as bench:
        number = bench.dump(fd)
        ctx = bench.commit()
        copy = bench.build(number)
        time.sleep(0.05)
        early = nanoseconds(shown(copy).it_value)
        program = Program()
        RESOURCE.settle(ctx.files[number][1], copy, program, ctx)
        run_here(program)
        assert nanoseconds(shown(copy).it_value) > early
    os.close(fd)


@pytest.mark.parametrize("field", ["vsec", "vnsec", "isec", "insec"])
def test_times_beyond_all_clocks_are_refused(field: str) -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    values = {"vsec": 1, "vnsec": 0, "isec": 0, "insec": 0, field: 2**63}
    with Bench() as bench:
        ctx = bench.commit()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ImageError):
            RESOURCE.restore(
                pb.timerfd_entry(
                    id=1, flags=2, fown=owner, clockid=1, ticks=0, settime_flags=1, **values
                ),
                ctx,
            )
        assert os.listdir("/proc/self/fd") == before
