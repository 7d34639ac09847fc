from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import wait_until
from torpor.proc import read, status

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)

RECORDED = b"""\
Name:\ta\\nb \\\\c:\tUid:
Umask:\t0027
State:\tS (sleeping)
Tgid:\t42
Ngid:\t0
Pid:\t43
PPid:\t1
TracerPid:\t7
Uid:\t1000\t1001\t1002\t1003
Gid:\t5\t6\t7\t8
FDSize:\t256
Groups:\t4 24 4294967294\x20
NStgid:\t42\t9\t1
NSpid:\t43\t10\t2
NSpgid:\t42\t9\t1
NSsid:\t40\t0\t0
Kthread:\t0
VmRSS:\t    1708 kB
CoreDumping:\t0
THP_enabled:\t1
x86_Thread_features:\tshstk wrss\x20
x86_Thread_features_locked:\t
Threads:\t2
SigQ:\t3/96365
SigPnd:\t0000000000000100
ShdPnd:\t0000000000000200
SigBlk:\t8000000000000000
SigIgn:\t0000000000001000
SigCgt:\t0000000180014003
CapInh:\t0000000000000001
CapPrm:\t000001fffeffffff
CapEff:\t0000000000000002
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t3
Cpus_allowed:\tff,00000001
Cpus_allowed_list:\t0,32-39
Mems_allowed:\t00000000,00000001
"""


def test_recorded() -> None:
    parsed = status.parse(RECORDED)
    assert parsed.Name == b"a\nb \\c:\tUid:"
    assert (parsed.Umask, parsed.State) == (0o27, "S")
    assert (parsed.Tgid, parsed.Pid, parsed.PPid, parsed.TracerPid) == (42, 43, 1, 7)
    assert parsed.Uid == (1000, 1001, 1002, 1003)
    assert parsed.Gid == (5, 6, 7, 8)
    assert parsed.Groups == [4, 24, 2**32 - 2]
    assert (parsed.NStgid, parsed.NSpid) == ([42, 9, 1], [43, 10, 2])
    assert (parsed.NSpgid, parsed.NSsid) == ([42, 9, 1], [40, 0, 0])
    assert parsed.Kthread is False
    assert parsed.VmRSS == 1708 * 1024
    assert (parsed.CoreDumping, parsed.THP_enabled) == (False, True)
    assert parsed.x86_Thread_features == frozenset(("shstk", "wrss"))
    assert parsed.x86_Thread_features_locked == frozenset()
    assert (parsed.Threads, parsed.SigQ) == (2, (3, 96365))
    assert (parsed.SigPnd, parsed.ShdPnd, parsed.SigBlk) == (1 << 8, 1 << 9, 1 << 63)
    assert (parsed.SigIgn, parsed.SigCgt) == (0x1000, 0x180014003)
    assert (parsed.CapInh, parsed.CapPrm, parsed.CapEff) == (1, 0x1FFFEFFFFFF, 2)
    assert (parsed.CapBnd, parsed.CapAmb) == (2**41 - 1, 0)
    assert (parsed.NoNewPrivs, parsed.Seccomp, parsed.Seccomp_filters) == (True, 2, 3)
    assert parsed.Cpus_allowed == 0xFF << 32 | 1
    assert parsed.Mems_allowed == 1


def test_it_is_like_a_dictionary() -> None:
    parsed = status.parse(RECORDED)
    assert parsed["Uid"] == (1000, 1001, 1002, 1003)
    assert "Seccomp" in parsed
    assert "Nonsense" not in parsed
    assert parsed.get("Nonsense", 5) == 5
    assert parsed.get("Threads") == 2
    assert parsed.line("Cpus_allowed_list") == b"0,32-39"
    with pytest.raises(KeyError):
        parsed["Nonsense"]


def test_a_line_that_the_kernel_leaves_out() -> None:
    old = RECORDED.replace(b"Kthread:\t0\n", b"").replace(b"NSpid:\t43\t10\t2\n", b"")
    parsed = status.parse(old)
    assert parsed.Kthread is None
    with pytest.raises(AttributeError, match="NSpid"):
        parsed.NSpid
    assert "NSpid" not in parsed


def test_every_declared_line_can_be_read() -> None:
    parsed = status.parse(RECORDED + b"FDSize:\t64\n")
    for name in status.Status.__annotations__:
        parsed[name]
    assert set(status._CONVERT) == set(status.Status.__annotations__)


