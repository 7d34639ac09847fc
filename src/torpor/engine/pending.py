"""What of an address space is still to be brought in: pieces of files, and where they belong.

Plain data; `engine/pager.py` keeps one for each address space and tells it what the program does to its memory.
"""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    #: (start, end, number of the file, offset in it of the first byte)
    Piece: TypeAlias = tuple[int, int, int, int]


class Pending:
    """Pieces that do not overlap, in order of their addresses."""

    __slots__ = ("_starts", "pieces")

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.pieces: list[Piece] = sorted(pieces)
        self._starts = [piece[0] for piece in self.pieces]

    def __bool__(self) -> bool:
        return bool(self.pieces)

    def copy(self) -> Pending:
        """Another one with the same pieces: that of a child."""
        return Pending(self.pieces)

    def at(self, address: int) -> Piece | None:
        """The piece that an address belongs to."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self.pieces[index][1]:
            return self.pieces[index]
        return None

    def next_from(self, address: int) -> Piece:
        """What is left from ``address`` on of the piece that it belongs to; else the first piece behind it, or the very
        first one. There must be one.
        """
        found = self.at(address)
        if found is not None:
            return part(found, address, found[1])
        index = bisect_right(self._starts, address)
        return self.pieces[index if index < len(self.pieces) else 0]

    def between(self, start: int, end: int) -> list[Piece]:
        """The parts of pieces that lie in [start, end)."""
        low, high = self._range(start, end)
        return [part(piece, max(piece[0], start), min(piece[1], end)) for piece in self.pieces[low:high]]

    def drop(self, start: int, end: int) -> None:
        """Nothing is to be brought in between any more: it is there, or it is gone."""
        low, high = self._range(start, end)
        if low == high:
            return
        rest: list[Piece] = []
        first, last = self.pieces[low], self.pieces[high - 1]
        if first[0] < start:
            rest.append(part(first, first[0], start))
        if end < last[1]:
            rest.append(part(last, end, last[1]))
        self._replace(low, high, rest)

    def move(self, old: int, new: int, size: int) -> None:
        """What belonged to ``size`` bytes at ``old`` belongs to those at ``new`` instead."""
        moved = [
            (start - old + new, end - old + new, file, offset)
            for start, end, file, offset in self.between(old, old + size)
        ]
        self.drop(old, old + size)
        self.drop(new, new + size)
        at = bisect_right(self._starts, new)
        self._replace(at, at, moved)

    def _range(self, start: int, end: int) -> tuple[int, int]:
        """The indexes of the pieces that have something in [start, end)."""
        low = bisect_right(self._starts, start)
        if low and self.pieces[low - 1][1] > start:
            low -= 1
        high = low
        while high < len(self.pieces) and self._starts[high] < end:
            high += 1
        return low, high

    def _replace(self, low: int, high: int, pieces: list[Piece]) -> None:
        self.pieces[low:high] = pieces
        self._starts[low:high] = [piece[0] for piece in pieces]


def part(piece: Piece, start: int, end: int) -> Piece:
    """A part of a piece."""
    return start, end, piece[2], piece[3] + start - piece[0]
