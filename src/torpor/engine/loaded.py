"""A snapshot that has been read and checked, and what every way of waking it begins with: a plain restore makes one
tree from it, a template any number.
"""

from __future__ import annotations

import os
import time

from .. import log, resources
from ..errors import ImageError, TaskGone, Unsupported, UsageError, doing
from ..images import schema as pb
from ..images.store import ImageReader
from ..model.snapshot import RestoredTask, Snapshot
from ..proc.read import alive
from ..proc.tasks import parent_of_ended
from ..remote import stub
from ..resources import fs, generation, sysv_ipc
from ..resources.base import BuildContext
from ..resources.files import regular
from ..undo import Undo
from . import cpu, load, pid_spaces, plan, restart, restore_memory, same_vdso, zombies
from .programs import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from ..options import Options
    from ..proc.maps import Vma
    from ..resources.base import FileResource

MARGIN_FD = 16
ROOM_FDS = 1024  # what files, mappings and pages files may need above the tasks' own descriptors
PAGE = 4096
ARENA_BYTES_MIN = 4 << 20
PATIENCE = 1.0  # seconds in which a parent waits for a child that has ended, if it ever does


class Loaded:
    """An image set, read and checked. Close it when nothing is to be woken from it any more."""

    def __init__(self, options: Options) -> None:
        self.options = options
        #: Is what is built for one tree, which is born with our descriptors?
        self.places = False
        #: Nothing is to be made: what stands in the way and may be gone by then is but noted.
        self.explaining = False
        self.undo = Undo()  # taken back in any case: what only the making needs
        self.snapshot = Snapshot()
        try:
            self.images_fd = os.open(options.images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"images directory `{options.images_dir}`: {error.strerror}") from None
        self.reader = ImageReader(self.images_fd)
        self.kinds = resources.task_resources()
        self.file_kinds = resources.FileKinds()

    def close(self) -> None:
        """Close the images; only ``images_fd`` stays."""
        self.undo.roll_back()
        for task in self.snapshot.tasks.values():
            if task.pages is not None:
                task.pages.close()

    def read(self, ctx: BuildContext) -> None:
        """Read the images and check what does not depend on the outside."""
        self._raise_fd_limit()
        load.load(self.reader, self.snapshot)
        plan.add_helpers(self.snapshot, self.options.shell_job)
        plan.check_sessions(self.snapshot)
        plan.check_spaces(self.snapshot)
        for task in self.snapshot.tasks.values():
            if task.zombie:
                zombies.check(task.pid, task.own_pid, task.core.tc.exit_code)
        self._check(ctx)

    def lend(self, ctx: BuildContext, first_fd: int = 0) -> None:
        """Take what the caller lends."""
        self.reserve_fds(ctx, first_fd)
        for fd, key in ctx.options.inherit_fd:
            ctx.inherited.lend(key, ctx.keep(os.dup(fd)))

    def register_files(self, ctx: BuildContext) -> None:
        """Let each kind of file see whether its entries can be restored."""
        by_type: dict[int, tuple[FileResource, str, bool, bool, list[Message]]] = {}
        files = ctx.files
        for file_id, entry in self.snapshot.files.items():
            kind = by_type.get(entry.type)
            if kind is None:
                kind = by_type[entry.type] = self._kind_of(file_id, entry)
            resource, field, has_flags, has_pos, entries = kind
            own = getattr(entry, field)
            if own.id != file_id or (has_flags and own.flags >> 31) or (has_pos and own.pos >> 63):
                _check_file(file_id, field, own)
            files[file_id] = resource, own
            entries.append(own)
        for resource, *_, entries in by_type.values():
            resource.check_restore(entries, ctx)

    def _kind_of(self, file_id: int, entry: Message) -> tuple[FileResource, str, bool, bool, list[Message]]:
        """(resource of a file_entry, its field, has it flags, has it a position, where such entries are collected)"""
        resource = self.file_kinds.of_type(entry.type)
        if resource is None:
            raise Unsupported(f"file {file_id}: type {pb.fd_types.Name(entry.type)} cannot be restored yet")
        fields = getattr(entry, resource.FIELD).DESCRIPTOR.fields_by_name
        return resource, resource.FIELD, "flags" in fields, "pos" in fields, []

    def _check(self, ctx: BuildContext) -> None:
        if self.options.own_pids:
            self.snapshot.apart = True
            self.snapshot.mounts = self.snapshot.mounts or stub.MS_SLAVE
            self.snapshot.outer.clear()

        def note(text: str) -> None:
            ctx.notes.append(text)
            log.info(text)

        pid_spaces.choose_outer(self.snapshot, alive, note)
        for task in self.snapshot.tasks.values():
            if not self.snapshot.apart:
                try:
                    _check_free(task, 0 if self.explaining else PATIENCE)
                except Unsupported as error:
                    if not self.explaining:
                        raise
                    ctx.notes.append(f"as things are it would fail: {error}")
            for thread in task.threads if task.alive else ():
                cpu.check(thread.core, thread.image)
                for kind in self.kinds:
                    with doing(f"task {thread.tid}"):
                        try:
                            kind.check(thread.core, ctx)
                        except ImageError as error:
                            raise _in_image(error, thread.image) from None
        same_vdso.check_vdso(self.snapshot)
        generation.check(self.options.argument)
        if self.options.strict:
            from . import audit

            audit.check(self.reader, self.options)

    def _raise_fd_limit(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            self.undo.add("file descriptor limit", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
        self.fd_limit = hard

    def reserve_fds(self, ctx: BuildContext, first: int = 0) -> None:
        """Find numbers for the builder's descriptors that the tasks do not use, if possible from ``first`` on."""
        highest = max((max(task.fds)[0] for task in self.snapshot.tasks.values() if task.fds), default=2)
        ctx.first_free_fd = highest + MARGIN_FD
        if max(first, ctx.first_free_fd) + ROOM_FDS <= self.fd_limit:
            ctx.first_free_fd = max(first, ctx.first_free_fd)
        if ctx.first_free_fd + ROOM_FDS > self.fd_limit:
            # Their numbers reach up to our limit: ours go into the gaps between them.
            taken = {fd for task in self.snapshot.tasks.values() for fd, _, _ in task.fds}
            ctx.gaps = (fd for fd in range(3, self.fd_limit) if fd not in taken)

    def build(self, ctx: BuildContext) -> None:
        """Make open file descriptions, mapped files and shared memory."""
        self.build_files(ctx)
        sysv_ipc.prepare(ctx)
        restore_memory.prepare(self.snapshot, ctx)
        sysv_ipc.prepare_rest(ctx)
        generation.announce(self.snapshot, ctx)
        self.build_directories(ctx)
        for key in ctx.inherited.unused():
            log.warning(f"--inherit-fd: no file in the images is called {key}")

    def build_directories(self, ctx: BuildContext) -> None:
        """Open the tasks' root and working directories, and what else belongs to no table of descriptors."""
        if self.snapshot.settings:
            from . import pid_settings

            pid_settings.prepare(ctx)
        for task in self.snapshot.tasks.values():
            if task.alive:
                fs.prepare(task.fs, ctx)

    def build_files(self, ctx: BuildContext) -> None:
        """Make open file descriptions."""
        if self._may_place(ctx):
            with doing(f"task {self.snapshot.root.pid}"):
                _place_table(self.snapshot.root, ctx)
        else:
            for task in self.snapshot.tasks.values():
                with doing(f"task {task.pid}"):
                    _build_table(task, ctx)
        for hook in ctx.memo.get("after_build", ()):
            hook()

    def _may_place(self, ctx: BuildContext) -> bool:
        """Is there but one descriptor table, which is born with ours?"""
        tables = {task.ids.files_id for task in self.snapshot.tasks.values() if task.alive}
        return self.places and len(tables) == 1 and ctx.gaps is None

    def _spans(self) -> list[tuple[int, int]]:
        """What the tasks' mappings cover, of all tasks together."""
        layouts = {id(task.mm): task.mm for task in self.snapshot.tasks.values() if task.alive}.values()
        return [
            (entry.start, entry.end)
            for layout in layouts
            for entry in layout.vmas
            if not entry.status & restore_memory.UNPLACED
        ]

    def place_arena(self, ours: list[Vma], before: int = 0) -> plan.Place:
        """Where an arena may lie that is to hold the programs of many copies, one after the other: what it does not
        use costs nothing. It must not lie on mappings of ours either. So many bytes ``before`` it are free in all
        tasks.
        """
        size = 4 * sum(map(_generous_size, self.snapshot.tasks.values())) + ARENA_BYTES_MIN & -PAGE
        taken = [*self._spans(), *((vma.start, vma.end) for vma in ours)]
        return plan.Place(plan.hole(taken, before + size) + before, size)

    def write_programs(self, ctx: BuildContext, memory: restore_memory.MemoryPlan) -> Writer:
        """Write all programs, then decide where they lie: the arena's address is known to them only when they are
        compiled.
        """
        spans = self._spans()
        # The programs name the arena in two records only; their sizes do not depend on it. What is not used costs
        # nothing.
        size = sum(map(_generous_size, self.snapshot.tasks.values())) + (1 << 20) & -PAGE
        for _ in range(2):
            place = plan.Place(plan.hole(spans, size), size)
            ctx.memo["arena"] = (place.base, place.base + size)
            writer = Writer(self.snapshot, ctx, memory, place)
            writer.write()
            needed = -(-(writer.size + restart.SCRATCH_BYTES) // PAGE) * PAGE + PAGE
            if needed <= size:
                return writer
            size = needed + (1 << 16)
        raise AssertionError("the programs grew as they were written again")


def _build_table(task: RestoredTask, ctx: BuildContext) -> None:
    one = (-1, 0, False)
    with doing(lambda: f"fd {one[0]}"):
        for one in task.fds:
            if one[1] not in ctx.built:
                ctx.build(one[1])


def _place_table(task: RestoredTask, ctx: BuildContext) -> None:
    """Build a table under the numbers that the task has: most need not be moved then, neither by us nor by the task."""
    built, files, kept, in_place, fd = ctx.built, ctx.files, ctx.kept, ctx.in_place, -1
    spare: list[int] = []
    try:
        with doing(lambda: f"fd {fd}"):
            for fd, file_id, _ in task.fds:
                made = built.get(file_id)
                if made is None:
                    resource, entry = files[file_id]
                    new = resource.restore(entry, ctx)
                elif made in in_place:
                    new = os.dup(made)
                else:
                    continue
                if new == fd:  # nearly always
                    kept.append(fd)
                    in_place.add(fd)
                else:
                    new = ctx.keep_at(new, fd, spare)
                if made is None:
                    built[file_id] = new
    finally:
        for one in spare:
            os.close(one)


def _check_free(task: RestoredTask, patience: float) -> None:
    """Raise Unsupported where a number of the task is in use.

    One whose process has ended is waited for, ``patience`` in seconds: the parent of a program that a dump has just
    ended collects it a moment later.
    """
    end = time.monotonic() + patience
    for tid in {task.pid, *(thread.tid for thread in task.threads)}:
        while alive(tid):
            try:
                parent = parent_of_ended(tid)
            except TaskGone:
                break
            if parent is None:
                raise Unsupported(
                    f"process id {tid} is in use",
                    hint="end that process, or restore into a pid namespace of its own (--own-pids)",
                )
            if parent == os.getpid() or time.monotonic() >= end:
                raise Unsupported(
                    f"process id {tid} is in use: its process has ended, but its parent {parent} has not waited for it",
                    hint="let the parent wait for it, or restore into a pid namespace of its own (--own-pids)",
                )
            time.sleep(0.005)


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


def _generous_size(task: RestoredTask) -> int:
    """More than the programs of a task will need in the arena."""
    mappings = len(task.mm.vmas) if task.alive else 0
    return (len(task.threads) + 1 << 16) + 512 * (mappings + len(task.runs) + len(task.fds))
