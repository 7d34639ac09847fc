"""Running the compiled programs in the stubs: who stops where, who goes on when, and what went wrong in which call."""

from __future__ import annotations

import contextlib
import errno
import os
import time

from .. import log, resources
from ..errors import KernelError, TaskGone, TorporError, Unsupported, doing
from ..linux import ptrace
from ..linux.call import call
from ..linux.nr import NR
from ..model.snapshot import INIT_PID, RestoredTask, RestoredThread, Snapshot
from ..proc import status as proc_status
from ..proc.read import pids, read
from ..proc.tasks import children_if_alive
from ..remote import machine, stub
from ..remote.program import Program, Record, Row
from ..remote.tracee import SIGTRAP, Dying, Stop, stops_soon, wait_stop
from ..resources import cgroups_build
from ..resources.task import pending
from . import cpu, pid_spaces, restart, zombies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType

    from ..resources.base import BuildContext
    from .restore_memory import MemoryPlan

PAGE = 4096
ALL_SIGNALS = (1 << 64) - 1
SIGSEGV, SIGSTOP = 11, 19
#: Where in the machine a record's call returns to.
AFTER_CALL = machine.STUB.index(b"\x0f\x05") + 2
FATAL = (4, 7, 8, 11, 31)  # what a wrong program earns: SIGILL SIGBUS SIGFPE SIGSEGV SIGSYS
FORKS = (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE)


def has_epilogue(task: RestoredTask) -> bool:
    """Has the task something to do when its children have ended or stopped?"""
    return any(child.helper or child.stopped for child in task.children)


