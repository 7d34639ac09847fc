"""Pipes through the images: content in its pieces, ends, sizes, flags, owners; none of it is taken
out by the dump.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import select
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.file_bench import Bench, in_child, seen
from kit.files import slurp
from torpor.errors import ImageError, KernelError, Unsupported
from torpor.images import schema as pb
from torpor.images.store import ImageReader
from torpor.resources.files import pipe

PAGE = 4096
O_LARGEFILE = 0o100000
MAX = int(slurp("/proc/sys/fs/pipe-max-size"))


def held(fd: int) -> int:
    """FIONREAD"""
    count = array.array("i", [0])
    fcntl.ioctl(fd, 0x541B, count)
    return count[0]


def reads(fd: int, size: int = 1 << 20) -> list[bytes]:
    """All that read(2) gives, until there is no more."""
    os.set_blocking(fd, False)
    found = []
    while True:
        try:
            chunk = os.read(fd, size)
        except BlockingIOError:
            return found
        if not chunk:
            return found
        found.append(chunk)


def room(fd: int) -> int:
    """How many one-byte packets go into the pipe."""
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
    count = 0
    while True:
        try:
            count += os.write(fd, b"x")
        except BlockingIOError:
            return count


def stuff(fd: int, piece: bytes) -> None:
    """Write until the pipe takes no more."""
    try:
        while True:
            os.write(fd, piece)
    except BlockingIOError:
        pass


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def data_entries(bench: Bench) -> list[tuple[object, bytes]]:
    return list(ImageReader(bench.dir_fd).iter_with_payload("pipes-data"))


@given(
    writes=st.lists(st.tuples(st.integers(1, 9000), st.booleans()), max_size=12),
    step=st.sampled_from([1 << 20, 700]),
)
@settings(max_examples=60)
def test_content_comes_back_in_its_pieces(writes: list[tuple[int, bool]], step: int) -> None:
    r, w = os.pipe2(os.O_NONBLOCK)
    for index, (size, packet) in enumerate(writes):
        fcntl.fcntl(w, fcntl.F_SETFL, os.O_NONBLOCK | (os.O_DIRECT if packet else 0))
        try:
            os.write(w, bytes([index + 1]) * size)
        except BlockingIOError:
            break
    total = held(r)
    with Bench() as bench:
        ids = bench.dump(r), bench.dump(w)
        bench.commit()
        assert held(r) == total, "the dump took something out"
        r2, w2 = map(bench.build, ids)
        assert seen(r2)["flags"] == seen(r)["flags"] and seen(w2)["flags"] == seen(w)["flags"]
        assert held(r2) == held(w2) == total
        # What is free shows how many buffers are taken; packets show by where reads stop.
        assert room(w2) == room(w)
        assert reads(r2, step) == reads(r, step)
    close(r, w)


@pytest.mark.parametrize("piece", [1, 100, 2100, PAGE])
def test_a_full_pipe_is_full_again(piece: int) -> None:
    """2100 bytes do not go into a page with 2100 others: it is full with little in it."""
    r, w = os.pipe2(os.O_NONBLOCK)
    stuff(w, b"z" * piece)
    count = held(r)
    with Bench() as bench:
        ids = bench.dump(r), bench.dump(w)
        bench.commit()
        r2, w2 = map(bench.build, ids)
        assert held(r2) == count
        with pytest.raises(BlockingIOError):
            os.write(w2, b"z" * piece)
        poll = select.poll()
        poll.register(w2, select.POLLOUT)
        assert poll.poll(0) == []
    close(r, w)


def test_a_later_write_joins_the_last_buffer_as_before() -> None:
    r, w = os.pipe2(os.O_NONBLOCK)
    os.write(w, b"a" * 3000)
    os.write(w, b"b" * 3000)
    with Bench() as bench:
        ids = bench.dump(r), bench.dump(w)
        bench.commit()
        _, w2 = map(bench.build, ids)
        for end in (w, w2):
            os.write(end, b"c" * 1000)
        # 96 bytes still fit beside them, then 14 buffers are free.
        assert room(w2) == room(w) == 96 + 14
    close(r, w)


@pytest.mark.parametrize("size", [PAGE, 2 * PAGE, 16 * PAGE, 32 * PAGE, MAX])
@pytest.mark.parametrize("holders", ["both", "reader", "writer"])
def test_size_comes_back_by_either_end(size: int, holders: str) -> None:
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETPIPE_SZ, size)
    os.write(w, b"content")
    with Bench() as bench:
        ids = [bench.dump(fd) for fd in {"both": (r, w), "reader": (r,), "writer": (w,)}[holders]]
        bench.commit()
        copies = [bench.build(number) for number in ids]
        for copy in copies:
            assert fcntl.fcntl(copy, fcntl.F_GETPIPE_SZ) == size
            assert held(copy) == 7
    close(r, w)


@pytest.mark.parametrize(
    "flags", [0, os.O_NONBLOCK, os.O_DIRECT, os.O_NONBLOCK | os.O_DIRECT, os.O_APPEND]
)
@pytest.mark.parametrize("end", [0, 1])
def test_flags_of_each_end_come_back(flags: int, end: int) -> None:
    ends = os.pipe()
    fcntl.fcntl(ends[end], fcntl.F_SETFL, flags)
    with Bench() as bench:
        ids = [bench.dump(fd) for fd in ends]
        bench.commit()
        for number, old in zip(ids, ends, strict=True):
            new, before = seen(bench.build(number)), seen(old)
            new.pop("link"), before.pop("link")
            assert new == before
    close(*ends)


def test_the_restored_ends_are_of_one_new_pipe() -> None:
    r, w = os.pipe()
    with Bench() as bench:
        ids = bench.dump(r), bench.dump(w)
        bench.commit()
        r2, w2 = map(bench.build, ids)
        assert seen(r2)["link"] == seen(w2)["link"] != seen(r)["link"]
        os.write(w2, b"through")
        assert os.read(r2, 100) == b"through"
    close(r, w)


def test_an_end_that_nobody_holds_is_gone() -> None:
    r, w = os.pipe()
    r2, w2 = os.pipe()
    os.write(w, b"last")
    os.close(w)
    os.close(r2)
    with Bench() as bench:
        ids = bench.dump(r), bench.dump(w2)
        bench.commit()
        reader, writer = map(bench.build, ids)
        assert os.read(reader, 100) == b"last"
        assert os.read(reader, 100) == b""  # end of file, not a wait for writers
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
    close(r, w2)


def test_ends_opened_again_are_descriptions_of_their_own() -> None:
    r, w = os.pipe()
    modes = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_NONBLOCK]
    again = [os.open(f"/proc/self/fd/{r}", mode) for mode in modes]
    os.write(w, b"once")
    with Bench() as bench:
        ids = [bench.dump(fd) for fd in (*again, r, w)]
        assert len(ids) == len(set(ids)) == 6
        bench.commit()
        assert len(data_entries(bench)) == 1
        copies = [bench.build(number) for number in ids]
        for copy, old in zip(copies, (*again, r, w), strict=True):
            assert seen(copy)["flags"] == seen(old)["flags"]
        assert len({seen(copy)["link"] for copy in copies}) == 1
        assert os.read(copies[2], 100) == b"once"
        assert held(copies[4]) == 0
        close(*copies)
        bench.building.kept.clear()
    close(r, w, *again)


def test_only_what_was_opened_again_is_left() -> None:
    r, w = os.pipe()
    again = os.open(f"/proc/self/fd/{r}", os.O_RDONLY)
    os.write(w, b"rest")
    close(r, w)
    with Bench() as bench:
        number = bench.dump(again)
        bench.commit()
        copy = bench.build(number)
        assert seen(copy)["flags"] == os.O_RDONLY | O_LARGEFILE
        assert os.read(copy, 100) == b"rest" and os.read(copy, 100) == b""
    os.close(again)


def test_owner_and_permissions_of_the_inode_come_back() -> None:
    """A task that is not root opens /dev/stdout again only if it owns the pipe."""
    r, w = os.pipe()
    os.fchown(w, 1234, 4321)
    os.fchmod(w, 0o640)
    with Bench() as bench:
        ids = bench.dump(r), bench.dump(w)
        bench.commit()
        r2, w2 = map(bench.build, ids)
        assert seen(r2)["owner"] == seen(w2)["owner"] == (1234, 4321)
        assert seen(r2)["mode"] == stat.S_IFIFO | 0o640

        def work() -> None:
            os.setresgid(4321, 4321, 4321)
            os.setresuid(1234, 1234, 1234)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # or /proc/self is root's
            os.close(os.open(f"/proc/self/fd/{w2}", os.O_WRONLY))

        in_child(work)
    close(r, w)


def test_the_dump_does_not_signal_or_wake_anybody() -> None:
    def work() -> None:
        import signal
        import struct

        r, w = os.pipe()
        os.write(w, b"data")
        os.close(r)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        fcntl.fcntl(w, 15, struct.pack("ii", 1, os.getpid()))
        fcntl.fcntl(w, fcntl.F_SETFL, os.O_ASYNC)
        with Bench() as bench:
            bench.dump(w)
        assert signal.SIGIO not in signal.sigpending()
        assert held(w) == 4

    in_child(work)


def test_a_pipe_larger_than_allowed_is_named_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pipe-max-size was larger when the pipe was made, or its maker had CAP_SYS_RESOURCE."""

    class Fcntl:
        F_GETPIPE_SZ, F_SETPIPE_SZ = fcntl.F_GETPIPE_SZ, fcntl.F_SETPIPE_SZ

        @staticmethod
        def fcntl(fd: int, command: int, argument: int = 0) -> int:
            if command == fcntl.F_SETPIPE_SZ and argument > 64 * 1024:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            return fcntl.fcntl(fd, command, argument)

    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETPIPE_SZ, MAX)
    monkeypatch.setattr(pipe, "fcntl", Fcntl)
    before = os.listdir("/proc/self/fd")
    for verb in (Bench.check, Bench.dump):
        with (
            Bench() as bench,
            pytest.raises(Unsupported, match=f"a pipe of {MAX} bytes .*pipe-max-size"),
        ):
            verb(bench, r)
    assert os.listdir("/proc/self/fd") == before
    close(r, w)


