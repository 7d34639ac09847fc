"""Which pages tasks share copy-on-write: the same page frame at the same address is the same page.

A tree forked from one program has nearly all its memory in common. Its pages are stored once, with the task that comes first in
the tree; the others name it (pagemap_entry.same_as), and restore lets children inherit by forking what they share with
their parent. Kernel: fs/proc/task_mmu.c (pagemap entries); page frame numbers show to CAP_SYS_ADMIN only.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.source import SourceTask

PAGE = 4096
ENTRY = 8  # bytes of a pagemap entry
FRAME = (1 << 55) - 1
PRESENT_OR_SWAPPED = 3 << 62


class Sharing:
    """Remembers the page frames of the tasks seen so far; all of them must stay stopped."""

    def __init__(self) -> None:
        #: pid → its runs with their pagemap entries: start → (end, entries)
        self._frames: dict[int, dict[int, tuple[int, bytes]]] = {}
        #: pagemap entry → (address, pid) of the task that is first to have it
        self._first: dict[int, tuple[int, int]] = {}

    def split(self, task: SourceTask, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """The (start, end) runs of a task as (start, pages, pid of the earlier task that has the same or 0)."""
        mine: dict[int, tuple[int, bytes]] = {}
        parent = self._frames.get(task.ppid, {})
        fd = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, end in runs:
                entries = os.pread(fd, (end - start) // PAGE * ENTRY, start // PAGE * ENTRY)
                mine[start] = (end, entries)
                same = parent.get(start)
                if same is not None and same == (end, entries) and _all_known(entries):
                    yield start, (end - start) // PAGE, task.ppid
                else:
                    yield from self._split_run(task, start, entries, parent)
        finally:
            os.close(fd)
        self._frames[task.pid] = mine

    def _split_run(
        self, task: SourceTask, start: int, entries: bytes, parent: dict[int, tuple[int, bytes]]
    ) -> Iterator[tuple[int, int, int]]:
        values = memoryview(entries).cast("Q")
        theirs = _entries_of(parent, start, start + len(values) * PAGE)
        first, pid = self._first, task.pid
        begin, owner_now = 0, -1
        for index, value in enumerate(values):
            address = start + index * PAGE
            if theirs.get(address) == value and value & FRAME:
                owner = task.ppid
            elif value & FRAME:
                known = first.setdefault(value & (FRAME | PRESENT_OR_SWAPPED), (address, pid))
                owner = known[1] if known[0] == address and known[1] != pid else 0
            else:
                owner = 0
            if owner != owner_now:
                if index > begin:
                    yield start + begin * PAGE, index - begin, owner_now
                begin, owner_now = index, owner
        if len(values) > begin:
            yield start + begin * PAGE, len(values) - begin, owner_now


def _all_known(entries: bytes) -> bool:
    """Do all entries show a frame? Without the privilege they are all zero."""
    return all(value & FRAME for value in memoryview(entries).cast("Q"))


def _entries_of(runs: dict[int, tuple[int, bytes]], start: int, end: int) -> dict[int, int]:
    """address → pagemap entry of what ``runs`` have between ``start`` and ``end``."""
    found: dict[int, int] = {}
    for low, (high, entries) in runs.items():
        if low < end and start < high:
            values = memoryview(entries).cast("Q")
            for address in range(max(low, start), min(high, end), PAGE):
                found[address] = values[(address - low) // PAGE]
    return found
