"""Tasks whose memory is nearly that of a sibling seen before: the children that a program forks do the same as a rule.

Such a task's runs of pages are the same, and most pages it has of its own have the content of the sibling's. So the
lists of both are compared as a whole, and its pagemap is the sibling's but for a few entries.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain

from ..images.pages import PE_PARENT, PE_PRESENT, framed_run
from .sharing import ENTRY, FRAME, PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    #: (start, end)
    Span = tuple[int, int]

MODELS_MAX = 4


class Model:
    """What the pages of one task have turned out to be."""

    __slots__ = ("_addresses", "_content", "_entries", "_firsts", "_framed", "_number", "_parents", "_parts", "_places")

    def __init__(
        self, pid: int, runs: list[Span], entries: list[bytes], found: Iterable[tuple[int, int, int]],
        own: list[Span], content: bytes, parents: dict[int, int], number: Callable[[int], int],
    ) -> None:  # fmt: skip
        """``found`` are its runs as (start, pages, pid of the task that stores them or 0), ``own`` those that it has
        alone, ``content`` what is in these. ``parents``: address → pagemap entry of its parent; ``number`` gives the
        pid for the images.
        """
        self._entries = entries
        self._content = content
        self._number = number
        self._addresses = _addresses(runs)
        self._parents = [parents.get(address, -1) for address in self._addresses]
        #: (start, pages, owner), each with its entry for another task's pagemap
        self._parts = [(start, count, owner or pid) for start, count, owner in found]
        self._firsts = [start for start, _, _ in self._parts]
        self._framed = [framed_run(start, count, PE_PARENT, number(owner)) for start, count, owner in self._parts]
        #: address → where in ``content``
        self._places = dict(zip(_addresses(own), range(0, len(content), PAGE), strict=True))

    def differing(self, entries: list[bytes]) -> Iterator[tuple[int, bool]]:
        """The pages for which another task has other entries: (address, is it the parent's page?)."""
        at = 0
        for mine, other in zip(self._entries, entries, strict=True):
            if mine != other:
                ours, theirs = memoryview(mine).cast("Q"), memoryview(other).cast("Q")
                for index, (one, two) in enumerate(zip(ours, theirs, strict=True), at):
                    if one != two:
                        yield self._addresses[index], two == self._parents[index]
            at += len(mine) // ENTRY

    def same_content(self, address: int, content: bytes) -> bool:
        """Is this what the pages from ``address`` on hold, all of them its own?"""
        place = self._places.get(address, -1)
        last = self._places.get(address + len(content) - PAGE, -1)
        end = place + len(content)
        return place >= 0 and last == end - PAGE and self._content[place:end] == content

    def owner(self, address: int) -> int:
        """The pid of the task that stores a page."""
        return self._parts[bisect_right(self._firsts, address) - 1][2]

    def pagemap(self, changes: list[tuple[int, int]]) -> Iterator[bytes]:
        """The entries of a task that has the same but for ``changes``: (address, pid of who stores it or 0) in order of
        addresses.
        """
        at = index = 0
        while index < len(changes):
            part = bisect_right(self._firsts, changes[index][0]) - 1
            yield from self._framed[at:part]
            start, count, owner = self._parts[part]
            end = start + count * PAGE
            while index < len(changes) and changes[index][0] < end:
                address, other = changes[index]
                if address > start:
                    yield self._entry(start, address, owner)
                start, index = address + PAGE, index + 1
                while index < len(changes) and changes[index] == (start, other) and start < end:
                    start, index = start + PAGE, index + 1
                yield self._entry(address, start, other)
            if start < end:
                yield self._entry(start, end, owner)
            at = part + 1
        yield from self._framed[at:]

    def _entry(self, start: int, end: int, owner: int) -> bytes:
        if owner:
            return framed_run(start, (end - start) // PAGE, PE_PARENT, self._number(owner))
        return framed_run(start, (end - start) // PAGE, PE_PRESENT, 0)


def _addresses(spans: list[Span]) -> list[int]:
    return list(chain.from_iterable(range(start, end, PAGE) for start, end in spans))


class Models:
    """The last few models, to be found by whose children they are and by their runs.

    The longer a program forks, the less its children differ from the one before, and the first is the odd one: so
    another one is taken after the 4th, the 16th, and so on.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[Span, ...]], Model] = {}
        self._asked: dict[tuple[int, tuple[Span, ...]], int] = {}

    def find(self, ppid: int, runs: list[Span]) -> Model | None:
        """One for a child of ``ppid`` with these runs; None: it may be one for others."""
        key = ppid, tuple(runs)
        model = self._known.get(key)
        if model is None:
            return None
        count = self._asked[key] = self._asked[key] + 1
        return None if count & (count - 1) == 0 and count & 0x5555_5555 and count > 1 else model

    def add(self, ppid: int, runs: list[Span], model: Model) -> None:
        """Remember one, in place of another like it."""
        key = ppid, tuple(runs)
        if key not in self._known and len(self._known) >= MODELS_MAX:
            oldest = next(iter(self._known))
            del self._known[oldest], self._asked[oldest]
        self._known[key] = model
        self._asked.setdefault(key, 0)


def all_known(entries: list[bytes]) -> bool:
    """Does every entry show where its page is?"""
    return all(value & FRAME for run in entries for value in memoryview(run).cast("Q"))
