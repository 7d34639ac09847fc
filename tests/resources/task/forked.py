"""Source and target of the round trips here: forked children that set themselves up and wait.

A child is dumped with the real means (ptrace, programs run in it); restoring is a program's
records, each done as an ordinary system call by another child, which then can be dumped or looked
at in /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from torpor.images import schema as pb
from torpor.linux import ptrace
from torpor.model.source import SourceTask, SourceThread
from torpor.proc import stat, status
from torpor.proc.read import read
from torpor.remote.guest import Guest
from torpor.remote.machine import RECORD_WORDS
from torpor.remote.program import Program, Run
from torpor.remote.tracee import Seized
from torpor.resources.base import BuildContext, DumpContext

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
ALL_SIGNALS = (1 << 64) - 1


def syscall(number: int, *args: object) -> int:
    """A system call by number, as the target programs do them; OSError if it fails."""
    words = [ctypes.c_void_p(arg) if isinstance(arg, int) else arg for arg in args]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"syscall {number}")
    return result


def prctl(*args: object) -> int:
    return syscall(157, *args, *(0,) * (5 - len(args)))


def call_each(program: Program) -> Run:
    """Do what the machine does with a program, here and now; AssertionError names what fails."""
    area = mmap.mmap(-1, max(program.size, 4096))
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    program.place(base)
    area[: program.size] = program.compile()
    for index, record in enumerate(program.records):
        offset = index * RECORD_WORDS * 8
        words = struct.unpack_from(f"<{RECORD_WORDS}Q", area, offset)
        try:
            result = syscall(words[0] - 1, *words[1:7])
        except OSError as error:
            if error.errno >= 64 or not words[9] >> error.errno & 1:
                raise AssertionError(f"{record}: {error}") from error
            result = -error.errno
        struct.pack_into("<q", area, offset + 56, result)
        if words[8]:
            ctypes.c_int64.from_address(words[8]).value = result
    run = Run(program, area[: program.size])
    _kept.append(area)  # the address is exported for good: the records may be looked at again
    return run


_kept: list[mmap.mmap] = []


class Child:
    """A forked child: runs ``setup``, then does what it is told until it is ended."""

    def __init__(self, setup: Callable[[], object]) -> None:
        said, self._said = os.pipe()
        hears, self.tells = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(said)
            os.close(self.tells)
            self._live(setup, hears)
        os.close(self._said)
        os.close(hears)
        try:
            text = b""
            while chunk := os.read(said, 65536):
                text += chunk
                if text.endswith(b"\0"):
                    break
        finally:
            os.close(said)
        if text != b"\0":
            self.end()
            raise AssertionError(f"the child failed:\n{text.decode(errors='replace')}")

    def _live(self, setup: Callable[[], object], hears: int) -> None:
        try:
            setup()
            os.write(self._said, b"\0")
            while True:  # only reads from here on: seccomp's strict mode allows nothing else
                try:
                    if not os.read(hears, 1):
                        break
                except OSError:
                    pass
        except BaseException:
            os.write(self._said, traceback.format_exc().encode())
        finally:
            os._exit(0)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.tells)


@contextlib.contextmanager
def child(setup: Callable[[], object] = lambda: None) -> Iterator[int]:
    """The pid of a child that has run ``setup`` and waits."""
    one = Child(setup)
    try:
        yield one.pid
    finally:
        one.end()


def _guest(task: SourceTask, seized: Seized) -> Guest:
    lines = proc_text(task.pid, "maps").splitlines()
    _, end = next(line.split()[0].split("-") for line in lines if "[vdso]" in line)
    task.mem_fd = os.open(f"/proc/{task.pid}/mem", os.O_RDWR)
    signals = task.status.SigCgt | task.status.SigPnd | task.status.ShdPnd
    return Guest(task.pid, task.own_pid, task.mem_fd, [int(end, 16)], signals, seized)


def _source(pid: int, seized: Seized) -> SourceTask:
    tids = [pid, *sorted(int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid)]
    assert seized.seize(tids, ptrace.O_SUSPEND_SECCOMP) == tids
    task = SourceTask(pid, 0, stat.parse(read(pid, "stat")), status.parse(read(pid, "status")))
    for tid in tids:
        seen = (read(pid, f"task/{tid}/{name}") for name in ("stat", "status"))
        one, other = stat.parse(next(seen)), status.parse(next(seen))
        thread = SourceThread(task, tid, one, other, seized.stops[tid])
        thread.regs, thread.sigmask = ptrace.get_regs(tid), ptrace.get_sigmask(tid)
        task.threads.append(thread)
    return task


class Dumped:
    """What a dump gave: ``cores`` by tid, ``core`` of the main thread, the task and the context."""

    def __init__(self, task: SourceTask, ctx: DumpContext) -> None:
        self.task, self.ctx = task, ctx
        self.cores = {thread.tid: pb.core_entry() for thread in task.threads}
        self.core = self.cores[task.pid]


def dump(pid: int, *resources: object) -> Dumped:
    """Dump all threads of a process with these resources, and let it go on."""
    seized, ctx = Seized(), DumpContext(None, None)
    try:
        dumped = Dumped(_source(pid, seized), ctx)
        task = dumped.task
        guest = _guest(task, seized)
        try:
            for thread in task.threads:
                wanted = [r for r in resources if r.PER == "thread" or thread.tid == pid]
                program = Program()
                asked = [resource.ask(program, thread) for resource in wanted]
                run = guest.run(thread.tid, thread.own_tid, program, thread.regs, thread.sigmask)
                for resource, what in zip(wanted, asked, strict=True):
                    resource.dump(thread, run, what, dumped.cores[thread.tid], ctx)
            guest.leave()
        finally:
            os.close(task.mem_fd)
    finally:
        seized.release_all()
    return dumped


def build_context(**images: object) -> BuildContext:
    """A context whose image set holds just these (name → list of messages)."""
    reader = SimpleNamespace(read_all=lambda name, **_: images.get(name, []))
    return BuildContext(None, reader, None)


def restored_thread(core: object, *, mm: object = None) -> SimpleNamespace:
    """The RestoredThread of this very process."""
    own = os.getpid()
    task = SimpleNamespace(pid=own, own_pid=own, live_pid=own, core=core, mm=mm, threads=[])
    thread = SimpleNamespace(tid=own, own_tid=own, task=task, core=core)
    task.threads.append(thread)
    return thread


def restore(
    core: object, *resources: object, ctx: BuildContext | None = None, mm: object = None
) -> None:
    """Give this process the state in ``core``: check, then the records, every signal blocked."""
    ctx = ctx or build_context()
    # What a core_entry gets from the wire: a copy shares nothing with what was dumped.
    read_back = pb.core_entry()
    read_back.ParseFromString(core.SerializePartialToString())
    mask = struct.pack("<Q", ALL_SIGNALS)
    old = ctypes.create_string_buffer(8)
    syscall(14, 2, mask, old, 8)
    program = Program()
    thread = restored_thread(read_back, mm=mm)
    for resource in sorted(resources, key=lambda resource: resource.ORDER):
        if hasattr(resource, "check"):
            resource.check(read_back, ctx)
        resource.restore(thread, read_back, program, ctx)
    call_each(program)
    syscall(14, 2, ctypes.c_uint64(read_back.tc.blk_sigset).value.to_bytes(8, "little"), 0, 8)


def proc_text(pid: int, name: str) -> str:
    """A file of /proc/PID, read without Torpor."""
    with open(f"/proc/{pid}/{name}") as file:
        return file.read()


def proc_status(pid: int, name: str) -> str:
    """A line of /proc/PID/status, read without Torpor."""
    for line in proc_text(pid, "status").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    raise AssertionError(f"no {name}")


__all__ = [
    "build_context", "call_each", "child", "dump", "prctl", "proc_status", "proc_text",
    "restore", "restored_thread", "syscall",
]  # fmt: skip
