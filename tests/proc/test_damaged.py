"""Whatever the bytes, a parser returns something or raises ValueError, and no other error."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torpor.linux.call import buffer, call
from torpor.proc import (
    auxv,
    cgroup,
    cpuinfo,
    fdinfo,
    fdinfo_kinds,
    fdinfo_watches,
    limits,
    links,
    locks,
    maps,
    mountinfo,
    pagemap,
    read,
    scalars,
    smaps,
    stat,
    status,
    strings,
    sysvipc,
    tasks,
    timers,
)

ME = os.getpid()


def whole_status(data: bytes) -> None:
    parsed = status.parse(data)
    for name in status.Status.__annotations__:
        try:
            getattr(parsed, name)
        except AttributeError:
            pass  # the line is missing


def whole_fdinfo(data: bytes) -> None:
    info = fdinfo.parse(data)
    for look in (
        lambda: (info.pos, info.flags, info.mnt_id, info.ino),
        lambda: info.locks,
        lambda: fdinfo_kinds.eventfd(info),
        lambda: fdinfo_kinds.timerfd(info),
        lambda: fdinfo_kinds.signalfd(info),
        lambda: fdinfo_kinds.pidfd(info),
        lambda: fdinfo_kinds.userfaultfd(info),
        lambda: fdinfo_kinds.io_uring(info),
        lambda: fdinfo_watches.epoll(info),
        lambda: fdinfo_watches.inotify(info),
        lambda: fdinfo_watches.fanotify(info),
    ):
        try:
            look()
        except ValueError:
            pass


def mine(name: str) -> Callable[[], bytes]:
    return lambda: read.read(ME, name)


def fdinfos() -> bytes:
    """One file with the lines of all kinds."""
    epoll = select.epoll()
    inotify = call("inotify_init1", 0)
    ring = call("io_uring_setup", 8, buffer(120))
    fds = [epoll.fileno(), inotify, ring, os.eventfd(5), call("timerfd_create", 0, 0)]
    fds += [call("fanotify_init", 4, 0), os.pidfd_open(ME)]
    call("inotify_add_watch", inotify, b"/tmp\0", 2)
    call("fanotify_mark", fds[-2], 1, 2, -100, b"/tmp\0")
    epoll.register(inotify)
    texts = [read.read(ME, f"fdinfo/{fd}") for fd in fds]
    for fd in fds[1:]:
        os.close(fd)
    epoll.close()
    return texts[0] + b"".join(text.split(b"\n", 4)[4] for text in texts[1:])


LOCKS = b"1: POSIX  ADVISORY  WRITE 1 fe:00:1 5 14\n1: -> POSIX  ADVISORY  READ 1 fe:00:1 0 EOF\n"
TIMERS = b"ID: 0\nsignal: 10/0000000000001234\nnotify: signal/pid.23120\nClockID: 0\n"
PARSERS: dict[str, tuple[Callable[[bytes], object], Callable[[], bytes]]] = {
    "auxv": (auxv.parse, mine("auxv")),
    "cgroup": (cgroup.parse, mine("cgroup")),
    "children": (tasks.parse_children, lambda: b"12 13 "),
    "cpuinfo": (cpuinfo.parse, lambda: read.read_system("cpuinfo")),
    "environ": (strings.parse_environ, mine("environ")),
    "fdinfo": (whole_fdinfo, fdinfos),
    "limits": (limits.parse, mine("limits")),
    "links": (links.parse, lambda: b"net:[4026531840]"),
    "locks": (locks.parse, lambda: LOCKS),
    "maps": (maps.parse, mine("maps")),
    "mountinfo": (mountinfo.parse, mine("mountinfo")),
    "pagemap": (lambda data: [*map(pagemap.frame, pagemap.words(data))], lambda: bytes(80)),
    "personality": (scalars.parse_personality, mine("personality")),
    "smaps": (smaps.parse, mine("smaps")),
    "stat": (stat.parse, mine("stat")),
    "status": (whole_status, mine("status")),
    "shm": (sysvipc.parse_shm, lambda: read.read_system("sysvipc/shm") + b" 1" * 16),
    "timers": (timers.parse, lambda: TIMERS),
    "uptime": (scalars.parse_uptime, lambda: read.read_system("uptime")),
}
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 6), st.binary(max_size=4) | st.sampled_from([b"\n"])),
    max_size=4,
)


@pytest.mark.parametrize("name", PARSERS)
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=EDITS, keep=st.floats(0.5, 1), anything=st.none() | st.binary())
def test_damaged(
    name: str, edits: list[tuple[float, int, bytes]], keep: float, anything: bytes | None
) -> None:
    parser, sample = PARSERS[name]
    text = SAMPLES.setdefault(name, sample()[:8000])
    damaged = text[: int(len(text) * keep)] if anything is None else anything
    for place, length, new in edits:
        at = int(len(damaged) * place)
        damaged = damaged[:at] + new + damaged[at + length :]
    try:
        parser(damaged)
    except ValueError:
        pass


@pytest.mark.parametrize("name", PARSERS)
def test_the_samples_are_whole(name: str) -> None:
    parser, sample = PARSERS[name]
    parser(sample())


SAMPLES: dict[str, bytes] = {}
