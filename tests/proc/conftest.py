"""Fixtures for the parsers: descriptors that are closed again, children that are reaped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from torpor.proc import fdinfo, read


@pytest.fixture
def keep() -> Iterator[Callable[[int], int]]:
    """Hands a descriptor through and closes it after the test."""
    fds: list[int] = []

    def take(fd: int) -> int:
        assert fd >= 0
        fds.append(fd)
        return fd

    yield take
    for fd in fds:
        os.close(fd)


@pytest.fixture
def child() -> Iterator[Callable[..., int]]:
    """Forks a child that runs a function and then sleeps; it is killed after the test."""
    pids: list[int] = []

    def start(setup: Callable[[], object] = lambda: None) -> int:
        ready, say = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                setup()
                os.write(say, b"!")
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        pids.append(pid)
        os.close(say)
        with open(ready, "rb") as pipe:
            assert pipe.read(1) == b"!", "the child failed"
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def fdinfo_of() -> Callable[[int], fdinfo.Fdinfo]:
    """Parses what the kernel says about a descriptor of ours now."""
    return lambda fd: fdinfo.parse(read.read(os.getpid(), f"fdinfo/{fd}"))
