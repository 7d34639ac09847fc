"""The part of a task's program that makes its memory: mappings, pages, and what the kernel keeps of their layout."""

from __future__ import annotations

import errno
import os
import struct
from bisect import bisect_right

from .. import log
from ..errors import ImageError
from ..model.snapshot import RestoredTask, Snapshot
from ..resources import MappingKinds, base
from ..resources.files import regular
from ..resources.memory import vdso
from . import spans
from .pieces import Stored, by_address, groups
from .plan import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..images.schema import Message
    from ..remote.program import Program
    from ..remote.stub import Arena
    from ..resources.base import BuildContext
    from .fill import Fill
    from .mapped import Handle
    from .pieces import Piece
    from .shelf import Shelf

PAGE = 4096
ADDRESS_END = 0x7FFFFFFFF000
PROT_WRITE = 2
PR_SET_MM, PR_SET_MM_MAP = 35, 14
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0
MADV_DONTNEED, MADV_GUARD_INSTALL = 4, 102
MADV_DONTFORK, MADV_HUGEPAGE, MADV_WIPEONFORK = 10, 14, 18
UNPLACED = base.VMA_GUARD | base.VMA_VSYSCALL
NO_PAGES = base.VMA_VDSO | base.VMA_VVAR | base.VMA_VSYSCALL
READ_BYTES_MAX = 1 << 30
LARGE_BYTES = 1 << 22  # from this on, pieces are brought in from outside
MAP_BYTES = 1 << 18  # mappings with less are complete before their task runs


def prepare(snapshot: Snapshot, ctx: BuildContext, *, inheritable: bool = False) -> list[tuple[Any, Message]]:
    """Open in the builder what mappings need: mapped files, shared memory, page files, executables.

    ``inheritable``: only what copies of the snapshot may have from a common ancestor; returns the other mappings, as
    (resource, entry).
    """
    kinds = MappingKinds()
    others = []
    seen: set[int] = set()
    for task in snapshot.tasks.values():
        if not task.alive:
            continue
        for entry in task.mm.vmas if id(task.mm) not in seen else ():
            if entry.status & UNPLACED:
                continue
            kind = kinds.of_entry(entry)
            if inheritable and not kind.inheritable(entry, ctx):
                others.append((kind, entry))
            else:
                kind.prepare(entry, ctx)
        seen.add(id(task.mm))
        exe = ("exe", task.mm.exe_file_id)
        if exe not in ctx.memo:
            ctx.memo[exe] = ctx.keep(regular.open_file(ctx, task.mm.exe_file_id, os.O_RDONLY))
        for fd in {run.fd for run in task.runs} - {-1}:
            if ("pages", fd) not in ctx.memo:
                ctx.memo["pages", fd] = ctx.keep(os.dup(fd))
    return others


def heirs(snapshot: Snapshot) -> set[int]:
    """The pids of tasks that have pages of their parent, to be inherited by forking."""
    return {
        task.pid
        for task in snapshot.tasks.values()
        if task.alive and task.parent is not None and any(run.same_as == task.parent.pid for run in task.runs)
    }


def clear(place: Place, program: Program, spared: tuple[int, int] = (0, 0)) -> None:
    """Unmap everything but the arena and what is ``spared``, (start, end) below it."""
    program.call("munmap", 0, spared[0] or place.base, why="everything below the arena")
    if spared[1] and spared[1] < place.base:
        program.call("munmap", spared[1], place.base - spared[1])
    end = place.base + place.size
    program.call("munmap", end, ADDRESS_END - end, why="everything above it")


