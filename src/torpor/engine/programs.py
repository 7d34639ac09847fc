"""The program of every task of a tree: what its stub does from birth to the moment before its first instruction."""

from __future__ import annotations

import errno
import functools
import os
import struct

from .. import resources
from ..model.snapshot import RestoredTask, RestoredThread, Snapshot
from ..remote import stub
from ..remote.program import Program
from ..resources import cgroups_build, fs, locks
from ..resources import task as task_state
from ..resources.base import FileResource
from ..resources.files import tty
from ..resources.fown import emit as emit_fown
from ..resources.task import loginuid, pending, sigactions
from . import conduct, pid_spaces, plan, restart, restore_memory, zombies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..images.schema import Message
    from ..resources.base import BuildContext

SIGTRAP, SIGSEGV, SIGCHLD = 5, 11, 17
F_SETFD, FD_CLOEXEC = 2, 1
PAGE = 4096
WUNTRACED, WALL = 2, 0x40000000
ALL_SIGNALS = (1 << 64) - 1
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800
CLONE_THREAD, CLONE_SYSVSEM, CLONE_NEWPID = 0x10000, 0x40000, 0x20000000
THREAD_FLAGS = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM
BARRIERS = (task_state.ALONE, task_state.TOGETHER)


class Writer:
    """Writes the programs of one tree. ``programs``: thread id in the images → program."""

    def __init__(
        self, snapshot: Snapshot, ctx: BuildContext, memory: restore_memory.MemoryPlan, place: plan.Place
    ) -> None:
        self.snapshot = snapshot
        self.ctx = ctx
        self.memory = memory
        self.place = place
        self.programs: dict[int, Program] = {}
        self.kinds = resources.task_resources()
        #: Tasks that unmap the arena by themselves, as the last call of their program.
        self.unmapping: set[int] = set()
        #: Has the one task nothing to wait for on the way? Then it does not stop between its halves.
        self.straight = False
        #: Emits what the root does before anything else.
        self.prelude: Callable[[Program], None] | None = None
        self.heirs = restore_memory.heirs(snapshot)
        self._settled: set[int] = set()  # files that some task's program has seen to
        self._table_owners: dict[int, RestoredTask] = {}

    def write(self) -> None:
        """Write all of them anew."""
        self.programs.clear()
        self._settled.clear()
        self._table_owners.clear()
        self.memory.reads.clear()
        self.memory.fills.clear()
        self.unmapping.clear()
        for task in self.snapshot.tasks.values():
            self._write_programs(task)

    @property
    def size(self) -> int:
        """Bytes that all of them need in the arena."""
        return sum((program.size + 63) // 64 * 64 for program in self.programs.values())

    def _write_programs(self, task: RestoredTask) -> None:
        main = self._program(task.pid, "task")
        if not task.alive:
            self._write_short_life(task, main)
            return
        for thread in task.threads[1:]:
            self._program(thread.tid, "thread")
        parent = task.parent
        inherited = parent if task.pid in self.heirs else None
        if parent is None:
            inherited = self.memory.forebear
            if self.prelude is not None:
                self.prelude(main)
            for first, last in others(self.ctx.kept):
                main.call("close_range", first, last, 0, why="what we inherited by chance")
            cgroups_build.emit_namespace(main, task.pid, self.ctx)
        loginuid.emit(task, main, self.ctx)
        if self.snapshot.settings:
            self._emit_settings(task, main)
        shelf = self.memory.shelf
        if inherited is None and (parent is None or self._has_memory_when_forking(parent)):
            restore_memory.clear(self.place, main, shelf.region(task) if shelf is not None else (0, 0))
        elif shelf is not None and parent is not None:
            shelf.emit_drop_others(task, main)
        if inherited is None and self._is_shown_as_another(task):
            self.memory.emit_exe(task, main)
        if shelf is not None:
            shelf.emit_hold_back(task, main)
        for step, child in plan.steps_of(task, self.heirs).steps:
            if step == plan.FORK:
                assert child is not None
                self._emit_birth(task, child, main)
            elif step == plan.SETSID:
                main.call("setsid", why="session leader")
                tty.emit_session(task.pid, main, self.ctx)
            elif step == plan.MEMORY:
                self.memory.emit(task, main, inherited=inherited)
            else:
                self._emit_place(step, main)
        self._emit_fds(task, main)
        fs.emit(task.fs, main, self.ctx, own_mounts=bool(self.snapshot.mounts))
        for thread in task.threads[1:]:
            self._emit_thread(thread, main)
        self.memory.emit_opening(task, main)
        self.straight = self._is_straight()
        if not self.straight:
            self._emit_stop(task.own_pid, task.own_pid, main)
        self._write_second_half(task, main)

    def _emit_settings(self, task: RestoredTask, program: Program) -> None:
        from . import pid_settings

        if pid_settings.first_tasks(self.snapshot).get(task.space) is task:
            pid_settings.emit(self.snapshot.settings[task.space], program, self.ctx)

    def _is_straight(self) -> bool:
        alone = len(self.snapshot.tasks) == 1 and len(self.snapshot.root.threads) == 1
        return alone and not self.memory.fills and not self.memory.reads and not self.ctx.memo.get("after_mappings")

    def _program(self, tid: int, what: str) -> Program:
        program = self.programs.get(tid)
        if program is None:
            program = self.programs[tid] = Program(f"{what} {tid}")
        return program

    @staticmethod
    def _emit_stop(pid: int, tid: int, program: Program) -> None:
        program.call("tgkill", pid, tid, SIGTRAP, why="wait for the others")

    def _has_memory_when_forking(self, parent: RestoredTask) -> bool:
        while parent.helper and parent.parent is not None:
            parent = parent.parent  # whose memory, if any, a helper passes on
        if parent.parent is None and self.memory.forebear is not None:
            return True
        # An heir has it from its birth, even if no child of its own is to inherit it.
        return parent.alive and (parent.pid in self.heirs or any(child.pid in self.heirs for child in parent.children))

    def _is_shown_as_another(self, task: RestoredTask) -> bool:
        """Is it born with an ancestor's executable, not the stub's?"""
        while task.parent is not None:
            task = task.parent
            if self._has_memory_when_forking(task):
                return True
        return False

    def _write_short_life(self, task: RestoredTask, program: Program) -> None:
        """Zombies and helpers: they are born, lead or join a group, and end."""
        shelf = self.memory.shelf
        if shelf is not None:
            shelf.emit_hold_back(task, program)
        for step, child in plan.steps_of(task, set()).steps:
            if step == plan.FORK:
                assert child is not None
                self._emit_birth(task, child, program)
            elif step == plan.SETSID:
                program.call("setsid", why="session leader")
            elif step != plan.MEMORY:
                self._emit_place(step, program)
        self._emit_stop(task.own_pid, task.own_pid, program)
        if task.zombie:
            self._emit_join_group(task, program)
            zombies.emit_end(task, program, self.place.base)
        else:
            program.call("exit_group", 0, why="only needed as a leader")

    def _emit_birth(self, task: RestoredTask, child: RestoredTask, program: Program) -> None:
        """A child is born, with its part of the shelf if there is one."""
        shelf = self.memory.shelf
        if shelf is not None:
            shelf.emit_lend(task, child, program)
        self._emit_fork(task, child, program)
        if shelf is not None:
            shelf.emit_let_go(child, program)

    def _emit_fork(self, task: RestoredTask, child: RestoredTask, program: Program) -> None:
        flags = 0
        if task.alive and child.alive:
            if task.ids.files_id == child.ids.files_id:
                flags |= CLONE_FILES
            if task.ids.fs_id == child.ids.fs_id:
                flags |= CLONE_FS
        exit_signal = SIGCHLD
        if child.helper:
            exit_signal = 0
        elif child.core.tc.HasField("exit_signal"):
            exit_signal = child.core.tc.exit_signal
        if child.spaces != task.spaces and task.children_space != child.space:
            flags |= CLONE_NEWPID
        numbers = pid_spaces.set_tid(self.snapshot, child.pid, child.numbers)
        stub.emit_clone(program, flags, exit_signal, numbers, self._program(child.pid, "task"))

    def _emit_thread(self, thread: RestoredThread, program: Program) -> None:
        numbers = pid_spaces.set_tid(self.snapshot, thread.tid, thread.numbers)
        stub.emit_clone(program, THREAD_FLAGS, 0, numbers, self._program(thread.tid, "thread"))

    @staticmethod
    def _emit_place(step: str, program: Program) -> None:
        if step == plan.LEAD:
            program.call("setpgid", 0, 0, why="group leader")
        else:
            program.call("unshare", CLONE_NEWPID, why="the pid namespace of its children")

    def _emit_join_group(self, task: RestoredTask, program: Program) -> None:
        if task.group != task.pid and task.group in self.snapshot.tasks and task.groups[-1]:
            program.call("setpgid", 0, task.groups[-1], why="process group")

    def _emit_fds(self, task: RestoredTask, program: Program) -> None:
        if not self._owns_table(task):
            return
        built = self.ctx.built
        in_place = self.ctx.in_place
        rows = [
            (built[file_id], fd, os.O_CLOEXEC if cloexec else 0)
            for fd, file_id, cloexec in task.fds if fd not in in_place
        ]  # fmt: skip
        program.calls("dup3", rows)
        program.calls("fcntl", [(fd, F_SETFD, FD_CLOEXEC) for fd, _, cloexec in task.fds if cloexec and fd in in_place])

    def _owns_table(self, task: RestoredTask) -> bool:
        """Is it the first of the tasks that share its descriptor table?"""
        table = task.ids.files_id
        return self._table_owners.setdefault(table, task) is task

    def _write_second_half(self, task: RestoredTask, main: Program) -> None:
        """From the moment when all tasks exist: groups, what files need of their holders, the task's own state."""
        self.memory.emit_filled(task, main)
        self._emit_join_group(task, main)
        self.memory.emit_late(task, main)
        tty.emit_foreground(task.pid, main, self.ctx, functools.partial(self.snapshot.seen_by, task))
        if self._owns_table(task):
            self._emit_settle(task, main)
            for first, last in ranges([fd for fd in self.ctx.kept if fd not in self.ctx.in_place]):
                main.call("close_range", first, last, 0, why="the builder's descriptors")
        locks.emit(task, main, self.ctx)
        self.memory.emit_locks_and_seals(task, main)
        for thread in task.threads:
            self._write_state(thread)
        if conduct.has_epilogue(task):
            self._write_epilogue(task, main)

    def _write_epilogue(self, task: RestoredTask, program: Program) -> None:
        """Helpers are waited for, and the stops of children that the task knows of."""
        for child in task.children:
            number = child.numbers[len(task.numbers) - 1]
            if child.helper:
                program.call("wait4", number, 0, WALL, 0, why="the helper")
            elif child.stopped and child.core.tc.stop_reported:
                program.call("wait4", number, 0, WUNTRACED | WALL, 0, why="the stop is known")
            elif child.stopped:
                area = program.out(128)
                program.call("waitid", os.P_PID, number, area, os.WSTOPPED | os.WNOWAIT, 0, why="it has stopped")
        queued = {struct.unpack_from("<i", one.siginfo)[0] for one in task.core.tc.signals_s.signals}
        if SIGCHLD not in queued:
            mask = struct.pack("<Q", 1 << (SIGCHLD - 1))
            program.call("rt_sigtimedwait", mask, 0, bytes(16), 8, may_fail=(errno.EAGAIN,), why="old news")
        self._emit_stop(task.own_pid, task.own_pid, program)

    def _write_state(self, thread: RestoredThread) -> None:
        """The state of one thread. With several threads each waits twice on the way, see resources/task."""
        program = self.programs[thread.tid]
        pid, tid, main = thread.task.own_pid, thread.own_tid, thread.tid == thread.task.pid
        if not main:
            self._emit_stop(pid, tid, program)
        # Until the registers are set nothing is to be delivered but our own stops.
        unmaps = self._can_unmap(thread.task)
        ours = 1 << (SIGTRAP - 1) | unmaps << (SIGSEGV - 1)
        program.call("rt_sigprocmask", 2, struct.pack("<Q", ALL_SIGNALS & ~ours), 0, 8)
        waits = list(BARRIERS) if len(thread.task.threads) > 1 else []
        for kind in self.kinds:
            while waits and waits[0] <= kind.ORDER:
                waits.pop(0)
                self._emit_stop(pid, tid, program)
            if main or kind.PER == "thread":
                kind.restore(thread, thread.core, program, self.ctx)
        for _ in waits:
            self._emit_stop(pid, tid, program)
        if unmaps:
            self.unmapping.add(thread.task.pid)
            size = self.place.size + PAGE
            program.call("munmap", self.place.base, size, why="the arena; where it returns to nothing is left: a stop")
        else:
            self._emit_stop(pid, tid, program)

    @staticmethod
    def _can_unmap(task: RestoredTask) -> bool:
        """Is nothing to be done in the arena after the program? And may the fault of its end stay without a trace? The
        kernel resets the action for a SIGSEGV that is ignored when it has to send one (force_sig_info_to_task()).
        """
        return (
            len(task.threads) == 1 and not conduct.has_epilogue(task) and not restart.is_to_be_rebuilt(task.core)
            and not sigactions.ignores(task.core, SIGSEGV) and not pending.is_pending(task.core, SIGSEGV)
            and not pending.late(task.core)
        )  # fmt: skip

    def _emit_settle(self, task: RestoredTask, program: Program) -> None:
        files, settled, ctx = self.ctx.files, self._settled, self.ctx
        each, once, owned = _duties(ctx)
        for fd, file_id, _ in task.fds:
            if file_id in each:
                resource, entry = files[file_id]
                resource.settle_each(entry, fd, task, program, ctx)
        for fd, file_id, _ in (*task.fds, *self._in_flight(task)):
            if file_id in settled or not (file_id in once or file_id in owned):
                continue
            settled.add(file_id)
            resource, entry = files[file_id]
            if file_id in once:
                resource.settle(entry, fd, program, ctx)
            if file_id in owned:
                owner = self.snapshot.seen_by(task, entry.fown.pid) if len(task.spaces) > 1 else None
                emit_fown(entry.fown, fd, program, getattr(entry, "flags", 0), owner)

    def _in_flight(self, task: RestoredTask) -> list[tuple[int, int, bool]]:
        """(our descriptor, file id, False) of the files that are in flight in the task's sockets."""
        carriers: dict[int, int] = self.ctx.memo.get("in flight", {})  # file id → id of the socket
        if not carriers:
            return []
        held = {file_id for _, file_id, _ in task.fds}
        found = []
        for file_id, carrier in carriers.items():
            seen = {file_id}
            while carrier in carriers and carrier not in held and carrier not in seen:
                seen.add(carrier)
                carrier = carriers[carrier]
            if carrier in held and file_id in self.ctx.built:
                found.append((self.ctx.built[file_id], file_id, False))
        return found


def _duties(ctx: BuildContext) -> tuple[set[int], set[int], set[int]]:
    """The ids of the files of which something is to be done for each descriptor, once for each description, and to tell
    who owns it: few of many.
    """
    each: set[int] = set()
    once: set[int] = set()
    owned: set[int] = set()
    by_kind: dict[int, tuple[FileResource, list[tuple[int, Message]]]] = {}
    for file_id, (resource, entry) in ctx.files.items():
        by_kind.setdefault(resource.FD_TYPE, (resource, []))[1].append((file_id, entry))
    for resource, entries in by_kind.values():
        fields = entries[0][1].DESCRIPTOR.fields_by_name
        if resource.settles_each(ctx):
            each.update(file_id for file_id, _ in entries)
        if type(resource).settle is not FileResource.settle:
            once.update(file_id for file_id, _ in entries)
        if "fown" in fields:
            owned.update([file_id for file_id, entry in entries if (one := entry.fown).pid or one.signum])
            if "flags" in fields:
                owned.update([file_id for file_id, entry in entries if entry.flags & os.O_ASYNC])
    return each, once, owned


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The numbers as (first, last) ranges."""
    ordered = sorted(set(numbers))
    found: list[tuple[int, int]] = []
    parts = [(0, len(ordered))] if ordered else []
    while parts:
        start, end = parts.pop()
        if ordered[end - 1] - ordered[start] == end - 1 - start:
            if found and found[-1][1] + 1 == ordered[start]:
                found[-1] = (found[-1][0], ordered[end - 1])
            else:
                found.append((ordered[start], ordered[end - 1]))
        else:
            middle = (start + end) // 2
            parts += ((middle, end), (start, middle))
    return found


def others(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The ranges of descriptor numbers that are not among ``numbers``."""
    found: list[tuple[int, int]] = []
    start = 0
    for first, last in ranges(numbers):
        if first > start:
            found.append((start, first - 1))
        start = last + 1
    return [*found, (start, 0xFFFFFFFF)]
