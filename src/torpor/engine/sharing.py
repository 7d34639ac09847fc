"""Which pages tasks share: the same page frame at the same address, or the same content there.

A tree forked from one program has nearly all its memory in common. Its pages are stored once, with
the task that comes first in the tree; the others name it (pagemap_entry.same_as), and restore lets
children inherit by forking what they share with their parent. Of what siblings have written since,
most is equal again, since they did the same: it is stored once as well.
Kernel: fs/proc/task_mmu.c (pagemap entries); page frame numbers show to CAP_SYS_ADMIN only.
"""

from __future__ import annotations

import os
from itertools import repeat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.source import SourceTask

PAGE = 4096
ENTRY = 8  # bytes of a pagemap entry
FRAME = (1 << 55) - 1
PRESENT_OR_SWAPPED = 3 << 62
SAME_PAGE = FRAME | PRESENT_OR_SWAPPED
GAP_PAGES = 256  # runs with so little between them are looked up by one read
#: Contents of so many pages are remembered (64 MiB).
CONTENTS_MAX = 1 << 14
#: A task with more pages of its own than this is not searched for contents that are known.
OWN_PAGES_MAX = 1 << 13


def read_entries(pid: int, runs: list[tuple[int, int]]) -> list[bytes]:
    """The pagemap entries of each run."""
    found: list[bytes] = []
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = 0
        while first < len(runs):
            last = first
            while last + 1 < len(runs) and runs[last + 1][0] - runs[last][1] <= GAP_PAGES * PAGE:
                last += 1
            low = runs[first][0]
            data = os.pread(fd, (runs[last][1] - low) // PAGE * ENTRY, low // PAGE * ENTRY)
            for start, end in runs[first : last + 1]:
                found.append(data[(start - low) // PAGE * ENTRY : (end - low) // PAGE * ENTRY])
            first = last + 1
    finally:
        os.close(fd)
    return found


class Frames:
    """The pagemap entries of one task's runs."""

    __slots__ = ("by_address", "runs")

    def __init__(self) -> None:
        #: start → (end, entries, are all of them known?)
        self.runs: dict[int, tuple[int, bytes, bool]] = {}
        #: address → entry; made when it is asked for
        self.by_address: dict[int, int] | None = None

    def addresses(self) -> dict[int, int]:
        """address → entry"""
        if self.by_address is None:
            self.by_address = {}
            for start, (end, entries, _) in self.runs.items():
                self.by_address.update(
                    zip(range(start, end, PAGE), memoryview(entries).cast("Q"), strict=True)
                )
        return self.by_address


class Sharing:
    """Remembers the pages of the tasks seen so far; all of them must stay stopped."""

    def __init__(self) -> None:
        self._frames: dict[int, Frames] = {}
        #: pagemap entry → (address, pid) of the task that is first to have it
        self._first: dict[int, tuple[int, int]] = {}
        #: (address, content) → pid of the task that it is stored with
        self._contents: dict[tuple[int, bytes], int] = {}

    def split(
        self, task: SourceTask, runs: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int, int]]:
        """The (start, end) runs of a task as (start, pages, pid of the earlier task that has the same
        or 0).
        """
        mine = Frames()
        parent = self._frames.get(task.ppid) or Frames()
        fd = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, end in runs:
                entries = os.pread(fd, (end - start) // PAGE * ENTRY, start // PAGE * ENTRY)
                same = parent.runs.get(start)
                if same is not None and same[2] and same[0] == end and same[1] == entries:
                    mine.runs[start] = same
                    yield start, (end - start) // PAGE, task.ppid
                else:
                    mine.runs[start] = end, entries, _all_known(entries)
                    yield from self._split_run(task, start, entries, parent)
        finally:
            os.close(fd)
        if task.children or task.ppid not in self._frames:
            self._frames[task.pid] = mine

    def _split_run(
        self, task: SourceTask, start: int, entries: bytes, parent: Frames
    ) -> Iterator[tuple[int, int, int]]:
        values = memoryview(entries).cast("Q")
        end = start + len(values) * PAGE
        theirs = map(parent.addresses().get, range(start, end, PAGE)) if parent.runs else repeat(-1)
        first, pid, ppid = self._first, task.pid, task.ppid
        begin, owner_now = start, -1
        for address, value, other in zip(range(start, end, PAGE), values, theirs, strict=False):
            if not value & FRAME:
                owner = 0
            elif value == other:
                owner = ppid
            else:
                known = first.setdefault(value & SAME_PAGE, (address, pid))
                owner = known[1] if known[0] == address and known[1] != pid else 0
            if owner != owner_now:
                if address > begin:
                    yield begin, (address - begin) // PAGE, owner_now
                begin, owner_now = address, owner
        if end > begin:
            yield begin, (end - begin) // PAGE, owner_now

    def addresses(self, pid: int) -> dict[int, int]:
        """address → pagemap entry of a task whose pages were split and that has children."""
        frames = self._frames.get(pid)
        return frames.addresses() if frames is not None else {}

    def owner_of(self, address: int, content: bytes, pid: int) -> int:
        """The pid of an earlier task that has this content at this address and stores it; 0: it is
        ``pid`` now.
        """
        contents = self._contents
        if len(contents) >= CONTENTS_MAX:
            return contents.get((address, content), 0)
        owner = contents.setdefault((address, content), pid)
        return 0 if owner == pid else owner


def _all_known(entries: bytes) -> bool:
    """Do all entries show a frame? Without the privilege they are all zero."""
    return all(value & FRAME for value in memoryview(entries).cast("Q"))
