"""epoll through the images: watches of all kinds, by numbers that still stand for the file and by
others.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.file_bench import Bench, in_child, run_here, seen, source
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.linux.call import address_of, call
from torpor.proc import fdinfo, fdinfo_watches
from torpor.remote.program import Program
from torpor.resources.files.eventpoll import RESOURCE

IN, OUT, PRI, RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLPRI, select.EPOLLRDHUP
ET, ONESHOT, EXCLUSIVE, WAKEUP = 1 << 31, 1 << 30, 1 << 28, 1 << 29


def control(epoll: int, op: int, fd: int, events: int, data: int) -> None:
    call("epoll_ctl", epoll, op, fd, struct.pack("=IQ", events, data))


def watches(epoll: int) -> list[tuple[int, int, int, int, int]]:
    """(number, events, data, inode, device): sorted, for the kernel's order is by address."""
    with open(f"/proc/self/fdinfo/{epoll}", "rb") as file:
        found = fdinfo_watches.epoll(fdinfo.parse(file.read()))
    return sorted((one.tfd, one.events, one.data, one.ino, one.sdev) for one in found)


def ready(epoll: int) -> list[tuple[int, int]]:
    """(events, data) of all that is ready."""
    area = bytearray(12 * 64)
    count = call("epoll_pwait", epoll, address_of(area), 64, 0, None, 8)
    return sorted(struct.unpack_from("=IQ", area, 12 * index) for index in range(count))


def trip(epoll: int) -> tuple[int, Program]:
    """A copy of the epoll; its watches are added in this process, which has all the files."""
    with Bench() as bench:
        bench.dumping.tasks[os.getpid()] = SimpleNamespace(
            pid=os.getpid(), pidfd=os.pidfd_open(os.getpid())
        )
        number = bench.dump(epoll)
        os.close(bench.dumping.tasks[os.getpid()].pidfd)
        ctx = bench.commit()
        copy = os.dup(bench.build(number))
        program = Program()
        before = os.listdir("/proc/self/fd")
        RESOURCE.settle(ctx.files[number][1], copy, program, ctx)
        run_here(program)
        assert os.listdir("/proc/self/fd") == before
        return copy, program


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def epoll_create() -> int:
    return call("epoll_create1", 0)


@given(
    chosen=st.lists(
        st.tuples(
            st.sampled_from([0, IN, OUT, IN | OUT, IN | PRI | RDHUP]),
            st.sampled_from([0, ET, ONESHOT, ET | ONESHOT, WAKEUP]),
            st.integers(0, 2**64 - 1),
        ),
        max_size=6,
    )
)
@settings(max_examples=40)
def test_watches_come_back(chosen: list[tuple[int, int, int]]) -> None:
    epoll, files = epoll_create(), [os.eventfd(0) for _ in chosen]
    for fd, (events, how, data) in zip(files, chosen, strict=True):
        control(epoll, 1, fd, events | how, data)
    copy, program = trip(epoll)
    assert watches(copy) == watches(epoll)
    assert len(program) == len(chosen)
    assert ready(copy) == ready(epoll)
    assert watches(copy) == watches(epoll)
    close(epoll, copy, *files)


@pytest.mark.parametrize("events", [IN | EXCLUSIVE, IN | OUT | EXCLUSIVE | ET])
def test_exclusive_watches(events: int) -> None:
    epoll, fd = epoll_create(), os.eventfd(0)
    control(epoll, 1, fd, events, 5)
    copy, _ = trip(epoll)
    assert watches(copy) == watches(epoll)
    assert watches(copy)[0][1] & EXCLUSIVE
    close(epoll, copy, fd)


def test_oneshot_watches_that_have_fired_stay_silent() -> None:
    epoll, files = epoll_create(), [os.eventfd(index) for index in range(4)]
    for index, fd in enumerate(files):
        control(epoll, 1, fd, ONESHOT | (IN if index % 2 else OUT), index)
    assert len(ready(epoll)) == 4
    control(epoll, 3, files[2], IN | OUT | ONESHOT, 2)  # one is watched again
    copy, _ = trip(epoll)
    assert watches(copy) == watches(epoll)
    assert [events & 0xFF for _, events, _, _, _ in watches(copy)].count(0) == 3
    assert ready(copy) == [(IN | OUT, 2)]
    control(copy, 3, files[1], IN | ONESHOT, 77)
    assert ready(copy) == [(IN, 77)]
    close(epoll, copy, *files)


def test_a_spent_watch_of_a_file_that_is_not_ready_waits_for_errors_only() -> None:
    """The one thing that cannot be made again: EPOLL_CTL_ADD always adds EPOLLERR and EPOLLHUP."""
    epoll, (r, w) = epoll_create(), os.pipe()
    control(epoll, 1, r, IN | ONESHOT, 1)
    os.write(w, b"x")
    assert ready(epoll) == [(IN, 1)]
    os.read(r, 1)
    copy, _ = trip(epoll)
    assert watches(copy)[0][1] == ONESHOT | select.EPOLLERR | select.EPOLLHUP
    os.write(w, b"x")
    assert ready(copy) == []
    close(epoll, copy, r, w)