class Layout:
    """The mappings of an address space, for looking up; siblings with equal ones share it."""

    __slots__ = ("entries", "first", "late", "mm", "pageless", "starts", "wiped")

    def __init__(self, mm: Message, kinds: MappingKinds) -> None:
        self.mm = mm
        self.entries = [entry for entry in mm.vmas if not entry.status & UNPLACED]
        self.starts = [entry.start for entry in self.entries]
        #: (start, end) of mappings whose pages are the kernel's
        self.pageless = [(entry.start, entry.end) for entry in self.entries if entry.status & NO_PAGES]
        #: (start, end) of what a child of fork(2) would find empty
        self.wiped = [
            (entry.start, entry.end)
            for entry in self.entries
            if entry.madv >> MADV_WIPEONFORK & 1 or entry.flags & base.MAP_DROPPABLE
        ]
        #: those that are to be made before the others
        self.first = [entry for entry in self.entries if kinds.of_entry(entry).FIRST]
        #: (start, bytes, MADV_*) of the advice to be given
        self.late: list[tuple[int, int, int]] | None = None

    def own_spans(self, kept: dict[int, Message]) -> list[tuple[int, int]]:
        """(start, end) of mappings that are not ``kept`` and have pages."""
        others = (entry for entry in self.entries if entry.start not in kept and not entry.status & NO_PAGES)
        return [(entry.start, entry.end) for entry in others]

    def holding(self, pieces: list[Piece]) -> list[Message]:
        """The mappings that hold pieces, which are ascending by address and lie in one each."""
        found: list[Message] = []
        end = 0
        for _, address, _, _ in pieces:
            if address >= end:
                found.append(self.entry_at(address))
                end = found[-1].end
        return found

    def entry_at(self, address: int) -> Message:
        """The mapping that holds an address (checked when it was loaded)."""
        return self.entries[bisect_right(self.starts, address) - 1]


