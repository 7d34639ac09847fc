from __future__ import annotations

import fcntl
import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.proc import locks, read


def test_recorded() -> None:
    text = (
        b"1: LEASE  ACTIVE    READ 4242 fe:00:2146483 0 EOF\n"
        b"2: OFDLCK ADVISORY  READ -1 fe:00:2146467 100 EOF\n"
        b"3: POSIX  ADVISORY  WRITE 4242 103:0a:2146467 5 14\n"
        b"3: -> POSIX  ADVISORY  WRITE 4243 103:0a:2146467 5 14\n"
        b"4: FLOCK  ADVISORY  WRITE 4242 fe:00:2146467 0 EOF\n"
        b"5: LEASE  BREAKING  UNLCK 4242 <none>:0 0 EOF\n"
        b"6: DELEG  ACTIVE    READ 0 fe:00:1 0 EOF\n"
    )
    lease, ofd, posix, waiter, flock, breaking, delegation = locks.parse(text)
    assert lease == (1, False, "LEASE", "ACTIVE", "READ", 4242, (254, 0), 2146483, 0, locks.EOF)
    assert (ofd.kind, ofd.pid, ofd.start, ofd.end) == ("OFDLCK", -1, 100, locks.EOF)
    assert (posix.id, posix.blocked, posix.dev) == (3, False, (0x103, 10))
    assert (posix.type, posix.start, posix.end) == ("WRITE", 5, 14)
    assert waiter == posix._replace(blocked=True, pid=4243)
    assert (flock.kind, flock.end) == ("FLOCK", locks.EOF)
    assert (breaking.mode, breaking.type) == ("BREAKING", "UNLCK")
    assert (breaking.dev, breaking.inode) == (None, 0)
    assert delegation.kind == "DELEG"


OFFSETS = st.integers(0, 2**63 - 1)
LOCKS = st.builds(
    locks.Lock,
    st.integers(1, 2**31),
    st.booleans(),
    st.sampled_from(["POSIX", "FLOCK", "OFDLCK", "LEASE", "DELEG", "ACCESS"]),
    st.sampled_from(["ADVISORY", "ACTIVE", "BREAKING", "BREAKER", "*NOINODE*"]),
    st.sampled_from(["READ", "WRITE", "UNLCK"]),
    st.integers(-1, 2**22),
    st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    st.integers(0, 2**64 - 1),
    OFFSETS,
    OFFSETS,
)


def show(lock: locks.Lock) -> bytes:
    assert lock.dev is not None
    arrow = "-> " if lock.blocked else ""
    place = f"{lock.dev[0]:02x}:{lock.dev[1]:02x}:{lock.inode}"
    end = "EOF" if lock.end == locks.EOF else lock.end
    kind = f"{lock.kind:6} {lock.mode:9} {lock.type}"
    return f"{lock.id}: {arrow}{kind} {lock.pid} {place} {lock.start} {end}\n".encode()


@given(st.lists(LOCKS))
def test_what_is_printed_is_parsed(expected: list[locks.Lock]) -> None:
    assert locks.parse(b"".join(map(show, expected))) == expected


@pytest.mark.parametrize(
    "text",
    [b"1:\n", b"1: ->\n", b"x: POSIX ADVISORY READ 1 0:0:1 0 EOF\n", b"1: POSIX ADVISORY READ\n"],
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="locks"):
        locks.parse(text)


def test_live_lock_that_another_process_waits_for(tmp_path: os.PathLike[str]) -> None:
    fd = os.open(os.path.join(tmp_path, "f"), os.O_RDWR | os.O_CREAT)
    inode = os.fstat(fd).st_ino
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
    pid = os.fork()
    if pid == 0:
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH, 0, 7)
        finally:
            os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while True:
            mine = [lock for lock in locks.parse(read.read_system("locks")) if lock.inode == inode]
            if len(mine) == 2 or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        held, wanted = mine
        assert (held.blocked, held.pid, held.type) == (False, os.getpid(), "WRITE")
        assert (held.start, held.end) == (5, 14)
        assert (wanted.blocked, wanted.pid, wanted.type) == (True, pid, "READ")
        assert (wanted.start, wanted.end, wanted.id) == (7, locks.EOF, held.id)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)
