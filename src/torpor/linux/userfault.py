"""userfaultfd(2): bringing pages into memory of another task that is still empty
(include/uapi/linux/userfaultfd.h).
"""

from __future__ import annotations

import ctypes
import errno
import os

from ..errors import KernelError
from .call import call

API, REGISTER_MODE_MISSING, REGISTER_MODE_WP = 0xAA, 1, 2
USER_MODE_ONLY = 1
IOC_API, IOC_REGISTER, IOC_UNREGISTER, IOC_COPY = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC028AA03
IOC_WRITEPROTECT, WRITEPROTECT_MODE_WP = 0xC018AA06, 1
COPY_MODE_DONTWAKE = 1
IOC_WAKE, IOC_ZEROPAGE, IOC_POISON = 0x8010AA02, 0xC020AA04, 0xC020AA08
#: What is written is only noted: nobody has to answer. Linux kernel commit d61ea1cb0095 ("userfaultfd:
#: UFFD_FEATURE_WP_ASYNC") (in v6.7).
FEATURE_WP_ASYNC = 1 << 15
FEATURE_EVENT_FORK, FEATURE_EVENT_REMAP, FEATURE_EVENT_REMOVE, FEATURE_EVENT_UNMAP = 0x2, 0x4, 0x8, 0x40
EVENT_PAGEFAULT, EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = range(0x12, 0x17)
#: All that changes which page belongs where.
EVENTS = FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP
MESSAGE_BYTES = 32
COPY_BYTES = 16 << 20
PROT_READ, MAP_SHARED, MADV_POPULATE_READ = 1, 1, 22
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
NOBODY = 0x10000, 0x11000  # the first page that may be mapped, on which hardly anybody has anything


def _ioctl(fd: int, request: int, *words: int) -> ctypes.Array[ctypes.c_int64]:
    argument = (ctypes.c_int64 * len(words))(*words)
    call("ioctl", fd, request, argument)
    return argument


def possible(features: int = 0) -> bool:
    """Is it there, with these features, and may we use it?"""
    try:
        fd = call("userfaultfd", FLAGS)
    except KernelError:
        return False
    try:
        start(fd, features)
    except KernelError:
        return False
    finally:
        os.close(fd)
    return True


def make(flags: int = 0) -> int:
    """userfaultfd(2), with ``flags`` besides the usual ones. Raises KernelError."""
    return call("userfaultfd", FLAGS | flags)


def start(fd: int, features: int = 0) -> None:
    """Agree with the kernel on a version and on ``features``; to be done first. Raises KernelError."""
    _ioctl(fd, IOC_API, API, features, 0)


def register(fd: int, begin: int, end: int, mode: int = REGISTER_MODE_MISSING) -> None:
    """Take charge of the missing pages of a mapping, or of those that are written. Raises KernelError."""
    _ioctl(fd, IOC_REGISTER, begin, end - begin, mode, 0)


def unregister(fd: int, begin: int, end: int) -> None:
    """Leave a mapping to itself again. Raises KernelError."""
    _ioctl(fd, IOC_UNREGISTER, begin, end - begin)


def zero(fd: int, address: int, size: int) -> None:
    """Make missing pages empty ones, and let go who waits for them. Raises KernelError."""
    _ioctl(fd, IOC_ZEROPAGE, address, size, 0, 0)


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


def copy(fd: int, address: int, source: int, size: int) -> tuple[int, int]:
    """Make pages at ``address`` with what lies at ``source`` in our memory; who waits for them is not woken yet.

    Returns how many bytes are there, from the first one on, and the errno of what stopped it: EEXIST a page was there,
    ENOENT no mapping of this userfaultfd holds the whole of it, EAGAIN there are events to be read first (or some of it
    is done), ESRCH the address space is gone, EFAULT the source cannot be read.
    """
    return _made(fd, IOC_COPY, (ctypes.c_int64 * 5)(address, source, size, COPY_MODE_DONTWAKE, 0))


def make_empty(fd: int, address: int, size: int) -> tuple[int, int]:
    """As :func:`copy`, but the pages are empty, and who waits for them is woken."""
    return _made(fd, IOC_ZEROPAGE, (ctypes.c_int64 * 4)(address, size, 0, 0))


def poison(fd: int, address: int, size: int) -> tuple[int, int]:
    """As :func:`make_empty`, but whoever touches the pages gets SIGBUS.

    Linux kernel commit fc71884a5f59 ("mm: userfaultfd: add new UFFDIO_POISON ioctl") (in v6.6).
    """
    return _made(fd, IOC_POISON, (ctypes.c_int64 * 4)(address, size, 0, 0))


def _made(fd: int, request: int, argument: ctypes.Array[ctypes.c_int64]) -> tuple[int, int]:
    """The last word of the argument is what the kernel has done, or why it has done nothing."""
    try:
        call("ioctl", fd, request, argument)
    except KernelError as error:
        return max(argument[-1], 0), error.errno or errno.EINVAL
    return argument[-1], 0


def wake(fd: int, begin: int, end: int) -> None:
    """Let those go on who wait for a page between: they try again."""
    try:
        _ioctl(fd, IOC_WAKE, begin, end - begin)
    except KernelError:
        pass  # nobody is there to be woken


def has_memory(fd: int) -> bool:
    """Is there still a process that has the address space?

    UFFDIO_UNREGISTER of pages that nobody has registered says so (userfaultfd_unregister() in fs/userfaultfd.c): ENOMEM
    when the address space is gone, and else nothing or EINVAL.
    """
    try:
        unregister(fd, *NOBODY)
    except KernelError as error:
        return error.errno != errno.ENOMEM
    return True


def map_file(fd: int, size: int) -> int:
    """Map a whole file for reading; returns the address, for :func:`copy` and :func:`populate`. Raises KernelError."""
    return call("mmap", 0, size, PROT_READ, MAP_SHARED, fd, 0)


def populate(address: int, size: int) -> int:
    """Have pages of a mapped file at hand; 0, or the errno why some are not (EFAULT: the file ends before)."""
    try:
        call("madvise", address, size, MADV_POPULATE_READ)
    except KernelError as error:
        # Before Linux 5.14 there is no such advice: the copy itself reads them, one by one.
        return 0 if error.errno == errno.EINVAL else error.errno or errno.EFAULT
    return 0
