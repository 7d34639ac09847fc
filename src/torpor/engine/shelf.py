"""Memory that the copies of a template share although it is not their root's: that of the tasks below.

A copy's root inherits its memory by being forked from the held stub. What other tasks have beyond that lies in the held
stub as well, complete, on a *shelf*: an area beside the arena that is free in all tasks, and holds their private
mappings one after the other. Everybody in a copy inherits it; each task moves its own mappings from there to where
they belong (mremap(2)), and nothing is read. The pages stay shared until somebody writes to them.

A mapping is made where the task has it, filled, and then put on the shelf: so it remembers that address, and back in
its place it is what it would have been (vma->vm_pgoff, by which the kernel tells whether neighbours are one mapping).

Mappings of the tasks lie in the order of the tree, so that a task with its descendants has one region of the shelf.
Others do not inherit it: fork(2) would copy its page tables for nothing.
"""

from __future__ import annotations

import errno

from .. import log
from ..remote.program import Program
from ..resources import MappingKinds, base
from . import spans
from .restore_memory import NO_PAGES, UNPLACED, heirs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..images.schema import Message
    from ..model.snapshot import RestoredTask, Snapshot
    from ..resources.base import BuildContext
    from .restore_memory import MemoryPlan

PAGE = 4096
TABLE_BYTES = 1 << 21  # what a page table maps: larger mappings keep their place in it, so that it is moved as a whole
MAYMOVE_FIXED = 3
MADV_DONTFORK, MADV_DOFORK = 10, 11
#: Of a mapping with less to be read the moving costs more than the reading.
PAGES_MIN = 4
#: Of what a task has inherited in a mapping, pages of its own may be so small a part that it is better read: on the
#: shelf the whole mapping takes memory once more, once for all copies.
PART_MIN = 4
MAPPINGS_MAX = 1 << 14  # an address space may have 65,530 (vm.max_map_count), and each takes a moment to fork