class MemoryPlan:
    """Emits the memory of tasks, one after the other."""

    def __init__(
        self, snapshot: Snapshot, ctx: BuildContext, forebear: RestoredTask | None = None, shelf: Shelf | None = None
    ) -> None:  # fmt: skip
        """``forebear``: whose memory the root is born with, see :func:`forebear`; ``shelf``: what there is for the
        others.
        """
        self.snapshot = snapshot
        self.ctx = ctx
        self.forebear = forebear
        self.shelf = shelf
        self.kinds = MappingKinds()
        self._stored = Stored(snapshot, ctx.memo)
        self._layouts: dict[int, Layout] = {}
        self._has_exe: set[int] = set()
        #: (program, record, bytes) of reads that have to be complete, see :meth:`check_reads`
        self.reads: list[tuple[Program, int, int]] = []
        #: pid → what is brought in from outside, while all wait at their first stop
        self.fills: dict[int, Fill] = {}
        #: What brings in memory once the tasks run.
        self.pager: Handle | None = None

    def layout(self, task: RestoredTask) -> Layout:
        """The task's mappings."""
        found = self._layouts.get(id(task.mm))
        if found is None:
            found = self._layouts[id(task.mm)] = Layout(task.mm, self.kinds)
        return found

    def emit(self, task: RestoredTask, program: Program, *, inherited: RestoredTask | None) -> None:
        """Emit the task's memory; ``inherited`` is the task whose complete memory it has already, or None."""
        self.ctx.memo["mm"] = task.mm
        layout = self.layout(task)
        # The usual case of a forked tree: everything is there, but for the pages written to since.
        forked = inherited is not None and inherited.mm is task.mm
        here = vdso.layout(inherited.mm.vmas) if inherited else None
        vdso.clear(vdso.layout(task.mm.vmas), here, program)
        kept, pieces = self.needed(task, inherited, program)
        taken = self.shelf.emit_take(task, program) if self.shelf is not None else {}
        if taken:
            kept = {start: entry for start, entry in kept.items() if start not in taken}
            pieces = [piece for piece in pieces if layout.entry_at(piece[1]).start not in taken]
        writable: set[int] = set()
        if not forked:
            self._take_large(task, layout, kept, pieces)
            writable = self._emit_mappings(layout, {**kept, **taken}, inherited, pieces, program)
        if inherited is not None:
            self._drop_pages(task, list(kept.values()), inherited, program)
        self._emit_pages(layout, pieces, writable, program)
        if not forked:
            vdso.emit(vdso.layout(task.mm.vmas), here, program)
        if not forked or taken:
            self._emit_guards(task, program)
        if not forked:
            self._emit_mm(task, program, inherited)

    def needed(
        self, task: RestoredTask, inherited: RestoredTask | None, program: Program
    ) -> tuple[dict[int, Message], list[Piece]]:
        """What a task needs besides what it has ``inherited``: (the mappings that it keeps of that, by their starts;
        what is to be read). Emits the end of the others.
        """
        layout = self.layout(task)
        runs = spans.minus_runs(task.runs, layout.pageless)
        if self.ctx.options.fresh and layout.wiped:
            runs = spans.outside(runs, layout.wiped)
        pieces = self._stored.pieces(task, runs, layout.entries, inherited)
        if inherited is None:
            return {}, pieces
        if inherited is self.forebear:  # it has all pages of the mappings that it has
            had = self.layout(inherited).starts
            pieces = [piece for piece in pieces if not _holds(had, layout.entry_at(piece[1]).start)]
        if inherited.mm is task.mm:
            return dict(zip(layout.starts, layout.entries, strict=True)), pieces
        kept = self._drop_foreign(layout, inherited, program)
        if inherited is not self.forebear:
            pieces += self._stored.lost(task, inherited, layout.own_spans(kept), layout.entries)
            pieces.sort(key=by_address)
        return kept, pieces

    def emit_apart(self, task: RestoredTask, entries: list[Message], program: Program) -> None:
        """Emit some private mappings of a task with all that is in them, where nothing is."""
        layout = Layout(type(task.mm)(vmas=entries), self.kinds)
        runs = list(spans.clipped(task.runs, [(entry.start, entry.end) for entry in entries]))
        pieces = self._stored.pieces(task, runs, layout.entries, None)
        writable = self._emit_mappings(layout, {}, None, pieces, program)
        self._emit_pages(layout, pieces, writable, program)

    def _take_large(
        self, task: RestoredTask, layout: Layout, kept: dict[int, Message], pieces: list[Piece]
    ) -> None:
        """Take out of ``pieces`` the large ones that can be brought in from outside (engine/fill.py), and with
        ``options.map`` what can be brought in later (engine/mapped.py).

        Not so in a task whose children inherit its memory: they are born before. Nor where the descriptor for it would
        appear in other tasks.
        """
        some = pieces if self.ctx.options.map else [piece for piece in pieces if piece[2] >= LARGE_BYTES]
        plain = [piece for piece in some if self._is_plain(layout.entry_at(piece[1]), kept)]
        mapped = self._to_map(layout, plain) if self.ctx.options.map else []
        later = {piece[1] for piece in mapped}
        large = [piece for piece in plain if piece[2] >= LARGE_BYTES and piece[1] not in later]
        heirs = any(run.same_as == task.pid for child in task.children if child.alive for run in child.runs)
        if not (large or mapped) or heirs or self._shares_table(task):
            return
        from ..linux import userfault
        from .fill import Fill

        if not self.ctx.once("userfaultfd", userfault.possible):
            return
        taken = later | {piece[1] for piece in large}
        pieces[:] = [piece for piece in pieces if piece[1] not in taken]
        self.fills[task.pid] = Fill(large, _mappings_of(large, layout), mapped, _mappings_of(mapped, layout))

    def _to_map(self, layout: Layout, plain: list[Piece]) -> list[Piece]:
        """Those of the pieces that may be brought in when the task runs already; small mappings are not worth it."""
        sizes: dict[int, int] = {}
        for piece in plain:
            start = layout.entry_at(piece[1]).start
            sizes[start] = sizes.get(start, 0) + piece[2]
        worth = {start for start, size in sizes.items() if size >= MAP_BYTES} - {start for start, _ in layout.wiped}
        mapped = []
        for piece in plain:
            entry = layout.entry_at(piece[1])
            locked = entry.flags & base.MAP_LOCKED and not entry.lock_on_fault
            if entry.start in worth and not locked and not entry.flags & base.MAP_GROWSDOWN:
                mapped.append(piece)
        if mapped and not self.ctx.once("userfaultfd events", _tells_events):
            log.warning("this kernel does not tell what a task does to its memory: all of it is brought in at once")
            return []
        return mapped

    def _shares_table(self, task: RestoredTask) -> bool:
        tasks = self.snapshot.tasks.values()
        return any(one is not task and one.alive and one.ids.files_id == task.ids.files_id for one in tasks)

    @staticmethod
    def _is_plain(entry: Message, kept: dict[int, Message]) -> bool:
        plain = entry.status & base.VMA_ANON_PRIVATE and not entry.status & NO_PAGES
        huge = entry.flags & base.MAP_HUGETLB or entry.madv >> MADV_HUGEPAGE & 1
        return bool(plain and not huge and entry.start not in kept)

    def start_pager(self) -> None:
        """Start the pager for what is to be brought in when the tasks run, if there is any. Raises KernelError."""
        fills = [one for one in self.fills.values() if one.mapped]
        if not fills:
            return
        from . import mapped

        self.pager = mapped.start(fills, lazy=self.ctx.options.map_lazy)
        self.ctx.on_failure.add("pager", self.pager.end)

    def fill(self, arena: Arena) -> None:
        """Bring in the large memory of the tasks, which wait, or hand it over to the pager. Raises TorporError."""
        for pid, one in self.fills.items():
            one.run(arena, self.snapshot.tasks[pid], self.pager)
        if self.pager is not None:
            self.pager.await_ready()

    def release(self) -> None:
        """The tasks are about to be let go."""
        if self.pager is not None:
            self.pager.release()

    def explain_pager(self) -> Iterator[str]:
        """What will be brought in when the tasks run, a line a mapping."""
        for pid, one in self.fills.items():
            yield from one.explain(f"task {pid}", lazy=self.ctx.options.map_lazy)

    def emit_opening(self, task: RestoredTask, program: Program) -> None:
        """Emit what lets us bring in the task's large memory; its descriptors are in place."""
        one = self.fills.get(task.pid)
        if one is not None:
            one.emit_open(program)

    def emit_filled(self, task: RestoredTask, program: Program) -> None:
        """Emit what is to be done once the large memory is there."""
        one = self.fills.get(task.pid)
        if one is not None:
            one.emit_close(program)

    def _drop_foreign(self, layout: Layout, parent: RestoredTask, program: Program) -> dict[int, Message]:
        """Unmap what the parent has and the task has not; returns the mappings that stay, by their start."""
        mine = dict(zip(layout.starts, layout.entries, strict=True))
        kept: dict[int, Message] = {}
        for entry in self.layout(parent).entries:
            if entry.status & (base.VMA_VDSO | base.VMA_VVAR):
                continue
            own = mine.get(entry.start)
            end = entry.start
            if own is not None and own.end <= entry.end and _same(own, entry):
                kept[entry.start], end = own, own.end
            if end < entry.end:
                program.call("munmap", end, entry.end - end, why="the parent's")
        return kept

    def _emit_mappings(
        self,
        layout: Layout,
        kept: dict[int, Message],
        inherited: RestoredTask | None,
        pieces: list[Piece],
        program: Program,
    ) -> set[int]:
        """Make the mappings that are not ``kept``; those that get pages are writable for now, returned are their
        starts.

        The pieces that a mapping's resource brings in by itself are taken out of ``pieces``.
        """
        filled = {entry.start for entry in layout.holding(pieces)}
        first = [entry for entry in layout.first if entry.start not in kept]
        if first:
            self._emit_first(first, kept, inherited, program)
        wanted = [entry for entry in layout.entries if entry.start not in kept and not (first and entry in first)]
        for entry, prot in self._joined(wanted, filled):
            start = entry.start
            if entry.status & base.VMA_AIORING:  # the kernel's own layout: the resource knows what goes where
                self.ctx.memo["pieces"] = [piece for piece in pieces if start <= piece[1] < entry.end]
                pieces[:] = [piece for piece in pieces if not start <= piece[1] < entry.end]
                filled.discard(start)
                prot = entry.prot
            self.kinds.of_entry(entry).restore(entry, prot, program, self.ctx)
            if entry.HasField("anon_name"):
                name = bytes(entry.anon_name) + b"\0"
                length = entry.end - start
                program.call("prctl", PR_SET_VMA, PR_SET_VMA_ANON_NAME, start, length, name, may_fail=(22,))
        return filled - set(kept)

    def _joined(self, entries: list[Message], filled: set[int]) -> Iterator[tuple[Message, int]]:
        """(mapping, its protection for now), in order; neighbours that may be made by one call as one."""
        index = 0
        while index < len(entries):
            entry = entries[index]
            prot = self._prot_for_now(entry, filled)
            last, index = index, index + 1
            while index < len(entries) and self._joins(entries[last], entries[index], prot, filled):
                last, index = index, index + 1
            if entry is not entries[last]:
                whole = type(entry)()
                whole.CopyFrom(entry)
                whole.end = entries[last].end
                entry = whole
            yield entry, prot

    @staticmethod
    def _prot_for_now(entry: Message, filled: set[int]) -> int:
        return int(entry.prot | PROT_WRITE if entry.start in filled else entry.prot)

    def _joins(self, one: Message, other: Message, prot: int, filled: set[int]) -> bool:
        """Can ``other`` be made together with ``one``, which is before it and is made with ``prot``?"""
        return bool(
            (one.end, one.flags, prot) == (other.start, other.flags, self._prot_for_now(other, filled))
            and self.kinds.of_entry(one).joins(one) and self.kinds.of_entry(other).joins(other)
        )  # fmt: skip

    def _emit_first(
        self, entries: list[Message], kept: dict[int, Message], inherited: RestoredTask | None, program: Program
    ) -> None:
        """Make the mappings that depend on what is there already, and on what is not."""
        there = [*kept.values()]
        if inherited is not None:
            there += [one for one in inherited.mm.vmas if one.status & (base.VMA_VDSO | base.VMA_VVAR)]
        occupied = self.ctx.memo["occupied"] = [self.ctx.memo["arena"], *((one.start, one.end) for one in there)]
        for entry in entries:
            self.kinds.of_entry(entry).restore(entry, entry.prot, program, self.ctx)
            occupied.append((entry.start, entry.end))

    @staticmethod
    def _drop_pages(task: RestoredTask, kept: list[Message], parent: RestoredTask, program: Program) -> None:
        """Drop the pages of the mappings that were ``kept`` which the parent has and the task has not."""
        surplus = spans.minus(spans.spans(parent.runs), spans.spans(task.runs))
        if not surplus:
            return
        places = [(entry.start, entry.end) for entry in kept if not entry.status & NO_PAGES]
        for start, end in spans.common(surplus, places):
            program.call("madvise", start, end - start, MADV_DONTNEED, why="the parent's pages")

    def _emit_pages(self, layout: Layout, pieces: list[Piece], writable: set[int], program: Program) -> None:
        """Read pages into place. ``writable``: starts of mappings that were made writable for it."""
        closed = [entry for entry in layout.holding(pieces) if not entry.prot & PROT_WRITE]
        rows = [(entry.start, entry.end - entry.start, entry.prot) for entry in closed]
        opened = [(start, size, prot | PROT_WRITE) for start, size, prot in rows if start not in writable]
        program.calls("mprotect", opened)
        for group in groups(pieces):
            self._emit_group(group, program)
        program.calls("mprotect", rows)

    def _emit_group(self, group: list[Piece], program: Program) -> None:
        """Read pieces that follow one another in their file, by one call if they are small."""
        fd, address, size, offset = group[0]
        if len(group) > 1:
            vector = [word for _, address, size, _ in group for word in (address, size)]
            area = program.put(struct.pack(f"<{len(vector)}Q", *vector))
            self.reads.append((program, len(program), sum(vector[1::2])))
            program.call("preadv", fd, area, len(group), offset, 0, why="pages")
            return
        while size:
            part = min(size, READ_BYTES_MAX)
            program.call("pread64", fd, address, part, offset, transfer=True, why="pages")
            address, size, offset = address + part, size - part, offset + part

    def check_reads(self, arena: Arena) -> None:
        """After the programs have run: were all reads of many pieces complete? Raises ImageError."""
        for program, index, wanted in self.reads:
            if arena.result(program, index) != wanted:
                raise ImageError("pages", program.name, "a pages file has fewer bytes than it had a moment ago")

    @staticmethod
    def _emit_guards(task: RestoredTask, program: Program) -> None:
        for entry in task.mm.vmas:
            if entry.status & base.VMA_GUARD:
                program.call("madvise", entry.start, entry.end - entry.start, MADV_GUARD_INSTALL, why="guard region")

    def emit_exe(self, task: RestoredTask, program: Program) -> None:
        """Emit the change of the executable in a stub whose present one the task may have mapped, which forbids it:
        while nothing is mapped.
        """
        if self.shelf is None or not self.shelf.is_born_as(task):
            self._emit_mm(task, program, None)
        self._has_exe.add(task.pid)

    def _emit_mm(self, task: RestoredTask, program: Program, inherited: RestoredTask | None) -> None:
        mm = task.mm
        auxv = struct.pack(f"<{len(mm.mm_saved_auxv)}Q", *mm.mm_saved_auxv)
        same_exe = (inherited is not None and inherited.mm.exe_file_id == mm.exe_file_id) or task.pid in self._has_exe
        exe_fd = 0xFFFFFFFF if same_exe else self.ctx.memo["exe", mm.exe_file_id]
        area = program.put(
            struct.pack(
                "<12QII", mm.mm_start_code, mm.mm_end_code, mm.mm_start_data, mm.mm_end_data, mm.mm_start_brk,
                mm.mm_brk, mm.mm_start_stack, mm.mm_arg_start, mm.mm_arg_end, mm.mm_env_start, mm.mm_env_end, 0,
                len(auxv), exe_fd,
            )
        )  # fmt: skip
        program.pointer(area, 88, program.put(auxv))
        program.call("prctl", PR_SET_MM, PR_SET_MM_MAP, area, 104, 0, why="where code, data, brk, arguments lie; exe")

    def emit_late(self, task: RestoredTask, program: Program) -> None:
        """Emit what must not be in force while children are still to inherit: advice."""
        layout = self.layout(task)
        if layout.late is None:
            layout.late = list(_advice(layout))
        for start, length, bit in layout.late:
            program.call("madvise", start, length, bit, may_fail=(errno.EINVAL,) if bit == 12 else ())

    @staticmethod
    def emit_locks_and_seals(task: RestoredTask, program: Program) -> None:
        """Emit what makes memory stay in place, and stay as it is."""
        for entry in task.mm.vmas:
            if entry.status & UNPLACED:
                continue
            length = entry.end - entry.start
            if entry.flags & base.MAP_LOCKED:
                on_fault = int(entry.lock_on_fault)
                program.call("mlock2", entry.start, length, on_fault, why="locked memory")
            if entry.sealed:
                program.call("mseal", entry.start, length, 0)


