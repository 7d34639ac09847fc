"""dump: stop a tree, write what it is to images, then end it or let it go on.

Nothing is changed in the tasks but what `remote/guest.py` says, and everything that was stopped is let go whatever
happens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from .. import log, resources
from ..errors import KernelError, UsageError, doing
from ..images import schema as pb
from ..images.store import ImageWriter
from ..linux import ptrace
from ..model.source import Mapping, SourceTask, SourceThread
from ..proc import maps as proc_maps
from ..remote.guest import Guest
from ..remote.program import Program
from ..remote.tracee import Seized
from ..resources import cgroups, fs, locks, remap
from ..resources.base import DumpContext
from ..resources.files import tty
from ..undo import Undo
from . import collect, cpu, preflight
from .collector import Paused
from .dump_files import FileDumper
from .dump_memory import MemoryDumper
from .restart import Restarts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..images.schema import Message
    from ..options import Options

VERSION = "0.1.0"
TASK_ALIVE, TASK_DEAD, TASK_STOPPED = 1, 2, 3
MACHINE_X86_64 = 1
SIGINFO_BYTES = 128


class DumpResult:
    """What was dumped: counts, bytes of page data, and times in seconds."""

    __slots__ = ("files", "frozen_s", "images_dir", "mappings", "pages", "pids", "shared_pages", "threads", "total_s")

    def __init__(self, images_dir: str) -> None:
        self.images_dir = images_dir
        self.pids: list[int] = []
        self.threads = self.mappings = self.files = self.pages = self.shared_pages = 0
        self.frozen_s = self.total_s = 0.0


def dump(pid: int, options: Options) -> DumpResult:
    """Write a snapshot of the tree of processes below and with ``pid`` to ``options.images_dir``.

    The tree is killed afterwards unless ``options.leave_running`` or ``leave_stopped`` is set. Raises TorporError; then
    the tree runs on as if nothing had been, and no image is left.
    """
    started = time.monotonic()
    with doing("dump"), Paused():
        preflight.check_target(pid)
        resources_ready()
        with Undo() as undo:
            try:
                directory = os.open(options.images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise UsageError(f"images directory `{options.images_dir}`: {error.strerror}") from None
            undo.add("images directory", lambda: os.close(directory))
            result = DumpResult(options.images_dir)
            preflight.check_tree(pid, options)
            with ImageWriter(directory) as writer:
                _Dump(pid, options, writer, result).run()
    result.total_s = time.monotonic() - started
    log.info("Dumping finished successfully")
    return result


def resources_ready() -> None:
    """Load every module that a dump may need, while nothing is frozen."""
    resources.FileKinds()
    resources.task_resources()
    resources.MappingKinds()


class _Dump:
    """One dump under way."""

    def __init__(self, pid: int, options: Options, writer: ImageWriter, result: DumpResult) -> None:
        self.root = pid
        self.options = options
        self.writer = writer
        self.result = result
        self.seized = Seized(timeout_s=options.timeout or 10.0)
        self.ctx = DumpContext(options, writer)
        self.tasks: dict[int, SourceTask] = {}
        self.kinds = resources.task_resources()
        self.cores: dict[int, Message] = {}
        self.getters: dict[object, tuple[Program, list[tuple[Any, Any]], Any]] = {}
        self.mappings: dict[object, list[Mapping]] = {}
        self.reported_stops: set[int] = set()
        self.restarts = Restarts()
        self.unread = tty.Unread(None)

    def run(self) -> None:
        done = False
        try:
            self.restarts.look(collect.look(self.root))
            self._freeze()
            self._write()
            self.writer.commit()
            if self.options.leave_running or self.options.leave_stopped:
                self.unread.put_back()
                self.ctx.undo.roll_back()
            self._finish()
            self.unread.forget()
            self.ctx.undo.commit()
            done = not self.options.leave_running
        finally:
            if not done:
                self.unread.put_back()
            self.ctx.undo.roll_back()
            self.seized.release_all()
            if not done:
                remap.remove_links(self.ctx)
            for task in self.tasks.values():
                collect.close_handles(task)
            self.restarts.close()
            self.ctx.close()

    def _freeze(self) -> None:
        self.frozen_at = time.monotonic()
        self.tasks = collect.freeze(self.root, self.seized)
        self.ctx.tasks = self.tasks
        for task in self.tasks.values():
            for thread in task.threads:
                self.restarts.mend(thread)
        self.freezing_s = time.monotonic() - self.frozen_at
        threads = sum(len(task.threads) for task in self.tasks.values())
        log.info(f"freeze: {len(self.tasks)} tasks, {threads} threads in {self.freezing_s * 1e3:.1f} ms")

    def _write(self) -> None:
        collect.number_shared(self.tasks)
        preflight.check_frozen(self.tasks)
        self.memory = MemoryDumper(self.ctx)
        files = FileDumper(self.ctx)
        for task in self.tasks.values():
            with doing(f"task {task.pid}"):
                self._write_task(task, files)
        files.finish()
        self.unread = tty.finish(self.ctx)
        self.memory.finish()
        locks.finish(self.ctx)
        cgroups.finish(self.ctx)
        self._write_tree()
        self.result.threads = sum(len(task.threads) for task in self.tasks.values())
        self.result.pids = list(self.tasks)
        self.result.files = files.count
        self.result.mappings = self.memory.mappings
        self.result.pages = self.memory.pages
        self.result.shared_pages = self.memory.shared_pages

    def _write_task(self, task: SourceTask, files: FileDumper) -> None:
        if task.zombie:
            self._write_zombie(task)
            return
        collect.open_handles(task)
        collect.read_mappings(task, self.mappings)
        self._run_getters(task)
        files.dump_task(task)
        self.writer.write_one(f"fs-{task.vpid}", fs.dump(self.ctx, task))
        self.writer.write_one(f"ids-{task.vpid}", self._ids(task))
        self.memory.dump_task(task)
        for thread in task.threads:
            self.writer.write_one(f"core-{thread.vtid}", self.cores[thread.tid])

    def _write_zombie(self, task: SourceTask) -> None:
        core = pb.core_entry(mtype=MACHINE_X86_64)
        core.tc.task_state = TASK_DEAD
        core.tc.exit_code = task.stat.exit_code
        _set_exit_signal(task, core)
        core.tc.personality = 0
        core.tc.flags = task.stat.flags
        core.tc.blk_sigset = 0
        pb.put_bytes(core.tc, "comm", task.stat.comm)
        self.writer.write_one(f"core-{task.vpid}", core)

    def _run_getters(self, task: SourceTask) -> None:
        in_use = task.status.SigCgt | task.status.ShdPnd
        for thread in task.threads:
            in_use |= thread.status.SigPnd
        guest = Guest(task.pid, task.vpid, task.mem_fd, rooms_for_guest(task), in_use, self.seized)
        try:
            for thread in task.threads:
                with doing(f"thread {thread.tid}"):
                    self.cores[thread.tid] = self._core(guest, thread)
        finally:
            guest.leave()

    def _core(self, guest: Guest, thread: SourceThread) -> Message:
        task = thread.task
        main = thread.tid == task.pid
        self.restarts.settle(thread)
        program, asked, brk = self._getters(thread, main)
        stops = self._ask_stops(task, program) if main else []
        run = guest.run(thread.tid, thread.vtid, program, thread.regs, thread.sigmask)
        if brk is not None:
            task.answers["brk"] = run.result(brk)
        for pid, area in stops:
            if not any(run.bytes(area)):
                self.reported_stops.add(pid)
        core = pb.core_entry(mtype=MACHINE_X86_64)
        cpu.dump(thread, core, self.restarts.dump(thread, core))
        if main:
            self._task_core(task, core)
        for kind, answer in asked:
            kind.dump(thread, run, answer, core, self.ctx)
        cgroups.dump_thread(thread, core, self.ctx)
        return core

    def _getters(self, thread: SourceThread, main: bool) -> tuple[Program, list[tuple[Any, Any]], Any]:
        """The program that asks a thread, (resource, where its answers are) and where that of brk(2) is.

        It is the same for many threads; not so where something is to be added for stopped children.
        """
        alone = main and any(child.stopped for child in thread.task.children)
        key = alone and thread.tid, main, len(thread.status.Groups)
        known = self.getters.get(key)
        if known is None:
            program = Program("getters")
            asked = [
                (kind, kind.ask(program, thread)) for kind in self.kinds if main or kind.PER == "thread"
            ]
            known = self.getters[key] = program, asked, program.call("brk", 0) if main else None
        return known

    @staticmethod
    def _ask_stops(task: SourceTask, program: Program) -> list[tuple[int, Any]]:
        """Ask for each stopped child whether the task has still to be told of the stop; it stays as it is."""
        asked = []
        for child in task.children:
            if child.stopped:
                area = program.out(SIGINFO_BYTES)
                program.call("waitid", os.P_PID, child.vpid, area, os.WSTOPPED | os.WNOHANG | os.WNOWAIT, 0)
                asked.append((child.pid, area))
        return asked

    def _task_core(self, task: SourceTask, core: Message) -> None:
        core.tc.task_state = TASK_STOPPED if task.stopped else TASK_ALIVE
        if task.stopped:
            core.tc.stop_signo = task.threads[0].stop.signal
            core.tc.stop_reported = task.pid in self.reported_stops
        core.tc.exit_code = 0
        _set_exit_signal(task, core)
        core.tc.flags = task.stat.flags
        pb.put_bytes(core.tc, "comm", task.stat.comm)

    def _ids(self, task: SourceTask) -> Message:
        entry = pb.task_kobj_ids_entry(
            vm_id=task.ids["vm"], files_id=task.ids["files"], fs_id=task.ids["fs"], sighand_id=task.ids["sighand"]
        )
        preflight.set_namespace_ids(entry)
        return entry

    def _write_tree(self) -> None:
        for task in self.tasks.values():
            parent = self.tasks[task.ppid].vpid if task.ppid else 0
            threads = [thread.vtid for thread in task.threads] or [0]
            self.writer.append(
                "pstree",
                pb.pstree_entry(pid=task.vpid, ppid=parent, pgid=task.group, sid=task.session, threads=threads),
            )
        inventory = pb.inventory_entry(
            img_version=2, fdinfo_per_id=True, ns_per_id=True, root_cg_set=cgroups.OWN_SET, lsmtype=0
        )
        self._write_network(inventory)
        inventory.root_ids.CopyFrom(pb.task_kobj_ids_entry(vm_id=1, files_id=1, fs_id=1, sighand_id=1))
        preflight.set_namespace_ids(inventory.root_ids)
        inventory.plugins_entry.SetInParent()
        inventory.torpor = VERSION
        self.writer.write_one("inventory", inventory)
        self.writer.write_one("seccomp", self.ctx.memo.get("seccomp") or pb.seccomp_entry())
        self._write_stats()

    def _write_network(self, inventory: Message) -> None:
        lock = self.ctx.memo.get("network lock")
        inventory.network_lock_method = lock.method if lock else 2  # skip
        if lock and lock.run_id:
            inventory.dump_criu_run_id = lock.run_id
        if self.options.tcp_close:
            inventory.tcp_close = True

    def _write_stats(self) -> None:
        stats = pb.stats_entry()
        frozen_us = int((time.monotonic() - self.frozen_at) * 1e6)
        stats.dump.freezing_time = int(self.freezing_s * 1e6)
        stats.dump.frozen_time = frozen_us
        stats.dump.memdump_time = int(self.memory.seconds * 1e6)
        stats.dump.memwrite_time = int(self.memory.seconds * 1e6)
        stats.dump.pages_scanned = self.memory.pages
        stats.dump.pages_skipped_parent = 0
        stats.dump.pages_written = self.memory.pages
        stats.dump.pages_lazy = 0
        stats.dump.shpages_written = self.ctx.memo.get("shared pages", 0)
        self.writer.write_one("stats-dump", stats)

    def _finish(self) -> None:
        """The images are complete: end the tree, or let it go on."""
        if self.options.leave_running or self.options.leave_stopped:
            if self.options.leave_stopped:
                self._stop_all()
            self.seized.release_all()
            self.result.frozen_s = time.monotonic() - self.frozen_at
            return
        self.result.frozen_s = time.monotonic() - self.frozen_at
        self._kill_all()

    def _stop_all(self) -> None:
        for task in self.tasks.values():
            if not task.zombie and not task.stopped:
                os.kill(task.pid, signal.SIGSTOP)

    def _kill_all(self) -> None:
        """Kill the tree and see it gone. Children first: nobody is to be told of a child's death and act on it."""
        for task in reversed(self.tasks.values()):
            if task.zombie:
                continue
            try:
                os.kill(task.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for task in reversed(self.tasks.values()):
            for thread in reversed(task.threads):
                self.seized.forget(thread.tid)
                # Other threads are taken in any case: until then the end of the main one is told to nobody.
                ours = task.stat.ppid == os.getpid() and thread.tid == task.pid
                _await_end(thread.tid, leave=ours)


def _set_exit_signal(task: SourceTask, core: Message) -> None:
    if task.ppid and task.stat.exit_signal != signal.SIGCHLD:
        core.tc.exit_signal = task.stat.exit_signal & 0x7F


def rooms_for_guest(task: SourceTask) -> list[int]:
    """The ends of the task's mappings of code, where ours may lie for a moment: the vDSO's first.

    The others are for programs that have unmapped it: the last page of a segment of code is padded with zeros.
    """
    vdso = [mapping.vma.end for mapping in task.mappings if mapping.vma.kind == proc_maps.VDSO]
    code = [
        mapping.vma.end
        for mapping in task.mappings
        if mapping.vma.kind == proc_maps.FILE
        and mapping.vma.prot & proc_maps.PROT_EXEC
        and mapping.vma.flags & proc_maps.MAP_PRIVATE
    ]
    return vdso + code


def _await_end(tid: int, *, leave: bool) -> None:
    """Wait for the exit of a tracee that was killed; its parent is told afterwards.

    ``leave``: we are its parent too, and whoever started it in this process is to find its exit status.
    """
    try:
        if leave:
            os.waitid(os.P_PID, tid, os.WEXITED | os.WNOWAIT)
        else:
            os.waitpid(tid, ptrace.WALL)
    except ChildProcessError:
        pass





def explain(pid: int, options: Options) -> Iterator[str]:
    """What dump() would do to the tree, a line a step, without doing it: nothing is stopped."""
    with doing("dump"):
        preflight.check_target(pid)
        preflight.check_tree(pid, options)
        for one, (parent, stat) in collect.look(pid).items():
            if stat.state in "ZX":
                yield f"task {one}: has ended: its exit status is stored"
                continue
            task = collect.running(one, parent)
            tids = [thread.tid for thread in task.threads]
            yield f"task {one}: ptrace seize and interrupt {len(tids)} threads: {', '.join(map(str, tids))}"
            for thread in task.threads:
                program = Program(f"getters of {thread.tid}")
                for kind in resources.task_resources():
                    if thread.tid == one or kind.PER == "thread":
                        with contextlib.suppress(KernelError):  # some look at it by ptrace, and it is not stopped
                            kind.ask(program, thread)
                yield f"thread {thread.tid} itself runs, in memory of its own for the moment:"
                yield from (f"  {line}" for line in program.explain())
            yield f"task {one}: read {len(preflight.quick_mappings(one))} mappings and the pages in them"
        yield f"write the images to {options.images_dir}"
        yield "let the tree go on" if options.leave_running else "kill the tree"
