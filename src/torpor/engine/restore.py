"""restore: compile the images into one program per task, start stubs with the right pids, run the programs, let go.

Everything before the first stub is planning and can be printed (``--explain``). From then on all tasks are traced with
EXITKILL: an error kills them all, and so does the death of this process.
"""

from __future__ import annotations

import errno
import os
import struct
import time

from .. import log, resources
from ..errors import ImageError, TorporError, Unsupported, UsageError, doing
from ..images import schema as pb
from ..images.store import ImageReader
from ..model.snapshot import RestoredTask, RestoredThread, Snapshot
from ..proc.read import alive
from ..remote import stub
from ..remote.program import Program
from ..resources import cgroups_build, fs, locks
from ..resources import task as task_state
from ..resources.base import BuildContext
from ..resources.files import regular, tty
from ..resources.fown import emit as emit_fown
from ..undo import Undo
from . import conduct, cpu, load, plan, restart, restore_memory
from .collector import Paused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..images.schema import Message
    from ..options import Options

SIGTRAP, SIGCHLD = 5, 17
WUNTRACED, WALL = 2, 0x40000000
ALL_SIGNALS = (1 << 64) - 1
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800
CLONE_THREAD, CLONE_SYSVSEM = 0x10000, 0x40000
THREAD_FLAGS = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM
FD_LIMIT = 1 << 20
MARGIN_FD = 16
ROOM_FDS = 1024  # what files, mappings and pages files may need above the tasks' own descriptors
BARRIERS = (task_state.ALONE, task_state.TOGETHER)


class RestoreResult:
    """A restored tree: ``pid`` of its root as we see it, all ``pids``, and the time it took in seconds."""

    __slots__ = ("pid", "pids", "total_s")

    def __init__(self, pid: int, pids: list[int], total_s: float) -> None:
        self.pid = pid
        self.pids = pids
        self.total_s = total_s


def restore(options: Options) -> RestoreResult:
    """Make the tree of processes again that ``options.images_dir`` holds; it runs when this returns.

    The root becomes a child of this process (of its parent with ``restore_sibling``). Raises TorporError; then no
    process, file or mount of the attempt is left.
    """
    started = time.monotonic()
    with doing("restore"), Paused():
        work = _Restore(options)
        try:
            work.plan()
            pids = work.run()
        except BaseException as error:
            work.ctx.on_failure.roll_back(error)
            raise
        finally:
            work.close()
    log.info("Restore finished successfully. Tasks resumed.")
    return RestoreResult(work.root_pid, pids, time.monotonic() - started)


def explain(options: Options) -> Iterator[str]:
    """What restore() would do in each task, a line a call, without doing it."""
    with doing("restore"):
        work = _Restore(options)
        try:
            work.plan()
            for task in work.snapshot.tasks.values():
                for thread in task.threads if task.alive else [None]:
                    program = work.programs[thread.tid if thread else task.pid]
                    yield f"{program.name}:"
                    yield from (f"  {line}" for line in program.explain())
        finally:
            work.ctx.on_failure.roll_back()
            work.close()


