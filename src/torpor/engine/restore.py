"""restore: compile the images into one program per task, start stubs with the right pids, run the programs, let go.

Everything before the first stub is planning and can be printed (``--explain``). From then on all tasks are traced with
EXITKILL: an error kills them all, and so does the death of this process.
"""

from __future__ import annotations

import os
import time

from .. import log
from ..collector import Paused
from ..errors import UsageError, doing
from ..remote import stub
from ..resources import cgroups_build, net_namespace
from ..resources.base import BuildContext
from . import conduct, restore_memory
from .hooks import Hooks
from .loaded import Loaded
from .programs import ranges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..options import Options
    from .overlays import Overlays
    from .own_mounts import OwnMounts


class RestoreResult:
    """A restored tree: ``pid`` of its root as we see it, all ``pids``, and the time it took in seconds.

    ``waits_for`` is the child of ours that ends with the root, with its exit status (128 + N for signal N): the root
    itself, or the init of its pid namespace. ``written_to`` is the folder with the upper layers of its overlays, "" if
    that is no place of the file system.
    """

    __slots__ = ("pid", "pids", "total_s", "waits_for", "written_to")

    def __init__(self, pid: int, pids: list[int], total_s: float, waits_for: int, written_to: str = "") -> None:
        self.pid = pid
        self.pids = pids
        self.total_s = total_s
        self.waits_for = waits_for
        self.written_to = written_to


def restore(options: Options) -> RestoreResult:
    """Make the tree of processes again that ``options.images_dir`` holds; it runs when this returns.

    The root becomes a child of this process (of its parent with ``restore_sibling``); with ``own_pids`` a small init
    does, and the tree is in its pid namespace. Raises TorporError; then no process, file or mount of the attempt is
    left.
    """
    started = time.monotonic()
    with doing("restore"), Paused():
        work = _Restore(options)
        try:
            pids = _carry_out(work)
            log.info("Restore finished successfully. Tasks resumed.")
            written_to = work.overlays.folder if work.overlays is not None else ""
            result = RestoreResult(work.root_pid, pids, time.monotonic() - started, work.waits_for, written_to)
            work.hooks.run("post-resume", work.root_pid)
        finally:
            os.close(work.loaded.images_fd)
    return result


def _carry_out(work: _Restore) -> list[int]:
    """All of it, or nothing. When this is through, none of the tree's files is open here any more."""
    try:
        work.load()
        work.hooks.run("pre-restore")
        work.plan()
        return work.run()
    except BaseException as error:
        work.ctx.on_failure.roll_back(error)
        raise
    finally:
        work.close()


def explain(options: Options) -> Iterator[str]:
    """What restore() would do in each task, a line a call, without doing it."""
    with doing("restore"):
        work = _Restore(options)
        work.loaded.explaining = True
        try:
            work.load()
            work.plan()
            yield from work.ctx.notes
            root = work.loaded.snapshot.root
            if work.loaded.snapshot.apart:
                how = "" if root.own_pid == 1 else f", with an init that forks process {root.own_pid} and ends with it"
                yield f"make a pid namespace{how}"
                if work.loaded.snapshot.mounts:
                    yield "make a mount namespace with a /proc of it"
            for task in work.loaded.snapshot.tasks.values():
                for thread in task.threads if task.alive else [None]:
                    program = work.writer.programs[thread.tid if thread else task.pid]
                    yield f"{program.name}:"
                    yield from (f"  {line}" for line in program.explain())
            yield from work.memory.explain_pager()
        finally:
            work.ctx.on_failure.roll_back()
            work.close()
            os.close(work.loaded.images_fd)