def _mappings_of(pieces: list[Piece], layout: Layout) -> list[tuple[int, int]]:
    """(start, end) of the mappings that hold the pieces."""
    return sorted({(entry.start, entry.end) for entry in (layout.entry_at(piece[1]) for piece in pieces)})


def _holds(ordered: list[int], number: int) -> bool:
    at = bisect_right(ordered, number)
    return at > 0 and ordered[at - 1] == number


def _advice(layout: Layout) -> Iterator[tuple[int, int, int]]:
    for entry in layout.entries:
        advice = entry.madv
        if not advice or entry.status & (base.VMA_VVAR | base.VMA_VDSO):
            continue
        if entry.flags & base.MAP_DROPPABLE:
            advice &= ~(1 << MADV_WIPEONFORK | 1 << 16)
        for bit in range(advice.bit_length()):
            if advice >> bit & 1:
                yield entry.start, entry.end - entry.start, bit


def _same(a: Message, b: Message) -> bool:
    """Are two mappings with the same start equal but for their ends?"""
    return bool(
        a.prot == b.prot and a.flags == b.flags and a.shmid == b.shmid and a.pgoff == b.pgoff
        and a.status == b.status and a.anon_name == b.anon_name and a.fdflags == b.fdflags
    )  # fmt: skip


def _tells_events() -> bool:
    from ..linux import userfault

    return userfault.possible(userfault.EVENTS)
