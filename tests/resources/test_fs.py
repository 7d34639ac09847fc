"""Root and working directory, umask."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from kit.file_bench import Bench, in_child, run_here
from torpor.remote.program import Program
from torpor.resources import fs


def round_trip() -> None:
    """Dump our own directories, leave them, restore, compare."""
    with Bench() as bench:
        umask = os.umask(0)
        os.umask(umask)
        task = SimpleNamespace(pid=os.getpid(), status=SimpleNamespace(Umask=umask))
        entry = fs.dump(bench.dumping, task)
        before = [os.readlink(f"/proc/self/{name}") for name in ("cwd", "root")]
        ctx = bench.commit()
        os.umask(0)
        fs.prepare(entry, ctx)
        os.chdir("/")
        program = Program()
        fs.emit(entry, program, ctx)
        run_here(program)
        assert [os.readlink(f"/proc/self/{name}") for name in ("cwd", "root")] == before
        assert os.umask(0) == umask


@pytest.mark.parametrize("umask", [0, 0o22, 0o777])
def test_working_directory_and_umask(tmp_path: object, umask: int) -> None:
    def work() -> None:
        os.chdir(str(tmp_path))
        os.umask(umask)
        round_trip()

    in_child(work)


def test_deleted_working_directory(tmp_path: object) -> None:
    def work() -> None:
        os.mkdir(f"{tmp_path}/gone")
        os.chdir(f"{tmp_path}/gone")
        os.rmdir(f"{tmp_path}/gone")
        round_trip()
        assert os.listdir(str(tmp_path)) == []

    in_child(work)


def test_other_root(tmp_path: object) -> None:
    """Another process is the one with the other root, as in a dump; it shows through its /proc
    links."""

    def work() -> None:
        os.makedirs(f"{tmp_path}/root/inner")
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.chroot(f"{tmp_path}/root")
            os.chdir("/inner")
            os.write(told, b"x")
            os.read(ready, 0)
            while True:
                os.read(os.pipe()[0], 1)
        os.read(ready, 1)
        with Bench() as bench:
            task = SimpleNamespace(pid=pid, status=SimpleNamespace(Umask=0o22))
            entry = fs.dump(bench.dumping, task)
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            ctx = bench.commit()
            fs.prepare(entry, ctx)
            program = Program()
            fs.emit(entry, program, ctx)
            assert [record.name for record in program.records] == [
                "fchdir",
                "chroot",
                "fchdir",
                "umask",
            ]
            proc = os.open("/proc/self", os.O_PATH)
            child = os.fork()
            if child == 0:
                run_here(program)
                os._exit(0 if os.getcwd() == "/inner" and os.listdir("/") == ["inner"] else 1)
            assert os.waitpid(child, 0)[1] == 0
            os.close(proc)

    in_child(work)