class _Restore:
    """One restore under way."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.undo = Undo()  # taken back in any case: what only the making needs
        self.programs: dict[int, Program] = {}
        self.settled: set[int] = set()  # files that some task's program has seen to
        self.snapshot = Snapshot()
        self.arena: stub.Arena | None = None
        self.root_pid = 0
        self.table_owners: dict[int, RestoredTask] = {}
        try:
            self.images_fd = os.open(options.images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"images directory `{options.images_dir}`: {error.strerror}") from None
        self.reader = ImageReader(self.images_fd)
        self.ctx = BuildContext(options, self.reader, self.undo)
        self.kinds = resources.task_resources()
        self.file_kinds = resources.FileKinds()

    def close(self) -> None:
        """Take back everything that tasks do not hold; after an error, everything."""
        self.undo.roll_back()
        for task in self.snapshot.tasks.values():
            if task.pages is not None:
                task.pages.close()
        for fd in self.ctx.kept:
            os.close(fd)
        self.ctx.kept.clear()
        if self.arena is not None:
            self.arena.close()
            self.arena = None
        os.close(self.images_fd)

    # ---------------------------------------------------------------------------------- planning

    def plan(self) -> None:
        """Load and check the images, make the shared objects, write every task's program."""
        self._raise_fd_limit()
        snapshot = self.snapshot
        load.load(self.reader, snapshot)
        self.helpers = plan.add_helpers(snapshot, self.options.shell_job)
        plan.check_sessions(snapshot)
        self._check()
        self._reserve_fds()
        cgroups_build.prepare(snapshot, self.ctx)
        self._build()
        memory = restore_memory.MemoryPlan(snapshot, self.ctx)
        self.memory = memory
        self.heirs = restore_memory.heirs(snapshot)
        self._place_arena(memory)

    def _check(self) -> None:
        """Everything that can be found out before anything is created."""
        for task in self.snapshot.tasks.values():
            for tid in {task.pid, *(thread.tid for thread in task.threads)}:
                if alive(tid):
                    raise Unsupported(
                        f"process id {tid} is in use",
                        hint="end that process, or restore in a pid namespace of its own",
                    )
            for thread in task.threads if task.alive else ():
                cpu.check(thread.core, thread.image)
                for kind in self.kinds:
                    with doing(f"task {thread.tid}"):
                        try:
                            kind.check(thread.core, self.ctx)
                        except ImageError as error:
                            raise _in_image(error, thread.image) from None
        conduct.check_vdso(self.snapshot)

    def _raise_fd_limit(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            self.undo.add("file descriptor limit", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
        self.fd_limit = hard

    def _reserve_fds(self) -> None:
        highest = max((fd for task in self.snapshot.tasks.values() for fd, _, _ in task.fds), default=2)
        self.ctx.first_free_fd = highest + MARGIN_FD
        if self.ctx.first_free_fd + ROOM_FDS > self.fd_limit:
            # Their numbers reach up to our limit: ours go into the gaps between them.
            taken = {fd for task in self.snapshot.tasks.values() for fd, _, _ in task.fds}
            self.ctx.gaps = (fd for fd in range(3, self.fd_limit) if fd not in taken)

    def _build(self) -> None:
        """Make open file descriptions, mapped files and shared memory."""
        for fd, key in self.options.inherit_fd:
            self.ctx.inherited[key] = self.ctx.keep(os.dup(fd))
        for entry in self.snapshot.files.values():
            resource = self.file_kinds.by_type.get(entry.type)
            if resource is None:
                raise Unsupported(f"file {entry.id}: type {pb.fd_types.Name(entry.type)} cannot be restored yet")
            own = getattr(entry, resource.FIELD)
            _check_file(entry.id, resource.FIELD, own)
            self.ctx.files[entry.id] = (resource, own)
        for task in self.snapshot.tasks.values():
            for fd, file_id, _ in task.fds:
                if file_id not in self.ctx.built:
                    with doing(f"task {task.pid}"), doing(f"fd {fd}"):
                        self.ctx.build(file_id)
        for hook in self.ctx.memo.get("after_build", ()):
            hook()
        restore_memory.prepare(self.snapshot, self.ctx)
        for task in self.snapshot.tasks.values():
            if task.alive:
                fs.prepare(task.fs, self.ctx)

    def _place_arena(self, memory: restore_memory.MemoryPlan) -> None:
        """Write all programs, then decide where they lie: the arena's address is known to them only when they are
        compiled.
        """
        spans = [
            (entry.start, entry.end)
            for layout in {id(task.mm): task.mm for task in self.snapshot.tasks.values() if task.alive}.values()
            for entry in layout.vmas
            if not entry.status & restore_memory.UNPLACED
        ]
        # The programs name the arena in two records only; their sizes do not depend on it. What is not used costs
        # nothing.
        size = sum(map(_generous_size, self.snapshot.tasks.values())) + (1 << 20) & -4096
        for _ in range(2):
            base = plan.hole(spans, size)
            self.programs = {}
            self.settled.clear()
            memory.reads.clear()
            memory.fills.clear()
            self.placeholder = _Place(base, size)
            self.ctx.memo["arena"] = (base, base + size)
            for task in self.snapshot.tasks.values():
                self._write_programs(task, memory)
            needed = sum((program.size + 63) // 64 * 64 for program in self.programs.values())
            needed = -(-(needed + restart.SCRATCH_BYTES) // 4096) * 4096 + 4096
            if needed <= size:
                return
            size = needed + (1 << 16)
        raise AssertionError("the programs grew as they were written again")

    # ------------------------------------------------------------------------------ the programs

    def _write_programs(self, task: RestoredTask, memory: restore_memory.MemoryPlan) -> None:
        main = self._program(task.pid, "task")
        if not task.alive:
            self._write_short_life(task, main, memory)
            return
        for thread in task.threads[1:]:
            self._program(thread.tid, "thread")
        parent = task.parent
        if parent is None:
            for first, last in others(self.ctx.kept):
                main.call("close_range", first, last, 0, why="what we inherited by chance")
            restore_memory.clear(self.placeholder, main)  # type: ignore[arg-type]
        heir = task.pid in self.heirs
        if parent is not None and not heir and self._has_memory_when_forking(parent):
            restore_memory.clear(self.placeholder, main)  # type: ignore[arg-type]
        for step, child in plan.steps_of(task, self.heirs).steps:
            if step == plan.FORK:
                assert child is not None
                self._emit_fork(task, child, main)
            elif step == plan.SETSID:
                main.call("setsid", why="session leader")
                tty.emit_session(task.pid, main, self.ctx)
            else:
                memory.emit(task, main, inherited=parent if heir else None)
        self._emit_group_leader(task, main)
        self._emit_fds(task, main)
        fs.emit(task.fs, main, self.ctx)
        for thread in task.threads[1:]:
            self._emit_thread(thread, main)
        memory.emit_opening(task, main)
        self._emit_stop(task.pid, task.pid, main)
        self._write_second_half(task, main, memory)

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
        return parent.alive and any(child.pid in self.heirs for child in parent.children)

    def _write_short_life(self, task: RestoredTask, program: Program, memory: restore_memory.MemoryPlan) -> None:
        """Zombies and helpers: they are born, lead or join a group, and end."""
        for step, child in plan.steps_of(task, set()).steps:
            if step == plan.FORK:
                assert child is not None
                self._emit_fork(task, child, program)
            elif step == plan.SETSID:
                program.call("setsid", why="session leader")
        self._emit_group_leader(task, program)
        self._emit_stop(task.pid, task.pid, program)
        if task.zombie:
            self._emit_join_group(task, program)
            program.call("prctl", 15, pb.get_bytes(task.core.tc.comm) + b"\0", why="name")
            program.call("setrlimit", 4, struct.pack("<QQ", 0, 0), why="no core dump")
            status = task.core.tc.exit_code
            if status & 0x7F:
                program.call("tgkill", task.pid, task.pid, status & 0x7F, why="end as it ended")
            program.call("exit_group", status >> 8 & 0xFF)
        else:
            program.call("exit_group", 0, why="only needed as a leader")

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
        self._emit_clone(program, flags, exit_signal, child.pid, self._program(child.pid, "task"))

    def _emit_thread(self, thread: RestoredThread, program: Program) -> None:
        self._emit_clone(program, THREAD_FLAGS, 0, thread.tid, self._program(thread.tid, "thread"))

    @staticmethod
    def _emit_clone(program: Program, flags: int, exit_signal: int, tid: int, child: Program) -> None:
        args = program.put(struct.pack("<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, 1, 0))
        program.pointer(args, 64, program.put(struct.pack("<i", tid)))
        program.call("clone3", args, 88, child=child, why=child.name)

    @staticmethod
    def _emit_group_leader(task: RestoredTask, program: Program) -> None:
        if task.group == task.pid and task.session != task.pid:
            program.call("setpgid", 0, 0, why="group leader")

    def _emit_join_group(self, task: RestoredTask, program: Program) -> None:
        if task.group != task.pid and task.group in self.snapshot.tasks:
            program.call("setpgid", 0, task.group, why="process group")

    def _emit_fds(self, task: RestoredTask, program: Program) -> None:
        if not self._owns_table(task):
            return
        for fd, file_id, cloexec in task.fds:
            program.call("dup3", self.ctx.built[file_id], fd, os.O_CLOEXEC if cloexec else 0)

    def _owns_table(self, task: RestoredTask) -> bool:
        """Is it the first of the tasks that share its descriptor table?"""
        table = task.ids.files_id
        return self.table_owners.setdefault(table, task) is task

    def _write_second_half(self, task: RestoredTask, main: Program, memory: restore_memory.MemoryPlan) -> None:
        """From the moment when all tasks exist: groups, what files need of their holders, the task's own state."""
        memory.emit_filled(task, main)
        self._emit_join_group(task, main)
        memory.emit_late(task, main)
        tty.emit_foreground(task.pid, main, self.ctx)
        if self._owns_table(task):
            self._emit_settle(task, main)
            for first, last in ranges(self.ctx.kept):
                main.call("close_range", first, last, 0, why="the builder's descriptors")
        locks.emit(task, main, self.ctx)
        memory.emit_locks_and_seals(task, main)
        for thread in task.threads:
            self._write_state(thread)
        if conduct.has_epilogue(task):
            self._write_epilogue(task, main)

    def _write_epilogue(self, task: RestoredTask, program: Program) -> None:
        """Helpers are waited for, and the stops of children that the task knows of."""
        for child in task.children:
            if child.helper:
                program.call("wait4", child.pid, 0, WALL, 0, why="the helper")
            elif child.stopped and child.core.tc.stop_reported:
                program.call("wait4", child.pid, 0, WUNTRACED | WALL, 0, why="the stop is known")
            elif child.stopped:
                area = program.out(128)
                program.call("waitid", os.P_PID, child.pid, area, os.WSTOPPED | os.WNOWAIT, 0, why="it has stopped")
        queued = {struct.unpack_from("<i", one.siginfo)[0] for one in task.core.tc.signals_s.signals}
        if SIGCHLD not in queued:
            mask = struct.pack("<Q", 1 << (SIGCHLD - 1))
            program.call("rt_sigtimedwait", mask, 0, bytes(16), 8, may_fail=(errno.EAGAIN,), why="old news")
        self._emit_stop(task.pid, task.pid, program)

    def _write_state(self, thread: RestoredThread) -> None:
        """The state of one thread. With several threads each waits twice on the way, see resources/task."""
        program = self.programs[thread.tid]
        pid, main = thread.task.pid, thread.tid == thread.task.pid
        if not main:
            self._emit_stop(pid, thread.tid, program)
        # Until the registers are set nothing is to be delivered but our own stops.
        program.call("rt_sigprocmask", 2, struct.pack("<Q", ALL_SIGNALS & ~(1 << (SIGTRAP - 1))), 0, 8)
        waits = list(BARRIERS) if len(thread.task.threads) > 1 else []
        for kind in self.kinds:
            while waits and waits[0] <= kind.ORDER:
                waits.pop(0)
                self._emit_stop(pid, thread.tid, program)
            if main or kind.PER == "thread":
                kind.restore(thread, thread.core, program, self.ctx)
        for _ in waits:
            self._emit_stop(pid, thread.tid, program)
        self._emit_stop(pid, thread.tid, program)

    def _emit_settle(self, task: RestoredTask, program: Program) -> None:
        for fd, file_id, _ in task.fds:
            resource, entry = self.ctx.files[file_id]
            resource.settle_each(entry, fd, task, program, self.ctx)
        for fd, file_id in [*((fd, file_id) for fd, file_id, _ in task.fds), *self._in_flight(task)]:
            resource, entry = self.ctx.files[file_id]
            if file_id in self.settled:
                continue
            self.settled.add(file_id)
            resource.settle(entry, fd, program, self.ctx)
            fown = entry.fown if "fown" in entry.DESCRIPTOR.fields_by_name else None
            if fown is not None:
                emit_fown(fown, fd, program, getattr(entry, "flags", 0))

    def _in_flight(self, task: RestoredTask) -> list[tuple[int, int]]:
        """(our descriptor, file id) of the files that are in flight in the task's sockets."""
        carriers: dict[int, int] = self.ctx.memo.get("in flight", {})  # file id → id of the socket
        held = {file_id for _, file_id, _ in task.fds}
        found = []
        for file_id, carrier in carriers.items():
            seen = {file_id}
            while carrier in carriers and carrier not in held and carrier not in seen:
                seen.add(carrier)
                carrier = carriers[carrier]
            if carrier in held and file_id in self.ctx.built:
                found.append((self.ctx.built[file_id], file_id))
        return found

    # ------------------------------------------------------------------------------- running them

    def run(self) -> list[int]:
        """Start the stubs, run the programs, let everybody go. Returns all pids."""
        arena = self.arena = stub.Arena(self.placeholder.base, self.placeholder.size)
        for program in self.programs.values():
            arena.place(program)
        for program in self.programs.values():
            arena.write(program)
        conductor = conduct.Conductor(self.snapshot, arena, self.programs, self.ctx)
        try:
            self.root_pid = conductor.launch(self.ctx.kept, sibling=self.options.restore_sibling)
            conductor.first_half()
            self.memory.check_reads(arena)
            self.memory.fill(arena)
            for hook in self.ctx.memo.get("after_mappings", ()):
                hook()
            conductor.second_half(self.kinds)
            conductor.epilogue(cpu)
            conductor.set_registers(cpu)
            if self.options.pidfile:
                self._write_pidfile()
            for hook in self.ctx.memo.get("after_restore", ()):
                hook()
            conductor.release()
            cgroups_build.freeze(self.ctx)
        except BaseException as error:
            conductor.abort()
            if isinstance(error, TorporError):
                log.error(str(error))
            raise
        return [task.pid for task in self.snapshot.tasks.values() if not task.helper]

    def _write_pidfile(self) -> None:
        from .pidfile import write

        write(self.options, self.root_pid, self.ctx.on_failure)


def _check_file(file_id: int, field: str, own: Message) -> None:
    """Raise ImageError for what no entry of files.img can be."""
    if own.id != file_id:
        raise ImageError("files.img", f"file {file_id}: {field}: id", f"{own.id} is another file's")
    if getattr(own, "flags", 0) >> 31:
        raise ImageError("files.img", f"file {file_id}: {field}: flags", f"{own.flags:#x} cannot be")
    position = getattr(own, "pos", 0)
    if position >> 63 and position != regular.NO_POSITION:
        raise ImageError("files.img", f"file {file_id}: {field}: pos", f"{position:#x} is beyond all files")


def _in_image(error: ImageError, image: str) -> ImageError:
    """What a part of a thread's state says about "core", said about the file that it came from."""
    if error.image != "core":
        return error
    return ImageError(image, error.field, error.what.removeprefix(f"core: {error.field}: "), hint=error.hint)


def ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """The numbers as (first, last) ranges."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def others(numbers: list[int]) -> list[tuple[int, int]]:
    """The ranges of descriptor numbers that are not among ``numbers``."""
    found: list[tuple[int, int]] = []
    start = 0
    for first, last in ranges(numbers):
        if first > start:
            found.append((start, first - 1))
        start = last + 1
    return [*found, (start, 0xFFFFFFFF)]


def _generous_size(task: RestoredTask) -> int:
    """More than the programs of a task will need in the arena."""
    mappings = len(task.mm.vmas) if task.alive else 0
    return (len(task.threads) + 1 << 16) + 512 * (mappings + len(task.runs) + len(task.fds))


class _Place:
    """Where the arena will be."""

    __slots__ = ("base", "size")

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size
