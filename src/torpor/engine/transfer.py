"""Moving memory of a task to a file.

Measured: a second thread, to read while the first one writes, gains nothing (writes wait for the
inode); pieces of 512 KiB stay in the cache between the two copies, and from 2 MiB on ext4 spends
more time on finding large folios than on copying.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os

from .. import log
from ..errors import KernelError, TaskGone
from ..images.source import refused
from ..linux import kernel
from ..linux.call import call
from .sharing import ENTRY, read_entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.source import SourceTask

CHUNK_BYTES = 1 << 19
IOV_MAX = 1024
RESERVE_BYTES_MIN = 8 << 20
EXCLUSIVE = 1  # of a pagemap entry's last byte: bit 56


def reserve(fd: int, start: int, size: int, file: str) -> None:
    """Have the file system set aside the room at once, where that helps: what memory holds would only
    be cleared for it. Raises KernelError, by the ``file``'s name.
    """
    if size < RESERVE_BYTES_MIN:
        return
    try:
        if kernel.file_system(fd) != kernel.TMPFS_MAGIC:
            call("fallocate", fd, 0, start, size)
    except KernelError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise refused(f"reserve {size >> 20} MiB for `{file}`", error) from None


def has_alone(pid: int, runs: list[tuple[int, int]]) -> bool:
    """Are all pages of the runs mapped by this task only?

    process_vm_readv(2) pins what it reads, and the kernel copies a page for that which others have too (mm/gup.c,
    gup_must_unshare()): a family would share no memory any more after it. Reading /proc/PID/mem leaves it shared.
    """
    flags: set[int] = set()
    for entries in read_entries(pid, runs):
        flags.update(entries[ENTRY - 1 :: ENTRY])
    return all(flag & EXCLUSIVE for flag in flags)


def read_pieces(
    pid: int, mem_fd: int, batch: list[tuple[int, int]], address: int, view: memoryview, *, alone: bool
) -> None:
    """Read the (address, bytes) pieces of a stopped task to our own ``address``, which ``view`` is on.

    ``alone``: what :func:`has_alone` says.
    """
    if not alone:
        read_file(pid, mem_fd, batch, view)
        return
    try:
        count = kernel.read_memory_into(pid, address, batch)
    except KernelError as error:
        if error.errno != errno.EFAULT:
            raise
        count = 0
    if count != len(view):
        read_file(pid, mem_fd, batch, view)


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


class Buffer:
    """Room for pieces of a task's memory on their way to a file."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CHUNK_BYTES)
        self._address = kernel.writable_address(self._memory)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give it back."""
        with contextlib.suppress(BufferError):  # an error on its way out holds a piece: with it the memory goes
            self._memory.close()

    def read(
        self, task: SourceTask, runs: list[tuple[int, int]], *, alone: bool
    ) -> Iterator[tuple[list[tuple[int, int]], memoryview]]:
        """The content of the runs, in pieces: (its (address, bytes) spans, the content), valid until the next one."""
        with memoryview(self._memory) as view:
            for batch in batches(runs):
                with view[: sum(length for _, length in batch)] as content:
                    read_pieces(task.pid, task.mem_fd, batch, self._address, content, alone=alone)
                    yield batch, content

    def read_running(
        self, task: SourceTask, runs: list[tuple[int, int]], *, alone: bool
    ) -> Iterator[tuple[list[tuple[int, int]], memoryview]]:
        """As :meth:`read`, of a task that is not stopped: what it gives back meanwhile is left out."""
        for batch in batches(runs):
            try:
                yield from self.read(task, [(start, start + length) for start, length in batch], alone=alone)
            except (TaskGone, OSError) as error:
                log.debug(f"task {task.pid}: at {batch[0][0]:#x}: {error}")


def read_file(pid: int, mem_fd: int, batch: list[tuple[int, int]], view: memoryview) -> None:
    """As process_vm_readv, from /proc/PID/mem: also what the task itself may not read, and without pinning it."""
    done = 0
    for start, length in batch:
        while length:
            count = os.preadv(mem_fd, [view[done : done + length]], start)
            if not count:
                raise TaskGone(f"task {pid}: memory at {start:#x} could not be read")
            done, start, length = done + count, start + count, length - count
