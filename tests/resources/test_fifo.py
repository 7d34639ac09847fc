"""FIFOs through the images: path, flags, content, both ends, ends that are missing."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import struct

import pytest

from kit.file_bench import Bench, in_child, run_here, seen
from torpor.errors import ImageError
from torpor.images.store import ImageReader
from torpor.remote.program import Program


def held(fd: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(fd, 0x541B, count)
    return count[0]


@pytest.fixture
def fifo(tmp_path: object) -> str:
    path = f"{tmp_path}/fifo"
    os.mkfifo(path, 0o640)
    return path


def open_ends(path: str, *flags: int) -> list[int]:
    keeper = os.open(path, os.O_RDWR)
    fds = [os.open(path, flag) for flag in flags]
    os.close(keeper)
    return fds


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


R, W, RW, NB = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_NONBLOCK


@pytest.mark.parametrize(
    "flags", [(R, W), (W, R), (RW,), (R | NB,), (R | NB, W, W | NB, RW), (R, W | os.O_APPEND)]
)
@pytest.mark.parametrize("content", [b"", b"some bytes"])
def test_round_trip_leaves_no_visible_difference(
    fifo: str, flags: tuple[int, ...], content: bytes
) -> None:
    keeper = os.open(fifo, RW)
    fds = [os.open(fifo, flag) for flag in flags]
    os.write(keeper, content)
    os.close(keeper)
    with Bench() as bench:
        ids = [bench.dump(fd) for fd in fds]
        before = [seen(fd) for fd in fds]
        assert held(fds[0]) == len(content)
        close(*fds)  # with the last one goes what was in it
        bench.commit()
        copies = [bench.build(number) for number in ids]
        assert [seen(fd) for fd in copies] == before
        assert [held(fd) for fd in copies] == [len(content)] * len(fds)
        reader = next(
            fd for fd, flag in zip(copies, flags, strict=True) if flag & os.O_ACCMODE != W
        )
        os.set_blocking(reader, False)
        if content:
            assert os.read(reader, 100) == content
        assert len(list(ImageReader(bench.dir_fd).iter_with_payload("fifo-data"))) == 1


def test_a_writer_alone(fifo: str) -> None:
    (writer,) = open_ends(fifo, W)
    with Bench() as bench:
        number = bench.dump(writer)
        os.close(writer)
        bench.commit()
        copy = bench.build(number)
        with pytest.raises(BrokenPipeError):
            os.write(copy, b"x")


def test_size_comes_back(fifo: str) -> None:
    fd = os.open(fifo, RW)
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 8192)
    with Bench() as bench:
        number = bench.dump(fd)
        os.close(fd)
        bench.commit()
        assert fcntl.fcntl(bench.build(number), fcntl.F_GETPIPE_SZ) == 8192


def test_packets_and_their_bounds(fifo: str) -> None:
    fd = os.open(fifo, RW | NB)
    fcntl.fcntl(fd, fcntl.F_SETFL, NB | os.O_DIRECT)
    for piece in (b"one", b"twotwo"):
        os.write(fd, piece)
    with Bench() as bench:
        number = bench.dump(fd)
        os.close(fd)
        bench.commit()
        copy = bench.build(number)
        assert [os.read(copy, 100), os.read(copy, 100)] == [b"one", b"twotwo"]


def test_what_is_still_there_does_not_double(fifo: str) -> None:
    """Somebody outside of the tree keeps the FIFO open: its content never went away."""
    fd, outside = os.open(fifo, RW), os.open(fifo, RW)
    os.write(fd, b"once")
    with Bench() as bench:
        number = bench.dump(fd)
        os.close(fd)
        bench.commit()
        assert held(bench.build(number)) == 4
    os.close(outside)


def test_the_owner_is_in_the_entry_of_the_name(fifo: str) -> None:
    def work() -> None:
        fd = os.open(fifo, RW)
        fcntl.fcntl(fd, 15, struct.pack("ii", 1, os.getpid()))
        fcntl.fcntl(fd, 10, signal.SIGUSR1)
        with Bench() as bench:
            number = bench.dump(fd)
            ctx = bench.commit()
            copy = bench.build(number)
            resource, entry = ctx.files[number]
            program = Program()
            resource.settle(entry, copy, program, ctx)
            run_here(program)
            assert struct.unpack("ii", fcntl.fcntl(copy, 16, bytes(8))) == (1, os.getpid())
            assert fcntl.fcntl(copy, 11) == signal.SIGUSR1

    in_child(work)


def test_two_fifos_with_one_inode_number_stay_apart() -> None:
    """The images have 32 bits for what is a 64-bit inode number of any file system."""
    from torpor.resources.base import DumpContext
    from torpor.resources.files.fifo import _number

    ctx = DumpContext(None, None)
    numbers = [_number(inode, ctx) for inode in (5, 5, 5 + (1 << 32), 2**32 - 1, 2**64 - 1)]
    assert numbers == [5, 6, 7, 2**32 - 1, 0]


def test_a_file_in_its_place_is_refused(fifo: str) -> None:
    fd = os.open(fifo, RW)
    with Bench() as bench:
        number = bench.dump(fd)
        bench.commit()
        os.close(fd)
        os.unlink(fifo)
        os.close(os.open(fifo, os.O_CREAT, 0o640))
        before = os.listdir("/proc/self/fd")
        with pytest.raises(Exception) as caught:
            bench.build(number)
        assert "kind of file" in str(caught.value) or isinstance(caught.value, ImageError)
        assert os.listdir("/proc/self/fd") == before


def test_an_unlinked_fifo_comes_back(tmp_path: object) -> None:
    path = f"{tmp_path}/gone"
    os.mkfifo(path)
    fd = os.open(path, RW)
    os.write(fd, b"left over")
    os.unlink(path)
    with Bench() as bench:
        number = bench.dump(fd)
        os.close(fd)
        bench.commit()
        copy = bench.build(number)
        assert os.read(copy, 100) == b"left over"
        assert not os.path.exists(path) or os.fstat(copy).st_nlink == 1
