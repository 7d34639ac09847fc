"""io_uring: its system calls and structures. include/uapi/linux/io_uring.h"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from .call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# IORING_SETUP_*
IOPOLL, SQPOLL, SQ_AFF, CQSIZE, CLAMP, ATTACH_WQ, R_DISABLED = 1, 2, 4, 8, 0x10, 0x20, 0x40
SUBMIT_ALL, COOP_TASKRUN, TASKRUN_FLAG, SQE128, CQE32 = 0x80, 0x100, 0x200, 0x400, 0x800
SINGLE_ISSUER, DEFER_TASKRUN, NO_MMAP, REGISTERED_FD_ONLY, NO_SQARRAY = 0x1000, 0x2000, 0x4000, 0x8000, 0x10000
HYBRID_IOPOLL = 0x20000
# io_uring_enter(2)
ENTER_GETEVENTS, ENTER_SQ_WAKEUP = 1, 2
# io_uring_register(2)
REGISTER_EVENTFD, REGISTER_EVENTFD_ASYNC, REGISTER_FILES2, REGISTER_BUFFERS2 = 4, 7, 13, 15
REGISTER_ENABLE_RINGS, REGISTER_IOWQ_MAX_WORKERS, REGISTER_RING_FDS = 12, 19, 20
REGISTER_FILE_ALLOC_RANGE, REGISTER_CLOCK = 25, 29
# mmap(2) offsets of the rings and of the submission entries
OFF_SQ_RING, OFF_CQ_RING, OFF_SQES = 0, 0x8000000, 0x10000000
SQ_NEED_WAKEUP = 1
OP_MSG_RING = 40
CQE_SKIP_SUCCESS = 1 << 6  # sqe.flags
MSG_RING_FLAGS_PASS = 2
SQE_BYTES, CQE_BYTES = 64, 16
ENTRIES_MAX = 32768

#: Names of the operations, by number.
OPERATIONS = (
    "nop readv writev fsync read_fixed write_fixed poll_add poll_remove sync_file_range sendmsg recvmsg timeout "
    "timeout_remove accept async_cancel link_timeout connect fallocate openat close files_update statx read write "
    "fadvise madvise send recv openat2 epoll_ctl splice provide_buffers remove_buffers tee shutdown renameat unlinkat "
    "mkdirat symlinkat linkat msg_ring fsetxattr setxattr fgetxattr getxattr socket uring_cmd send_zc sendmsg_zc "
    "read_multishot waitid futex_wait futex_wake futex_waitv fixed_fd_install ftruncate bind listen recv_zc epoll_wait "
    "readv_fixed writev_fixed pipe"
).split()


class Params:
    """struct io_uring_params. ``sq_off`` and ``cq_off`` say where in the rings the kernel has put what."""

    #: The names of the words of struct io_sqring_offsets and io_cqring_offsets.
    SQ = "head tail ring_mask ring_entries flags dropped array".split()
    CQ = "head tail ring_mask ring_entries overflow cqes flags".split()
    _FORM = struct.Struct("<10I 10I 10I")

    def __init__(self, flags: int, cq_entries: int = 0, *, cpu: int = 0, idle_ms: int = 0, wq_fd: int = 0) -> None:
        self.flags = flags
        self.sq_entries = 0
        self.cq_entries = cq_entries
        self.cpu = cpu
        self.idle_ms = idle_ms
        self.wq_fd = wq_fd
        self.sq_off: dict[str, int] = {}
        self.cq_off: dict[str, int] = {}
        #: With NO_MMAP: where the submission entries, and the two rings, are to be.
        self.sq_address = self.cq_address = 0

    def pack(self) -> bytes:
        """As the kernel takes it."""
        words = (self.sq_entries, self.cq_entries, self.flags, self.cpu, self.idle_ms, 0, self.wq_fd)
        places = [(0,) * 8 + (one & 0xFFFFFFFF, one >> 32) for one in (self.sq_address, self.cq_address)]
        return self._FORM.pack(*words, 0, 0, 0, *places[0], *places[1])

    def unpack(self, data: bytes) -> None:
        """As the kernel gives it back."""
        words = self._FORM.unpack(data)
        self.sq_entries, self.cq_entries, self.flags = words[:3]
        self.sq_off = dict(zip(self.SQ, words[10:20], strict=False))
        self.cq_off = dict(zip(self.CQ, words[20:30], strict=False))

    def unpack_offsets(self, sq_entries: int, offsets: Sequence[int]) -> None:
        """Fill in what a ring made so has been found to have."""
        self.sq_entries = sq_entries
        self.sq_off = dict(zip(self.SQ, offsets, strict=False))
        self.cq_off = dict(zip(self.CQ, offsets[len(self.SQ) :], strict=True))

    @property
    def offsets(self) -> list[int]:
        """All offsets, in the kernel's order: what a program that uses the ring has remembered."""
        return [*self.sq_off.values(), *self.cq_off.values()]

    @property
    def ring_bytes(self) -> int:
        """The bytes of the two rings, which lie in one piece."""
        cqes = self.cq_off["cqes"] + self.cq_entries * cqe_bytes(self.flags)
        return cqes if self.flags & NO_SQARRAY else max(cqes, self.sq_off["array"] + 4 * self.sq_entries)

    @property
    def sqe_bytes(self) -> int:
        """The bytes of the submission entries."""
        return self.sq_entries * SQE_BYTES * (2 if self.flags & SQE128 else 1)


