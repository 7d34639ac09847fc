"""eventfd through the images: counter, semaphore, flags."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.file_bench import Bench, seen
from torpor.images import schema as pb
from torpor.resources.files.eventfd import RESOURCE, is_semaphore


def shown(fd: int) -> object:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = [line for line in file if line.startswith(("eventfd-count", "eventfd-semaphore"))]
    assert len(lines) == 2
    return lines, seen(fd)


@given(
    counter=st.integers(0, 2**64 - 2) | st.sampled_from([0, 1, 2**32, 2**64 - 2]),
    semaphore=st.booleans(),
    flags=st.sets(st.sampled_from([os.O_NONBLOCK, os.O_APPEND, os.O_NOATIME])),
)
def test_round_trip_leaves_no_visible_difference(
    counter: int, semaphore: bool, flags: set[int]
) -> None:
    import fcntl

    fd = os.eventfd(0, os.EFD_SEMAPHORE if semaphore else 0)
    if counter:
        os.eventfd_write(fd, counter)
    fcntl.fcntl(fd, fcntl.F_SETFL, sum(flags))
    with Bench() as bench:
        number = bench.dump(fd)
        bench.commit()
        copy = bench.build(number)
        assert shown(copy) == shown(fd)
        if counter:
            assert os.eventfd_read(copy) == (1 if semaphore else counter)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == os.O_RDWR | sum(flags)
    os.close(fd)


def test_what_criu_writes_is_no_semaphore() -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    with Bench() as bench:
        ctx = bench.commit()
        fd = RESOURCE.restore(
            pb.eventfd_file_entry(id=1, flags=os.O_RDWR, counter=7, fown=owner), ctx
        )
        assert os.eventfd_read(fd) == 7
        os.close(fd)


def test_a_counter_that_cannot_be_is_an_error_and_does_not_wait() -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    with Bench() as bench:
        ctx = bench.commit()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError) as caught:
            RESOURCE.restore(
                pb.eventfd_file_entry(id=1, flags=os.O_RDWR, counter=2**64 - 1, fown=owner), ctx
            )
        assert caught.value.errno == errno.EINVAL
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("semaphore", [False, True])
def test_a_semaphore_is_seen_where_fdinfo_does_not_tell(semaphore: bool) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if semaphore else 0))
    assert is_semaphore(fd) is semaphore
    os.close(fd)


def test_without_bpf_it_is_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from torpor.errors import Unsupported
    from torpor.linux import btf

    def refuse(_: object) -> None:
        raise Unsupported("not here")

    monkeypatch.setattr(btf, "lookup", refuse)
    fd = os.eventfd(0, os.EFD_SEMAPHORE)
    assert is_semaphore(fd) is False
    os.close(fd)
