"""POSIX message queues by their system calls. Kernel: ipc/mqueue.c"""

from __future__ import annotations

import ctypes
import struct

from .call import call

MQUEUE_MAGIC = 0x19800202
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD = 0, 1, 2
_ATTR = "<4q32x"  # struct mq_attr: flags, maxmsg, msgsize, curmsgs


def mq_open(name: bytes, flags: int, mode: int = 0, size: tuple[int, int] | None = None) -> int:
    """Open the queue ``name`` (without a slash); ``size`` is (maxmsg, msgsize) of one that is made."""
    attr = None if size is None else struct.pack(_ATTR, 0, *size, 0)
    return call("mq_open", name + b"\0", flags, mode, attr)


def attributes(fd: int) -> tuple[int, int, int]:
    """(maxmsg, msgsize, messages that wait) of a queue."""
    area = ctypes.create_string_buffer(64)
    call("mq_getsetattr", fd, None, area)
    _, maxmsg, msgsize, current = struct.unpack(_ATTR, area)
    return maxmsg, msgsize, current


def send(fd: int, text: bytes, priority: int) -> None:
    """Append a message."""
    call("mq_timedsend", fd, text, len(text), priority, None)


def unlink(name: bytes) -> None:
    """Remove the name of a queue."""
    call("mq_unlink", name + b"\0")


def sigevent(value: int, signo: int, notify: int) -> bytes:
    """struct sigevent for mq_notify(2)."""
    return struct.pack("<Qii48x", value, signo, notify)
