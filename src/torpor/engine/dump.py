"""dump: stop a tree, write what it is to images, then end it or let it go on.

Nothing is changed in the tasks but what `remote/guest.py` says, and everything that was stopped is let go whatever
happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time

from .. import log, resources
from ..collector import Paused
from ..errors import KernelError, UsageError, doing
from ..images import schema as pb
from ..images.store import ImageWriter
from ..linux import netns, ptrace
from ..model.snapshot import INIT_PID
from ..model.source import Mapping, SourceTask, SourceThread
from ..remote.guest import Guest
from ..remote.program import Program
from ..remote.tracee import Seized, see_stopped
from ..resources import cgroups, fs, locks, net_namespace, remap, sysv_ipc
from ..resources.base import DumpContext, TaskResource
from ..resources.files import tty
from ..undo import Undo
from . import collect, cpu, guests, paging, pid_settings, pid_spaces, preflight, rest
from . import home as homes
from .dump_files import FileDumper
from .dump_memory import MemoryDumper
from .hooks import Hooks
from .precopy import Precopy
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
MEMBERS_TIMEOUT_S = 2.0
F_GETFD = 1


class DumpResult:
    """What was dumped: counts (``early_pages``: those of ``pages`` that were copied while the tree ran), and times in
    seconds.
    """

    __slots__ = (
        "early_pages", "files", "frozen_s", "images_dir", "mappings", "pages", "pids", "shared_pages", "threads",
        "total_s",
    )  # fmt: skip

    def __init__(self, images_dir: str) -> None:
        self.images_dir = images_dir
        self.pids: list[int] = []
        self.threads = self.mappings = self.files = self.pages = self.shared_pages = self.early_pages = 0
        self.frozen_s = self.total_s = 0.0


def dump(pid: int, options: Options) -> DumpResult:
    """Write a snapshot of the tree of processes below and with ``pid`` to ``options.images_dir``.

    The tree is killed afterwards unless ``options.leave_running`` or ``leave_stopped`` is set. Raises TorporError; then
    the tree runs on as if nothing had been, and no image is left (all of them where it was the action "post-dump" that
    failed: they are complete).
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
            hooks = Hooks(options, directory)
            hooks.run("pre-dump", pid)
            paging.settle(lambda: collect.look(pid))
            holders: list[tuple[int, int]] = []
            hints: dict[Any, Any] = {}
            found = preflight.blockers(pid, options, thorough=False, guests=holders, hints=hints)
            if found and not holders:
                preflight.refuse(found)
            with ImageWriter(directory) as writer:
                _Dump(pid, options, writer, result, hooks, hints).run(holders)
    result.total_s = time.monotonic() - started
    log.info("Dumping finished successfully")
    return result


def resources_ready() -> None:
    """Load what every dump needs, while nothing is frozen; what this one needs besides, the preflight meets."""
    resources.task_resources()


