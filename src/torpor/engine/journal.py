"""What a pager knows, kept where it outlives the pager: in memory that it shares with its guard.

The kernel itself writes the journal: messages of a userfaultfd are read straight into it. A call that has begun is
finished even in a process that is being killed, so no event is ever taken from the kernel without being here.

::

    flags | side 0: state, events … | side 1: state, events …

A state says everything as it was at one moment; the events that follow it are what has happened since. Now and then a
new state is written to the other side, and one byte makes it the valid one.
"""

from __future__ import annotations

import marshal
import mmap
import os
import struct

from ..linux.userfault import EVENT_PAGEFAULT, MESSAGE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PAGE = 4096
EVENTS_MAX = 2000
ENTRY_BYTES = 8 + MESSAGE_BYTES
EVENTS_BYTES = (EVENTS_MAX + 1) * ENTRY_BYTES + PAGE & -PAGE
STATE_BYTES_MIN = 32 << 20  # what is not used costs nothing
SIDE, FINISHED, FAILURES, HURRY, RELEASED = range(5)  # the flags, a byte each


class Journal:
    """Shared with all children that are forked from now on."""

    def __init__(self, state: tuple[Any, ...]) -> None:
        """``state``: what is known at the beginning, made of what marshal takes."""
        first = marshal.dumps(state)
        self._state_bytes = max(8 * len(first), STATE_BYTES_MIN) + PAGE & -PAGE
        self._side_bytes = self._state_bytes + EVENTS_BYTES
        self._memory = mmap.mmap(-1, PAGE + 2 * self._side_bytes)
        for side in (0, 1):  # have it at hand: the kernel is never to wait for these pages
            start = self._events(side)
            self._memory[start : start + EVENTS_BYTES] = bytes(EVENTS_BYTES)
        self._count = 0
        self.write(state)

    def flag(self, which: int) -> int:
        """The value of a flag."""
        return self._memory[which]

    def set(self, which: int, value: int = 1) -> None:
        """Set a flag."""
        self._memory[which] = value

    def receive(self, which: int, fd: int) -> bool:
        """Set a flag to the next byte that comes from ``fd``; False: there is none to come. It is never lost: who dies
        here has either not taken it yet or has set the flag. Raises OSError.
        """
        with memoryview(self._memory)[which : which + 1] as target:
            return os.readv(fd, [target]) == 1

    @property
    def full(self) -> bool:
        """Is it time for a new state?"""
        return self._count >= EVENTS_MAX

    def write(self, state: tuple[Any, ...]) -> None:
        """From now on this is what is known."""
        side = 1 - self._memory[SIDE]
        content = marshal.dumps(state)
        if len(content) + 8 > self._state_bytes:
            raise MemoryError("the pager's state has outgrown the room for it")
        start = self._start(side)
        struct.pack_into("<Q", self._memory, start, len(content))
        self._memory[start + 8 : start + 8 + len(content)] = content
        self._end(side, 0)
        self._memory[SIDE] = side
        self._count = 0

    def read(self) -> tuple[Any, list[tuple[int, bytes]]]:
        """The last state, and the (number of the address space, message) of the events since. For a new pager."""
        start = self._start(self._memory[SIDE])
        length = struct.unpack_from("<Q", self._memory, start)[0]
        events = list(self._entries())
        self._count = len(events)
        return marshal.loads(self._memory[start + 8 : start + 8 + length]), events

    def take(self, fd: int, number: int) -> bytes | None:
        """Read a message from the userfaultfd of address space ``number``; None if there is none. Raises OSError.

        Events are kept, page faults are not: whoever waits for a page asks again.
        """
        place = self._entry(self._count)
        struct.pack_into("<Q", self._memory, place, number)
        self._end(self._memory[SIDE], self._count)
        self._end(self._memory[SIDE], self._count + 1)
        with memoryview(self._memory)[place + 8 : place + ENTRY_BYTES] as target:
            try:
                if os.readv(fd, [target]) != MESSAGE_BYTES:
                    return None
            except BlockingIOError:
                return None
            message = bytes(target)
        if message[0] == EVENT_PAGEFAULT:
            self._end(self._memory[SIDE], self._count)
        else:
            self._count += 1
        return message

    def add(self, number: int, message: bytes) -> None:
        """Keep an event that is not the kernel's."""
        place = self._entry(self._count)
        self._end(self._memory[SIDE], self._count + 1)
        struct.pack_into("<Q", self._memory, place, number)
        self._memory[place + 9 : place + ENTRY_BYTES] = message[1:]
        self._memory[place + 8] = message[0]  # with which it is there
        self._count += 1

    def _entries(self) -> Iterator[tuple[int, bytes]]:
        for index in range(EVENTS_MAX):
            place = self._entry(index)
            if self._memory[place + 8] in (0, EVENT_PAGEFAULT):
                return
            number = struct.unpack_from("<Q", self._memory, place)[0]
            yield number, self._memory[place + 8 : place + ENTRY_BYTES]

    def _start(self, side: int) -> int:
        return PAGE + side * self._side_bytes

    def _events(self, side: int) -> int:
        return self._start(side) + self._state_bytes

    def _entry(self, index: int) -> int:
        return self._events(self._memory[SIDE]) + index * ENTRY_BYTES

    def _end(self, side: int, index: int) -> None:
        """Nothing is valid from this entry on: the first byte of a message is what has happened, never 0."""
        self._memory[self._events(side) + index * ENTRY_BYTES + 8] = 0
