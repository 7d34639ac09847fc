"""This process's own guest page: a memfd, mapped, and the eventfd that goes with it. Layout: model/guest_page.py."""

from __future__ import annotations

import fcntl
import mmap
import os

from ..model import guest_page as layout


class LivePage:
    """A page that is there for as long as the process is."""

    def __init__(self, signal: int, generation: int = 1, new_id: bytes = b"", argument: bytes = b"") -> None:
        page = layout.Page()
        self.fd = os.memfd_create(layout.NAME.decode(), os.MFD_CLOEXEC)
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        page.generation, page.id, page.argument = generation, new_id or os.urandom(layout.ID_BYTES), argument
        page.signal, page.eventfd, page.pid = signal, self.event_fd, os.getpid()
        page.tid = page.pid  # the main thread, where Python runs handlers
        os.write(self.fd, layout.build(page))
        self.map = mmap.mmap(self.fd, layout.PAGE_BYTES)
        self.asked = generation

    def close(self) -> None:
        """Let go of it."""
        self.map.close()
        os.close(self.fd)
        os.close(self.event_fd)

    def word(self, offset: int) -> int:
        """A word of the page."""
        value: int = layout.WORD.unpack_from(self.map, offset)[0]
        return value

    def put(self, offset: int, value: int) -> None:
        """Write a word of the page."""
        layout.WORD.pack_into(self.map, offset, value)

    @property
    def state(self) -> int:
        """The state word."""
        return self.word(layout.AT_STATE)

    @state.setter
    def state(self, value: int) -> None:
        self.put(layout.AT_STATE, value)

    def generation(self) -> int:
        """The counter."""
        return self.word(layout.AT_GENERATION)

    def id(self) -> bytes:
        """The id of the wake-up."""
        return self.map[layout.AT_ID : layout.AT_ID + layout.ID_BYTES]

    def argument(self) -> bytes:
        """What was handed over."""
        size = min(self.word(layout.AT_ARGUMENT_SIZE), layout.ARGUMENT_BYTES)
        return self.map[layout.AT_ARGUMENT : layout.AT_ARGUMENT + size]

    def say(self, text: str) -> None:
        """What is being done, or why it failed, for the dump's error message."""
        data = text.encode(errors="replace")[: layout.TEXT_BYTES]
        self.put(layout.AT_TEXT_SIZE, 0)
        self.map[layout.AT_TEXT : layout.AT_TEXT + len(data)] = data
        self.put(layout.AT_TEXT_SIZE, len(data))

    def clear(self) -> bool:
        """Take all from the eventfd; was there anything?"""
        try:
            return os.eventfd_read(self.event_fd) > 0
        except BlockingIOError:
            return False

    def deserted(self) -> bool:
        """Is nobody there any more who is taking a snapshot? Whoever does holds the page's lock."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True
