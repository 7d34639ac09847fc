"""A pager's journal: what was read from a userfaultfd is there for whoever comes after, whenever the reader dies."""

from __future__ import annotations

import os
import struct

from torpor.engine.journal import EVENTS_MAX, HURRY, Journal
from torpor.linux.userfault import EVENT_PAGEFAULT, EVENT_REMOVE, EVENT_UNMAP


def message(event: int, *words: int) -> bytes:
    return struct.pack("<B7x3Q", event, *words, *(0,) * (3 - len(words)))


def sender() -> tuple[int, int]:
    """A pipe in the place of a userfaultfd."""
    return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)


def test_events_since_the_last_state() -> None:
    book, (reader, writer) = Journal(("first",)), sender()
    sent = [message(EVENT_REMOVE, 1, 2), message(EVENT_PAGEFAULT, 0, 77), message(EVENT_UNMAP, 3, 4)]
    for each in sent:
        os.write(writer, each)
        assert book.take(reader, 9) == each
    assert book.take(reader, 9) is None
    kept = [(9, sent[0]), (9, sent[2])]
    assert book.read() == (("first",), kept)
    book.add(10, message(EVENT_REMOVE, 5, 6))
    assert book.read() == (("first",), [*kept, (10, message(EVENT_REMOVE, 5, 6))])
    book.write(("second", [1, 2]))
    assert book.read() == (("second", [1, 2]), [])
    os.write(writer, sent[0])
    book.take(reader, 1)
    assert book.read() == (("second", [1, 2]), [(1, sent[0])])


def test_it_says_when_it_is_full() -> None:
    book = Journal(())
    for number in range(EVENTS_MAX):
        assert not book.full
        book.add(number, message(EVENT_REMOVE, number))
    assert book.full
    assert [number for number, _ in book.read()[1]] == list(range(EVENTS_MAX))
    book.write(())
    assert not book.full
    assert book.read() == ((), [])


def test_another_process_finds_what_one_has_read_that_was_killed() -> None:
    book, (reader, writer) = Journal(("state",)), sender()
    os.write(writer, message(EVENT_REMOVE, 1, 2))
    pid = os.fork()
    if pid == 0:
        book.take(reader, 4)
        book.set(HURRY)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert book.flag(HURRY) == 1
    assert book.read() == (("state",), [(4, message(EVENT_REMOVE, 1, 2))])