@pytest.mark.parametrize("text", [b"", b"Uid:\t0\n", RECORDED[:-1]])
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="status"):
        status.parse(text)


def test_a_broken_value_is_named() -> None:
    with pytest.raises(ValueError, match="status: Uid"):
        status.parse(RECORDED.replace(b"1000\t1001", b"1000")).Uid


@given(
    name=st.binary(max_size=15).filter(lambda name: b"\0" not in name),
    uid=st.tuples(U32, U32, U32, U32),
    groups=st.lists(U32),
    pids=st.lists(U32, min_size=1, max_size=32),
    blocked=U64,
    capabilities=U64,
    umask=st.integers(0, 0o777),
)
def test_what_is_printed_is_parsed(
    name: bytes,
    uid: tuple[int, int, int, int],
    groups: list[int],
    pids: list[int],
    blocked: int,
    capabilities: int,
    umask: int,
) -> None:
    shown = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    text = b"Name:\t%s\nUmask:\t%04o\n" % (shown, umask)
    text += b"Uid:\t%d\t%d\t%d\t%d\n" % uid
    text += b"Groups:\t%s \n" % b" ".join(b"%d" % group for group in groups)
    text += b"NSpid:\t%s\n" % b"\t".join(b"%d" % pid for pid in pids)
    text += b"SigBlk:\t%016x\nCapEff:\t%016x\n" % (blocked, capabilities)
    parsed = status.parse(text)
    assert (parsed.Name, parsed.Umask, parsed.Uid) == (name, umask, uid)
    assert (parsed.Groups, parsed.NSpid) == (groups, pids)
    assert (parsed.SigBlk, parsed.CapEff) == (blocked, capabilities)


def _threads_by_status() -> int:
    return status.parse(read.read(os.getpid(), "status")).Threads


def test_live() -> None:
    parsed = status.parse(read.read(os.getpid(), "status"))
    assert (parsed.Pid, parsed.Tgid, parsed.PPid) == (os.getpid(), os.getpid(), os.getppid())
    assert parsed.Uid[:3] == os.getresuid()
    assert parsed.Gid[:3] == os.getresgid()
    assert parsed.Groups == sorted(os.getgroups())
    assert parsed.Threads >= threading.active_count()
    # A thread of an earlier test may be ending meanwhile.
    wait_until("as many", lambda: _threads_by_status() == len(os.listdir("/proc/self/task")))
    cpus = {
        cpu for cpu in range(parsed.Cpus_allowed.bit_length()) if parsed.Cpus_allowed >> cpu & 1
    }
    assert cpus == os.sched_getaffinity(0)
    mask = os.umask(0)
    os.umask(mask)
    assert parsed.Umask == mask


def _change_everything() -> None:
    libc = ctypes.CDLL(None)
    os.setpgid(0, 0)
    os.umask(0o123)
    os.setgroups([7, 5, 5])
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, 64})
    os.kill(os.getpid(), signal.SIGHUP)  # of the process
    signal.pthread_kill(threading.get_ident(), 64)  # of the thread
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    os.setresgid(1, 2, 3)
    os.setresuid(4, 5, 6)


def test_live_of_a_child_that_changed_everything(child: Callable[..., int]) -> None:
    pid = child(_change_everything)
    parsed = status.parse(read.read(pid, "status"))
    assert (parsed.Uid, parsed.Gid) == ((4, 5, 6, 5), (1, 2, 3, 2))
    assert parsed.Groups == [5, 5, 7]
    assert parsed.Umask == 0o123
    assert parsed.NSpgid[0] == pid
    assert parsed.NSsid[0] == os.getsid(0)
    assert parsed.SigBlk == 1 << 63 | 1
    assert (parsed.ShdPnd, parsed.SigPnd) == (1, 1 << 63)
    assert parsed.SigCgt >> (signal.SIGUSR1 - 1) & 1
    assert parsed.SigIgn >> (signal.SIGUSR2 - 1) & 1
    assert parsed.NoNewPrivs is True
    assert parsed.THP_enabled is False
    assert parsed.CapEff == 0


def test_live_of_a_zombie() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        parsed = status.parse(read.read(pid, "status"))
        assert (parsed.State, parsed.VmRSS, parsed.Umask) == ("Z", None, None)
    finally:
        os.waitpid(pid, 0)
