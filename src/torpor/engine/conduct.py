"""Running the compiled programs in the stubs: who stops where, who goes on when, and what went wrong in which call."""

from __future__ import annotations

import errno
import os
import struct
import time

from ..errors import KernelError, TaskGone, TorporError, Unsupported, doing
from ..linux import ptrace
from ..linux.call import call
from ..linux.nr import NR
from ..model.snapshot import RestoredTask, RestoredThread, Snapshot
from ..proc import maps as proc_maps
from ..proc import stat as proc_stat
from ..proc import status as proc_status
from ..proc.read import read
from ..remote import machine, stub
from ..remote.program import Program
from ..remote.tracee import SIGTRAP, Stop, wait_stop
from ..resources import cgroups_build
from ..resources.memory import vdso
from ..resources.task import pending
from . import restart

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..resources.base import BuildContext

PAGE = 4096
ALL_SIGNALS = (1 << 64) - 1
SIGSTOP = 19
FATAL = (4, 7, 8, 11, 31)  # what a wrong program earns: SIGILL SIGBUS SIGFPE SIGSEGV SIGSYS
FORKS = (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE)


def check_vdso(snapshot: Snapshot) -> None:
    """Raise Unsupported when the tasks' vDSO is not the one of this kernel."""
    here = _own_vdso()
    checked = False
    for task in snapshot.tasks.values():
        if checked:
            break
        wanted = vdso.layout(task.mm.vmas) if task.alive else None
        if wanted is None:
            continue
        if here is None:
            raise Unsupported("this kernel has no vDSO and the snapshot's tasks have one")
        stored = _stored_vdso(task, wanted)
        if stored:
            vdso.check(wanted, here[0], stored, here[1])
            checked = True


_here: list[tuple[tuple[int, int, int], bytes] | None] = []


def _own_vdso() -> tuple[tuple[int, int, int], bytes] | None:
    """Ours: (start of vvar, start, end) and content. It stays where it is, so it is looked up once."""
    if not _here:
        _here.append(_find_own_vdso())
    return _here[0]


def _find_own_vdso() -> tuple[tuple[int, int, int], bytes] | None:
    vmas = proc_maps.parse(read(os.getpid(), "maps"))
    code = [vma for vma in vmas if vma.kind == proc_maps.VDSO]
    if not code:
        return None
    data = [vma.start for vma in vmas if vma.kind in (proc_maps.VVAR, proc_maps.VVAR_VCLOCK)]
    place = (min(data, default=code[0].start), code[0].start, code[0].end)
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(place[1])
        return place, memory.read(place[2] - place[1])


def _stored_vdso(task: RestoredTask, wanted: tuple[int, int, int]) -> bytes:
    for address, count, _, fd, offset, _ in task.runs:
        if address <= wanted[1] and wanted[2] <= address + count * PAGE and fd >= 0:
            return os.pread(fd, wanted[2] - wanted[1], offset + wanted[1] - address)
    return b""


def _loginuid_of(task: RestoredTask) -> int | None:
    """The login uid to be set, None where it is ours anyway or unknown."""
    tc = task.core.tc
    if not tc.HasField("loginuid") or not os.path.exists("/proc/self/loginuid"):
        return None
    with open("/proc/self/loginuid", "rb") as file:
        return None if int(file.read()) == tc.loginuid else int(tc.loginuid)


def has_epilogue(task: RestoredTask) -> bool:
    """Has the task something to do when its children have ended or stopped?"""
    return any(child.helper or child.stopped for child in task.children)


