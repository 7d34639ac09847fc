"""userfaultfd(2): bringing pages into memory of another task that is still empty
(include/uapi/linux/userfaultfd.h).
"""

from __future__ import annotations

import ctypes
import errno
import os

from ..errors import KernelError
from .call import call

API, REGISTER_MODE_MISSING = 0xAA, 1
IOC_API, IOC_REGISTER, IOC_UNREGISTER, IOC_COPY = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC028AA03
COPY_BYTES = 16 << 20
PROT_READ, MAP_SHARED = 1, 1
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


def _ioctl(fd: int, request: int, *words: int) -> ctypes.Array[ctypes.c_int64]:
    argument = (ctypes.c_int64 * len(words))(*words)
    call("ioctl", fd, request, argument)
    return argument


def possible() -> bool:
    """Is it there, and may we use it?"""
    try:
        os.close(call("userfaultfd", FLAGS))
    except KernelError:
        return False
    return True


def start(fd: int) -> None:
    """Agree with the kernel on a version; to be done first. Raises KernelError."""
    _ioctl(fd, IOC_API, API, 0, 0)


def register(fd: int, begin: int, end: int) -> None:
    """Take charge of the missing pages of a mapping. Raises KernelError."""
    _ioctl(fd, IOC_REGISTER, begin, end - begin, REGISTER_MODE_MISSING, 0)


def unregister(fd: int, begin: int, end: int) -> None:
    """Leave a mapping to itself again. Raises KernelError."""
    _ioctl(fd, IOC_UNREGISTER, begin, end - begin)


def copy_from_file(fd: int, address: int, size: int, file: int, offset: int) -> None:
    """Fill ``size`` bytes at ``address`` with those at ``offset`` of a file; all of these are
    multiples of a page's size.

    Raises KernelError: EFAULT where the file ends before.
    """
    source = call("mmap", 0, size, PROT_READ, MAP_SHARED, file, offset)
    try:
        done = 0
        while done < size:
            argument = (ctypes.c_int64 * 5)(
                address + done, source + done, min(COPY_BYTES, size - done), 0, 0
            )
            try:
                call("ioctl", fd, IOC_COPY, argument)
            except KernelError as error:
                if error.errno != errno.EAGAIN or argument[4] <= 0:
                    raise
            done += argument[4]
    finally:
        call("munmap", source, size)
