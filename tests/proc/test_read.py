from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from torpor.errors import TaskGone
from torpor.linux.call import call
from torpor.proc import maps, read, stat, tasks

ME = os.getpid()


@pytest.fixture
def ended() -> int:
    """The number of a process that is no more."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def zombie() -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield pid
    os.waitpid(pid, 0)


def test_a_file_longer_than_a_page(tmp_path: os.PathLike[str]) -> None:
    data = read.read(ME, "smaps")
    assert len(data) > 16384
    assert data.endswith(b"\n")
    assert data.count(b"VmFlags:") == len(maps.parse(read.read(ME, "maps")))


def test_a_file_below(tmp_path: os.PathLike[str]) -> None:
    assert read.read(ME, f"task/{ME}/stat").startswith(b"%d (" % ME)
    assert read.read_system("self/stat").startswith(b"%d (" % ME)


@pytest.mark.parametrize("reach", [read.read, read.link, read.names, read.numbers, read.open_file])
def test_an_ended_task(reach: Callable[[int, str], object], ended: int) -> None:
    for name in ("stat", "fd", "task", "exe"):
        with pytest.raises(TaskGone, match=f"task {ended} is gone") as caught:
            reach(ended, name)
        assert caught.value.status == errno.ESRCH


def test_a_task_that_ends_while_its_file_is_open() -> None:
    wait, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(wait, 1)
        os._exit(0)
    fd = read.open_file(pid, "status")
    os.write(release, b"!")
    os.waitpid(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.read(fd, 1)
    for opened in (fd, wait, release):
        os.close(opened)


def test_a_zombie_has_a_state_but_no_environment(zombie: int) -> None:
    assert stat.parse(read.read(zombie, "stat")).state == "Z"
    assert read.alive(zombie)
    assert read.read(zombie, "maps") == b""
    with pytest.raises(TaskGone):
        read.read(zombie, "environ")


def test_a_missing_file_of_a_living_task_is_not_a_missing_task(zombie: int) -> None:
    for pid, name in ((ME, "fdinfo/987654"), (zombie, "exe")):
        with pytest.raises(FileNotFoundError) as caught:
            read.link(pid, name)
        assert caught.value.filename == f"/proc/{pid}/{name}"
    with pytest.raises(FileNotFoundError) as caught:
        read.read_system("nothing/such")
    assert caught.value.filename == "/proc/nothing/such"


def test_links_and_names(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"odd \xff\n")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    assert read.link(ME, f"fd/{fd}") == path
    assert fd in read.numbers(ME, "fd")
    assert read.numbers(ME, "fd") == sorted(read.numbers(ME, "fd"))
    assert {"net", "pid", "mnt"} <= set(read.names(ME, "ns"))
    os.close(fd)


def test_no_descriptor_is_left_open(ended: int) -> None:
    read.root()
    before = os.listdir("/proc/self/fd")
    read.read(ME, "stat")
    read.names(ME, "fd")
    read.pids()
    for reach in (read.read, read.names, read.link):
        with pytest.raises(TaskGone):
            reach(ended, "fd")
    assert os.listdir("/proc/self/fd") == before
    assert not os.get_inheritable(read.root())


def test_it_goes_on_after_a_change_of_root(tmp_path: os.PathLike[str]) -> None:
    read.root()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chroot(tmp_path)
            status = 0 if read.read(ME, "stat").startswith(b"%d (" % ME) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_another_procfs(tmp_path: os.PathLike[str]) -> None:
    fake = os.path.join(tmp_path, "proc")
    os.makedirs(os.path.join(fake, "7"))
    with open(os.path.join(fake, "7", "stat"), "wb") as file:
        file.write(b"x" * 200_000)
    read.use_root(fake)
    try:
        assert read.read(7, "stat") == b"x" * 200_000
        assert read.pids() == [7]
    finally:
        read.use_root("/proc")
    assert ME in read.pids()


def test_threads() -> None:
    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(3)]
    for other in others:
        other.start()
    try:
        expected = sorted({threading.get_native_id(), *(o.native_id or 0 for o in others)})
        assert set(expected) <= set(tasks.threads(ME))
        assert tasks.threads(ME) == sorted(map(int, os.listdir("/proc/self/task")))
    finally:
        stop.set()
        for other in others:
            other.join()


@pytest.mark.parametrize("with_file", [True, False])
def test_children_of_all_threads(
    with_file: bool, child: Callable[..., int], zombie: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tasks.children(ME)) - {zombie}
    mine = [child(), zombie]
    made: list[int] = []
    thread = threading.Thread(target=lambda: made.append(child()))
    thread.start()
    thread.join()
    if not with_file:
        monkeypatch.setattr(read, "read", without_children(read.read))
    assert sorted({*tasks.children(ME)} - before) == sorted(mine + made)
    assert tasks.children(made[0]) == []


def without_children(real: Callable[[int, str], bytes]) -> Callable[[int, str], bytes]:
    """/proc as a kernel without CONFIG_PROC_CHILDREN shows it."""

    def fake(pid: int, name: str) -> bytes:
        if name.endswith("/children"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
        return real(pid, name)

    return fake


def test_children_refused() -> None:
    assert tasks.parse_children(b"") == []
    assert tasks.parse_children(b"12 13 ") == [12, 13]
    with pytest.raises(ValueError, match="children"):
        tasks.parse_children(b"12 x")


def test_children_of_an_ended_task(ended: int) -> None:
    with pytest.raises(TaskGone):
        tasks.children(ended)


def test_a_reader_without_rights_sees_what_is_public() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            call("setresuid", 1, 1, 1)
            stat.parse(read.read(1, "stat"))
            try:
                read.read(1, "maps")
            except PermissionError as error:
                status = 0 if error.filename == "/proc/1/maps" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