class Conductor:
    """Leads the stubs of one tree through their programs.

    Tasks have two numbers: the one in the images (``task.pid``, ``thread.tid``, by which programs are found) and the
    one that we see, which differs in a pid namespace of their own (``live_pid``, ``live_tid``).
    """

    def __init__(
        self, snapshot: Snapshot, arena: stub.Arena, programs: dict[int, Program], ctx: BuildContext,
        states: dict[tuple[int, bool], State] | None = None, unmapping: Collection[int] = (),
        straight: bool = False,
    ) -> None:  # fmt: skip
        """``states`` remembers what the images say of registers, for the next time: by core and whether the call in
        it was rebuilt. ``unmapping``: tasks whose last call unmaps the arena; ``straight``: the one task does not stop
        before. Both are the Writer's.
        """
        self.unmapping = unmapping
        self.straight = straight
        self.states = {} if states is None else states
        self.snapshot = snapshot
        self.arena = arena
        self.programs = programs
        self.ctx = ctx
        #: By the numbers that we see, as in all that follow: the program that a stub runs.
        self.live: dict[int, Program] = {}
        self.ended: set[int] = set()
        self.released: set[int] = set()
        self.rebuilt: set[int] = set()  # threads whose interrupted call goes on by restart_syscall(2)
        self.started: list[int] = []
        self.init = 0  # of the tree's pid namespace, where that is none of its tasks
        self.apart = False  # has the tree a pid namespace of its own?
        self._init_code = 0
        #: Tasks in the images that were born with what is set from outside, if it can be inherited.
        self.outside_done: set[int] = set()
        self._threads = {thread.tid: thread for task in snapshot.tasks.values() for thread in task.threads}
        self._tids: dict[int, int] | None = None

    def launch(self, keep: list[int], *, sibling: bool) -> int:
        """Start the root's stub; returns its pid."""
        if not stub.become_subreaper():
            self.ctx.undo.add("child subreaper", stub.resign_as_subreaper)
        root = self.snapshot.root
        pid, _ = stub.launch([root.pid], self.arena, keep, sibling=sibling)
        self._born(pid, root.pid)
        stub.start(pid, self.arena, self.programs[root.pid])
        return pid

    def launch_init(
        self, keep: list[int], *, sibling: bool, created: Callable[[int], None] = lambda _: None
    ) -> int:
        """Start a pid namespace, whose init is the root's stub or forks it; returns the init's pid as we see it.

        ``created`` is told of the first process in it, which is stopped, before there is any other.
        """
        root = self.snapshot.root
        numbers = pid_spaces.set_tid(self.snapshot, root.pid, root.numbers)
        is_init = root.pid == INIT_PID
        annex = self.ctx.memo.get("annex")
        mounts = (annex.fd, annex.root_fd, annex.ipc_fd) if annex is not None else None
        pid, code = stub.launch(
            numbers if is_init else (), self.arena, keep, sibling=sibling, own_pids=True,
            propagation=self.snapshot.mounts, mounts=mounts,
        )  # fmt: skip
        try:
            created(pid)
        except BaseException:
            stub.kill([pid])
            raise
        self.apart = True
        if is_init:
            self._born(pid, root.pid)
            stub.start(pid, self.arena, self.programs[root.pid])
            return pid
        program = stub.init_program(numbers, self.programs[root.pid])
        self.arena.load([program])
        scratch = code + len(machine.INIT) + PAGE & -PAGE
        self.take_init(pid, program, code)
        stub.start_init(pid, program, code, root.pid, scratch, (self.arena.base, self.arena.size))
        return pid

    def adopt(self, pid: int, *, apart: bool = False) -> None:
        """Take over the root's stub, which was born a moment ago with its program, and let it go on. ``apart``: it is
        the init of a pid namespace.
        """
        self.apart = apart
        self._born(pid, self.snapshot.root.pid)
        ptrace.resume(pid)

    def adopt_forked(self, pid: int, init: int) -> None:
        """As :meth:`adopt`, for a root that has no program yet: the init of its pid namespace has forked it and was let
        go.
        """
        self.init, self.apart = init, True
        self.started.append(init)
        self._born(pid, self.snapshot.root.pid)
        stub.start(pid, self.arena, self.live[pid])

    def take_init(self, pid: int, program: Program, code: int) -> None:
        """Take over the init of the tree's pid namespace, which is stopped and is to go on with ``program`` in the
        machine at ``code``.
        """
        self.init, self._init_code = pid, code
        self.apart = True
        self.live[pid] = program
        self.started.append(pid)

    def _born(self, live: int, tid: int) -> None:
        """Thread ``tid`` of the images has come to life; it is stopped."""
        self.started.append(live)
        self.live[live] = self.programs[tid]
        thread = self._threads.get(tid)
        if thread is not None:  # a helper has none
            thread.live_tid = live
        task = self.snapshot.tasks.get(tid)
        if task is not None:
            task.live_pid = live
        self.ctx.live[tid] = live
        cgroups_build.enter(tid, live, self.ctx)

    def wake(
        self, memory: MemoryPlan, complete: Callable[[], None] | None = None,
        resuming: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """All of it: from the first stubs, which have been started, to the moment when everybody has been let go.

        ``complete`` is called when all tasks have everything, ``resuming`` just before the first is let go.
        """
        self.first_half()
        memory.check_reads(self.arena)
        memory.fill(self.arena)
        for hook in self.ctx.memo.get("after_mappings", ()):
            hook()
        self.second_half()
        self.epilogue()
        self.set_registers()
        if complete is not None:
            complete()
        if "io_uring completions" in self.ctx.memo:
            from . import requests  # few programs have any

            requests.post_completions(self.ctx)
        for hook in self.ctx.memo.get("after_restore", ()):
            hook()
        if "io_uring requests" in self.ctx.memo:
            from . import requests

            requests.submit(self.snapshot, self.ctx)
        if self.snapshot.settings:
            from . import pid_settings

            pid_settings.restore(self.snapshot)
        if resuming is not None:
            resuming()
        memory.release()
        self.release()
        cgroups_build.freeze(self.ctx)

    def first_half(self) -> None:
        """All tasks and threads come to life, with memory and files; each waits at its first stop."""
        index = 0
        while index < len(self.started):
            if self.started[index] in self.live:  # all but an init that was let go before
                self._until_stop(self.started[index])
            root = self.snapshot.root
            if self.started[index] == root.live_pid and cgroups_build.entered_namespace(root, self.ctx):
                ptrace.resume(root.live_pid)
                continue
            index += 1
        missing = {id(program) for program in self.programs.values()} - {id(one) for one in self.live.values()}
        if missing:
            tids = sorted(tid for tid, program in self.programs.items() if id(program) in missing)
            raise Unsupported(f"tasks {tids} were not created")

    def second_half(self) -> None:
        """Zombies end; everybody else takes on its own state; helpers end; each thread waits at its last stop."""
        tasks = self.snapshot.tasks.values()
        for task in tasks:
            if task.zombie:
                self._end_zombie(task)
        for stage in range(3) if not self.straight else ():
            # Between their stages the threads of a process wait for one another; one thread alone has only the last.
            moving = [task for task in tasks if task.alive and (stage == 2 or len(task.threads) > 1)]
            threads = [thread.live_tid for task in moving for thread in task.threads]
            for tid in threads:
                ptrace.resume(tid)
            for tid in threads:
                self._until_stop(tid)
        kinds = resources.task_resources()
        for task in tasks:
            for kind in kinds if task.alive else ():
                if task.pid not in self.outside_done or not kind.INHERITED:
                    kind.outside(task, task.core, self.ctx)
        for task in tasks:
            if task.helper:
                self._until_end(task.live_pid)

    def epilogue(self) -> None:
        """Helpers are waited for by their parents; stopped tasks stop, and those who knew of it are told again.

        Children first: a stopped task runs no program any more.
        """
        for task in reversed(self.snapshot.tasks.values()):
            if task.alive and has_epilogue(task):
                ptrace.resume(task.live_pid)
                self._until_stop(task.live_pid)
            if task.stopped and task.parent is not None and task.parent.alive:
                self._finish_task(task)
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
                self._welcome(ptrace.event_message(tid), tid)
                if tid == self.init:
                    ptrace.detach(tid)  # from here on it waits for the root
                    return
            elif stop.event == 0 and stop.signal == SIGTRAP:
                if ptrace.get_regs(tid).ip == self.arena.failed_at:
                    raise self._failure(tid)
                return
            elif stop.event == 0 and stop.signal in FATAL:
                if stop.signal == SIGSEGV and self._has_unmapped(tid):
                    return
                raise self._failure(tid, stop)
            ptrace.resume(tid)  # a SIGCHLD and the like of a stub is nobody's business

    def _has_unmapped(self, tid: int) -> bool:
        """Has the stub unmapped the arena that its code was in, as its program says it should?"""
        regs = ptrace.get_regs(tid)
        program = self.live[tid]
        at_end = regs.r15 == program.base + (len(program) - 1) * machine.RECORD_BYTES
        return bool(regs.ip == self.arena.code + AFTER_CALL and regs.ax == 0 and at_end)

    def _welcome(self, newborn: int, parent: int) -> None:
        """A new stub, stopped at birth: let it run."""
        wait_stop(newborn)
        self._born(newborn, self._number_of(newborn, parent))
        if parent == self.init:
            # In the machine of inits a failure is no stop; and where that lies there will be nothing left.
            regs = ptrace.get_regs(newborn)
            regs.ip += self.arena.code - self._init_code
            ptrace.set_regs(newborn, regs)
        ptrace.resume(newborn)

    def _number_of(self, newborn: int, parent: int) -> int:
        """The number in the images of a stub that ``parent``, stopped in its clone3, has made."""
        if not self.apart:
            return newborn
        if self._tids is None:
            self._tids = {id(program): tid for tid, program in self.programs.items()}
        program = self.live[parent]
        record = program.records[(ptrace.get_regs(parent).r15 - program.base) // machine.RECORD_BYTES]
        return self._tids[id(record.child)]

    def _end_zombie(self, task: RestoredTask) -> None:
        if zombies.is_init(task):
            ptrace.resume(task.live_pid)
            self._until_stop(task.live_pid)
            zombies.end_init(task, self.arena)
            self.ended.add(task.live_pid)
        else:
            self._until_end(task.live_pid)

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
        if stop is None:
            return self._record_failed(program, record, index)
        error = Unsupported(f"{record}: signal {stop.signal}", hint="please report this")
        error.context.insert(0, program.name)
        return error

    def _record_failed(self, program: Program, record: Record | Row, index: int) -> TorporError:
        """The error that the result of a record tells."""
        error: TorporError
        result = self.arena.result(program, index)
        if result >= 0:
            error = Unsupported(f"{record}: it ended after too few bytes")
        elif record.name == "clone3":
            tid = self._tid_of(record.child)
            error = stub.clone_error(-result, [self.snapshot.outer.get(tid, tid)])
        else:
            error = KernelError(str(record), -result)
        error.context.insert(0, program.name)
        return error

    def _tid_of(self, program: Program | None) -> int:
        return next((tid for tid, one in self.programs.items() if one is program), 0)

    def _ended_early(self, tid: int, error: TaskGone) -> TorporError:
        if not isinstance(error, Dying):
            self.ended.add(tid)
        program = self.live[tid]
        if tid == self.init:  # it ends where others trap
            for index, record in enumerate(program.records):
                if self.arena.result(program, index) < 0:
                    return self._record_failed(program, record, index)
        return Unsupported(f"{self.live[tid].name}: it ended while it was being restored ({error})")

    # ------------------------------------------------------------------------------------- the end

    @staticmethod
    def _see_stopped(task: RestoredTask) -> None:
        """Its stop signal may be one that stops nobody any more (SIGTSTP in an orphaned group): SIGSTOP always does."""
        if not stops_soon(task.live_pid, time.monotonic() + 1.0):
            with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
                os.kill(task.live_pid, SIGSTOP)

    def set_registers(self) -> None:
        """Give every thread its registers; the arena is unmapped by the main thread as the last call of all."""
        for task in self.snapshot.tasks.values():
            if task.alive and task.live_pid not in self.released:
                self._finish_task(task)

    def _finish_task(self, task: RestoredTask) -> None:
        for thread in task.threads:
            if restart.rebuild(thread, self.arena):
                self.rebuilt.add(thread.live_tid)
        for thread in task.threads:  # from here on none of them runs with SIGTRAP unblocked
            self._queue_late(thread)
        for thread in task.threads[1:]:
            self._set_state(thread)
        if task.pid not in self.unmapping:
            self._unmap_arena(task)
        self._set_state(task.threads[0])

    def _set_state(self, thread: RestoredThread) -> None:
        tid = thread.live_tid
        key = id(thread.core), tid in self.rebuilt
        state = self.states.get(key)
        if state is None:
            state = self.states[key] = State(thread, ptrace.get_xstate(tid), rebuilt=key[1])
        with doing(f"{thread.image}: thread_info.fpregs"):
            ptrace.set_xstate(tid, state.fpu)
        with doing(f"{thread.image}: thread_info.gpregs"):
            ptrace.set_regs(tid, state.regs)
        ptrace.set_sigmask(tid, state.mask)

    def _queue_late(self, thread: RestoredThread) -> None:
        """Have a thread queue for itself what would have been taken for one of its stops."""
        late = pending.late(thread.core)
        if late:
            ptrace.set_sigmask(thread.live_tid, ALL_SIGNALS)
        for shared, siginfo in late:
            place = restart.put_in_scratch(self.arena, siginfo)
            if shared:
                self._call(thread, "rt_sigqueueinfo", thread.task.own_pid, SIGTRAP, place)
            else:
                self._call(thread, "rt_tgsigqueueinfo", thread.task.own_pid, thread.own_tid, SIGTRAP, place)

    def _unmap_arena(self, task: RestoredTask) -> None:
        self._call(task.threads[0], "munmap", self.arena.base, self.arena.size)

    def _call(self, thread: RestoredThread, name: str, *arguments: int) -> None:
        """One call, stopped at its return: the code that made it may not be there any more."""
        tid = thread.live_tid
        regs = ptrace.get_regs(tid)
        regs.ip = self.arena.code + machine.STUB.index(b"\x0f\x05")
        regs.ax, regs.orig_ax = NR[name], ALL_SIGNALS
        regs.di, regs.si, regs.dx, regs.r10 = (*arguments, 0, 0, 0)[:4]
        ptrace.set_regs(tid, regs)
        stops = 0
        while stops < 2:
            ptrace.resume(tid, request=ptrace.SYSCALL)
            stop = wait_stop(tid)
            if stop.signal == SIGTRAP | 0x80:
                stops += 1
        result = ptrace.get_regs(tid).ax
        if result:
            raise KernelError(f"thread {thread.tid}: {name}", (1 << 64) - result)

    def release(self) -> None:
        """Let every thread go. From here on nothing can be taken back.

        Children first: if we die in between, a root that had been let go would find those dead that had not been.
        """
        left = [task for task in self.snapshot.tasks.values() if task.alive and task.live_pid not in self.released]
        for task in reversed(left):
            self._release_task(task)
        for task in left:
            if task.stopped:
                self._see_stopped(task)

    def _release_task(self, task: RestoredTask) -> None:
        self.released.add(task.live_pid)
        for thread in reversed(task.threads):
            signal = 0
            if task.stopped and thread is task.threads[0]:
                signal = task.core.tc.stop_signo or SIGSTOP
            if pending.stops(thread.core):
                call("tgkill", task.live_pid, thread.live_tid, SIGSTOP)
            try:
                ptrace.detach(thread.live_tid, signal)
            except KernelError as error:
                if error.errno != errno.ESRCH:  # a thread that was let go before may have ended the process
                    raise
                _take_end(thread.live_tid)

    def _newborn(self) -> list[int]:
        """Stubs that were forked a moment ago, of whom we have not heard."""
        if not self.apart:
            found = [task.pid for task in self.snapshot.tasks.values()]
        else:
            found = [child for pid in self.started for child in children_if_alive(pid)]
        return [pid for pid in found if pid not in self.started and _traced_by_us(pid)]

    def _strays(self) -> list[int]:
        """Stubs that were born when we had stopped listening. Those in our pid namespaces die with their init, or have
        died already and wait to be reaped by us. Not the inits themselves, nor what belongs to another tree.
        """
        if not self.apart:
            return self._newborn()
        parents: dict[int, int] = {}
        inside = []
        for pid in pids():
            try:
                status = proc_status.parse(read(pid, "status"))
            except (TaskGone, OSError, ValueError):
                continue
            parents[pid] = status.PPid
            if status.TracerPid == os.getpid() and len(status.NSpid) > 1 and status.NSpid[-1] != INIT_PID:
                inside.append(pid)
        return [pid for pid in inside if _is_below(pid, self.started, parents)]

    def __enter__(self) -> Conductor:
        """What was started within is killed if an error passes through."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        self.abort()
        if isinstance(error, TorporError):
            log.error(str(error))

    def abort(self) -> None:
        """Kill everything that was started."""
        stub.kill([*(pid for pid in self.started if pid not in self.ended), *self._newborn()], self._strays)
        # Those that we did not trace any more, or that were their parents' zombies, have become our children by now.
        stub.take_exits([pid for pid in self.started if pid not in self.ended])
        for pid in self.ended:
            stub.take_exit(pid)


class State:
    """What a thread is let go with: registers and signal mask, checked and laid out for this CPU."""

    __slots__ = ("fpu", "mask", "regs")

    def __init__(self, thread: RestoredThread, stub_fpu: bytes, *, rebuilt: bool) -> None:
        core, main = thread.core, thread is thread.task.threads[0]
        self.fpu = cpu.restore_fpu(core.thread_info.fpregs, stub_fpu, thread.image)
        self.regs = cpu.restored_regs(core, thread.image)
        restart.resume(core, thread.image, self.regs, rebuilt=rebuilt)
        self.mask = (core.tc.blk_sigset if main else core.thread_core.blk_sigset) & ALL_SIGNALS


def _is_below(pid: int, ancestors: Collection[int], parents: dict[int, int]) -> bool:
    """Has a process one of ``ancestors``?"""
    while pid in parents:
        pid = parents[pid]
        if pid in ancestors:
            return True
    return False


def _take_end(tid: int) -> None:
    """Take the end of a tracee that was killed, if it is not a child of ours besides: until then its parent is not told
    of it, nor can the init of its pid namespace end. The other threads of a child are nobody's business but ours.
    """
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            seen = proc_status.parse(read(tid, "status"))
            ours = seen.PPid == os.getpid() and seen.Tgid == tid
            if seen.TracerPid != os.getpid() or ours or ptrace.wait(tid, os.WNOHANG)[0]:
                return
        except (TaskGone, OSError):
            return
        time.sleep(0.0005)


def _traced_by_us(pid: int) -> bool:
    try:
        return proc_status.parse(read(pid, "status")).TracerPid == os.getpid()
    except (TaskGone, OSError):
        return False
