"""The part of a task's program that makes its memory: mappings, pages, and what the kernel keeps of their layout."""

from __future__ import annotations

import errno
import os
import struct

from ..errors import ImageError
from ..images.pages import Run
from ..model.snapshot import RestoredTask, Snapshot
from ..resources import MappingKinds, base
from ..resources.files import regular
from ..resources.memory import vdso

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from ..remote.program import Program
    from ..remote.stub import Arena
    from ..resources.base import BuildContext

PAGE = 4096
ADDRESS_END = 0x7FFFFFFFF000
PROT_WRITE = 2
PR_SET_MM, PR_SET_MM_MAP = 35, 14
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0
MADV_DONTNEED, MADV_GUARD_INSTALL = 4, 102
MADV_DONTFORK, MADV_WIPEONFORK = 10, 18
UNPLACED = base.VMA_GUARD | base.VMA_VSYSCALL
NO_PAGES = base.VMA_VDSO | base.VMA_VVAR | base.VMA_VSYSCALL
READ_BYTES_MAX = 1 << 30


def prepare(snapshot: Snapshot, ctx: BuildContext) -> None:
    """Open in the builder what mappings need: mapped files, shared memory, page files, executables."""
    kinds = MappingKinds()
    for task in snapshot.tasks.values():
        if not task.alive:
            continue
        for entry in task.mm.vmas:
            if not entry.status & UNPLACED:
                kinds.of_entry(entry).prepare(entry, ctx)
        exe = ("exe", task.mm.exe_file_id)
        if exe not in ctx.memo:
            ctx.memo[exe] = ctx.keep(regular.open_file(ctx, task.mm.exe_file_id, os.O_RDONLY))
        for fd in {run.fd for run in task.runs} - {-1}:
            if ("pages", fd) not in ctx.memo:
                ctx.memo["pages", fd] = ctx.keep(os.dup(fd))


def heirs(snapshot: Snapshot) -> set[int]:
    """The pids of tasks that have pages of their parent, to be inherited by forking."""
    return {
        task.pid
        for task in snapshot.tasks.values()
        if task.alive and task.parent is not None and any(run.same_as == task.parent.pid for run in task.runs)
    }


def clear(arena: Arena, program: Program) -> None:
    """Unmap everything but the arena."""
    program.call("munmap", 0, arena.base, why="everything below the arena")
    end = arena.base + arena.size
    program.call("munmap", end, ADDRESS_END - end, why="everything above it")


