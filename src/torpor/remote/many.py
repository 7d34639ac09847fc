"""Many system calls of our own by one call to the machine: each costs a tenth of what it costs one by one.

Their arguments are given by columns, for what is done to a thousand sockets is nearly the same for all of them::

    many = Many()
    many.calls("setsockopt", fds, SOL_TCP, TCP_REPAIR, many.place(ON), 4)
    many.run()
"""

from __future__ import annotations

from array import array

from ..errors import KernelError
from ..linux import call as gate
from ..linux.function import Area, Function
from ..linux.nr import NR
from .machine import OWN, RECORD_BYTES, RECORD_WORDS, RESULT_WORD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias, TypeVar

    _Thing = TypeVar("_Thing")

    #: An argument of many calls: the same for all, or one for each (not negative).
    Column: TypeAlias = int | Sequence[int]

_WORD = (1 << 64) - 1
#: Of so many things at a time the records stay in the processor's cache.
AT_ONCE = 64

_machine: list[Function] = []


def parts(things: Sequence[_Thing]) -> Iterator[Sequence[_Thing]]:
    """The things, as many at a time as should be done by the same calls."""
    for start in range(0, len(things), AT_ONCE):
        yield things[start : start + AT_ONCE]


class Block:
    """The calls of one kind, one for each row of their arguments. ``results`` is what the kernel gave, once they have
    been made.
    """

    __slots__ = ("columns", "count", "name", "results", "start")

    def __init__(self, name: str, start: int, columns: tuple[Column, ...]) -> None:
        self.name = name
        self.start = start  # the number of the first among all
        self.columns = columns
        self.count = next(len(column) for column in columns if not isinstance(column, int))
        self.results: list[int] = []

    def write(self, words: array[int]) -> None:
        """Write the records into those of all calls."""
        first, end = self.start * RECORD_WORDS, (self.start + self.count) * RECORD_WORDS
        for place, column in enumerate((NR[self.name] + 1, *self.columns)):
            values = array("Q", (column & _WORD,)) * self.count if isinstance(column, int) else array("Q", column)
            words[first + place : end : RECORD_WORDS] = values


class Many:
    """Calls to be made one after the other, in the order in which they are given."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._areas: list[Area] = []
        self._count = 0

    def place(self, content: bytes | bytearray) -> int:
        """The address of bytes for the kernel to read or write."""
        return self.area(content).address

    def area(self, content: bytes | bytearray) -> Area:
        """As :meth:`place`, to be looked at when the calls have been made."""
        self._areas.append(Area(content))
        return self._areas[-1]

    def calls(self, name: str, *columns: Column) -> Block:
        """Add the system call ``name`` for each row of arguments; at least one column has several."""
        block = Block(name, self._count, columns)
        self._count += block.count
        self._blocks.append(block)
        return block

    def run(self, failed: Callable[[Block, int, KernelError], None] | None = None) -> None:
        """Make them all. The first that fails raises KernelError, unless ``failed(block, row, error)`` returns: then
        those behind it are made. Results are there in any case, of those that were made.
        """
        if gate.fault is not None:
            for block in self._blocks:
                for _ in range(block.count):
                    gate.fault(block.name)
        if not _machine:
            _machine.append(Function(OWN))
        words = array("Q", bytes((self._count + 1) * RECORD_BYTES))  # the last one, of zeros, is the end
        for block in self._blocks:
            block.write(words)
        address, index = words.buffer_info()[0], 0
        try:
            while True:
                index = (_machine[0](address + index * RECORD_BYTES) - address) // RECORD_BYTES
                if index == self._count:
                    return
                block = next(one for one in reversed(self._blocks) if one.start <= index)
                number = (1 << 64) - words[index * RECORD_WORDS + RESULT_WORD]
                error = KernelError(block.name, number)
                if failed is None:
                    raise error
                failed(block, index - block.start, error)
                index += 1
        finally:
            results = words[RESULT_WORD : index * RECORD_WORDS : RECORD_WORDS]
            for block in self._blocks:
                block.results = results[block.start : block.start + block.count].tolist()
