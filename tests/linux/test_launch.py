"""Children that share our memory: the bytes are those of their source, and other threads are no harm."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from torpor.errors import KernelError, TorporError
from torpor.linux import launch
from torpor.linux.call import call
from torpor.resources.apart import WALL, Identity, apart

ASIDE = """
.intel_syntax noprefix
push rbx
mov rbx, rdx
mov eax, 435
syscall
test rax, rax
jnz 1f
call rbx
xor edi, edi
mov eax, 231
syscall
1: pop rbx
ret
"""
LAUNCH = """
.intel_syntax noprefix
mov r10, rcx
mov eax, 435
syscall
test rax, rax
jnz 1f
mov r15, rdx
jmp r10
1: ret
"""


@pytest.mark.parametrize(("source", "code"), [(ASIDE, launch._ASIDE), (LAUNCH, launch._LAUNCH)])
def test_bytes_are_those_of_the_source(tmp_path: Path, source: str, code: bytes) -> None:
    (tmp_path / "a.s").write_text(source)
    subprocess.run(["gcc", "-c", "a.s", "-o", "a.o"], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "a.o", "a.bin"], cwd=tmp_path, check=True)
    assert (tmp_path / "a.bin").read_bytes() == code


def status(name: str) -> str:
    """A line of our own /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name + ":"))


def test_another_process_does_it(tmp_path: Path) -> None:
    free = os.getpid() + 1
    while os.path.exists(f"/proc/{free}"):
        free += 1
    before = os.getcwd(), status("Uid"), status("Groups"), dumpable()

    def action() -> tuple[object, ...]:
        return os.getpid(), os.getcwd(), status("Uid"), status("Groups"), os.open("/dev/null", os.O_RDONLY)

    *found, fd = apart(action, Identity(free, 1234, 1234, (7, 8)), folder=str(tmp_path))
    os.close(fd)  # it is ours
    assert found == [free, str(tmp_path), "0\t1234\t0\t0", "7 8"]
    assert (os.getcwd(), status("Uid"), status("Groups"), dumpable()) == before
    assert apart(os.getpid, Identity(1)) not in (1, os.getpid())  # it is taken
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, WALL | os.WNOHANG)


def dumpable() -> int:
    """May others look at us? (PR_GET_DUMPABLE)"""
    return call("prctl", 3, 0, 0, 0, 0)


def test_its_errors_are_ours() -> None:
    def refuse() -> None:
        raise TorporError("no")

    with pytest.raises(TorporError, match="no"):
        apart(refuse)
    with pytest.raises(KernelError, match=r"/nowhere.*No such file"):
        apart(lambda: os.stat("/nowhere"))
    with pytest.raises(KernelError, match="No such file"):
        apart(os.getpid, folder="/nowhere")
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_while_other_threads_are_busy() -> None:
    """A fork by hand would copy their locks, and sooner or later wait for one for ever."""
    stop = threading.Event()

    def allocate() -> None:
        while not stop.is_set():
            bytearray(1 << 20)
            stop.wait(0)

    threads = [threading.Thread(target=allocate) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(60):
            assert apart(lambda number=number: (number, bytes(100_000)))[0] == number  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