class _Restore:
    """One restore under way."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.loaded = Loaded(options)
        self.ctx = BuildContext(options, self.loaded.reader, self.loaded.undo)
        self.arena: stub.Arena | None = None
        self.own_mounts: OwnMounts | None = None
        self.root_pid = self.waits_for = 0

    def close(self) -> None:
        """Take back everything that tasks do not hold; after an error, everything. Only the images directory stays."""
        self.loaded.undo.roll_back()
        for first, last in ranges(self.ctx.kept):
            os.closerange(first, last + 1)
        self.ctx.kept.clear()
        if self.arena is not None:
            self.arena.close()
            self.arena = None
        self.loaded.close()

    def load(self) -> None:
        """Load and check the images."""
        if self.options.overlay and not self.options.own_pids:
            raise UsageError("an overlay is for a copy in namespaces of its own", hint="--own-pids")
        self.hooks = Hooks(self.options, self.loaded.images_fd)
        self.loaded.read(self.ctx)

    def plan(self) -> None:
        """Make the shared objects, write every task's program."""
        snapshot = self.loaded.snapshot
        self.loaded.lend(self.ctx)
        net_namespace.prepare(snapshot, self.ctx)
        self.loaded.register_files(self.ctx)
        cgroups_build.prepare(snapshot, self.ctx)
        self._build()
        self.memory = restore_memory.MemoryPlan(snapshot, self.ctx)
        self.writer = self.loaded.write_programs(self.ctx, self.memory)

    def _build(self) -> None:
        self.own_mounts = self._make_own_mounts() if self.options.own_pids else None
        if self.own_mounts is None:
            self.loaded.places = True
            self.loaded.build(self.ctx)
            return

        def build() -> None:
            if self.overlays is not None:
                self.overlays.copy_up()
            self.loaded.build(self.ctx)

        self.own_mounts.annex.build(build)

    def _make_own_mounts(self) -> OwnMounts | None:
        from .overlays import Wanted
        from .own_mounts import Needed, OwnMounts

        wanted = Wanted.of(self.options)
        needed = Needed(self.loaded.snapshot, self.ctx, wanted)
        return OwnMounts(wanted, needed, self.loaded.snapshot, self.ctx) if needed or wanted else None

    @property
    def overlays(self) -> Overlays | None:
        """Those of the tree, once they are made."""
        return self.own_mounts.overlays if self.own_mounts is not None else None

    def run(self) -> list[int]:
        """Start the stubs, run the programs, let everybody go. Returns all pids."""
        self.memory.start_pager()
        place = self.writer.place
        arena = self.arena = stub.Arena(place.base, place.size)
        arena.load(self.writer.programs.values())
        if self.memory.pager is not None:
            self.memory.pager.part()
        conductor = conduct.Conductor(
            self.loaded.snapshot, arena, self.writer.programs, self.ctx, unmapping=self.writer.unmapping,
            straight=self.writer.straight,
        )  # fmt: skip
        with conductor:
            if self.loaded.snapshot.apart:
                self.waits_for = conductor.launch_init(
                    self.ctx.kept, sibling=self.options.restore_sibling, created=self._namespaces_are_there
                )
            else:
                self.waits_for = conductor.launch(self.ctx.kept, sibling=self.options.restore_sibling)
            conductor.wake(self.memory, self._complete, self._resuming)
        self.root_pid = self.loaded.snapshot.root.live_pid
        return [task.live_pid for task in self.loaded.snapshot.tasks.values() if not task.helper]

    def _namespaces_are_there(self, pid: int) -> None:
        """There are the namespaces, and nothing but ``pid`` is in them, which has set them up."""
        for name in ("setup-namespaces", "post-setup-namespaces"):
            self.hooks.run(name, pid)

    def _complete(self) -> None:
        """All tasks have everything, and are stopped."""
        pid = self.loaded.snapshot.root.live_pid
        with net_namespace.away(self.ctx):
            for master in self.ctx.memo.get("orphan pts masters", ()):
                self.hooks.run("orphan-pts-master", pid, fd=master)
            if self.overlays is not None:
                self.overlays.watch(self.waits_for)
            self.hooks.run("post-restore", pid)
        if self.options.pidfile:
            from .pidfile import write

            write(self.options, pid, self.ctx.on_failure)

    def _resuming(self) -> None:
        with net_namespace.away(self.ctx):
            if "network namespace" in self.ctx.memo:
                self.hooks.run("network-unlock", self.loaded.snapshot.root.live_pid)
            self.hooks.run("pre-resume", self.loaded.snapshot.root.live_pid)