def cqe_bytes(flags: int) -> int:
    """The bytes of a completion entry."""
    return CQE_BYTES * (2 if flags & CQE32 else 1)


def setup(entries: int, params: Params) -> int:
    """io_uring_setup(2): a descriptor, close-on-exec; fills in ``params``. Raises KernelError."""
    area = ctypes.create_string_buffer(params.pack())
    fd = call("io_uring_setup", entries, area)
    params.unpack(area.raw[: Params._FORM.size])
    return fd


def enter(fd: int, submit: int, flags: int = 0) -> int:
    """io_uring_enter(2): how many entries were taken. Waits for nothing. Raises KernelError."""
    return call("io_uring_enter", fd, submit, 0, flags, None, 0)


def register(fd: int, what: int, data: bytes, count: int) -> int:
    """io_uring_register(2). Raises KernelError."""
    return call("io_uring_register", fd, what, data, count)


class Rings:
    """A ring's memory as we see it: ``ring`` holds the heads, tails and completions, ``sqes`` the submissions."""

    __slots__ = ("_areas", "_words", "params", "ring", "sqes")

    def __init__(self, fd: int, params: Params, places: Sequence[tuple[int, int]] = ()) -> None:
        """``places``: the (descriptor, offset) of the one and of the other, if they are not to be had by ``fd``."""
        self.params = params
        self._areas: list[mmap.mmap] = []
        places = places or ((fd, OFF_SQ_RING), (fd, OFF_SQES))
        sizes = params.ring_bytes, params.sqe_bytes
        try:
            self.ring, self.sqes = (self._map(*place, size) for place, size in zip(places, sizes, strict=True))
        except BaseException:
            self._unmap()
            raise
        self._words = self.ring[: params.ring_bytes & -4].cast("I")

    def _map(self, fd: int, offset: int, size: int) -> memoryview:
        before = offset % max(os.fstatvfs(fd).f_bsize, mmap.PAGESIZE)  # of huge pages it begins with a whole one
        access = mmap.PROT_READ | mmap.PROT_WRITE
        area = mmap.mmap(fd, before + size, mmap.MAP_SHARED, access, offset=offset - before)
        self._areas.append(area)
        return memoryview(area)[before : before + size]

    def _unmap(self) -> None:
        for area in self._areas:
            area.close()

    def close(self) -> None:
        """Unmap it."""
        for view in (self._words, self.ring, self.sqes):
            view.release()
        self._unmap()

    def sq(self, name: str) -> int:
        """A word of the submission ring."""
        return int(struct.unpack_from("<I", self.ring, self.params.sq_off[name])[0])

    def cq(self, name: str) -> int:
        """A word of the completion ring."""
        return int(struct.unpack_from("<I", self.ring, self.params.cq_off[name])[0])

    def set_sq(self, name: str, value: int) -> None:
        """Set a word of the submission ring, at once: struct.pack_into() clears it first, and a thread that polls the
        ring would take a tail of 0 for one that has gone round.
        """
        self._words[self.params.sq_off[name] // 4] = value & 0xFFFFFFFF

    def set_cq(self, name: str, value: int) -> None:
        """Set a word of the completion ring, at once."""
        self._words[self.params.cq_off[name] // 4] = value & 0xFFFFFFFF


def rsrc_register(count: int, data: int = 0, tags: int = 0) -> bytes:
    """struct io_uring_rsrc_register; ``data`` and ``tags`` are addresses."""
    return struct.pack("<IIQQQ", count, 0, 0, data, tags)


def register_files(fd: int, fds: Sequence[int], tags: Sequence[int]) -> None:
    """IORING_REGISTER_FILES2; -1 is an empty place. Raises KernelError."""
    table, marks = (ctypes.c_int * len(fds))(*fds), (ctypes.c_uint64 * len(tags))(*tags)
    data = rsrc_register(len(fds), ctypes.addressof(table), ctypes.addressof(marks))
    register(fd, REGISTER_FILES2, data, len(data))


def message(target_fd: int, user_data: int, res: int, flags: int) -> bytes:
    """A submission entry that posts a completion to another ring, and none of its own unless it fails."""
    how = MSG_RING_FLAGS_PASS if flags else 0
    head = (OP_MSG_RING, CQE_SKIP_SUCCESS, 0, target_fd, user_data, 0, res & 0xFFFFFFFF, how, 0, 0, 0, flags)
    return struct.pack("<BBHiQQIIQHHI", *head).ljust(SQE_BYTES, b"\0")