def images_with(bench: Bench, data: bytes = b"", **fields: object) -> int:
    """Images of one read end, as anybody could have written them."""
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    entry = pb.pipe_entry(id=1, pipe_id=5, flags=0, fown=owner)
    bench.writer.append("files", pb.file_entry(type=pb.fd_types.PIPE, id=1, pipe=entry))
    bench.writer.append(
        "pipes-data", pb.pipe_data_entry(pipe_id=5, bytes=len(data), **fields), data
    )
    bench.commit()
    return 1


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (b"x" * 70000, {}),
        (b"x" * 5000, {"size": PAGE}),
        (b"abc", {"buffer": [2 << 1]}),
        (b"abc", {"buffer": [3 << 1, 0]}),
        (b"abc", {"buffer": [4 << 1]}),
        (b"x" * 20, {"buffer": [1 << 1] * 20, "size": PAGE}),
        (b"x" * 70000, {"buffer": [70000 << 1], "size": 128 * 1024}),
    ],
)
def test_data_that_cannot_be_is_an_image_error(data: bytes, fields: dict[str, object]) -> None:
    with Bench() as bench:
        number = images_with(bench, data, **fields)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ImageError, match="pipes-data"):
            bench.build(number)
        assert os.listdir("/proc/self/fd") == before


def test_a_size_that_is_not_allowed_is_a_kernel_error_with_advice() -> None:
    with Bench() as bench:
        number = images_with(bench, size=4 * MAX)
        with pytest.raises(KernelError, match="pipe-max-size") as caught:
            bench.build(number)
        assert caught.value.errno == errno.EPERM