class _Dump:
    """One dump under way."""

    def __init__(
        self, pid: int, options: Options, writer: ImageWriter, result: DumpResult, hooks: Hooks, hints: dict[Any, Any]
    ) -> None:
        self.root = pid
        self.hooks = hooks
        self.options = options
        self.writer = writer
        self.result = result
        self.seized = Seized(timeout_s=options.timeout or 10.0)
        self.ctx = DumpContext(options, writer)
        self.ctx.hints = hints
        self.precopy = Precopy(self.ctx, self.seized.timeout_s)
        self.tasks: dict[int, SourceTask] = {}
        self.kinds = resources.task_resources()
        self.varying = [kind for kind in self.kinds if type(kind).varies is not TaskResource.varies]
        self.cores: dict[int, Message] = {}
        self.getters: dict[object, tuple[Program, list[tuple[Any, Any]], Any]] = {}
        self.mappings: dict[object, list[Mapping]] = {}
        self.reported_stops: set[int] = set()
        self.restarts = Restarts()
        self.unread = tty.Unread(None)
        self.visit: netns.Visit
        self.levels: dict[int, Message] = {}

    def run(self, holders: list[tuple[int, int]]) -> None:
        """Dump the tree, from its network namespace. ``holders``: see guests.Guests."""
        try:
            if self.options.leave_running and self.options.precopy:
                self.precopy.run(self.root)
            with guests.Guests(holders, self.options) as told:
                if holders:  # what they do to get ready may take something out of the way, or put it there
                    preflight.check_tree(self.root, self.options)
                with netns.Visit(netns.of(self.root)) as visit:
                    self.visit = self.ctx.memo["network namespace"] = visit
                    self._run(told)
                told.taken()
        finally:
            self.precopy.close()

    def _run(self, told: guests.Guests) -> None:
        done = False
        try:
            home = homes.find(self.root)
            if home is not None:
                home.settle(self.ctx)
            self.restarts.look(collect.look(self.root))
            fresh = net_namespace.Fresh() if self.visit.elsewhere else None
            self._freeze()
            self._write(told, fresh)
            # Nobody looks at the images while the tree stands still: it need not wait until they are in place.
            early = self.options.leave_running and not self.hooks
            if early:
                self._go_on()
            self.precopy.complete()
            self.writer.commit()
            self._tell("post-dump")
            if not early:
                self._go_on()
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

    def _tell(self, moment: str) -> None:
        with self.visit.away():
            self.hooks.run(moment, self.root)

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

    def _write(self, told: guests.Guests, fresh: net_namespace.Fresh | None) -> None:
        collect.number_shared(self.tasks)
        preflight.check_frozen(self.tasks)
        self.levels = pid_spaces.levels_of(self.tasks, self.ctx.memo.get("home"), self.options.shell_job)
        told.check_frozen()
        self.memory = MemoryDumper(self.ctx, self.precopy)
        files = FileDumper(self.ctx)
        for task in self.tasks.values():
            if not task.zombie:
                with doing(f"task {task.pid}"):
                    collect.open_handles(task)
                    collect.read_mappings(task, self.mappings)
        rest.look(self.tasks, self.ctx)
        for task in self.tasks.values():
            if not task.zombie:
                with doing(f"task {task.pid}"):
                    self._run_getters(task)
        # From here on nothing runs in any task: what waits in a ring goes on waiting.
        rest.bring_to_rest(self.tasks, self.ctx, self._guest)
        if fresh is not None:
            self.ctx.undo.add("network-unlock", lambda: self._tell("network-unlock"))
            self._tell("network-lock")
            net_namespace.dump(self.visit, fresh, self.ctx)
        for task in self.tasks.values():
            with doing(f"task {task.pid}"):
                self._write_task(task, files)
        rest.require_stillness(self.ctx)
        files.finish()
        self.unread = tty.finish(self.ctx)
        self.memory.finish()
        locks.finish(self.ctx)
        sysv_ipc.finish(self.ctx)
        cgroups.finish(self.ctx)
        self._write_tree()
        home = self.ctx.memo.get("home")
        mounts = home.propagation() if home is not None and home.is_root else 0
        pid_settings.dump(self.tasks, self.levels, mounts, self.writer)
        self.result.threads = sum(len(task.threads) for task in self.tasks.values())
        self.result.pids = list(self.tasks)
        self.result.files = files.count
        self.result.mappings = self.memory.mappings
        self.result.pages = self.memory.pages
        self.result.early_pages = self.precopy.pages
        self.result.shared_pages = self.memory.shared_pages

    def _write_task(self, task: SourceTask, files: FileDumper) -> None:
        if task.zombie:
            self._write_zombie(task)
            return
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

    def _guest(self, task: SourceTask) -> Guest:
        return collect.guest_in(task, self.seized)

    def _run_getters(self, task: SourceTask) -> None:
        guest = self._guest(task)
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
        unclear = self._unclear(task) if main else []
        program, asked, brk = self._getters(thread, main, bool(unclear))
        stops = self._ask_stops(task, program) if main else []
        cloexec = [(fd, program.call("fcntl", fd, F_GETFD)) for fd in unclear]
        run = guest.run(thread.tid, thread.own_tid, program, thread.regs, thread.sigmask)
        if brk is not None:
            task.answers["brk"] = run.result(brk)
        for fd, answer in cloexec:
            task.answers[f"cloexec {fd}"] = run.result(answer)
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

    def _unclear(self, task: SourceTask) -> list[int]:
        """The descriptors of which fdinfo does not tell whether they are closed by exec: the flag is that of the
        description. Slaves of ptys that were opened by TIOCGPTPEER can be such.
        """
        if self.ctx.descriptors.table(task.pid):
            return []  # which tells
        found = []
        for fd, link in self.ctx.descriptors.links(task.pid):
            if "/pts/" in link and fcntl.fcntl(self.ctx.borrow(task, fd), fcntl.F_GETFL) & os.O_CLOEXEC:
                found.append(fd)
        return found

    def _getters(self, thread: SourceThread, main: bool, own: bool) -> tuple[Program, list[tuple[Any, Any]], Any]:
        """The program that asks a thread, (resource, where its answers are) and where that of brk(2) is.

        It is the same for many threads; not so where something is to be added (``own``), as for stopped children, or
        for timers.
        """
        alone = own or (main and any(child.stopped for child in thread.task.children))
        others = [kind.varies(thread) for kind in self.varying if main or kind.PER == "thread"]
        key = alone and thread.tid, main, len(thread.status.Groups), *others
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
                number = child.status.NSpid[len(task.status.NSpid) - 1]
                program.call("waitid", os.P_PID, number, area, os.WSTOPPED | os.WNOHANG | os.WNOWAIT, 0)
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
        net = net_namespace.NUMBER if self.visit.elsewhere else 0
        preflight.set_namespace_ids(entry, net=net, cgroup=cgroups.NUMBER if cgroups.is_own(self.root) else 0)
        if task.pid in self.levels:
            entry.pid_ns_id = self.levels[task.pid].ns_id[-1]
        return entry

    def _write_tree(self) -> None:
        for task in self.tasks.values():
            parent = self.tasks[task.ppid].vpid if task.ppid else 0
            threads = [thread.vtid for thread in task.threads] or [0]
            entry = pb.pstree_entry(pid=task.vpid, ppid=parent, pgid=task.group, sid=task.session, threads=threads)
            if task.pid in self.levels:
                entry.levels.CopyFrom(self.levels[task.pid])
            self.writer.append("pstree", entry)
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

    def _go_on(self) -> None:
        """Everything is known: end the tree, or let it go on."""
        if self.options.leave_running or self.options.leave_stopped:
            self.unread.put_back()
            self.ctx.undo.roll_back()
            asked = self._stop_all() if self.options.leave_stopped else []
            self.seized.release_all()
            self.result.frozen_s = time.monotonic() - self.frozen_at
            see_stopped(asked)
            return
        self.result.frozen_s = time.monotonic() - self.frozen_at
        self._kill_all()

    def _stop_all(self) -> list[int]:
        """Ask all to stop that are not stopped; their pids."""
        asked = [task.pid for task in self.tasks.values() if not task.zombie and not task.stopped]
        for pid in asked:
            os.kill(pid, signal.SIGSTOP)
        return asked

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
                if task.own_pid == INIT_PID and len(task.status.NSpid) > 1 and not self._await_members(task):
                    log.warning(
                        f"task {task.pid}: it is gone when those that were in its pid namespace have been collected"
                    )
                    continue
                _await_end(thread.tid, leave=ours)
        rest.await_end(self.ctx)

    def _await_members(self, init: SourceTask) -> bool:
        """The init of a pid namespace ends when all others in it have been waited for (zap_pid_ns_processes() in
        kernel/pid_namespace.c): by us, if their parent is gone and we are who orphans come to. False: it has not ended
        yet, as whoever they came to does not collect them.
        """
        depth = len(init.status.NSpid)
        members = [task.pid for task in self.tasks.values() if len(task.status.NSpid) >= depth and task is not init]
        deadline = time.monotonic() + MEMBERS_TIMEOUT_S
        while time.monotonic() < deadline:
            for pid in members:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, ptrace.WALL | os.WNOHANG)
            try:
                if os.waitid(os.P_PID, init.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG | ptrace.WALL):
                    return True
            except ChildProcessError:
                return True
            time.sleep(0.0005)
        return False


def _set_exit_signal(task: SourceTask, core: Message) -> None:
    if task.ppid and task.stat.exit_signal != signal.SIGCHLD:
        core.tc.exit_signal = task.stat.exit_signal & 0x7F


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
            many = "s" * (len(tids) > 1)
            yield f"task {one}: ptrace seize and interrupt {len(tids)} thread{many}: {', '.join(map(str, tids))}"
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
