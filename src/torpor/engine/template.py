"""Templates: a snapshot whose memory is restored once, and forked for each copy of the tree.

::

    holder (we) ─┬─ the held stub: the root's memory, complete; never runs an instruction of the program
                 ├─ init of copy 1 ── root of copy 1 ── …
                 └─ init of copy 2 ── root of copy 2 ── …

A copy is what a plain restore makes, by the same programs, but for the memory of its root, which is there when it is
born. It takes these steps: the held stub clones the copy's init (in new pid and mount namespaces, sharing the stub's
memory, which an init does not need); the init forks the root, with the memory; the builder (we) makes the copy's own
open files, of which the root gets its own table with the first call of its program, which does the rest. The first two
are done ahead of time where nothing has to be done in between. Nothing but memory that nobody has written to is shared
with the siblings.

The held stub is traced and dies with us, and so does a copy that is not complete; complete ones live on.
"""

from __future__ import annotations

import os
import signal
import time
from _thread import get_ident

from .. import log
from ..collector import Paused
from ..errors import TaskGone, TorporError, Unsupported, UsageError, doing
from ..linux import ptrace
from ..model.snapshot import INIT_PID, Snapshot
from ..proc import maps as proc_maps
from ..proc import stat as proc_stat
from ..proc.read import read
from ..remote import held, machine, stub
from ..remote.held import CLONE_FILES, Inits
from ..remote.program import Program
from ..resources import MappingKinds, cgroups_build, generation, net_namespace, own_shm, sysv_ipc
from ..resources.base import BuildContext
from ..resources.unix_names import RENAMED
from ..undo import Undo
from . import conduct, plan, restore_memory, shelf
from .copies import Connections, CopyOptions, Wishes, check_fresh, renumbered
from .forebear import forebear as make_forebear
from .loaded import Loaded
from .overlays import OPENED, Wanted, opened_for_writing
from .own_mounts import Needed
from .programs import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from ..images.schema import Message
    from ..options import Options
    from .annex import Annex
    from .overlays import Overlays
    from .own_mounts import OwnMounts

#: Where the builder's descriptors begin: what the caller opens meanwhile should not change their numbers.
FIRST_FD = 512
#: What copies may have in common of what was made for the template: (first word of a key in ctx.memo).
LASTING = (
    "pages", "map", "exe", "directory", "remaps", "cgroups", "inet place", "last pid", RENAMED, OPENED, own_shm.MEMO,
)  # fmt: skip