def test_what_criu_writes_is_enough() -> None:
    with Bench() as bench:
        copy = bench.build(images_with(bench, b"from criu", size=64 * 1024))
        assert reads(copy) == [b"from criu"]
        assert seen(copy)["owner"] == (0, 0)


def test_no_entry_for_the_data_is_an_empty_pipe() -> None:
    owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    entry = pb.pipe_entry(id=1, pipe_id=5, flags=1, fown=owner)
    with Bench() as bench:
        bench.writer.append("files", pb.file_entry(type=pb.fd_types.PIPE, id=1, pipe=entry))
        bench.commit()
        copy = bench.build(1)
        assert held(copy) == 0 and fcntl.fcntl(copy, fcntl.F_GETPIPE_SZ) == 64 * 1024


@pytest.mark.parametrize("end", [0, 1])
def test_an_inherited_pipe_takes_its_place(end: int) -> None:
    old, given = os.pipe(), os.pipe()
    fcntl.fcntl(old[end], fcntl.F_SETFL, os.O_NONBLOCK)
    os.write(old[1], b"stays behind")
    with Bench() as bench:
        number = bench.dump(old[end])
        ctx = bench.commit()
        ctx.inherited[seen(old[0])["link"]] = given[end]
        copy = bench.build(number)
        assert seen(copy)["link"] == seen(given[0])["link"]
        assert held(copy) == 0
        assert seen(copy)["flags"] & ~O_LARGEFILE == os.O_NONBLOCK | end
        assert not seen(given[end])["flags"] & os.O_NONBLOCK, "the caller's own description"
    close(*old, *given)


def test_an_inherited_file_is_shared_so_that_its_position_is(tmp_path: object) -> None:
    r, w = os.pipe()
    file = os.open(f"{tmp_path}/log", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"before ")
    with Bench() as bench:
        number = bench.dump(w)
        ctx = bench.commit()
        ctx.inherited[seen(w)["link"]] = file
        os.write(bench.build(number), b"after")
    assert slurp(f"{tmp_path}/log") == b"before after"
    close(r, w, file)


def test_splice_layouts_survive_a_second_trip() -> None:
    r, w = os.pipe2(os.O_NONBLOCK | os.O_DIRECT)
    for size in (1, 5000, 10, PAGE):
        os.write(w, b"p" * size)
    pieces = [(1, True), (PAGE, True), (5000 - PAGE, True), (10, True), (PAGE, True)]
    with Bench() as bench:
        number = bench.dump(r)
        bench.commit()
        copy = bench.build(number)
        with Bench() as second:
            number = second.dump(copy)
            second.commit()
            entry, _ = data_entries(second)[0]
            assert [(length >> 1, bool(length & 1)) for length in entry.buffer] == pieces
    assert [(len(content), packet) for content, packet in pipe.take_pieces(r)] == pieces
    close(r, w)
