"""Where the pages of tasks are stored, and where they are to be: what there is to read for each of them."""

from __future__ import annotations

from bisect import bisect_right

from ..errors import ImageError
from . import spans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TypeAlias

    from ..images.pages import Run
    from ..images.schema import Message
    from ..model.snapshot import RestoredTask, Snapshot

    #: (our descriptor, address, bytes, offset) of pages to read
    Piece: TypeAlias = tuple[int, int, int, int]

PAGE = 4096
SMALL_BYTES = 1 << 18  # up to this, pieces are read many at a time
IOV_MAX = 1024


class Stored:
    """The pages of a snapshot's tasks. Each is stored once, with the first task that has it."""

    def __init__(self, snapshot: Snapshot, memo: dict[Any, Any]) -> None:
        """``memo`` holds our descriptors of the pages files, by ("pages", the snapshot's)."""
        self._snapshot = snapshot
        self._memo = memo
        self._order = {pid: index for index, pid in enumerate(snapshot.tasks)}
        self._places: dict[int, tuple[list[int], list[Run]]] = {}

    def pieces(
        self, task: RestoredTask, runs: list[Run], entries: list[Message], parent: RestoredTask | None
    ) -> list[Piece]:
        """What is to be read for some ``runs`` of a task, but for what it has of its ``parent``: ascending by address.

        No piece reaches from one of the mappings ``entries`` into another. Raises ImageError.
        """
        found: list[Piece] = []
        memo = self._memo
        parent_pid = parent.pid if parent else 0
        for address, count, _, fd, offset, same_as in runs:
            if same_as == 0:
                found.append((memo["pages", fd], address, count * PAGE, offset))
            elif same_as != parent_pid:
                found += self._foreign(task, same_as, address, address + count * PAGE)
        return _cut(found, entries)

    def lost(
        self, task: RestoredTask, parent: RestoredTask, places: list[tuple[int, int]], entries: list[Message]
    ) -> list[Piece]:
        """The parent's pages in some (start, end) ``places`` of the task, which cannot be inherited there because the
        mappings have grown or changed since. Raises ImageError.
        """
        found: list[Piece] = []
        for run in task.runs:
            if run.same_as == parent.pid:
                end = run.vaddr + run.nr_pages * PAGE
                for low, high in spans.common([(run.vaddr, end)], places):
                    found += self._foreign(task, parent.pid, low, high)
        return _cut(found, entries)

    def _foreign(self, task: RestoredTask, owner_pid: int, start: int, end: int) -> list[Piece]:
        """Where pages lie that are stored with another task."""
        owner = self._snapshot.tasks.get(owner_pid)
        # Only ever an earlier one: so the search ends.
        if owner is None or self._order[owner.pid] >= self._order[task.pid] or not owner.alive:
            raise ImageError(f"pagemap-{task.pid}.img", f"page {start:#x}", f"it is said to be task {owner_pid}'s")
        if owner_pid not in self._places:
            self._places[owner_pid] = [run[0] for run in owner.runs], owner.runs
        starts, runs = self._places[owner_pid]
        first = max(bisect_right(starts, start) - 1, 0)
        if runs and not runs[first][5] and starts[first] <= start and end <= starts[first] + runs[first][1] * PAGE:
            address, _, _, fd, offset, _ = runs[first]  # nearly always
            return [(self._memo["pages", fd], start, end - start, offset + start - address)]
        found: list[Piece] = []
        covered = 0
        for index in range(first, len(runs)):
            address, count, _, fd, offset, same_as = runs[index]
            if address >= end:
                break
            low, high = max(address, start), min(address + count * PAGE, end)
            if low >= high:
                continue
            covered += high - low
            if same_as == 0:
                found.append((self._memo["pages", fd], low, high - low, offset + low - address))
            else:
                found += self._foreign(owner, same_as, low, high)
        if covered != end - start:
            why = f"task {task.pid} needs it and it is not there"
            raise ImageError(f"pagemap-{owner_pid}.img", f"page {start:#x}", why)
        return found


def _cut(pieces: list[Piece], entries: list[Message]) -> list[Piece]:
    """The pieces, cut where mappings end."""
    found: list[Piece] = []
    last = len(entries) - 1
    index, end = -1, 0
    for piece in pieces:
        fd, address, size, offset = piece
        while address >= end and index < last:
            index += 1
            end = entries[index].end
        while address + size > end and index < last:
            part = end - address
            found.append((fd, address, part, offset))
            address, size, offset = end, size - part, offset + part
            index += 1
            end = entries[index].end
        found.append((fd, address, size, offset))
    return found


def groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces to be read together: small ones that follow one another in their file."""
    group: list[Piece] = []
    next_fd, next_offset = -1, -1
    for piece in sorted(pieces, key=_in_file):
        fd, _, size, offset = piece
        if group and (
            fd != next_fd or offset != next_offset or size > SMALL_BYTES or group[0][2] > SMALL_BYTES
            or len(group) == IOV_MAX
        ):  # fmt: skip
            yield group
            group = []
        group.append(piece)
        next_fd, next_offset = fd, offset + size
    if group:
        yield group


def by_address(piece: Piece) -> int:
    """What to sort pieces by."""
    return piece[1]


def _in_file(piece: Piece) -> tuple[int, int]:
    return piece[0], piece[3]