class Copy:
    """One copy of the tree: ``pid`` of its root as we see it. ``waits_for`` is the child of ours that ends with it: the
    init of its pid namespace, or the root itself. ``written_to`` is the folder with the upper layers of its overlays,
    "" if that is no place of the file system.
    """

    __slots__ = ("pid", "total_s", "waits_for", "written_to")

    def __init__(self, pid: int, waits_for: int, total_s: float, written_to: str = "") -> None:
        self.pid = pid
        self.waits_for = waits_for
        self.total_s = total_s
        self.written_to = written_to

    def __repr__(self) -> str:
        return f"<copy {self.pid}>"

    def kill(self) -> None:
        """Kill the copy, all of it. A copy that has ended and was not waited for is no error."""
        with doing(f"copy {self.pid}"):
            os.kill(self.waits_for, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end of its root; returns its exit status, 128 + N if signal N ended it."""
        status = self.poll(0)
        assert status is not None
        return status

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        """As :meth:`wait`, but None if it has not ended yet."""
        pid, status = os.waitpid(self.waits_for, ptrace.WALL | flags)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


class Template:
    """A snapshot that is ready to be copied. Use it as a context manager, in the thread that made it.

    Copies are children of this process, to be waited for; they outlive the template.
    """

    def __init__(self, options: Options) -> None:
        """Read the snapshot and restore the memory of its root. Raises TorporError; then nothing is left."""
        # The memory that copies inherit by forking has to be there.
        self.options = options.replace(own_pids=True, fresh=True, map=False).freeze()
        self.copies = 0
        self.overlays = Wanted.of(options)
        self._thread = get_ident()
        #: What is asked of a copy, as far as its programs depend on it → its programs
        self.recorded: dict[tuple[object, ...], _Recorded] = {}
        self._candidates: dict[tuple[object, ...], _Recorded] = {}
        self.states: dict[tuple[int, bool], conduct.State] = {}
        self.arena: stub.Arena  # from here on set by _start()
        self.inits: Inits
        self._ending = Undo()
        self.loaded = Loaded(self.options)
        self._ending.add("images directory", lambda: os.close(self.loaded.images_fd))
        self._ending.add("images", self.loaded.close)
        self.ctx = BuildContext(self.options, self.loaded.reader, self.loaded.undo)
        self._ending.add("descriptors", self._close_kept)
        self.pid = 0
        try:
            with doing("template"), Paused():
                self._prepare()
                self._start()
        except BaseException as error:
            self.close(error)
            raise
        log.info(f"template of {options.images_dir}: process {self.pid} is held")

    def __enter__(self) -> Template:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """End the template. Copies that run are not touched."""
        self.pid = 0
        if error is not None:
            self.ctx.on_failure.roll_back(error)
        self._ending.roll_back(error)

    def _close_kept(self) -> None:
        for fd in self.ctx.kept:
            os.close(fd)

    def alive(self) -> bool:
        """Is the held process still there?"""
        try:
            return bool(self.pid) and proc_stat.parse(read(self.pid, "stat")).state not in "ZX"
        except TaskGone:
            return False

    # ------------------------------------------------------------------------------- the template

    def _prepare(self) -> None:
        if self.options.action_script or self.options.notify is not None:
            raise UsageError("action scripts do not go with a template: its copies are made in too short a time")
        self.loaded.read(self.ctx)
        net_namespace.refuse(self.loaded.snapshot)
        self.loaded.lend(self.ctx, FIRST_FD)
        self.loaded.register_files(self.ctx)
        snapshot = self.loaded.snapshot
        self.needed = Needed(snapshot, self.ctx, self.overlays)
        if snapshot.root.zombie:
            raise Unsupported("the root of the snapshot has ended: there is nothing to copy")
        cgroups_build.prepare(snapshot, self.ctx)
        #: (resource, entry) of mappings that each copy has for itself
        self.own_mappings = restore_memory.prepare(snapshot, self.ctx, inheritable=True)
        self.loaded.build_directories(self.ctx)
        self.forebear = make_forebear(snapshot, self.ctx)
        memory = restore_memory.MemoryPlan(snapshot, self.ctx, self.forebear)
        self.shelf = shelf.plan(snapshot, memory, self.ctx)
        self.connections = Connections(snapshot, self.options)
        self.ctx.memo[OPENED] = opened_for_writing(snapshot)
        self.lasting = {key: value for key, value in self.ctx.memo.items() if _first_word(key) in LASTING}

    def _start(self) -> None:
        self.place = self._find_place()
        arena = self.arena = stub.Arena(self.place.base, self.place.size)
        self._ending.add("arena", arena.close)
        # Not to the end of the file: its last page is unmapped with what there was before (restore_memory.clear()).
        start = self.place.base - self.shelf.size
        self.lasting["arena"] = self.ctx.memo["arena"] = (start, self.place.base + self.place.size)
        pid = self.pid = held.launch(arena)
        self._ending.add("held stub", lambda: stub.kill([pid]))
        self._restore_memory()
        for kind in self.loaded.kinds:
            if kind.INHERITED:
                kind.outside(self.forebear, self.forebear.core, self.ctx)
        self.inits = Inits(self.pid, arena, self.loaded.snapshot.root.pid)
        self._ending.add("inits that nobody has taken", self.inits.close)
        self.mark = arena.mark()

    def _find_place(self) -> plan.Place:
        """Where the arena is to be, behind the shelf if there is room for one."""
        ours = proc_maps.parse(read(os.getpid(), "maps"))
        try:
            place = self.loaded.place_arena(ours, self.shelf.size)
        except Unsupported as error:
            if not self.shelf.size:
                raise
            log.info(f"template: memory of tasks below the root is read for each copy: {error}")
            self.shelf = shelf.Shelf()
            self.shelf.lay(self.loaded.snapshot.root, {})
            place = self.loaded.place_arena(ours)
        self.shelf.place(place.base)
        return place

    def _restore_memory(self) -> None:
        """All of it that the copies have in common, in the held stub."""
        snapshot, task, arena = Snapshot(), self.forebear, self.arena
        snapshot.tasks[task.pid] = snapshot.root = task
        task.live_pid = self.pid
        memory = restore_memory.MemoryPlan(snapshot, self.ctx)
        program = Program("executable of the template")
        restore_memory.clear(self.place, program)
        memory.emit_exe(task, program)
        held.run(self.pid, arena, program)
        self._fill_shelf()
        program = Program("memory of the template")
        memory.emit(task, program, inherited=None)
        memory.emit_opening(task, program)
        held.run(self.pid, arena, program)
        memory.check_reads(arena)
        memory.fill(arena)
        for one in memory.fills.values():
            os.close(one.opened(arena))  # its descriptors are ours

    def _fill_shelf(self) -> None:
        snapshot, arena = self.loaded.snapshot, self.arena
        memory = restore_memory.MemoryPlan(snapshot, self.ctx)

        def run(program: Program) -> None:
            held.run(self.pid, arena, program)
            memory.check_reads(arena)
            memory.reads.clear()

        self.shelf.fill(snapshot, memory, run)

    # --------------------------------------------------------------------------------- the copies

    def clone(self, options: CopyOptions | None = None, **wishes: Any) -> Copy:
        """Make one copy; it runs when this returns. ``wishes`` are those of :class:`~.copies.CopyOptions`.

        Raises TorporError; then nothing of it is left.
        """
        if not self.pid:
            raise UsageError("the template has ended")
        if get_ident() != self._thread:  # ptrace(2) knows threads
            raise UsageError("a template makes copies in the thread that made it", hint="one template for each thread")
        what = CopyOptions(**wishes) if wishes else options
        started = time.monotonic()
        with doing(f"copy {self.copies + 1}"), Paused():
            work = _Copying(self, what)
            try:
                work.build()
                pid, waits_for = work.run()
            except BaseException as error:
                work.ctx.on_failure.roll_back(error)
                raise
            finally:
                work.close()
                self._prepare_next()
        self.copies += 1
        written_to = work.overlays.folder if work.overlays is not None else ""
        return Copy(pid, waits_for, time.monotonic() - started, written_to)

    def _prepare_next(self) -> None:
        """Have what the next copy needs made meanwhile. A failure is that one's business, not of the one that runs."""
        try:
            self.inits.keep_ready()
        except TorporError as error:
            log.info(f"no init for the next copy yet: {error}")

    def record(self, shape: tuple[object, ...], recorded: _Recorded) -> None:
        """Keep the programs of a copy, once they were the same for two that had the same numbers: then nothing but
        the numbers went into them.
        """
        last = self._candidates.get(shape)
        self._candidates[shape] = recorded
        if last is not None and last.numbers == recorded.numbers and last.content == recorded.content:
            self.recorded[shape] = recorded


class _Recorded:
    """The programs of a copy, which serve for others whose files have the same numbers."""

    __slots__ = ("content", "numbers", "writer")

    def __init__(self, copying: _Copying, numbers: object, content: bytes) -> None:
        self.numbers = numbers
        self.writer = copying.writer
        self.content = content


class _Copying:
    """One copy under way."""

    def __init__(self, template: Template, options: CopyOptions | None) -> None:
        self.template = template
        self.snapshot = template.loaded.snapshot
        self.undo = Undo()
        lasting = template.ctx
        ctx = self.ctx = BuildContext(template.options, template.loaded.reader, self.undo)
        ctx.files = lasting.files
        template.loaded.reserve_fds(ctx, FIRST_FD)
        ctx.inherited = lasting.inherited
        ctx.kept = list(lasting.kept)
        ctx.memo = dict(template.lasting)
        overlays = options.overlays if options is not None and options.overlays else template.overlays
        if options is None and (overlays or template.needed):
            options = CopyOptions()
        self.wishes = (
            Wishes(options, self.snapshot, ctx, overlays, template.needed) if options is not None else None
        )
        self.forebear, self.shelf = template.forebear, template.shelf
        #: Is the root the init of its pid namespace?
        self.as_init = self.snapshot.root.own_pid == INIT_PID
        self.writer: Writer

    @property
    def overlays(self) -> Overlays | None:
        """Those of the copy, once they are made."""
        mounts = self._mounts
        return mounts.overlays if mounts is not None else None

    @property
    def _mounts(self) -> OwnMounts | None:
        return self.wishes.own_mounts if self.wishes is not None else None

    def close(self) -> None:
        """Give back everything that the copy does not hold; after an error, everything."""
        self.undo.roll_back()
        for fd in self.ctx.kept[len(self.template.ctx.kept) :]:
            os.close(fd)
        self.template.arena.rewind(self.template.mark)

    def build(self) -> None:
        """Make what the copy has for itself."""
        if not (self.wishes is not None and self.wishes.options.net):
            self.template.connections.check()
        if self.wishes is not None:
            self.wishes.apply(self.snapshot)
        if self._mounts is None:
            self._build(self.template.own_mappings)
        elif self.overlays is None:
            self._mounts.annex.build(lambda: self._build(self.template.own_mappings))
        else:
            self._build_under(self.overlays, self._mounts.annex)

    def _build(self, mappings: list[tuple[Any, Message]]) -> None:
        self.template.loaded.build_files(self.ctx)
        if self.template.needed.ipc:
            sysv_ipc.prepare(self.ctx)
        for kind, entry in mappings:
            kind.prepare(entry, self.ctx)
        if self.template.needed.ipc:
            sysv_ipc.prepare_rest(self.ctx)
        generation.announce(self.snapshot, self.ctx)

    def _build_under(self, overlays: Overlays, annex: Annex) -> None:
        """Make it with overlays: what the template has of the directories below is not for this copy."""
        mappings = list(self.template.own_mappings)
        kinds = MappingKinds()
        for task in self.snapshot.tasks.values():
            for entry in task.mm.vmas if task.alive else ():
                if overlays.concerns(entry) and kinds.of_entry(entry).inheritable(entry, self.ctx):
                    mappings.append((kinds.of_entry(entry), entry))
                    self.ctx.memo.pop(("map", entry.shmid, entry.fdflags), None)
        for key in [key for key in self.ctx.memo if _first_word(key) == "directory" and overlays.has(key[1])]:
            del self.ctx.memo[key]

        def build() -> None:
            overlays.copy_up()
            self.template.loaded.build_directories(self.ctx)
            self._build(mappings)

        annex.build(build)
        self.forebear = make_forebear(self.snapshot, self.ctx, overlays.concerns)
        self.shelf = self.shelf.without(overlays.concerns)

    def numbers(self) -> object:
        """All that the programs of one copy may have other than those of another."""
        lasting = self.template.lasting
        memo = {
            key: value for key, value in self.ctx.memo.items() if isinstance(value, int) and lasting.get(key) != value
        }
        return list(self.ctx.kept), dict(self.ctx.built), memo

    def _left_for_later(self) -> list[int]:
        """How much has been left to be done later."""
        return [len(value) for value in self.ctx.memo.values() if isinstance(value, list)]

    def run(self) -> tuple[int, int]:
        """Have it born and let go; returns the pids of the root and of the child of ours that ends with it."""
        wishes = self.wishes
        if wishes is not None and wishes.options.fresh_pid:
            return self._run_fresh()
        emits = wishes is not None and wishes.emits
        self._write(anew=self.as_init and emits)  # what it emits is in the root's program, for this copy alone
        if self.as_init:
            return self._run_as_init()
        if emits or (wishes is not None and wishes.options.cgroup):
            return self._run_below()
        conductor = self._conductor(self.snapshot)
        with conductor:
            init, root = self.template.inits.take_forked()
            conductor.adopt_forked(root, init)
            # The next one, but not before this one is through: they would wait for the same locks.
            self.ctx.memo.setdefault("after_mappings", []).append(self.template.inits.advance)
            self._wake(conductor)
        return root, init

    def _run_below(self) -> tuple[int, int]:
        """As run(), for a root that is not forked before its init has done something for this copy."""
        wishes = self.wishes
        assert wishes is not None
        template, arena = self.template, self.template.arena
        root = self.snapshot.root
        init = stub.init_program(root.pid, self._root_program, wishes.emit if wishes.emits else None)
        arena.load([init])
        conductor = self._conductor(self.snapshot)
        with conductor:
            pid, slot = template.inits.take()
            code = arena.code + len(machine.STUB)
            conductor.take_init(pid, init, code)
            wishes.place(pid)
            stub.start_init(pid, init, code, root.pid, slot)
            template.inits.advance()  # the next one, while this one forks
            self._wake(conductor)
        return root.live_pid, pid

    def _run_as_init(self) -> tuple[int, int]:
        """As run(), for a root that is the init of its pid namespace: it is born into its own."""
        pid = self.template.inits.bear_init(self._root_program)
        self._place(pid)
        conductor = self._conductor(self.snapshot)
        with conductor:
            conductor.adopt(pid, apart=True)
            self._wake(conductor)
        return pid, pid

    def _place(self, pid: int) -> None:
        """Put a root that was born a moment ago into its control groups, or end it."""
        try:
            if self.wishes is not None:
                self.wishes.place(pid)
        except BaseException:
            stub.kill([pid])
            raise

    def _conductor(self, snapshot: Snapshot) -> conduct.Conductor:
        writer = self.writer
        return conduct.Conductor(
            snapshot, self.template.arena, writer.programs, self.ctx, self.template.states, writer.unmapping,
            writer.straight,
        )  # fmt: skip

    def _wake(self, conductor: conduct.Conductor) -> None:
        root = conductor.snapshot.root
        conductor.outside_done.add(root.pid)
        overlays = self.overlays
        watch = (lambda: overlays.watch(conductor.init or root.live_pid)) if overlays is not None else None
        conductor.wake(self.writer.memory, watch)

    def _write(self, *, anew: bool) -> None:
        """Put the programs into the arena: those of the copy before, if they serve for this one and are not to be made
        ``anew``.
        """
        template, arena = self.template, self.template.arena
        if anew:
            self._write_anew(self.snapshot)
            return
        shape = self.wishes.shape if self.wishes is not None else ()
        recorded, numbers = template.recorded.get(shape), self.numbers()
        if recorded is not None and recorded.numbers == numbers:
            self.writer = recorded.writer
            arena.put(template.mark, recorded.content)
            return
        before = self._left_for_later()
        self._write_anew(self.snapshot)
        if before == self._left_for_later():
            template.record(shape, _Recorded(self, numbers, arena.content(template.mark)))

    @property
    def _root_program(self) -> Program:
        return self.writer.programs[self.snapshot.root.pid]

    def _write_anew(self, snapshot: Snapshot) -> None:
        template = self.template
        memory = restore_memory.MemoryPlan(snapshot, self.ctx, self.forebear, self.shelf if self.shelf.size else None)
        writer = self.writer = Writer(snapshot, self.ctx, memory, template.place)
        writer.prelude = self._emit_first
        writer.write()
        template.arena.load(writer.programs.values())

    def _emit_first(self, program: Program) -> None:
        """Emit what a root does first: its init may have forked it before we made its descriptors, and if there is none
        it has more to do.
        """
        fresh = self.wishes is not None and self.wishes.options.fresh_pid
        if not self.as_init and not fresh:
            program.call("unshare", CLONE_FILES, why="a descriptor table of its own, as it is now")
            return
        if self.as_init and self._mounts is None:
            stub.emit_proc(program, self.snapshot.mounts)
        if self.wishes is not None:
            self.wishes.emit(program)

    def _run_fresh(self) -> tuple[int, int]:
        """As run(), for a process that gets whatever pid is free."""
        from ..resources import uring_build  # few copies need them
        from ..resources.files import _tty_build

        template = self.template
        check_fresh(self.snapshot)
        pid = template.inits.bear(self.snapshot.root.core.thread_info.clear_tid_addr)
        snapshot = Snapshot()
        root = snapshot.root = renumbered(self.snapshot.root, pid)
        snapshot.tasks[pid] = root
        self._place(pid)
        try:
            for one in (generation, uring_build, _tty_build):
                one.moved(self.snapshot.root.pid, pid, self.ctx)
            self._write_anew(snapshot)
        except BaseException:
            stub.kill([pid])
            raise
        conductor = self._conductor(snapshot)
        with conductor:
            conductor.adopt(pid)
            self._wake(conductor)
        return pid, pid


def _first_word(key: object) -> object:
    return key[0] if isinstance(key, tuple) else key
