"""bpf(2) without a compiler: a small program that reads the kernel's own record of a task.

It is a task iterator (kernel/bpf/task_iter.c), assembled here from offsets that btf.py finds. It needs CAP_BPF and
CAP_PERFMON, or CAP_SYS_ADMIN; everybody who asks must have another way when it is refused.
"""

from __future__ import annotations

import ctypes
import os
import struct

from .call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# include/uapi/linux/bpf.h
PROG_LOAD, LINK_CREATE, ITER_CREATE = 5, 28, 33
PROG_TYPE_TRACING, ATTACH_TRACE_ITER = 26, 28
KTIME_GET_NS, PROBE_READ_KERNEL, KTIME_GET_BOOT_NS, SEQ_WRITE = 5, 113, 125, 127
R0, R1, R2, R3, R6, R7, R8, R10 = 0, 1, 2, 3, 6, 7, 8, 10
CHUNK = 256  # a program's stack has 512 bytes


def _insn(code: int, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhi", code, src << 4 | dst, offset, value)


def _set(dst: int, value: int) -> bytes:
    return _insn(0xB7, dst, value=value)


def _copy(dst: int, src: int) -> bytes:
    return _insn(0xBF, dst, src)


def _add(dst: int, value: int) -> bytes:
    return _insn(0x07, dst, value=value)


def _load(dst: int, src: int, offset: int) -> bytes:
    return _insn(0x79, dst, src, offset)


def _store(dst: int, offset: int, src: int) -> bytes:
    return _insn(0x7B, dst, src, offset)


def _call(helper: int) -> bytes:
    return _insn(0x85, value=helper)


class Place:
    """``size`` bytes at ``offset`` of the task, or of what is reached from it by the pointers at ``through``."""

    __slots__ = ("offset", "size", "through")

    def __init__(self, offset: int, size: int, *, through: Sequence[int] = ()) -> None:
        self.offset = offset
        self.size = size
        self.through = through


def _read(offset: int, size: int, at: int) -> bytes:
    """Copy ``size`` bytes from r7 + offset to the program's stack; zeros where nothing can be read."""
    return _copy(R1, R10) + _add(R1, at) + _set(R2, size) + _copy(R3, R7) + _add(R3, offset) + _call(PROBE_READ_KERNEL)


def _write(size: int, at: int) -> bytes:
    return _copy(R1, R8) + _copy(R2, R10) + _add(R2, at) + _set(R3, size) + _call(SEQ_WRITE)


def program(places: Sequence[Place]) -> bytes:
    """The instructions: for a task, write the time (monotonic, since boot), its address and what lies at the places."""
    head, area = -24, -24 - CHUNK
    body = _load(R8, R1, 0) + _load(R8, R8, 0)  # ctx->meta->seq
    body += _call(KTIME_GET_NS) + _store(R10, head, R0) + _call(KTIME_GET_BOOT_NS) + _store(R10, head + 8, R0)
    body += _store(R10, head + 16, R7) + _write(24, head)
    body += _copy(R6, R7)
    for place in places:
        for pointer in place.through:
            body += _read(pointer, 8, area)
            body += _load(R7, R10, area)
        for start in range(0, place.size, CHUNK):
            count = min(CHUNK, place.size - start)
            body += _read(place.offset + start, count, area) + _write(count, area)
        if place.through:
            body += _copy(R7, R6)
    skip = _insn(0x15, R7, offset=len(body) // 8)  # the call that ends the walk has no task
    return _load(R7, R1, 8) + skip + body + _set(R0, 0) + _insn(0x95)


class TaskRecord:
    """What was read: when (ns of the host's CLOCK_MONOTONIC and CLOCK_BOOTTIME), the task's address, and the places."""

    __slots__ = ("address", "boottime", "fields", "monotonic")

    def __init__(self, data: bytes, places: Sequence[Place]) -> None:
        self.monotonic, self.boottime, self.address = struct.unpack_from("<3Q", data)
        self.fields: list[bytes] = []
        start = 24
        for place in places:
            self.fields.append(data[start : start + place.size])
            start += place.size


class TaskReader:
    """Reads the same places of any number of tasks. Has one descriptor, until :meth:`close`."""

    def __init__(self, iterator: int, places: Sequence[Place]) -> None:
        """``iterator`` is the BTF id of bpf_iter_task(). Raises KernelError where it is refused."""
        self.places = places
        code = ctypes.create_string_buffer(program(places))
        licence = ctypes.create_string_buffer(b"GPL")  # probe_read_kernel is for such programs
        attr = bytearray(120)
        struct.pack_into(
            "<IIQQ", attr, 0, PROG_TYPE_TRACING, (len(code) - 1) // 8, ctypes.addressof(code), ctypes.addressof(licence)
        )
        attr[48:58] = b"torpor_rd\0"
        struct.pack_into("<I", attr, 68, ATTACH_TRACE_ITER)
        struct.pack_into("<I", attr, 108, iterator)
        self.fd = call("bpf", PROG_LOAD, bytes(attr), len(attr))

    def read(self, tid: int) -> TaskRecord | None:
        """The places of one thread; None when it is gone. Raises KernelError."""
        which = ctypes.create_string_buffer(struct.pack("<IIQ", tid, 0, 0), 16)  # union bpf_iter_link_info
        attr = struct.pack("<IIIIQII", self.fd, 0, ATTACH_TRACE_ITER, 0, ctypes.addressof(which), 16, 0)
        link = call("bpf", LINK_CREATE, attr, len(attr))
        try:
            walk = call("bpf", ITER_CREATE, struct.pack("<II", link, 0), 8)
            try:
                data = b""
                while chunk := os.read(walk, 1 << 16):
                    data += chunk
            finally:
                os.close(walk)
        finally:
            os.close(link)
        # Before v6.1 the walk cannot be told a thread, and has all of them: Linux kernel commit f0d74c4da1f0 ("bpf:
        # Parameterize task iterators.").
        whole = 24 + sum(place.size for place in self.places)
        return TaskRecord(data, self.places) if len(data) == whole else None

    def close(self) -> None:
        """Drop the program."""
        os.close(self.fd)
