"""Files found by name, and files that have lost it: every state that can be seen comes back."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator

import pytest

from kit.file_bench import Bench, in_child, run_here, seen
from torpor.errors import TorporError, Unsupported
from torpor.images import schema as pb
from torpor.proc.read import root
from torpor.remote.program import Program
from torpor.resources import remap
from torpor.resources.files import regular


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: object) -> Iterator[None]:
    """No test leaves a descriptor open."""
    root()  # is opened once and kept
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def make(path: object, content: bytes = b"") -> str:
    with open(str(path), "wb") as file:
        file.write(content)
    return str(path)


def round_trip(bench: Bench, fd: int) -> tuple[dict[str, object], int]:
    """(what was seen of ``fd``, which is closed, the copy's descriptor)"""
    file_id = bench.dump(fd)
    before = seen(fd)
    os.close(fd)
    bench.commit()
    return before, bench.build(file_id)


@pytest.mark.parametrize(
    "flags",
    [
        os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_SYNC, os.O_RDONLY | os.O_NONBLOCK, os.O_RDONLY | os.O_NOFOLLOW, os.O_PATH,
        os.O_RDONLY | os.O_DIRECT, os.O_RDONLY | os.O_NOATIME, os.O_CREAT | os.O_RDONLY,
    ],
)  # fmt: skip
def test_flags_and_position(bench: Bench, tmp_path: object, flags: int) -> None:
    fd = os.open(make(f"{tmp_path}/file", b"0123456789"), flags)
    if not flags & os.O_PATH:
        os.lseek(fd, 4, os.SEEK_SET)
    before, copy = round_trip(bench, fd)
    assert seen(copy) == before


def test_content_is_not_truncated(bench: Bench, tmp_path: object) -> None:
    path = f"{tmp_path}/file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_EXCL)
    os.write(fd, b"kept")
    round_trip(bench, fd)
    with open(path, "rb") as file:
        assert file.read() == b"kept"


@pytest.mark.parametrize(
    "name", ["file (deleted)", "new\nline", "back\\slash", os.fsdecode(b"\xff\xfe")]
)
def test_odd_names(bench: Bench, tmp_path: object, name: str) -> None:
    fd = os.open(make(f"{tmp_path}/{name}", b"x"), os.O_RDONLY)
    before, copy = round_trip(bench, fd)
    assert seen(copy) == before
    assert before["names"] == 1


@pytest.mark.parametrize(
    "path", ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/kmsg", "/proc/stat"]
)
def test_devices_and_system_files(bench: Bench, path: str) -> None:
    before, copy = round_trip(bench, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    assert seen(copy) == before


def next_names(fd: int, at_most: int) -> list[str]:
    """The names that getdents64(2) gives next, as many as go into so many bytes."""
    found = ctypes.create_string_buffer(at_most)
    size = ctypes.CDLL(None).syscall(217, fd, found, at_most)
    names, at = [], 0
    while at < size:
        length = int.from_bytes(found.raw[at + 16 : at + 18], "little")
        names.append(found.raw[at + 19 : at + length].split(b"\0")[0].decode())
        at += length
    return names


def test_directory_with_position(bench: Bench, tmp_path: object) -> None:
    names = {f"entry {number}" for number in range(40)}
    for name in names:
        make(f"{tmp_path}/{name}")
    fd = os.open(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    first = next_names(fd, 300)
    file_id, before = bench.dump(fd), seen(fd)
    rest = next_names(fd, 1 << 16)
    os.close(fd)
    assert len(first) > 2 and len(rest) > 2 and {*first, *rest} >= names
    bench.commit()
    copy = bench.build(file_id)
    assert seen(copy) == before
    assert next_names(copy, 1 << 16) == rest


@pytest.mark.parametrize("kind", ["symlink", "fifo", "socket"])
@pytest.mark.parametrize("deleted", [False, True])
def test_path_only(bench: Bench, tmp_path: object, kind: str, deleted: bool) -> None:
    import socket

    path = f"{tmp_path}/thing"
    if kind == "symlink":
        os.symlink("nowhere/at\nall", path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    if deleted:
        os.unlink(path)
    if deleted and kind == "socket":
        with pytest.raises(Unsupported, match="deleted socket"):
            bench.dump(fd)
        os.close(fd)
        return
    before, copy = round_trip(bench, fd)
    after = seen(copy)
    assert after == before
    if kind == "symlink":
        assert os.readlink("", dir_fd=copy) == "nowhere/at\nall"
    assert sorted(os.listdir(str(tmp_path))) == ([] if deleted else ["thing"])


# ---------------------------------------------------------------------- deleted files


@pytest.mark.parametrize("size", [0, 1, 12287, 12288, 100_001])
def test_deleted_file(bench: Bench, tmp_path: object, size: int) -> None:
    content = os.urandom(size)
    path = make(f"{tmp_path}/gone", content)
    fd = os.open(path, os.O_RDWR)
    os.chmod(path, 0o4711)
    os.chown(path, 12, 34)
    os.chmod(path, 0o4711)
    os.utime(path, ns=(10**18 + 1000, 10**18 + 5000))
    os.lseek(fd, size // 2, os.SEEK_SET)
    os.unlink(path)
    before, copy = round_trip(bench, fd)
    assert seen(copy) == before
    times = os.fstat(copy)
    assert (times.st_atime_ns, times.st_mtime_ns) == (10**18 + 1000, 10**18 + 5000)
    assert os.pread(copy, size + 1, 0) == content
    assert os.listdir(str(tmp_path)) == []


def test_holes_stay(bench: Bench, tmp_path: object) -> None:
    fd = os.open(f"{tmp_path}/sparse", os.O_RDWR | os.O_CREAT)
    os.unlink(f"{tmp_path}/sparse")
    os.ftruncate(fd, 1 << 32)
    os.pwrite(fd, b"a" * 5000, 0)
    os.pwrite(fd, b"b" * 5000, 1 << 31)
    blocks = os.fstat(fd).st_blocks
    before, copy = round_trip(bench, fd)
    assert seen(copy) == before
    assert os.pread(copy, 5001, 0) == b"a" * 5000 + b"\0"
    assert os.pread(copy, 5000, 1 << 31) == b"b" * 5000
    assert os.fstat(copy).st_blocks <= blocks + 16


def test_one_ghost_for_all_who_have_it(bench: Bench, tmp_path: object) -> None:
    first = make(f"{tmp_path}/one", b"same")
    os.link(first, f"{tmp_path}/two")
    flags = (os.O_RDONLY, os.O_RDWR | os.O_NOFOLLOW, os.O_WRONLY | os.O_APPEND)
    names = ("one", "two", "two")
    fds = [os.open(f"{tmp_path}/{name}", flag) for name, flag in zip(names, flags, strict=True)]
    os.unlink(f"{tmp_path}/one")
    os.unlink(f"{tmp_path}/two")
    ids = [bench.dump(fd) for fd in fds]
    before = [seen(fd) for fd in fds]
    for fd in fds:
        os.close(fd)
    bench.commit()
    copies = [bench.build(file_id) for file_id in ids]
    assert [seen(fd) for fd in copies] == before
    assert len({os.fstat(fd).st_ino for fd in copies}) == 1
    os.write(copies[2], b"!")
    assert os.pread(copies[0], 9, 0) == b"same!"
    mapped = regular.open_file(bench.building, ids[0], os.O_RDWR)
    assert os.fstat(mapped).st_ino == os.fstat(copies[0]).st_ino
    os.close(mapped)
    assert os.listdir(str(tmp_path)) == []


def test_another_file_has_the_name_now(bench: Bench, tmp_path: object) -> None:
    path = make(f"{tmp_path}/config", b"old")
    fd = os.open(path, os.O_RDONLY)
    os.rename(make(f"{tmp_path}/new", b"newer"), path)
    _, copy = round_trip(bench, fd)
    assert os.pread(copy, 9, 0) == b"old"
    with open(path, "rb") as file:
        assert file.read() == b"newer"
    assert os.listdir(str(tmp_path)) == ["config"]


def test_deleted_with_its_directories(bench: Bench, tmp_path: object) -> None:
    os.makedirs(f"{tmp_path}/a/b")
    fd = os.open(make(f"{tmp_path}/a/b/file", b"x"), os.O_RDONLY)
    directory = os.open(f"{tmp_path}/a/b", os.O_RDONLY | os.O_DIRECTORY)
    os.unlink(f"{tmp_path}/a/b/file")
    os.removedirs(f"{tmp_path}/a/b") if os.listdir(str(tmp_path)) == ["a"] else None
    os.makedirs(str(tmp_path), exist_ok=True)
    ids = [bench.dump(fd), bench.dump(directory)]
    before = [seen(fd), seen(directory)]
    os.close(fd)
    os.close(directory)
    bench.commit()
    copies = [bench.build(file_id) for file_id in ids]
    assert [seen(fd) for fd in copies] == before
    assert os.listdir(copies[1]) == []
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR])
def test_deleted_special_files(bench: Bench, tmp_path: object, kind: int) -> None:
    path = f"{tmp_path}/special"
    os.mknod(path, kind | 0o640, os.makedev(1, 5))
    fd = os.open(path, os.O_PATH if kind == stat.S_IFIFO else os.O_RDONLY)
    os.unlink(path)
    before, copy = round_trip(bench, fd)
    assert seen(copy) == before


def test_file_that_never_had_a_name_can_still_get_one(bench: Bench, tmp_path: object) -> None:
    fd = os.open(str(tmp_path), os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"unpublished")
    before, copy = round_trip(bench, fd)
    after = seen(copy)
    del before["link"], after["link"]  # it has the inode's number in it
    assert after == before
    here = os.open(str(tmp_path), os.O_PATH)  # without one os.link() does not follow
    os.link(f"/proc/self/fd/{copy}", "published", dst_dir_fd=here, follow_symlinks=True)
    os.close(here)
    with open(f"{tmp_path}/published", "rb") as file:
        assert file.read() == b"unpublished"


def test_ghost_limit(tmp_path: object) -> None:
    with Bench(ghost_limit=8192) as bench:
        fd = os.open(make(f"{tmp_path}/large", b"x" * 8193), os.O_RDONLY)
        os.unlink(f"{tmp_path}/large")
        with pytest.raises(Unsupported, match=r"limit is 8192.*--ghost-limit 12288"):
            bench.check(fd)
        with pytest.raises(Unsupported, match="limit is 8192"):
            bench.dump(fd)
        os.close(fd)


def test_nothing_is_left_when_a_ghost_fails(bench: Bench, tmp_path: object) -> None:
    os.mkdir(f"{tmp_path}/d")
    fd = os.open(make(f"{tmp_path}/d/gone", b"x"), os.O_RDONLY)
    os.unlink(f"{tmp_path}/d/gone")
    os.rmdir(f"{tmp_path}/d")
    file_id = bench.dump(fd)
    os.close(fd)
    ctx = bench.commit()
    ctx.keep = lambda fd: (os.close(fd), (_ for _ in ()).throw(OSError(errno.EMFILE, "full")))  # type: ignore[func-returns-value]
    with pytest.raises(TorporError):
        bench.build(file_id)
    assert os.listdir(str(tmp_path)) == []


# ---------------------------------------------------------------------- other names


def test_link_remap(tmp_path: object) -> None:
    with Bench(link_remap=True) as bench:
        path = make(f"{tmp_path}/first", b"content")
        os.link(path, f"{tmp_path}/second")
        fd = os.open(path, os.O_RDWR)
        os.unlink(path)
        file_id = bench.dump(fd)
        inode = os.fstat(fd).st_ino
        before = seen(fd)
        os.close(fd)
        assert len(os.listdir(str(tmp_path))) == 2
        before["names"] = 2  # the link lasts until the restore is complete
        ctx = bench.commit()
        copy = bench.build(file_id)
        assert seen(copy) == before
        assert os.fstat(copy).st_ino == inode
        for hook in ctx.memo["after_restore"]:
            hook()
        assert os.listdir(str(tmp_path)) == ["second"]


def test_links_are_taken_back(tmp_path: object) -> None:
    with Bench(link_remap=True) as bench:
        path = make(f"{tmp_path}/first")
        os.link(path, f"{tmp_path}/second")
        fd = os.open(path, os.O_RDWR)
        os.unlink(path)
        bench.dump(fd)
        os.close(fd)
        remap.remove_links(bench.dumping)
        assert os.listdir(str(tmp_path)) == ["second"]


def test_link_remap_needs_leave(bench: Bench, tmp_path: object) -> None:
    os.mkdir(f"{tmp_path}/elsewhere")
    path = make(f"{tmp_path}/first")
    os.link(path, f"{tmp_path}/elsewhere/second")
    fd = os.open(path, os.O_RDWR)
    os.unlink(path)
    with pytest.raises(Unsupported, match="--link-remap"):
        bench.dump(fd)
    os.close(fd)
    assert os.listdir(str(tmp_path)) == ["elsewhere"]


def test_a_name_beside_will_do(bench: Bench, tmp_path: object) -> None:
    """As a named semaphore has it: made by another name, which is gone."""
    path = make(f"{tmp_path}/first", b"content")
    os.link(path, f"{tmp_path}/second")
    make(f"{tmp_path}/third")
    fd = os.open(path, os.O_RDWR)
    os.unlink(path)
    file_id = bench.dump(fd)
    before = seen(fd)
    os.close(fd)
    assert sorted(os.listdir(str(tmp_path))) == ["second", "third"]
    bench.commit()
    assert seen(bench.build(file_id)) == {**before, "link": f"{tmp_path}/second"}
    assert sorted(os.listdir(str(tmp_path))) == ["second", "third"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("change", ["size", "mode", "kind", "absent"])
def test_changed_files_are_refused(bench: Bench, tmp_path: object, change: str) -> None:
    path = make(f"{tmp_path}/file", b"12345")
    fd = os.open(path, os.O_RDWR)
    file_id = bench.dump(fd)
    os.close(fd)
    if change == "size":
        os.truncate(path, 4)
    elif change == "mode":
        os.chmod(path, 0o600)
    else:
        os.unlink(path)
        if change == "kind":
            os.mkfifo(path)  # opening it for reading only would block
    bench.commit()
    why = {
        "size": "4 bytes now, and had 5",
        "mode": "skip-file-rwx",
        "kind": "another kind",
        "absent": "ENOENT",
    }
    with pytest.raises(TorporError, match=why[change]):
        bench.build(file_id)


def test_permissions_need_not_match(bench: Bench, tmp_path: object) -> None:
    path = make(f"{tmp_path}/file", b"12345")
    fd = os.open(path, os.O_RDWR)
    file_id = bench.dump(fd)
    os.close(fd)
    os.chmod(path, 0o600)
    bench.commit(skip_file_rwx_check=True)
    assert bench.build(file_id) > 0


def test_log_may_grow(bench: Bench, tmp_path: object) -> None:
    path = make(f"{tmp_path}/log", b"12345")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    file_id = bench.dump(fd)
    os.write(fd, b"more")
    os.close(fd)
    bench.commit()
    assert bench.build(file_id) > 0


def test_another_build_is_refused(bench: Bench, tmp_path: object) -> None:
    with open("/proc/self/exe", "rb") as file:
        image = bytearray(file.read())
    found = regular.build_id("/proc/self/exe")
    assert len(found) >= 16
    path = make(f"{tmp_path}/program", image)
    fd = os.open(path, os.O_RDONLY)
    file_id = bench.dump(fd)
    os.close(fd)
    image[image.find(found)] ^= 1
    make(path, image)
    bench.commit()
    with pytest.raises(Unsupported, match="another build"):
        bench.build(file_id)


def test_mounted_over(bench: Bench, tmp_path: object) -> None:
    def work() -> None:
        import ctypes

        libc = ctypes.CDLL(None)
        assert libc.unshare(0x20000) == 0
        assert libc.mount(None, b"/", None, 0x44000, None) == 0  # private, all of it
        fd = os.open(make(f"{tmp_path}/file", b"x"), os.O_RDONLY)
        assert libc.mount(b"none", str(tmp_path).encode(), b"tmpfs", 0, None) == 0
        with pytest.raises(Unsupported, match="nothing is found by its name"):
            bench.check(fd)
        make(f"{tmp_path}/file", b"y")
        with pytest.raises(Unsupported, match="another file is found"):
            bench.check(fd)
        inside = os.open(f"{tmp_path}/file", os.O_RDONLY)
        bench.check(inside)
        assert libc.umount2(str(tmp_path).encode(), 2) == 0  # lazily
        with pytest.raises(Unsupported, match="its mount is not visible"):
            bench.check(inside)

    in_child(work)


@pytest.mark.parametrize(
    ("path", "what"), [("/dev/watchdog", "watchdog"), ("/dev/fuse", "FUSE"), ("/dev/vhost-net", "virtual machine")]
)
def test_devices_with_state_are_refused_by_name(
    bench: Bench, path: str, what: str, tmp_path: object
) -> None:
    numbers = {"/dev/watchdog": 130, "/dev/fuse": 229, "/dev/vhost-net": 238}
    from types import SimpleNamespace

    from torpor.resources.files import refused

    device = os.makedev(10, numbers[path])
    fake = SimpleNamespace(
        fd=5, link=path, stat=SimpleNamespace(st_mode=stat.S_IFCHR, st_rdev=device)
    )
    assert what in str(refused.reason(fake))  # type: ignore[arg-type]


def test_image_with_relative_name_is_refused(bench: Bench) -> None:
    entry = pb.file_entry(type=1, id=1)
    entry.reg.CopyFrom(
        pb.reg_file_entry(id=1, flags=0, pos=0, fown=remap.no_owner(), name="etc/passwd")
    )
    bench.writer.append("files", entry)
    bench.commit()
    with pytest.raises(TorporError, match="not absolute"):
        bench.build(1)


def test_created_by_no_image(bench: Bench, tmp_path: object) -> None:
    """O_CREAT in an image does not make a file."""
    path = f"{tmp_path}/planted"
    entry = pb.file_entry(type=1, id=1)
    flags = os.O_RDWR | os.O_CREAT
    entry.reg.CopyFrom(
        pb.reg_file_entry(id=1, flags=flags, pos=0, fown=remap.no_owner(), name=path)
    )
    bench.writer.append("files", entry)
    bench.commit()
    with pytest.raises(TorporError, match="ENOENT"):
        bench.build(1)
    assert os.listdir(str(tmp_path)) == []


# ---------------------------------------------------------------------- files given from outside


def test_inherited(bench: Bench, tmp_path: object) -> None:
    path = make(f"{tmp_path}/file", b"12345")
    fd = os.open(path, os.O_RDWR)
    file_id = bench.dump(fd)
    ctx = bench.commit()
    os.unlink(path)
    other = os.open(make(f"{tmp_path}/other", b"abc"), os.O_RDONLY)
    ctx.inherited[path[1:]] = other
    copy = bench.build(file_id)
    assert os.fstat(copy).st_ino == os.fstat(other).st_ino
    os.lseek(other, 2, os.SEEK_SET)
    assert os.lseek(copy, 0, os.SEEK_CUR) == 2  # the same description
    os.close(fd)
    os.close(other)


def test_external(tmp_path: object) -> None:
    path = make(f"{tmp_path}/file", b"12345")
    fd = os.open(path, os.O_RDWR)
    with open(f"/proc/self/fdinfo/{fd}") as file:
        mount = int(file.read().split("mnt_id:")[1].split()[0])
    key = f"file[{mount:x}:{os.fstat(fd).st_ino:x}]"
    with Bench(external=[key]) as bench:
        os.unlink(path)  # would be a ghost otherwise
        file_id = bench.dump(fd)
        ctx = bench.commit()
        assert not ctx.images.has("remap-fpath")
        with pytest.raises(Unsupported, match=r"--inherit-fd fd\[N\]:file"):
            bench.build(file_id)
        ctx.inherited[key] = fd
        os.lseek(fd, 3, os.SEEK_SET)
        copy = bench.build(file_id)
        assert os.fstat(copy).st_ino == os.fstat(fd).st_ino
        assert os.lseek(copy, 0, os.SEEK_CUR) == 0  # a description of its own
    os.close(fd)


# ---------------------------------------------------------------------- /proc


def test_file_about_a_task_that_ended(bench: Bench) -> None:
    pid = os.fork()
    if pid == 0:
        while True:
            os.read(os.pipe()[0], 1)
    fds = [os.open(f"/proc/{pid}{name}", os.O_RDONLY) for name in ("/status", "")]
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    ids = [bench.dump(fd) for fd in fds]
    before = [seen(fd)["link"] for fd in fds]
    for fd in fds:
        os.close(fd)
    ctx = bench.commit()
    copies = [bench.build(file_id) for file_id in ids]
    for hook in ctx.memo["after_mappings"]:  # what stands in for the task ends
        hook()
    assert [seen(fd)["link"] for fd in copies] == before
    with pytest.raises(ProcessLookupError):
        os.read(copies[0], 1)
    assert not os.path.exists(f"/proc/{pid}")


def test_file_about_a_task_of_the_tree(bench: Bench) -> None:
    fd = os.open("/proc/self/stat", os.O_RDONLY)
    os.lseek(fd, 3, os.SEEK_SET)
    file_id = bench.dump(fd)
    before = seen(fd)
    bench.writer.append(
        "pstree", pb.pstree_entry(pid=os.getpid(), ppid=0, pgid=1, sid=1, threads=[os.getpid()])
    )
    os.close(fd)
    ctx = bench.commit()
    placeholder = bench.build(file_id)
    second = os.dup2(placeholder, fd + 50)
    os.dup2(placeholder, fd)
    entry = ctx.files[file_id][1]
    others = {int(name) for name in os.listdir("/proc/self/fd")} - {fd, second}
    task = bench.task((fd, file_id), (second, file_id), *((other, 999) for other in others))
    task.fds = [one for one in task.fds if os.path.exists(f"/proc/self/fd/{one[0]}")]
    count = len(os.listdir("/proc/self/fd"))
    program = Program()
    for number in (fd, second):
        regular.RESOURCE.settle_each(entry, number, task, program, ctx)
    run_here(program)
    assert len(os.listdir("/proc/self/fd")) == count
    assert seen(fd) == before
    assert os.read(fd, 100)
    assert seen(second)["pos"] == seen(fd)["pos"] > 3
    os.close(fd)
    os.close(second)


# ---------------------------------------------------------------------- for others


def test_ids_for_links(bench: Bench) -> None:
    pid = os.getpid()
    exe = regular.file_id_for(bench.dumping, pid, f"/proc/{pid}/exe")
    assert regular.file_id_for(bench.dumping, pid, f"/proc/{pid}/exe") == exe
    cwd = regular.file_id_for(bench.dumping, pid, f"/proc/{pid}/cwd")
    assert cwd != exe
    ctx = bench.commit()
    for file_id, link in ((exe, "exe"), (cwd, "cwd")):
        fd = regular.open_file(ctx, file_id, os.O_RDONLY)
        assert os.path.sameopenfile(fd, fd)
        assert os.readlink(f"/proc/self/fd/{fd}") == os.readlink(f"/proc/self/{link}")
        os.close(fd)
    with pytest.raises(TorporError, match="not there"):
        regular.open_file(ctx, 12345, os.O_RDONLY)


def test_mapped_and_deleted(bench: Bench, tmp_path: object) -> None:
    import mmap

    fd = os.open(make(f"{tmp_path}/lib", b"x" * 4096), os.O_RDWR)
    os.unlink(f"{tmp_path}/lib")
    with mmap.mmap(fd, 4096) as area:
        with open("/proc/self/maps") as file:
            span = next(line for line in file if f"{tmp_path}/lib" in line).split()[0]
        low, high = (int(word, 16) for word in span.split("-"))
        link = f"/proc/{os.getpid()}/map_files/{low:x}-{high:x}"
        file_id = regular.file_id_for(bench.dumping, os.getpid(), link, flags=os.O_RDWR)
        held = bench.dump(fd)
        ctx = bench.commit()
        mapped = regular.open_file(ctx, file_id, os.O_RDWR)
        area[:1] = b"y"
    copy = bench.build(held)
    assert os.fstat(copy).st_ino == os.fstat(mapped).st_ino  # one ghost for both
    assert os.pread(copy, 2, 0) == b"xx"
    os.close(mapped)
    os.close(fd)
