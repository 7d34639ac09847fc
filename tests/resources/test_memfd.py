"""memfds: content, holes, seals, and what descriptions of the same memfd share."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.file_bench import Bench, seen, source
from torpor.errors import TorporError
from torpor.linux.kernel import writable_address
from torpor.proc.read import root
from torpor.resources import FileKinds
from torpor.resources.files import memfd, regular

GET_SEALS, ADD_SEALS = 1034, 1033
SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC = 1, 2, 4, 8, 16, 32


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    root()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


def settle(bench: Bench) -> None:
    for hook in bench.building.memo.get("after_mappings", ()):
        hook()


@settings(max_examples=30)
@given(
    size=st.integers(0, 1 << 20),
    writes=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=9000)), max_size=5
    ),
    name=st.binary(max_size=200).filter(lambda name: b"\0" not in name and b"/" not in name),
    flags=st.sampled_from([0, os.O_APPEND, os.O_NONBLOCK | os.O_NOATIME]),
    mode=st.integers(0, 0o7777),
)
def test_round_trip(
    size: int, writes: list[tuple[int, bytes]], name: bytes, flags: int, mode: int
) -> None:
    with Bench() as bench:
        fd = os.memfd_create(os.fsdecode(name))
        os.ftruncate(fd, size)
        for at, content in writes:
            os.pwrite(fd, content, at)
        os.fchown(fd, 7, 8)
        os.fchmod(fd, mode)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        os.lseek(fd, size // 3, os.SEEK_SET)
        before, data = seen(fd), os.pread(fd, 3 << 20, 0)
        blocks, seals = os.fstat(fd).st_blocks, fcntl.fcntl(fd, GET_SEALS)
        file_id = bench.dump(fd)
        os.close(fd)
        bench.commit()
        copy = bench.build(file_id)
        settle(bench)
        assert seen(copy) == before
        assert os.pread(copy, 3 << 20, 0) == data
        assert os.fstat(copy).st_blocks == blocks
        assert fcntl.fcntl(copy, GET_SEALS) == seals


def test_large_and_sparse(bench: Bench) -> None:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 1 << 40)
    os.pwrite(fd, b"end", (1 << 40) - 3)
    before = seen(fd)
    file_id = bench.dump(fd)
    os.close(fd)
    ctx = bench.commit()
    copy = bench.build(file_id)
    assert seen(copy) == before
    assert os.pread(copy, 9, (1 << 40) - 3) == b"end"
    assert os.fstat(copy).st_blocks == 8
    assert (
        sum(ctx.images.size(name) for name in ctx.images.names() if name.startswith("pages-"))
        == 4096
    )


@pytest.mark.parametrize(
    "seals", [0, SEAL, SHRINK | GROW, SHRINK | GROW | WRITE | SEAL, FUTURE_WRITE, EXEC | SHRINK]
)
def test_seals(bench: Bench, seals: int) -> None:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"content")
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, ADD_SEALS, seals)
    seals = fcntl.fcntl(fd, GET_SEALS)  # EXEC on an executable one brings WRITE with it
    file_id = bench.dump(fd)
    os.close(fd)
    bench.commit()
    copy = bench.build(file_id)
    area = mmap.mmap(copy, 7)  # what a task has mapped before the seals are back
    if seals & WRITE:
        with pytest.raises(TorporError, match=r"EBUSY.*writable mapping"):
            settle(bench)
        area.close()
    settle(bench)
    assert fcntl.fcntl(copy, GET_SEALS) == seals
    assert os.pread(copy, 9, 0) == b"content"
    if seals & (WRITE | FUTURE_WRITE):
        with pytest.raises(PermissionError):
            os.write(copy, b"x")
    area.close()


def test_sharing(bench: Bench) -> None:
    first = os.memfd_create("shared")
    os.write(first, b"0123456789")
    others = [
        os.open(f"/proc/self/fd/{first}", flags)
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND)
    ]
    os.lseek(others[0], 5, os.SEEK_SET)
    fds = [first, *others]
    ids = [bench.dump(fd) for fd in fds]
    before = [seen(fd) for fd in fds]
    for fd in fds:
        os.close(fd)
    ctx = bench.commit()
    assert len(ctx.images.read_all("memfd")) == 1
    copies = [bench.build(file_id) for file_id in ids]
    assert [seen(fd) for fd in copies] == before
    assert len({os.fstat(fd).st_ino for fd in copies}) == 1
    os.pwrite(copies[0], b"X", 0)
    assert os.pread(copies[1], 1, 0) == b"X"
    os.lseek(copies[0], 1, os.SEEK_SET)
    assert os.lseek(copies[2], 0, os.SEEK_CUR) == before[2]["pos"]  # not the same description
    with pytest.raises(OSError):
        os.write(copies[1], b"x")


def test_mapped(bench: Bench) -> None:
    fd = os.memfd_create("mapped")
    os.write(fd, b"m" * 5000)
    with mmap.mmap(fd, 5000):
        with open("/proc/self/maps") as file:
            span = next(line for line in file if "/memfd:mapped" in line).split()[0]
        low, high = (int(word, 16) for word in span.split("-"))
        link = f"/proc/{os.getpid()}/map_files/{low:x}-{high:x}"
        mapped = memfd.file_id_for(bench.dumping, link, flags=os.O_RDWR)
        held = bench.dump(fd)
    os.close(fd)
    ctx = bench.commit()
    for flags in (os.O_RDWR, os.O_RDONLY):
        one = memfd.open_file(ctx, mapped, flags)
        assert os.fstat(one).st_ino == os.fstat(bench.build(held)).st_ino
        assert fcntl.fcntl(one, fcntl.F_GETFL) & os.O_ACCMODE == flags
        os.close(one)
    with pytest.raises(TorporError, match="not there"):
        memfd.open_file(ctx, 999, os.O_RDWR)


def test_shared_anonymous_memory_is_dumped_alike(bench: Bench) -> None:
    with mmap.mmap(-1, 8192) as area:  # MAP_SHARED | MAP_ANONYMOUS
        area[4096:4100] = b"anon"
        low = writable_address(area)
        high = low + 8192
        link = f"/proc/{os.getpid()}/map_files/{low:x}-{high:x}"
        target, result = os.readlink(os.fsencode(link)), os.stat(link)
        assert memfd.is_memfd(link, target, result)
        file_id = memfd.file_id_for(bench.dumping, link, flags=os.O_RDWR)
    ctx = bench.commit()
    assert [entry.name for entry in ctx.images.read_all("memfd")] == ["/dev/zero"]
    copy = memfd.open_file(ctx, file_id, os.O_RDWR)
    assert os.pread(copy, 9000, 0) == bytes(4096) + b"anon" + bytes(4092)
    os.close(copy)


def test_hugetlb(bench: Bench) -> None:
    fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    before = seen(fd)
    file_id = bench.dump(fd)
    os.close(fd)
    ctx = bench.commit()
    [entry] = ctx.images.read_all("memfd")
    assert entry.hugetlb_flag == os.MFD_HUGETLB | os.MFD_HUGE_2MB
    copy = bench.build(file_id)
    assert seen(copy) == before
    assert os.fstat(copy).st_blksize == 2 << 20


def test_executable_again(bench: Bench) -> None:
    """The first description must not count as a writer, or the file cannot be executed."""
    fd = os.memfd_create("program", 0)
    with open("/bin/true", "rb") as file:
        os.write(fd, file.read())
    file_id = bench.dump(fd)
    os.close(fd)
    bench.commit()
    copy = bench.build(file_id)
    pid = os.fork()
    if pid == 0:
        try:
            os.execve(copy, ["true"], {})
        except OSError as error:
            os._exit(error.errno)
    assert os.waitpid(pid, 0)[1] == 0, errno.ETXTBSY


def test_only_memfds_are_claimed(tmp_path: object) -> None:
    kinds = FileKinds()
    os.mkdir(f"{tmp_path}/memfd:x (deleted)")
    fd = os.open(f"{tmp_path}/memfd:x (deleted)", os.O_RDONLY)
    assert kinds.find(source(fd)) is regular.RESOURCE
    os.close(fd)
    fd = os.memfd_create("x")
    assert kinds.find(source(fd)) is memfd.RESOURCE
    os.close(fd)
    fd = os.open("/dev/shm/test_memfd_file", os.O_RDWR | os.O_CREAT)
    os.unlink("/dev/shm/test_memfd_file")
    assert kinds.find(source(fd)) is regular.RESOURCE
    os.close(fd)


def test_inherited(bench: Bench) -> None:
    fd = os.memfd_create("given")
    file_id = bench.dump(fd)
    ctx = bench.commit()
    ctx.inherited["/memfd:given"] = fd
    assert os.fstat(bench.build(file_id)).st_ino == os.fstat(fd).st_ino
    os.close(fd)


def test_content_outside_of_the_file_is_refused(bench: Bench) -> None:
    fd = os.memfd_create("short")
    os.pwrite(fd, b"x", 8192)
    file_id = bench.dump(fd)
    os.close(fd)
    ctx = bench.commit()
    [entry] = ctx.images.read_all("memfd")
    entry.size = 100
    ctx.memo["memfd inodes"] = {1: memfd._Inode(entry)}
    with pytest.raises(TorporError, match=r"pagemap-shmem.*outside of a file of 100 bytes"):
        bench.build(file_id)


@pytest.mark.parametrize(("flags", "pos"), [(os.O_RDWR, 1 << 63), (os.O_PATH, 5)])
def test_a_position_that_cannot_be_leaves_no_descriptor(bench: Bench, flags: int, pos: int) -> None:
    fd = os.memfd_create("named")
    file_id = bench.dump(fd)
    os.close(fd)
    ctx = bench.commit()
    _, entry = ctx.files[file_id]
    entry.flags, entry.pos = flags, pos
    with pytest.raises((TorporError, OSError)):
        bench.build(file_id)


def test_secret_memory_is_refused_by_name(bench: Bench) -> None:
    from types import SimpleNamespace

    from torpor.resources.files import refused

    fake = SimpleNamespace(
        fd=5, link="/secretmem (deleted)", stat=SimpleNamespace(st_mode=0o100600)
    )
    assert "memfd_secret" in str(refused.reason(fake))  # type: ignore[arg-type]
