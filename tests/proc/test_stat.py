from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.proc import comm, read, stat, status

PR_SET_NAME = 15
ODD_NAME = b"a) R\n\\b (\t\xff"

RECORDED = (
    b"4242 (worker) S 4200 4242 4200 34816 4242 4194560 1669 60 5 0 2 1 -3 4 20 -5 2 0 112410 "
    b"14151680 2698 18446744073709551615 94331692716032 94331692716373 140731191513360 0 0 0 0 "
    b"16781312 2 0 0 0 17 1 0 0 7 0 0 94331692727728 94331692728344 94332582670336 "
    b"140731191515807 140731191515844 140731191515844 140731191517146 0\n"
)


def test_recorded() -> None:
    parsed = stat.parse(RECORDED)
    assert (parsed.pid, parsed.comm, parsed.state, parsed.ppid) == (4242, b"worker", "S", 4200)
    assert (parsed.tty_nr, parsed.cutime, parsed.nice, parsed.num_threads) == (34816, -3, -5, 2)
    assert parsed.starttime == 112410
    assert parsed.rsslim == 2**64 - 1
    assert (parsed.start_code, parsed.end_code) == (94331692716032, 94331692716373)
    assert parsed.start_stack == 140731191513360
    assert (parsed.exit_signal, parsed.delayacct_blkio_ticks) == (17, 7)
    assert (parsed.start_data, parsed.end_data) == (94331692727728, 94331692728344)
    assert parsed.start_brk == 94332582670336
    assert (parsed.arg_start, parsed.arg_end) == (140731191515807, 140731191515844)
    assert (parsed.env_start, parsed.env_end) == (140731191515844, 140731191517146)
    assert parsed.exit_code == 0


@given(
    name=st.binary(min_size=0, max_size=64).filter(lambda name: b"\0" not in name),
    state=st.sampled_from("RSDZTtXI"),
    numbers=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=50, max_size=50),
    later=st.lists(st.integers(0, 9), max_size=3),
)
def test_what_is_printed_is_parsed(
    name: bytes, state: str, numbers: list[int], later: list[int]
) -> None:
    pid, *rest = numbers
    text = b"%d (%s) %s " % (pid, name, state.encode())
    text += b" ".join(b"%d" % number for number in rest + later) + b"\n"
    assert stat.parse(text) == (pid, name, state, *rest)


@pytest.mark.parametrize(
    "text", [b"", b"1 (a) S 2\n", b"(a) S " + b"1 " * 49, b"x (a) S " + b"1 " * 49, RECORDED[:-20]]
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="stat"):
        stat.parse(text)


def test_live() -> None:
    parsed = stat.parse(read.read(os.getpid(), "stat"))
    assert parsed.pid == os.getpid()
    assert parsed.ppid == os.getppid()
    assert (parsed.pgrp, parsed.session) == (os.getpgrp(), os.getsid(0))
    assert parsed.nice == os.getpriority(os.PRIO_PROCESS, 0)
    assert parsed.arg_start < parsed.arg_end <= parsed.env_start < parsed.env_end
    with open("/proc/self/mem", "rb", 0) as memory:
        memory.seek(parsed.arg_start)
        assert memory.read(parsed.arg_end - parsed.arg_start) == read.read(os.getpid(), "cmdline")


def test_any_name(child: Callable[..., int]) -> None:
    pid = child(lambda: ctypes.CDLL(None).prctl(PR_SET_NAME, ODD_NAME))
    assert stat.parse(read.read(pid, "stat")).comm == ODD_NAME
    assert status.parse(read.read(pid, "status")).Name == ODD_NAME
    assert comm.parse(read.read(pid, "comm")) == ODD_NAME


@given(st.binary())
def test_escapes_of_a_name_are_undone(name: bytes) -> None:
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    assert comm.unescape(escaped) == name
