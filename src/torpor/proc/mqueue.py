"""What a POSIX message queue reads as, opened as a file.

Kernel: ipc/mqueue.c, mqueue_read_file()
"""

from __future__ import annotations

from .record import Record


class Queue(Record):
    """``qsize`` bytes wait. Who asked to be notified: ``notify_pid`` as we see it (0: nobody), ``notify`` one of
    SIGEV_*, ``signo`` of SIGEV_SIGNAL.
    """

    qsize: int
    notify: int
    signo: int
    notify_pid: int


def parse(data: bytes) -> Queue:
    """Parse the text. Raises ValueError."""
    found = dict(word.split(b":", 1) for word in data.split() if b":" in word)
    try:
        return Queue(*(int(found[name.upper().encode()]) for name in Queue._fields))
    except (KeyError, ValueError) as error:
        raise ValueError(f"mqueue: cannot read {data!r}: {error}") from None
