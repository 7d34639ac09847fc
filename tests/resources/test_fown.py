"""Owners of descriptors (SIGIO): dumped, emitted, done in a forked child, seen by fcntl(2)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import subprocess

import pytest

from kit.file_bench import in_child, run_here, source
from kit.files import slurp_text
from torpor.remote.program import Program
from torpor.resources import fown

F_SETOWN_EX, F_GETOWN_EX, F_GETOWNER_UIDS, F_SETSIG, F_GETSIG = 15, 16, 17, 10, 11
TID, PID, PGRP = 0, 1, 2
O_LARGEFILE = 0o100000


def state(fd: int) -> tuple[object, ...]:
    return (
        fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_LARGEFILE,
        fcntl.fcntl(fd, F_GETSIG),
        struct.unpack("ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8))),
        struct.unpack("II", fcntl.fcntl(fd, F_GETOWNER_UIDS, bytes(8))),
    )


def capabilities() -> list[str]:
    return [line for line in slurp_text("/proc/self/status").splitlines() if line.startswith("Cap")]


def take_over(old: int, new: int) -> Program:
    """Give ``new`` the owner of ``old`` through an entry and a program."""
    one = source(old)
    program = Program()
    fown.emit(fown.dump(one), new, program, one.flags)
    run_here(program)
    return program


def test_nothing_is_done_where_nobody_asked() -> None:
    ends = os.pipe()
    assert len(take_over(ends[0], ends[1])) == 0
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("kind", [TID, PID, PGRP])
@pytest.mark.parametrize("number", [0, signal.SIGUSR2, signal.SIGRTMIN + 5])
@pytest.mark.parametrize("flags", [0, os.O_ASYNC, os.O_ASYNC | os.O_NONBLOCK])
def test_owner_signal_and_async_come_back(kind: int, number: int, flags: int) -> None:
    def work() -> None:
        os.setpgid(0, 0)
        (old, _), (new, _) = os.pipe(), os.pipe()
        fcntl.fcntl(old, F_SETOWN_EX, struct.pack("ii", kind, os.getpid()))
        fcntl.fcntl(old, F_SETSIG, number)
        fcntl.fcntl(old, fcntl.F_SETFL, flags)
        take_over(old, new)
        assert state(new) == state(old)
        assert state(new)[2] == (kind, os.getpid())

    in_child(work)


@pytest.mark.parametrize("ids", [(0, 1234), (1234, 0), (1234, 4321), (0, 0)])
def test_the_owners_credentials_come_back_and_ours_stay(ids: tuple[int, int]) -> None:
    def work() -> None:
        (old, _), (new, _) = os.pipe(), os.pipe()
        os.setresuid(*ids, 0)
        fcntl.fcntl(old, F_SETOWN_EX, struct.pack("ii", PID, os.getpid()))
        os.setresuid(0, 0, 0)
        libc_prctl = ctypes.CDLL(None).prctl
        libc_prctl(4, 1, 0, 0, 0)
        before = capabilities()
        program = take_over(old, new)
        assert state(new)[3] == ids
        assert os.getresuid() == (0, 0, 0)
        assert libc_prctl(3, 0, 0, 0, 0) == 1  # PR_GET_DUMPABLE
        assert capabilities() == before
        assert ("setresuid" in str(program)) == any(ids)

    in_child(work)


def test_si_fd_is_the_tasks_own_number() -> None:
    """The kernel tells by which descriptor O_ASYNC was switched on; the program does it by the
    task's.
    """

    def work() -> None:
        (old, _), (new, writer) = os.pipe(), os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        fcntl.fcntl(old, F_SETOWN_EX, struct.pack("ii", PID, os.getpid()))
        fcntl.fcntl(old, F_SETSIG, signal.SIGUSR1)
        fcntl.fcntl(old, fcntl.F_SETFL, os.O_ASYNC)
        kept = fcntl.fcntl(new, fcntl.F_DUPFD, 300)
        take_over(old, new)
        os.write(writer, b"x")
        info = signal.sigtimedwait({signal.SIGUSR1}, 5)
        assert info is not None and info.si_band & 1  # POLLIN
        assert kept == 300

    in_child(work)


def test_a_path_descriptor_has_no_owner() -> None:
    fd = os.open("/", os.O_PATH)
    entry = fown.dump(source(fd))
    assert (entry.pid, entry.signum, entry.uid) == (0, 0, 0) and entry.IsInitialized()
    os.close(fd)


def test_an_owner_that_is_gone_is_none() -> None:
    ends = os.pipe()
    child = subprocess.Popen(["sleep", "100"])
    fcntl.fcntl(ends[0], F_SETOWN_EX, struct.pack("ii", PID, child.pid))
    assert fown.dump(source(ends[0])).pid == child.pid
    child.kill()
    child.wait()
    assert fown.dump(source(ends[0])).pid == 0
    for end in ends:
        os.close(end)


def test_set_flags_leaves_async_alone() -> None:
    ends = os.pipe()
    fown.set_flags(ends[0], os.O_NONBLOCK | os.O_ASYNC)
    assert fcntl.fcntl(ends[0], fcntl.F_GETFL) == os.O_NONBLOCK
    fown.set_flags(ends[0], 0)
    assert fcntl.fcntl(ends[0], fcntl.F_GETFL) == 0
    for end in ends:
        os.close(end)
