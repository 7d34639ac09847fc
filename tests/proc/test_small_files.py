"""Files of few lines: cgroup limits timers auxv strings scalars links sysvipc cpuinfo."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.linux.call import call
from torpor.proc import (
    auxv,
    cgroup,
    cpuinfo,
    limits,
    links,
    read,
    scalars,
    strings,
    sysvipc,
    timers,
)

ME = os.getpid()
U64 = st.integers(0, 2**64 - 1)


# cgroup


def test_cgroup_recorded() -> None:
    v1, named, v2, gone = cgroup.parse(
        b"4:cpu,cpuacct:/a:b c\n1:name=systemd:/user (deleted)\n0::/../x\n0::/y (deleted)\n"
    )
    assert v1 == (4, ("cpu", "cpuacct"), b"/a:b c", False)
    assert named == (1, ("name=systemd",), b"/user (deleted)", False)
    assert v2 == (0, (), b"/../x", False)
    assert gone == (0, (), b"/y", True)


@given(
    st.lists(
        st.builds(
            cgroup.Cgroup,
            st.integers(1, 99),
            st.lists(st.sampled_from(["cpu", "memory", "name=a"]), min_size=1).map(tuple),
            st.binary().filter(lambda path: b"\n" not in path and b"\0" not in path),
            st.just(False),
        )
    )
)
def test_cgroup_as_printed(expected: list[cgroup.Cgroup]) -> None:
    lines = (b"%d:%s:%s\n" % (n, ",".join(names).encode(), path) for n, names, path, _ in expected)
    assert cgroup.parse(b"".join(lines)) == expected


def test_cgroup_live() -> None:
    with open("/proc/self/cgroup", "rb") as file:
        count = len(file.readlines())
    parsed = cgroup.parse(read.read(ME, "cgroup"))
    assert len(parsed) == count
    assert all(one.path.startswith(b"/") for one in parsed)


@pytest.mark.parametrize("text", [b"1:cpu\n", b"x:cpu:/\n", b":\n"])
def test_cgroup_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="cgroup"):
        cgroup.parse(text)


# limits


def show_limits(values: list[tuple[int, int]]) -> bytes:
    text = b"Limit                     Soft Limit           Hard Limit           Units     \n"
    for name, pair in zip(limits._NAMES, values, strict=True):
        shown = [b"unlimited" if one == 2**64 - 1 else b"%d" % one for one in pair]
        text += b"%-25s %-20s %-20s bytes     \n" % (name, *shown)
    return text


@given(st.lists(st.tuples(U64, U64), min_size=16, max_size=16))
def test_limits_as_printed(values: list[tuple[int, int]]) -> None:
    assert limits.parse(show_limits(values)) == dict(enumerate(values))


def test_limits_in_another_order() -> None:
    head, *lines = show_limits([(n, n + 100) for n in range(16)]).splitlines(True)
    parsed = limits.parse(head + b"Max new thing             1 2 \n" + b"".join(lines[::-1]))
    assert parsed == {n: (n, n + 100) for n in range(16)}


@pytest.mark.parametrize("spoil", [b"Max open files", b"unlimited"])
def test_limits_refused(spoil: bytes) -> None:
    text = show_limits([(2**64 - 1, 0)] * 16)
    with pytest.raises(ValueError, match="limits"):
        limits.parse(text.replace(spoil, b"?" * len(spoil)))


def test_limits_live(child: Callable[..., int]) -> None:
    def lower() -> None:
        for number in (0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 15):
            _, hard = resource.getrlimit(number)
            low = (1 << 40) + number if hard == -1 else max(hard // 2 + number, 0)
            resource.setrlimit(number, (low, hard))

    pid = child(lower)
    parsed = limits.parse(read.read(pid, "limits"))
    expected = {number: resource.prlimit(pid, number) for number in range(16)}
    assert parsed == {
        number: (soft % 2**64, hard % 2**64) for number, (soft, hard) in expected.items()
    }


# timers


TIMERS = st.builds(
    timers.Timer,
    st.integers(0, 2**31 - 1),
    st.integers(0, 64),
    U64,
    st.sampled_from([0, 1, 2, 4]),
    st.integers(0, 2**22),
    st.integers(-(2**31), 16),
)


@given(st.lists(TIMERS))
def test_timers_as_printed(expected: list[timers.Timer]) -> None:
    text = b""
    for number, signo, sigval, notify, target, clock in expected:
        how = [b"signal", b"none", b"thread"][notify & 3]
        text += b"ID: %d\nsignal: %d/%016x\n" % (number, signo, sigval)
        text += b"notify: %s/%s.%d\n" % (how, b"tid" if notify & 4 else b"pid", target)
        text += b"ClockID: %d\n" % clock
    assert timers.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        b"ID: 1\n",
        b"ID: 1\nsignal: 1/0\nnotify: loud/pid.1\nClockID: 0\n",
        b"ID: 1\nsignal: 1\nnotify: signal/pid.1\nClockID: 0\n",
        b"ID: 1\nClockID: 0\nsignal: 1/0\nnotify: signal/pid.1\n",
    ],
)
def test_timers_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="timers"):
        timers.parse(text)


def test_timers_live() -> None:
    created = []
    try:
        # struct sigevent: value, signal number, how to notify, thread.
        for notify, signo, clock in ((0, 10, 0), (1, 12, 1), (4, 40, 7)):
            event = struct.pack("=QiiI44x", 2**63 + notify, signo, notify, ME)
            number = ctypes.c_int(-1)
            call("timer_create", clock, event, ctypes.byref(number))
            created.append((number.value, signo, 2**63 + notify, notify, ME, clock))
        assert sorted(timers.parse(read.read(ME, "timers"))) == sorted(created)
    finally:
        for timer, *_ in created:
            call("timer_delete", timer)
    assert timers.parse(read.read(ME, "timers")) == []


# auxv


def test_auxv_live() -> None:
    libc = ctypes.CDLL(None)
    libc.getauxval.restype = ctypes.c_ulong
    libc.getauxval.argtypes = [ctypes.c_ulong]
    data = read.read(ME, "auxv")
    parsed = auxv.parse(data)
    assert parsed[6] == os.sysconf("SC_PAGESIZE")  # AT_PAGESZ
    for kind, value in parsed.items():
        # glibc puts a value of its own in the place of AT_HWCAP.
        assert kind == 16 or libc.getauxval(kind) == value, kind
    assert struct.pack(f"{len(data) // 8}Q", *auxv.words(data)) == data
    assert 0 not in parsed


def test_auxv_refused() -> None:
    with pytest.raises(ValueError, match="auxv"):
        auxv.parse(b"\1" * 24)


# strings


@given(st.lists(st.binary().filter(lambda one: b"\0" not in one)))
def test_strings_as_printed(expected: list[bytes]) -> None:
    assert strings.parse(b"".join(one + b"\0" for one in expected)) == expected


def test_strings_odd() -> None:
    assert strings.parse(b"no end") == [b"no end"]
    assert strings.parse(b"") == []
    assert strings.parse_environ(b"A=1\0A=2\0B=x=y\0odd\0C=\0") == {
        b"A": b"1",
        b"B": b"x=y",
        b"C": b"",
    }


def test_strings_live() -> None:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "100"], {"A": "x=y", "B": ""})
    try:
        deadline = time.monotonic() + 20
        while strings.parse(read.read(pid, "cmdline")) != [b"sleep", b"100"]:
            assert time.monotonic() < deadline
        assert strings.parse_environ(read.read(pid, "environ")) == {b"A": b"x=y", b"B": b""}
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# scalars


def test_scalars() -> None:
    assert scalars.parse_uptime(b"823.29 1599.47\n") == (823.29, 1599.47)
    assert scalars.parse_personality(b"00040000\n") == 0x40000
    assert scalars.parse_loginuid(b"4294967295") is None
    assert scalars.parse_loginuid(b"1000") == 1000
    assert scalars.parse_autogroup(b"/autogroup-12 nice -3\n\n") == -3
    assert scalars.parse_autogroup(b"") is None
    assert scalars.parse_oom_score_adj(b"-1000\n") == -1000
    assert scalars.parse_coredump_filter(b"00000033\n") == 0x33
    assert scalars.parse_coredump_filter(b"") == 0


@pytest.mark.parametrize(
    "parser",
    [
        scalars.parse_uptime,
        scalars.parse_personality,
        scalars.parse_loginuid,
        scalars.parse_autogroup,
        scalars.parse_oom_score_adj,
        scalars.parse_coredump_filter,
    ],
)
def test_scalars_refused(parser: Callable[[bytes], object]) -> None:
    with pytest.raises(ValueError, match=parser.__name__.removeprefix("parse_")):
        parser(b"what\n")


def test_scalars_live(child: Callable[..., int]) -> None:
    def setup() -> None:
        call("personality", 0x40000)
        for name, text in (("oom_score_adj", b"123"), ("coredump_filter", b"0x21")):
            fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(fd, text)
            os.close(fd)

    pid = child(setup)
    assert scalars.parse_personality(read.read(pid, "personality")) == 0x40000
    assert scalars.parse_oom_score_adj(read.read(pid, "oom_score_adj")) == 123
    assert scalars.parse_coredump_filter(read.read(pid, "coredump_filter")) == 0x21
    up, _ = scalars.parse_uptime(read.read_system("uptime"))
    assert abs(up - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60


# links


@given(st.sampled_from(["net", "pid_for_children", "socket", "pipe", "anon_inode"]), U64)
def test_links_as_printed(kind: str, number: int) -> None:
    assert links.parse(f"{kind}:[{number}]".encode()) == (kind, number)


@pytest.mark.parametrize(
    "target", [b"/a:[5]", b"net:5", b":[5]", b"anon_inode:[eventfd]", b"net:[5", b"net:[]", b""]
)
def test_links_refused(target: bytes) -> None:
    with pytest.raises(ValueError, match="link"):
        links.parse(target)


def test_links_live() -> None:
    for name in read.names(ME, "ns"):
        kind, number = links.parse(read.link(ME, f"ns/{name}"))
        assert number == os.stat(f"/proc/self/ns/{name}").st_ino
        assert name.startswith(kind)


# sysvipc

IPC_PRIVATE, IPC_CREAT, IPC_RMID = 0, 0o1000, 0


def test_sysvipc_live() -> None:
    key = -0x1234567 ^ ME
    shm = call("shmget", key, 12345, IPC_CREAT | 0o640)
    sem = call("semget", key, 7, IPC_CREAT | 0o600)
    msg = call("msgget", key, IPC_CREAT | 0o604)
    try:
        call("msgsnd", msg, struct.pack("q", 5) + b"hello", 5, 0)
        [segment] = [s for s in sysvipc.parse_shm(read.read_system("sysvipc/shm")) if s.key == key]
        [semset] = [s for s in sysvipc.parse_sem(read.read_system("sysvipc/sem")) if s.key == key]
        [queue] = [q for q in sysvipc.parse_msg(read.read_system("sysvipc/msg")) if q.key == key]
    finally:
        call("shmctl", shm, IPC_RMID, None)
        call("semctl", sem, 0, IPC_RMID, None)
        call("msgctl", msg, IPC_RMID, None)
    me = (os.geteuid(), os.getegid(), os.geteuid(), os.getegid())
    assert (segment.shmid, segment.perms, segment.size) == (shm, 0o640, 12345)
    assert (segment.cpid, segment.lpid, segment.nattch) == (ME, 0, 0)
    assert (segment.uid, segment.gid, segment.cuid, segment.cgid) == me
    assert abs(segment.ctime - time.time()) < 60
    assert (semset.semid, semset.perms, semset.nsems, semset.otime) == (sem, 0o600, 7, 0)
    assert (queue.msqid, queue.perms, queue.cbytes, queue.qnum) == (msg, 0o604, 5, 1)
    assert (queue.lspid, queue.lrpid, queue.rtime) == (ME, 0, 0)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=9, max_size=9), max_size=3))
def test_sysvipc_as_printed(rows: list[list[int]]) -> None:
    text = b"       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n"
    for key, *rest in rows:
        text += b"%10d %10d  %4o %10d %5u %5u %5u %5u %10d %10d\n" % (-key, key, *rest[:8])
    assert sysvipc.parse_sem(text) == [(-row[0], row[0], *row[1:]) for row in rows]


@pytest.mark.parametrize("spoil", [b"key", b" 5 ", b" 0 "])
def test_sysvipc_refused(spoil: bytes) -> None:
    text = b" key semid perms nsems uid gid cuid cgid otime ctime\n 1 2 3 4 0 0 0 0 6 5 \n"
    sysvipc.parse_sem(text)
    with pytest.raises(ValueError, match="sysvipc/sem"):
        sysvipc.parse_sem(text.replace(spoil, b" z " if spoil == b" 5 " else b" "))


# cpuinfo

CPU = b"""processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 158
model name\t: A CPU: with colons
stepping\t: 10
flags\t\t: fpu vme %s
bugs\t\t: spectre_v1

"""


def test_cpuinfo() -> None:
    one = cpuinfo.parse(CPU % b"avx2" + CPU % b"sse")
    assert one[:5] == ("GenuineIntel", 6, 158, 10, "A CPU: with colons")
    assert one.flags == {"fpu", "vme"}
    assert cpuinfo.parse(CPU.replace(b": 10", b": unknown") % b"").stepping == 0


@pytest.mark.parametrize("text", [b"", b"\n\n", b"processor: 0\n", CPU.replace(b"158", b"x")])
def test_cpuinfo_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="cpuinfo"):
        cpuinfo.parse(text)


def test_cpuinfo_live() -> None:
    flags = cpuinfo.parse(read.read_system("cpuinfo")).flags
    assert {"fpu", "sse2", "lm"} <= flags
