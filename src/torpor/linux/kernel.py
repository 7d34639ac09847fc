"""System calls used by more than one layer, each in a function that takes and returns Python values."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from .call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO, KCMP_SYSVSEM, KCMP_EPOLL_TFD = range(8)
PIDFD_THREAD = os.O_EXCL

PM_WRITTEN, PM_PRESENT, PM_SWAPPED, PM_FILE, PM_PFNZERO, PM_HUGE, PM_GUARD = 2, 8, 0x10, 4, 0x20, 0x40, 0x100
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2


def kcmp(pid1: int, pid2: int, kind: int, index1: int = 0, index2: int = 0) -> int:
    """kcmp(2): 0 the same object, 1 and 2 an order between different ones, 3 unordered."""
    return call("kcmp", pid1, pid2, kind, index1, index2)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A descriptor of ours (close-on-exec) for the open file description behind ``fd`` of another task."""
    return call("pidfd_getfd", pidfd, fd, 0)


class iovec(ctypes.Structure):
    """include/uapi/linux/uio.h"""

    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def read_memory(pid: int, address: int, length: int) -> bytes:
    """``length`` bytes at ``address`` of another task; fewer where its memory ends."""
    area = ctypes.create_string_buffer(length)
    local, remote = iovec(ctypes.addressof(area), length), iovec(address, length)
    count = call("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return area.raw[:count]


def read_memory_into(pid: int, target: int, spans: Sequence[tuple[int, int]]) -> int:
    """Read the (address, length) spans of another task one after the other to our address ``target``; returns the
    count.
    """
    words = [word for span in spans for word in span]
    local = struct.pack("<2Q", target, sum(words[1::2]))
    return call("process_vm_readv", pid, local, 1, struct.pack(f"<{len(words)}Q", *words), len(spans), 0)


class pm_scan_arg(ctypes.Structure):
    """include/uapi/linux/fs.h"""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size flags start end walk_end vec vec_len max_pages category_inverted category_mask "
            "category_anyof_mask return_mask"
        ).split()
    ]


def pagemap_scan(
    pagemap_fd: int, start: int, end: int, *, inverted: int = 0, mask: int = 0, anyof: int = 0, wanted: int = 0,
    flags: int = 0,
) -> list[tuple[int, int, int]]:  # fmt: skip
    """PAGEMAP_SCAN: all (start, end, categories) page regions of [start, end) that match. ``flags``: PM_SCAN_*.

    Linux kernel commit 52526ca7fdb9 ("fs/proc/task_mmu: implement IOCTL to get and optionally clear info about
    PTEs") (in v6.7). PM_GUARD in ``wanted`` is not insisted on: it came later, in v6.16.
    """
    import fcntl

    capacity = 4096
    vector = (ctypes.c_uint64 * (3 * capacity))()
    arg = pm_scan_arg(96, flags, start, end, 0, ctypes.addressof(vector), capacity, 0, inverted, mask, anyof, wanted)
    found: list[tuple[int, int, int]] = []
    while True:
        try:
            count = fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, arg)
        except OSError as error:
            if error.errno != errno.EINVAL or not arg.return_mask & PM_GUARD:
                raise
            arg.return_mask &= ~PM_GUARD
            continue
        words = vector[: 3 * count]
        found += zip(words[::3], words[1::3], words[2::3], strict=True)
        if count < capacity or arg.walk_end >= end:
            return found
        arg.start = arg.walk_end


def present_pages(
    pagemap_fd: int, start: int, end: int, *, also: int = 0, flags: int = 0
) -> list[tuple[int, int, int]]:
    """The (start, end, categories) regions of pages that are there, in memory or swapped out, zeros left out.
    ``also``: categories to be told besides these two; ``flags``: see :func:`pagemap_scan`.
    """
    there = PM_PRESENT | PM_SWAPPED
    return pagemap_scan(
        pagemap_fd, start, end, inverted=PM_PFNZERO, mask=PM_PFNZERO, anyof=there, wanted=there | also, flags=flags
    )


class GuardRegions:
    """Finds the guard regions (MADV_GUARD_INSTALL) in small parts of an address space, again and again."""

    def __init__(self, pagemap_fd: int) -> None:
        self._fd = pagemap_fd
        self._vector = (ctypes.c_uint64 * (3 * 64))()
        self._able = True

    def between(self, start: int, end: int) -> list[tuple[int, int]]:
        """(start, end) of those between; none where the kernel cannot tell, or when the address space is gone."""
        import fcntl

        found: list[tuple[int, int]] = []
        while self._able and start < end:
            arg = pm_scan_arg(96, 0, start, end, 0, ctypes.addressof(self._vector), 64, 0, 0, PM_GUARD, 0, PM_GUARD)
            try:
                count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, arg)
            except OSError as error:
                self._able = error.errno not in (errno.EINVAL, errno.ENOTTY)
                break
            words = self._vector[: 3 * count]
            found += zip(words[::3], words[1::3], strict=True)
            start = arg.walk_end if count == 64 else end
        return found


TMPFS_MAGIC = 0x01021994


def file_system(fd: int) -> int:
    """The kind of file system that an open file is on: a magic number of include/uapi/linux/magic.h."""
    status = (ctypes.c_uint64 * 15)()  # struct statfs
    call("fstatfs", fd, status)
    return status[0]


def name_bytes(text: str | bytes) -> bytes:
    """A NUL-terminated path for the kernel."""
    return os.fsencode(text) + b"\0"


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    """prctl(2) for the calling thread."""
    return call("prctl", option, a, b, c, d)


def writable_address(area: mmap.mmap | bytearray) -> int:
    """The address of a writable buffer that the caller keeps alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def is_subreaper() -> bool:
    """Do orphans among our descendants become our children? (PR_GET_CHILD_SUBREAPER)"""
    value = ctypes.c_int()
    call("prctl", 37, ctypes.byref(value), 0, 0, 0)
    return bool(value.value)