class Shelf:
    """Where on the shelf what lies. Offsets count from its start, which is decided later: see :meth:`place`."""

    def __init__(self) -> None:
        self.base = 0
        self.size = 0
        #: pid → start of a mapping → (its entry, offset)
        self.spots: dict[int, dict[int, tuple[Message, int]]] = {}
        #: pid → (start, end) of what it and its descendants have, as offsets; nothing: (0, 0)
        self.regions: dict[int, tuple[int, int]] = {}
        self._left: Callable[[Message], bool] = lambda _: False

    def place(self, end: int) -> None:
        """Decide where it lies: before the address ``end``."""
        self.base = end - self.size

    def without(self, left: Callable[[Message], bool]) -> Shelf:
        """The same for a copy that has mappings of its own: those that ``left`` tells of stay on the shelf."""
        other = Shelf()
        other.base, other.size, other.spots, other.regions = self.base, self.size, self.spots, self.regions
        other._left = left
        return other

    # ------------------------------------------------------------------------------ what lies there

    def lay(self, root: RestoredTask, wanted: dict[int, list[Message]]) -> None:
        """Give the mappings of a task and its descendants, by their pids, their places."""
        begun: dict[int, int] = {}
        stack = [root]
        while stack:
            task = stack[-1]
            if task.pid not in begun:
                begun[task.pid] = self.size
                if task.pid in wanted:
                    self.spots[task.pid] = {entry.start: (entry, self._room_for(entry)) for entry in wanted[task.pid]}
                stack += reversed(task.children)
            else:
                stack.pop()
                start = begun[task.pid]
                self.regions[task.pid] = (start, self.size) if self.size > start else (0, 0)
        self.size = -(-self.size // TABLE_BYTES) * TABLE_BYTES

    def _room_for(self, entry: Message) -> int:
        length = entry.end - entry.start
        offset = self.size
        if length >= TABLE_BYTES:
            offset += (entry.start - offset) % TABLE_BYTES
        self.size = offset + length
        return offset

    def fill(self, snapshot: Snapshot, memory: MemoryPlan, run: Callable[[Program], None]) -> None:
        """Have the held stub, in which nothing but the arena is mapped, fill it. ``run`` runs a program in there.

        Raises TorporError.
        """
        for pid, spots in self.spots.items():
            program = Program(f"memory of task {pid} on the shelf")
            memory.emit_apart(snapshot.tasks[pid], [entry for entry, _ in spots.values()], program)
            for start, (entry, offset) in spots.items():
                length = entry.end - start
                program.call("mremap", start, length, length, MAYMOVE_FIXED, self.base + offset, why="on the shelf")
            run(program)

    # ----------------------------------------------------------------------- what copies do with it

    def region(self, task: RestoredTask) -> tuple[int, int]:
        """(start, end) of what a task and its descendants have; (0, 0): nothing."""
        start, end = self.regions[task.pid]
        return (self.base + start, self.base + end) if end else (0, 0)

    def emit_drop_others(self, task: RestoredTask, program: Program) -> None:
        """Emit the end of what a task has inherited of the shelf and neither it nor a descendant needs."""
        start, end = self.region(task)
        low, high = self.base, self.base + self.size
        for first, last in ((low, start), (end, high)) if end else ((low, high),):
            if first < last:
                program.call("munmap", first, last - first, why="others' memory on the shelf")

    def emit_take(self, task: RestoredTask, program: Program) -> dict[int, Message]:
        """Emit the move of a task's mappings to where they belong; returns them, by their starts."""
        taken = {}
        for start, (entry, offset) in self.spots.get(task.pid, {}).items():
            place, length = self.base + offset, entry.end - start
            if self._left(entry):
                program.call("munmap", place, length, why="on the shelf, and the copy has its own")
                continue
            program.call("mremap", place, length, length, MAYMOVE_FIXED, start, why="from the shelf")
            taken[start] = entry
        return taken

    def emit_hold_back(self, task: RestoredTask, program: Program) -> None:
        """Emit what keeps a task's children from inheriting one another's part. Its own is not concerned."""
        parts = [self.region(child) for child in task.children if self.regions[child.pid][1]]
        if parts and len(task.children) > 1:
            low, high = parts[0][0], parts[-1][1]
            program.call("madvise", low, high - low, MADV_DONTFORK, may_fail=(errno.ENOMEM,), why="not for everybody")

    def emit_lend(self, task: RestoredTask, child: RestoredTask, program: Program) -> None:
        """Emit what lets a child that is born next inherit its part."""
        low, high = self.region(child)
        if high and len(task.children) > 1:
            program.call("madvise", low, high - low, MADV_DOFORK, may_fail=(errno.ENOMEM,), why="for this child")

    def emit_let_go(self, child: RestoredTask, program: Program) -> None:
        """Emit the end of a child's part in its parent, once the child is born."""
        low, high = self.region(child)
        if high:
            program.call("munmap", low, high - low, why="the child has it")

    @staticmethod
    def is_born_as(task: RestoredTask) -> bool:
        """Is a task of a copy born with the executable that it has?"""
        return bool(executable_at_birth(task) == task.mm.exe_file_id)


def plan(snapshot: Snapshot, memory: MemoryPlan, ctx: BuildContext) -> Shelf:
    """Decide what is to be on the shelf. ``memory`` is the plan of a copy that does without. Raises ImageError."""
    shelf = Shelf()
    inherits = heirs(snapshot)
    excluded = _of_replaced_executables(snapshot)
    wanted: dict[int, list[Message]] = {}
    left = MAPPINGS_MAX
    for task in snapshot.tasks.values():
        if task.alive and task.parent is not None:
            parent = task.parent if task.pid in inherits else None
            found = list(_worth(task, parent, memory, ctx, excluded[task.pid]))
            if found[left:]:
                log.info(f"template: no more than {MAPPINGS_MAX} mappings are kept; the others are read for each copy")
            if found[:left]:
                wanted[task.pid] = found[:left]
            left -= len(wanted.get(task.pid, ()))
    shelf.lay(snapshot.root, wanted)
    return shelf


def _worth(
    task: RestoredTask, parent: RestoredTask | None, memory: MemoryPlan, ctx: BuildContext, excluded: set[int]
) -> Iterator[Message]:
    """The mappings of a task that are to be on the shelf. ``parent``: whose memory it inherits otherwise."""
    layout, kinds = memory.layout(task), MappingKinds()
    kept, pieces = memory.needed(task, parent, Program())
    own: dict[int, int] = {}
    for piece in pieces:
        start = layout.entry_at(piece[1]).start
        own[start] = own.get(start, 0) + piece[2] // PAGE
    if not own:
        return
    total: dict[int, int] = {}
    for run in spans.clipped(task.runs, [(entry.start, entry.end) for entry in kept.values()]):
        start = layout.entry_at(run.vaddr).start
        total[start] = total.get(start, 0) + run.nr_pages
    wiped = {start for start, _ in layout.wiped}
    for entry in layout.entries:
        pages = own.get(entry.start, 0)
        if pages < PAGES_MIN or (entry.start in kept and pages * PART_MIN < total.get(entry.start, 0)):
            continue
        if entry.start in wiped or not _is_movable(entry):
            continue
        if entry.status & base.VMA_FILE_PRIVATE and entry.shmid in excluded:
            continue
        if kinds.of_entry(entry).inheritable(entry, ctx):
            yield entry


def _is_movable(entry: Message) -> bool:
    """Is it private memory of the plain kind?"""
    plain = entry.status & (base.VMA_ANON_PRIVATE | base.VMA_FILE_PRIVATE)
    special = entry.status & (NO_PAGES | UNPLACED) or entry.flags & (base.MAP_HUGETLB | base.MAP_DROPPABLE)
    return bool(plain and not special)


def _of_replaced_executables(snapshot: Snapshot) -> dict[int, set[int]]:
    """By pids: the ids of files that the task or an ancestor is born with as its executable, and has another. While one
    is mapped it cannot be replaced (kernel/fork.c, replace_mm_exe_file()), and who replaces it has its part of the
    shelf, and its descendants'.
    """
    by_name: dict[object, set[int]] = {}
    for file_id in snapshot.files:
        by_name.setdefault(_name(snapshot, file_id), set()).add(file_id)
    replaced: dict[int, set[int]] = {}
    for task in snapshot.tasks.values():
        above = replaced[task.parent.pid] if task.parent is not None else set()
        born_with = executable_at_birth(task)
        if task.alive and born_with and born_with != task.mm.exe_file_id:
            above = above | by_name[_name(snapshot, born_with)]
        replaced[task.pid] = above
    return replaced


def _name(snapshot: Snapshot, file_id: int) -> object:
    """The path of a regular file, the id of any other."""
    entry = snapshot.files.get(file_id)
    return entry.reg.name if entry is not None and entry.HasField("reg") else file_id


def executable_at_birth(task: RestoredTask) -> int:
    """The id of the executable that a task of a copy is born with, its nearest living ancestor's; 0: it is the root."""
    above = task.parent
    while above is not None and not above.alive:
        above = above.parent
    return above.mm.exe_file_id if above is not None else 0