def test_flags_and_the_watch_of_another_epoll() -> None:
    inner, outer, fd = epoll_create(), epoll_create(), os.eventfd(1)
    os.set_blocking(outer, False)
    control(inner, 1, fd, IN, 1)
    control(outer, 1, inner, IN | ET, 2)
    copy, _ = trip(outer)
    assert seen(copy) == seen(outer)
    assert watches(copy) == watches(outer)
    assert ready(copy) == [(IN, 2)]
    close(copy, outer, inner, fd)


def test_a_number_that_was_closed_while_the_file_lives_on() -> None:
    def work() -> None:
        epoll, fd = epoll_create(), os.eventfd(1)
        watched = fcntl.fcntl(
            fd, fcntl.F_DUPFD, 500
        )  # not to be taken again by what the test opens
        control(epoll, 1, watched, IN, 9)
        os.close(watched)
        copy, _ = trip(epoll)
        assert watches(copy) == watches(epoll) and watches(copy)[0][0] == watched
        assert ready(copy) == [(IN, 9)]
        with pytest.raises(OSError, match="ENOENT"):
            control(copy, 3, fd, IN, 10)  # it was not added by this number

    in_child(work)


def test_a_number_that_stands_for_another_file_now() -> None:
    def work() -> None:
        epoll, one, other = epoll_create(), os.eventfd(1), os.eventfd(0)
        watched = os.dup(one)
        control(epoll, 1, watched, IN, 1)
        os.dup2(other, watched)
        control(epoll, 1, watched, IN, 2)
        control(epoll, 1, one, IN, 3)
        assert [number for number, *_ in watches(epoll)].count(watched) == 2
        copy, _ = trip(epoll)
        assert ready(copy) == ready(epoll) == [(IN, 1), (IN, 3)]
        os.eventfd_write(other, 1)
        assert ready(copy) == ready(epoll) == [(IN, 1), (IN, 2), (IN, 3)]
        # The first of the three can be reached by no number, before and after.
        control(copy, 3, watched, IN, 20)
        control(copy, 3, one, IN, 30)
        assert ready(copy) == [(IN, 1), (IN, 20), (IN, 30)]

    in_child(work)


def test_one_number_for_three_files_in_turn() -> None:
    def work() -> None:
        epoll, files = epoll_create(), [os.eventfd(index + 1) for index in range(3)]
        for index, fd in enumerate(files):
            os.dup2(fd, 100)
            control(epoll, 1, 100, IN | OUT, index)
        os.close(100)
        copy, _ = trip(epoll)
        assert ready(copy) == ready(epoll) and len(ready(copy)) == 3
        os.eventfd_read(files[1])
        assert ready(copy) == ready(epoll)

    in_child(work)


def test_a_file_that_only_another_process_holds_is_named() -> None:
    epoll, fd = epoll_create(), os.eventfd(1)
    control(epoll, 1, fd, IN, 1)
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(w)
        os.read(r, 1)
        os._exit(0)
    os.close(fd)
    with (
        Bench() as bench,
        pytest.raises(
            Unsupported, match=f"added as fd {fd} and that task {os.getpid()} has closed"
        ),
    ):
        bench.dump(epoll)
    close(r, w, epoll)
    assert os.waitpid(pid, 0)[1] == 0


def test_watches_as_criu_writes_them() -> None:
    def work() -> None:
        owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
        fd = os.eventfd(1)
        entry = pb.eventpoll_file_entry(id=1, flags=os.O_RDWR, fown=owner)
        entry.tfd.add(id=1, tfd=fd, events=IN | 0x18, data=4)
        with Bench() as bench:
            ctx = bench.commit()
            epoll = RESOURCE.restore(entry, ctx)
            program = Program()
            RESOURCE.settle(entry, epoll, program, ctx)
            assert str(program).startswith(f"   0 epoll_ctl({epoll}, 1, {fd}, ")
            run_here(program)
            assert ready(epoll) == [(IN, 4)]

    in_child(work)


@pytest.mark.parametrize("field", ["tfd", "number"])
def test_a_number_out_of_range_is_an_image_error(field: str) -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    entry = pb.eventpoll_file_entry(id=1, flags=os.O_RDWR, fown=owner)
    entry.tfd.add(**{"id": 1, "tfd": 3, "events": IN, "data": 4, field: 2**31})
    with Bench() as bench, pytest.raises(ImageError, match="no file descriptor"):
        RESOURCE.settle(entry, 3, Program(), bench.commit())


def test_the_busy_poll_parameters() -> None:
    """struct epoll_params; kept as one number. Where the kernel has none the entry says nothing."""
    epoll = epoll_create()
    params = struct.pack("=IHBB", 50, 8, 1, 0)
    try:
        fcntl.ioctl(epoll, 0x40088A01, params)
        known = True
    except OSError:
        known = False
    with Bench() as bench:
        entry = RESOURCE.dump(source(epoll, 1), bench.dumping)
        assert entry.HasField("busy_poll") == known
        if known:
            ctx = bench.commit()
            copy = RESOURCE.restore(entry, ctx)
            got = bytearray(8)
            fcntl.ioctl(copy, 0x80088A02, got)
            assert bytes(got) == params
            os.close(copy)
    os.close(epoll)
