"""Interval timers and POSIX timers."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
import time

import pytest
from forked import build_context, child, dump, proc_text, restore, syscall
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.resources.task import itimers, posix_timers

slow = settings(max_examples=12)
SIGNAL, NONE, THREAD_ID = 0, 1, 4
REALTIME, MONOTONIC, PROCESS_CPU, BOOTTIME = 0, 1, 2, 7


def create(number: int, clock: int, event: bytes) -> None:
    """Make a timer; with PR_TIMER_CREATE_RESTORE_IDS on, the number is the one wanted."""
    got = ctypes.c_int32(number)
    syscall(222, clock, event, ctypes.byref(got))
    assert got.value == number


def event(signo: int, notify: int, value: int = 0, tid: int = 0) -> bytes:
    return struct.pack("<Qiii44x", value, signo, notify, tid)


def settime(number: int, interval: tuple[int, int], value: tuple[int, int]) -> None:
    syscall(223, number, 0, struct.pack("<4Q", *interval, *value), 0)


@pytest.mark.parametrize(
    ("which", "value", "interval"),
    [(0, 500.25, 0), (0, 1000, 7.5), (1, 300, 0.125), (2, 600, 0), (2, 60, 60)],
)
def test_interval_timers(which: int, value: float, interval: float) -> None:
    with child(lambda: signal.setitimer(which, value, interval)) as pid:
        first = dump(pid, itimers.RESOURCE).core

    def observe() -> None:
        restore(first, itimers.RESOURCE)
        for number in range(3):
            left, every = signal.getitimer(number)
            if number == which:
                assert value - 5 < left < value + 0.05  # CPU time is counted in ticks
                assert every == interval
            else:
                assert (left, every) == (0, 0)

    with child(observe):
        pass


def test_an_expired_interval_timer_goes_on_with_its_interval() -> None:
    core = pb.core_entry()
    for name in ("real", "virt", "prof"):
        entry = getattr(core.tc.timers, name)
        entry.isec = entry.iusec = entry.vsec = entry.vusec = 0
    core.tc.timers.real.isec = 40

    def observe() -> None:
        restore(core, itimers.RESOURCE)
        left, every = signal.getitimer(signal.ITIMER_REAL)
        assert 35 < left <= 40
        assert every == 40

    with child(observe):
        pass


def test_what_is_no_time_is_refused() -> None:
    core = pb.core_entry()
    core.tc.timers.real.iusec = 10**6
    with pytest.raises(ImageError, match=r"tc\.timers\.real"):
        itimers.RESOURCE.check(core, None)
    entry = core.tc.timers.posix.add(it_id=1, vnsec=10**9)
    with pytest.raises(ImageError, match="not a time"):
        posix_timers.RESOURCE.check(core, None)
    entry.vnsec = 0
    for field in ("si_signo", "it_sigev_notify"):
        setattr(entry, field, 1 << 31)
        with pytest.raises(ImageError, match="signal or notification out of range"):
            posix_timers.RESOURCE.check(core, None)
        setattr(entry, field, 0)
    core.tc.timers.posix.add(it_id=1)
    with pytest.raises(ImageError, match="not unique"):
        posix_timers.RESOURCE.check(core, None)


timers = st.dictionaries(
    st.integers(0, 2**31 - 2),
    st.tuples(
        st.sampled_from([REALTIME, MONOTONIC, BOOTTIME, PROCESS_CPU]),
        st.sampled_from([SIGNAL, NONE, SIGNAL | THREAD_ID]),
        st.integers(1, 64),
        st.integers(0, 2**64 - 1),
        st.tuples(st.integers(0, 10**6), st.integers(0, 999_999_999)),  # interval
        st.sampled_from([(0, 0), (10**6, 5), (10**9, 1)]),  # value: disarmed, or far away
    ),
    max_size=6,
)


@given(timers)
@slow
def test_posix_timers_keep_numbers_and_settings(wanted: dict[int, tuple]) -> None:
    def setup() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        syscall(157, 77, 1, 0, 0, 0)
        for number, (clock, notify, signo, value, interval, first) in wanted.items():
            create(number, clock, event(signo, notify, value, os.getpid()))
            settime(number, interval, first)
        syscall(157, 77, 0, 0, 0, 0)

    with child(setup) as pid:
        first = dump(pid, posix_timers.RESOURCE)
        listed = sorted(proc_text(pid, "timers").replace(str(pid), "PID").split("ID: ")[1:])
    assert {entry.it_id for entry in first.core.tc.timers.posix} == set(wanted)
    for entry in first.core.tc.timers.posix:
        clock, notify, signo, value, interval, left = wanted[entry.it_id]
        assert (entry.clock_id, entry.it_sigev_notify) == (clock, notify) or clock == PROCESS_CPU
        assert (entry.si_signo, entry.sival_ptr) == (signo, value)
        if any(left):
            assert (entry.isec, entry.insec) == interval
            assert left[0] - 10 < entry.vsec <= left[0]
        else:
            assert (entry.vsec, entry.vnsec) == (0, 0)

    def copy() -> None:
        for entry in first.core.tc.timers.posix:
            if entry.notify_thread_id:
                assert entry.notify_thread_id == first.task.pid
                entry.notify_thread_id = os.getpid()
        restore(first.core, posix_timers.RESOURCE)

    with child(copy) as pid:
        text = proc_text(pid, "timers").replace(str(pid), "PID")
        again = dump(pid, posix_timers.RESOURCE).core.tc.timers.posix
    assert sorted(text.split("ID: ")[1:]) == listed
    before = {entry.it_id: entry for entry in first.core.tc.timers.posix}
    for entry in again:
        assert (entry.isec, entry.insec) == (before[entry.it_id].isec, before[entry.it_id].insec)
        assert (
            before[entry.it_id].vsec - 10 < entry.vsec <= before[entry.it_id].vsec or not entry.vsec
        )


def test_numbers_on_a_kernel_that_only_counts() -> None:
    core = pb.core_entry()
    required = {"clock_id": 1, "si_signo": 10, "it_sigev_notify": 0, "sival_ptr": 7, "overrun": 0}
    times = {"isec": 0, "insec": 0, "vsec": 1000, "vnsec": 0}
    for number in (9, 2, 0):
        core.tc.timers.posix.add(it_id=number, **required, **times)
    ctx = build_context()
    ctx.memo["posix timers", "numbers"] = False
    with child(lambda: restore(core, posix_timers.RESOURCE, ctx=ctx)) as pid:
        lines = proc_text(pid, "timers").splitlines()
    assert sorted(line for line in lines if line.startswith("ID")) == ["ID: 0", "ID: 2", "ID: 9"]
    core.tc.timers.posix[0].it_id = 1 << 20
    with pytest.raises(Unsupported, match="cannot be told"):
        posix_timers.RESOURCE.check(core, ctx)


def test_numbering_goes_on_by_itself_afterwards() -> None:
    core = pb.core_entry()
    required = {"clock_id": 1, "si_signo": 10, "it_sigev_notify": 0, "sival_ptr": 7, "overrun": 0}
    core.tc.timers.posix.add(it_id=41, isec=0, insec=0, vsec=0, vnsec=0, **required)

    def observe() -> None:
        restore(core, posix_timers.RESOURCE)
        got = ctypes.c_int32(5)
        syscall(222, 1, event(10, 0), ctypes.byref(got))
        assert got.value != 5  # it is not a request any more
        assert syscall(157, 77, 2, 0, 0, 0) == 0

    with child(observe):
        pass


def test_a_timer_for_a_thread_that_has_ended() -> None:
    def setup() -> None:
        def other() -> None:
            syscall(157, 77, 1, 0, 0, 0)
            create(0, MONOTONIC, event(10, THREAD_ID, 3, threading.get_native_id()))
            settime(0, (0, 0), (1000, 0))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        while len(os.listdir("/proc/self/task")) > 1:
            time.sleep(0.001)

    with child(setup) as pid:
        core = dump(pid, posix_timers.RESOURCE).core
    (entry,) = core.tc.timers.posix
    assert entry.it_sigev_notify == THREAD_ID
    assert not entry.HasField("notify_thread_id")
    with child(lambda: restore(core, posix_timers.RESOURCE)) as pid:
        assert "notify: none/" in proc_text(pid, "timers")