class Conductor:
    """Leads the stubs of one restore through their programs."""

    def __init__(
        self, snapshot: Snapshot, arena: stub.Arena, programs: dict[int, Program], ctx: BuildContext
    ) -> None:
        self.snapshot = snapshot
        self.arena = arena
        self.programs = programs
        self.ctx = ctx
        self.live: dict[int, Program] = {}
        self.ended: set[int] = set()
        self.released: set[int] = set()
        self.rebuilt: set[int] = set()  # threads whose interrupted call goes on by restart_syscall(2)
        self.started: list[int] = []

    def launch(self, keep: list[int], *, sibling: bool) -> int:
        """Start the root's stub; returns its pid."""
        if not stub.become_subreaper():
            self.ctx.undo.add("child subreaper", stub.resign_as_subreaper)
        root = self.snapshot.root
        pid, _ = stub.launch([root.pid], self.arena, keep, sibling=sibling, loginuid=_loginuid_of(root))
        self.live[pid] = self.programs[root.pid]
        self.started.append(pid)
        cgroups_build.enter(root.pid, pid, self.ctx)
        stub.start(pid, self.arena, self.programs[root.pid])
        return pid

    def first_half(self) -> None:
        """All tasks and threads come to life, with memory and files; each waits at its first stop."""
        index = 0
        while index < len(self.started):
            self._until_stop(self.started[index])
            index += 1
        missing = set(self.programs) - set(self.live)
        if missing:
            raise Unsupported(f"tasks {sorted(missing)} were not created")

    def second_half(self, kinds: list[Any]) -> None:
        """Zombies end; everybody else takes on its own state; helpers end; each thread waits at its last stop."""
        tasks = self.snapshot.tasks.values()
        for task in tasks:
            if task.zombie:
                self._until_end(task.pid)
        for stage in range(3):
            # Between their stages the threads of a process wait for one another; one thread alone has only the last.
            moving = [task for task in tasks if task.alive and (stage == 2 or len(task.threads) > 1)]
            threads = [thread.tid for task in moving for thread in task.threads]
            for tid in threads:
                ptrace.resume(tid)
            for tid in threads:
                self._until_stop(tid)
        for task in tasks:
            if task.alive:
                for kind in kinds:
                    kind.outside(task, task.core, self.ctx)
        for task in tasks:
            if task.helper:
                self._until_end(task.pid)

    def epilogue(self, cpu: Any) -> None:
        """Helpers are waited for by their parents; stopped tasks stop, and those who knew of it are told again.

        Children first: a stopped task runs no program any more.
        """
        for task in reversed(self.snapshot.tasks.values()):
            if task.alive and has_epilogue(task):
                ptrace.resume(task.pid)
                self._until_stop(task.pid)
            if task.stopped and task.parent is not None and task.parent.alive:
                self._finish_task(task, cpu)
                self._release_task(task)
                self._see_stopped(task)

    def _until_stop(self, tid: int) -> None:
        """Let a running stub come to its next stop; stubs that it forks are set going on the way."""
        while True:
            try:
                stop = wait_stop(tid)
            except TaskGone as error:
                raise self._ended_early(tid, error) from None
            if stop.event in FORKS:
                self._welcome(ptrace.event_message(tid))
            elif stop.event == 0 and stop.signal == SIGTRAP:
                if ptrace.get_regs(tid).ip == self.arena.failed_at:
                    raise self._failure(tid)
                return
            elif stop.event == 0 and stop.signal in FATAL:
                raise self._failure(tid, stop)
            ptrace.resume(tid)  # a SIGCHLD and the like of a stub is nobody's business

    def _welcome(self, tid: int) -> None:
        """A new stub, stopped at birth: let it run."""
        self.started.append(tid)
        self.live[tid] = self.programs[tid]
        wait_stop(tid)
        cgroups_build.enter(tid, tid, self.ctx)
        ptrace.resume(tid)

    def _until_end(self, pid: int) -> None:
        """Let a stub end as its program says."""
        signal = 0
        while True:
            ptrace.resume(pid, signal)
            try:
                stop = wait_stop(pid)
            except TaskGone:
                self.ended.add(pid)
                return
            if stop.event == 0 and stop.signal == SIGTRAP and ptrace.get_regs(pid).ip == self.arena.failed_at:
                raise self._failure(pid)
            signal = stop.signal if stop.event == 0 else 0

    def _failure(self, tid: int, stop: Stop | None = None) -> TorporError:
        """What went wrong in a stub: the record that it stopped at, and its error."""
        program = self.live[tid]
        regs = ptrace.get_regs(tid)
        index, rest = divmod(regs.r15 - program.base, machine.RECORD_BYTES)
        if rest or not 0 <= index < len(program.records):
            return Unsupported(f"{program.name}: its program went astray", hint="please report this")
        record = program.records[index]
        error: TorporError
        if stop is not None:
            error = Unsupported(f"{record}: signal {stop.signal}", hint="please report this")
        else:
            memory = self.arena.read(program)
            result = struct.unpack_from("<q", memory, index * machine.RECORD_BYTES + 8 * machine.RESULT_WORD)[0]
            if result >= 0:
                error = Unsupported(f"{record}: it ended after too few bytes")
            elif record.name == "clone3":
                error = stub.clone_error(-result, [self._tid_of(record.child)])
            else:
                error = KernelError(str(record), -result)
        error.context.insert(0, program.name)
        return error

    def _tid_of(self, program: Program | None) -> int:
        return next((tid for tid, one in self.programs.items() if one is program), 0)

    def _ended_early(self, tid: int, error: TaskGone) -> TorporError:
        self.ended.add(tid)
        return Unsupported(f"{self.live[tid].name}: it ended while it was being restored ({error})")

    # ------------------------------------------------------------------------------------- the end

    @staticmethod
    def _see_stopped(task: RestoredTask) -> None:
        """Its stop signal may be one that stops nobody any more (SIGTSTP in an orphaned group): SIGSTOP always does."""
        deadline = time.monotonic() + 1.0
        while proc_stat.parse(read(task.pid, "stat")).state != "T":
            if time.monotonic() > deadline:
                os.kill(task.pid, SIGSTOP)
                return
            time.sleep(0.001)

    def set_registers(self, cpu: Any) -> None:
        """Give every thread its registers; the arena is unmapped by the main thread as the last call of all."""
        for task in self.snapshot.tasks.values():
            if task.alive and task.pid not in self.released:
                self._finish_task(task, cpu)

    def _finish_task(self, task: RestoredTask, cpu: Any) -> None:
        for thread in task.threads:
            if restart.rebuild(thread.tid, thread.core, self.arena, cpu.restored_regs(thread.core, thread.image)):
                self.rebuilt.add(thread.tid)
        for thread in task.threads[1:]:
            self._set_state(thread, cpu)
        self._unmap_arena(task)
        self._set_state(task.threads[0], cpu)

    def _set_state(self, thread: RestoredThread, cpu: Any) -> None:
        tid = thread.tid
        state = cpu.restore_fpu(thread.core.thread_info.fpregs, ptrace.get_xstate(tid), thread.image)
        with doing(f"{thread.image}: thread_info.fpregs"):
            ptrace.set_xstate(tid, state)
        regs = cpu.restored_regs(thread.core, thread.image)
        restart.resume(thread.core, thread.image, regs, rebuilt=tid in self.rebuilt)
        with doing(f"{thread.image}: thread_info.gpregs"):
            ptrace.set_regs(tid, regs)
        main = thread.tid == thread.task.pid
        mask = thread.core.tc.blk_sigset if main else thread.core.thread_core.blk_sigset
        ptrace.set_sigmask(tid, mask & ALL_SIGNALS)

    def _unmap_arena(self, task: RestoredTask) -> None:
        """One munmap, stopped at its return: the code that made the call is not there any more."""
        tid = task.pid
        regs = ptrace.get_regs(tid)
        regs.ip = self.arena.code + machine.STUB.index(b"\x0f\x05")
        regs.ax, regs.orig_ax = NR["munmap"], ALL_SIGNALS
        regs.di, regs.si = self.arena.base, self.arena.size
        ptrace.set_regs(tid, regs)
        stops = 0
        while stops < 2:
            ptrace.resume(tid, request=ptrace.SYSCALL)
            stop = wait_stop(tid)
            if stop.signal == SIGTRAP | 0x80:
                stops += 1
        result = ptrace.get_regs(tid).ax
        if result:
            raise KernelError(f"task {tid}: munmap of the arena", (1 << 64) - result)

    def release(self) -> None:
        """Let every thread go. From here on nothing can be taken back."""
        for task in self.snapshot.tasks.values():
            if task.alive and task.pid not in self.released:
                self._release_task(task)

    def _release_task(self, task: RestoredTask) -> None:
        self.released.add(task.pid)
        for thread in reversed(task.threads):
            signal = 0
            if task.stopped and thread is task.threads[0]:
                signal = task.core.tc.stop_signo or SIGSTOP
            for number in pending.held_back(thread.core):
                call("tgkill", task.pid, thread.tid, number)
            try:
                ptrace.detach(thread.tid, signal)
            except KernelError as error:
                if error.errno != errno.ESRCH:  # a thread that was let go before may have ended the process
                    raise

    def _is_ours_unknown(self, pid: int) -> bool:
        """Is it a stub that was forked a moment ago, of whom we have not heard?"""
        if pid in self.started:
            return False
        try:
            return proc_status.parse(read(pid, "status")).TracerPid == os.getpid()
        except (TaskGone, OSError):
            return False

    def abort(self) -> None:
        """Kill everything that was started."""
        newborn = [task.pid for task in self.snapshot.tasks.values() if self._is_ours_unknown(task.pid)]
        stub.kill([*(pid for pid in self.started if pid not in self.ended), *newborn])
        # Those that we did not trace any more, or that were their parents' zombies, have become our children by now.
        for pid in self.started:
            try:
                os.waitpid(pid, ptrace.WALL | (os.WNOHANG if pid in self.ended else 0))
            except ChildProcessError:
                continue