class MemoryPlan:
    """Emits the memory of tasks, one after the other."""

    def __init__(self, snapshot: Snapshot, ctx: BuildContext) -> None:
        self.snapshot = snapshot
        self.ctx = ctx
        self.kinds = MappingKinds()
        self.order = {pid: index for index, pid in enumerate(snapshot.tasks)}

    def emit(self, task: RestoredTask, program: Program, *, inherited: RestoredTask | None) -> None:
        """Emit the task's memory; ``inherited`` is the task whose complete memory it has already, or None."""
        self.ctx.memo["mm"] = task.mm
        kept = self._drop_foreign(task, inherited, program) if inherited else set()
        runs = iter(task.runs)
        run = next(runs, None)
        for entry in task.mm.vmas:
            if entry.status & UNPLACED:
                continue
            mine: list[Run] = []
            while run is not None and run[0] < entry.end:
                mine.append(run)
                if run[0] + run[1] * PAGE > entry.end:
                    break
                run = next(runs, None)
            if entry.status & NO_PAGES:
                mine = []
            self._emit_mapping(task, entry, mine, program, inherited if entry.start in kept else None)
        here = vdso.layout(inherited.mm.vmas) if inherited else None
        vdso.emit(vdso.layout(task.mm.vmas), here, program)
        self._emit_guards(task, program)
        self._emit_mm(task, program, inherited)

    def _drop_foreign(self, task: RestoredTask, parent: RestoredTask, program: Program) -> set[int]:
        """Unmap what the parent has and the task has not; returns the starts of the mappings that stay."""
        mine = {entry.start: entry for entry in task.mm.vmas if not entry.status & UNPLACED}
        kept: set[int] = set()
        for entry in parent.mm.vmas:
            if entry.status & (UNPLACED | base.VMA_VDSO | base.VMA_VVAR):
                continue
            own = mine.get(entry.start)
            if own is not None and _same(own, entry):
                kept.add(entry.start)
            else:
                program.call("munmap", entry.start, entry.end - entry.start, why="the parent's")
        return kept

    def _emit_mapping(
        self, task: RestoredTask, entry: Message, runs: list[Run], program: Program,
        parent: RestoredTask | None,
    ) -> None:  # fmt: skip
        length = entry.end - entry.start
        pieces = list(self._pieces(task, entry, runs, parent))
        if parent is not None:
            unwanted = _minus(_clipped(parent.runs, entry), [(run[0], run[0] + run[1] * PAGE) for run in runs])
            for start, end in unwanted:
                program.call("madvise", start, end - start, MADV_DONTNEED, why="the parent's pages")
            if pieces and not entry.prot & PROT_WRITE:
                program.call("mprotect", entry.start, length, entry.prot | PROT_WRITE)
        else:
            if entry.status & base.VMA_AIORING:  # the kernel's own layout: the resource knows what goes where
                self.ctx.memo["pieces"], pieces = pieces, []
            prot = entry.prot | PROT_WRITE if pieces else entry.prot
            self.kinds.of_entry(entry).restore(entry, prot, program, self.ctx)
            if entry.HasField("anon_name"):
                name = bytes(entry.anon_name) + b"\0"
                program.call("prctl", PR_SET_VMA, PR_SET_VMA_ANON_NAME, entry.start, length, name, may_fail=(22,))
        for fd, address, size, offset in pieces:
            while size:
                part = min(size, READ_BYTES_MAX)
                program.call("pread64", fd, address, part, offset, transfer=True, why="pages")
                address, size, offset = address + part, size - part, offset + part
        if pieces and not entry.prot & PROT_WRITE:
            program.call("mprotect", entry.start, length, entry.prot)

    def _pieces(
        self, task: RestoredTask, entry: Message, runs: list[Run], parent: RestoredTask | None
    ) -> list[tuple[int, int, int, int]]:
        """(descriptor, address, bytes, offset) of the pages to read into a mapping."""
        found: list[tuple[int, int, int, int]] = []
        for address, count, _, fd, offset, same_as in runs:
            start, end = max(address, entry.start), min(address + count * PAGE, entry.end)
            if same_as == 0:
                found.append((self.ctx.memo["pages", fd], start, end - start, offset + start - address))
            elif parent is None or parent.pid != same_as:
                found += self._foreign(task, same_as, start, end)
        return found

    def _foreign(self, task: RestoredTask, owner_pid: int, start: int, end: int) -> list[tuple[int, int, int, int]]:
        """Where pages lie that are stored with another task."""
        owner = self.snapshot.tasks.get(owner_pid)
        place = f"page {start:#x}"
        # Only ever an earlier one: so the search ends.
        if owner is None or self.order[owner.pid] >= self.order[task.pid] or not owner.alive:
            raise ImageError(f"pagemap-{task.pid}.img", place, f"it is said to be task {owner_pid}'s")
        found: list[tuple[int, int, int, int]] = []
        for address, count, _, fd, offset, same_as in owner.runs:
            low, high = max(address, start), min(address + count * PAGE, end)
            if low >= high:
                continue
            if same_as == 0:
                found.append((self.ctx.memo["pages", fd], low, high - low, offset + low - address))
            else:
                found += self._foreign(owner, same_as, low, high)
        if sum(piece[2] for piece in found) != end - start:
            raise ImageError(f"pagemap-{owner_pid}.img", place, f"task {task.pid} needs it and it is not there")
        return found

    @staticmethod
    def _emit_guards(task: RestoredTask, program: Program) -> None:
        for entry in task.mm.vmas:
            if entry.status & base.VMA_GUARD:
                program.call("madvise", entry.start, entry.end - entry.start, MADV_GUARD_INSTALL, why="guard region")

    def _emit_mm(self, task: RestoredTask, program: Program, inherited: RestoredTask | None) -> None:
        mm = task.mm
        auxv = struct.pack(f"<{len(mm.mm_saved_auxv)}Q", *mm.mm_saved_auxv)
        same_exe = inherited is not None and inherited.mm.exe_file_id == mm.exe_file_id
        exe_fd = 0xFFFFFFFF if same_exe else self.ctx.memo["exe", mm.exe_file_id]
        area = program.put(
            struct.pack(
                "<12QII", mm.mm_start_code, mm.mm_end_code, mm.mm_start_data, mm.mm_end_data, mm.mm_start_brk, mm.mm_brk,
                mm.mm_start_stack, mm.mm_arg_start, mm.mm_arg_end, mm.mm_env_start, mm.mm_env_end, 0, len(auxv), exe_fd,
            )  # fmt: skip
        )
        program.pointer(area, 88, program.put(auxv))
        program.call("prctl", PR_SET_MM, PR_SET_MM_MAP, area, 104, 0, why="where code, data, brk, arguments lie; exe")

    @staticmethod
    def emit_late(task: RestoredTask, program: Program) -> None:
        """Emit what must not be in force while children are still to inherit: advice and locks."""
        for entry in task.mm.vmas:
            length = entry.end - entry.start
            if entry.status & (UNPLACED | base.VMA_VVAR | base.VMA_VDSO):
                continue
            advice = entry.madv
            if entry.flags & base.MAP_DROPPABLE:
                advice &= ~(1 << MADV_WIPEONFORK | 1 << 16)
            for bit in range(advice.bit_length()):
                if advice >> bit & 1:
                    program.call("madvise", entry.start, length, bit, may_fail=(errno.EINVAL,) if bit == 12 else ())


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


def _same(a: Message, b: Message) -> bool:
    return bool(
        a.end == b.end and a.prot == b.prot and a.flags == b.flags and a.shmid == b.shmid and a.pgoff == b.pgoff
        and a.status == b.status and a.anon_name == b.anon_name and a.fdflags == b.fdflags
    )  # fmt: skip


def _clipped(runs: list[Run], entry: Message) -> list[tuple[int, int]]:
    found = []
    for address, count, *_ in runs:
        start, end = max(address, entry.start), min(address + count * PAGE, entry.end)
        if start < end:
            found.append((start, end))
    return found


def _minus(spans: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of ``spans`` that ``taken`` does not cover; both ascending."""
    found: list[tuple[int, int]] = []
    index = 0
    for start, end in spans:
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        at = index
        while start < end and at < len(taken) and taken[at][0] < end:
            if taken[at][0] > start:
                found.append((start, taken[at][0]))
            start = max(start, taken[at][1])
            at += 1
        if start < end:
            found.append((start, end))
    return found
