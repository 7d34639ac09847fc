"""Moving memory of a task to a file.

Measured: a second thread, to read while the first one writes, gains nothing (writes wait for the
inode); pieces of 512 KiB stay in the cache between the two copies, and from 2 MiB on ext4 spends
more time on finding large folios than on copying.
"""

from __future__ import annotations

import errno
import os

from ..errors import KernelError, TaskGone
from ..linux import kernel
from ..linux.call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 1 << 19
IOV_MAX = 1024
RESERVE_BYTES_MIN = 8 << 20


def reserve(fd: int, start: int, size: int) -> None:
    """Have the file system set aside the room at once, where that helps: what memory holds would only
    be cleared for it.
    """
    if size < RESERVE_BYTES_MIN:
        return
    try:
        if kernel.file_system(fd) != kernel.TMPFS_MAGIC:
            call("fallocate", fd, 0, start, size)
    except KernelError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def read_pieces(
    pid: int, mem_fd: int, batch: list[tuple[int, int]], address: int, view: memoryview
) -> None:
    """Read the (address, bytes) pieces of a stopped task to our own ``address``, which ``view`` is on."""
    try:
        count = kernel.read_memory_into(pid, address, batch)
    except KernelError as error:
        if error.errno != errno.EFAULT:
            raise
        count = 0
    if count != len(view):
        read_protected(pid, mem_fd, batch, view)


def batches(runs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The runs as lists of (address, length) of at most CHUNK_BYTES and IOV_MAX pieces each."""
    batch: list[tuple[int, int]] = []
    room = CHUNK_BYTES
    for start, end in runs:
        while start < end:
            length = min(end - start, room)
            batch.append((start, length))
            start += length
            room -= length
            if room == 0 or len(batch) == IOV_MAX:
                yield batch
                batch, room = [], CHUNK_BYTES
    if batch:
        yield batch


def read_protected(pid: int, mem_fd: int, batch: list[tuple[int, int]], view: memoryview) -> None:
    """As process_vm_readv, for memory that the task itself may not read: /proc/PID/mem does not ask."""
    done = 0
    for start, length in batch:
        while length:
            count = os.preadv(mem_fd, [view[done : done + length]], start)
            if not count:
                raise TaskGone(f"task {pid}: memory at {start:#x} could not be read")
            done, start, length = done + count, start + count, length - count
