"""bpf(2) without a compiler: a small program that reads the kernel's own record of a task.

It is a task iterator (kernel/bpf/task_iter.c), assembled here from offsets that btf.py finds. It needs CAP_BPF and
CAP_PERFMON, or CAP_SYS_ADMIN; everybody who asks must have another way when it is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from ..errors import KernelError, Unsupported
from .call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# include/uapi/linux/bpf.h
PROG_LOAD, LINK_CREATE, ITER_CREATE = 5, 28, 33
PROG_TYPE_TRACING, ATTACH_TRACE_ITER = 26, 28
MAP_CREATE, MAP_TYPE_PERCPU_ARRAY, MAP_LOOKUP_PERCPU_ELEM = 0, 6, 195
KTIME_GET_NS, PROBE_READ_KERNEL, KTIME_GET_BOOT_NS, SEQ_WRITE, D_PATH = 5, 113, 125, 127, 147
R0, R1, R2, R3, R6, R7, R8, R9, R10 = 0, 1, 2, 3, 6, 7, 8, 9, 10
LOAD_TRIES = 8  # as libbpf does, with some more
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


def _address(dst: int, value: int, *, kind: int = 0) -> bytes:
    """Load 64 bits; ``kind`` 1: the map behind descriptor ``value`` (BPF_PSEUDO_MAP_FD)."""
    return struct.pack("<BBhIBBhI", 0x18, kind << 4 | dst, 0, value & 0xFFFFFFFF, 0, 0, 0, value >> 32)


class Place:
    """``size`` bytes at ``offset`` of the task, or of what is reached from it by the pointers at ``through``.

    ``base``: the walk begins at this address of the kernel's memory, not at the task.
    """

    __slots__ = ("base", "offset", "size", "through")

    def __init__(self, offset: int, size: int, *, through: Sequence[int] = (), base: int = 0) -> None:
        self.offset = offset
        self.size = size
        self.through = through
        self.base = base


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
        if place.base:
            body += _address(R7, place.base)
        for pointer in place.through:
            body += _read(pointer, 8, area)
            body += _load(R7, R10, area)
        for start in range(0, place.size, CHUNK):
            count = min(CHUNK, place.size - start)
            body += _read(place.offset + start, count, area) + _write(count, area)
        if place.through or place.base:
            body += _copy(R7, R6)
    skip = _insn(0x15, R7, offset=len(body) // 8)  # the call that ends the walk has no task
    return _load(R7, R1, 8) + skip + body + _set(R0, 0) + _insn(0x95)


def per_cpu_program(map_fd: int, processors: int) -> bytes:
    """The instructions: write the address of a map, then where the value of its first key lies for each processor."""
    key, word = -8, -16
    body = _load(R8, R1, 0) + _load(R8, R8, 0) + _insn(0x62, R10, offset=key, value=0)
    body += _address(R1, map_fd, kind=1) + _store(R10, word, R1) + _write(8, word)
    for number in range(processors):
        body += _address(R1, map_fd, kind=1) + _copy(R2, R10) + _add(R2, key) + _set(R3, number)
        body += _call(MAP_LOOKUP_PERCPU_ELEM) + _store(R10, word, R0) + _write(8, word)
    return _load(R7, R1, 8) + _insn(0x15, R7, offset=len(body) // 8) + body + _set(R0, 0) + _insn(0x95)


def files_program(at: dict[str, int], head: dict[str, int], head_bytes: int, path_bytes: int) -> bytes:
    """The instructions of an iterator over files, for task_files.py: of each open file, write a head and its path.

    ``at``: where in the kernel's structures its fields lie; ``head``: where in the head they are written.
    """
    start = -head_bytes - path_bytes
    word = start - 8

    def keep(name: str, register: int, code: int = 0x7B) -> bytes:  # 0x63: 32 bits of it
        return _insn(code, R10, register, start + head[name])

    def ask(name: str, size: int, dst: int, address: int) -> bytes:
        """Copy what is behind a pointer of which the verifier knows nothing; zeros where nothing can be read."""
        return _copy(R1, R10) + _add(R1, dst) + _set(R2, size) + _copy(R3, address) + _add(R3, at[name]) + _call(
            PROBE_READ_KERNEL
        )

    body = _load(R8, R1, 0) + _load(R8, R8, 0)  # ctx->meta->seq
    body += keep("task", R9) + keep("file", R7)
    body += _insn(0x61, R6, R1, 16) + keep("fd", R6, 0x63)
    body += _insn(0x61, R1, R7, at["flags"]) + keep("flags", R1, 0x63)
    body += _load(R1, R7, at["pos"]) + keep("pos", R1)
    body += _load(R1, R7, at["inode"]) + keep("inode", R1) + _load(R1, R1, at["locks"]) + keep("locks", R1)
    if at["owner's file"] >= 0:
        body += _load(R1, R7, at["owner"])
    else:
        body += _load(R1, R7, at["owner"] + at["owner's pid"])
        body += _insn(0x61, R2, R7, at["owner"] + at["owner's signal"]) + _insn(0x4F, R1, R2)
    body += keep("owner", R1)
    # The descriptor's bit in task->files->fdt->close_on_exec
    body += _load(R9, R9, at["files"]) + _load(R9, R9, at["table"]) + _load(R9, R9, at["cloexec"])
    body += _copy(R3, R6) + _insn(0x77, R3, value=6) + _insn(0x67, R3, value=3) + _insn(0x0F, R3, R9)
    body += _copy(R1, R10) + _add(R1, word) + _set(R2, 8) + _call(PROBE_READ_KERNEL)
    body += _load(R1, R10, word) + _insn(0x57, R6, value=63) + _insn(0x7F, R1, R6) + _insn(0x57, R1, value=1)
    body += keep("cloexec", R1, 0x63)
    body += _load(R9, R7, at["private"])
    body += ask("count", 8, start + head["count"], R9) + ask("event flags", 4, start + head["event flags"], R9)
    body += _copy(R1, R7) + _add(R1, at["path"]) + _copy(R2, R10) + _add(R2, -path_bytes) + _set(R3, path_bytes)
    body += _call(D_PATH) + keep("path", R0)
    # Between nothing and all, for the verifier to see.
    body += _insn(0x65, R0, offset=1) + _set(R0, 0) + _insn(0xB5, R0, offset=1, value=path_bytes) + _set(R0, path_bytes)
    body += _copy(R1, R8) + _copy(R2, R10) + _add(R2, start) + _copy(R3, R0) + _add(R3, head_bytes) + _call(SEQ_WRITE)
    # The call that ends the walk has no task and no file.
    skip = _insn(0x15, R9, offset=len(body) // 8 + 1) + _insn(0x15, R7, offset=len(body) // 8)
    return _load(R9, R1, 8) + _load(R7, R1, 24) + skip + body + _set(R0, 0) + _insn(0x95)


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


def load(iterator: int, instructions: bytes) -> int:
    """A descriptor for a task iterator; ``iterator`` is the BTF id of bpf_iter_task(). Raises KernelError."""
    code = ctypes.create_string_buffer(instructions)
    licence = ctypes.create_string_buffer(b"GPL")  # probe_read_kernel is for such programs
    attr = bytearray(120)
    struct.pack_into(
        "<IIQQ", attr, 0, PROG_TYPE_TRACING, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence)
    )
    attr[48:58] = b"torpor_rd\0"
    struct.pack_into("<I", attr, 68, ATTACH_TRACE_ITER)
    struct.pack_into("<I", attr, 108, iterator)
    for _ in range(LOAD_TRIES):
        try:
            return call("bpf", PROG_LOAD, bytes(attr), len(attr))
        except KernelError as error:  # a signal on its way to us stops the verifier
            if error.errno != errno.EAGAIN:
                raise
    return call("bpf", PROG_LOAD, bytes(attr), len(attr))


def walk(program_fd: int, tid: int) -> bytes:
    """What the program writes about one thread. Raises KernelError."""
    which = ctypes.create_string_buffer(struct.pack("<IIQ", tid, 0, 0), 16)  # union bpf_iter_link_info
    attr = struct.pack("<IIIIQII", program_fd, 0, ATTACH_TRACE_ITER, 0, ctypes.addressof(which), 16, 0)
    link = call("bpf", LINK_CREATE, attr, len(attr))
    try:
        walker = call("bpf", ITER_CREATE, struct.pack("<II", link, 0), 8)
        try:
            data = b""
            while chunk := os.read(walker, 1 << 16):
                data += chunk
        finally:
            os.close(walker)
    finally:
        os.close(link)
    return data


class TaskReader:
    """Reads the same places of any number of tasks. Has one descriptor, until :meth:`close`."""

    def __init__(self, iterator: int, places: Sequence[Place]) -> None:
        """``iterator`` is the BTF id of bpf_iter_task(). Raises KernelError where it is refused."""
        self.places = places
        self.fd = load(iterator, program(places))

    def read(self, tid: int) -> TaskRecord | None:
        """The places of one thread; None when it is gone. Raises KernelError."""
        data = walk(self.fd, tid)
        # Before v6.1 the walk cannot be told a thread, and has all of them: Linux kernel commit f0d74c4da1f0 ("bpf:
        # Parameterize task iterators.").
        whole = 24 + sum(place.size for place in self.places)
        return TaskRecord(data, self.places) if len(data) == whole else None

    def close(self) -> None:
        """Drop the program."""
        os.close(self.fd)


# A system call program (kernel/bpf/syscall.c) is run by bpf(2) itself, and handed a record that is handed back.
PROG_TEST_RUN, PROG_TYPE_SYSCALL, F_SLEEPABLE = 10, 31, 1 << 4
READ_MAX = 1024


def _reader() -> bytes:
    """The instructions: of a record {address, bytes, content} fill in the content, in pieces of CHUNK bytes.

    They are unrolled; r7 is the address, r9 counts down the bytes.
    """
    body = _copy(R6, R1) + _load(R7, R6, 0) + _load(R9, R6, 8)
    body += _set(R1, 0) + b"".join(_store(R10, -CHUNK + at, R1) for at in range(0, CHUNK, 8))
    for start in range(0, READ_MAX, CHUNK):
        copied = b"".join(_load(R1, R10, -CHUNK + at) + _store(R6, 16 + start + at, R1) for at in range(0, CHUNK, 8))
        whole = _copy(R2, R9) + _insn(0xB5, R2, offset=1, value=CHUNK) + _set(R2, CHUNK)  # at most a whole piece
        read = _copy(R1, R10) + _add(R1, -CHUNK) + _copy(R3, R7) + _add(R3, start) + _call(PROBE_READ_KERNEL)
        body += whole + read + copied + _insn(0x15, R0, offset=1) + _insn(0x95)  # ends with the error, if any
        body += _insn(0x25, R9, offset=2, value=CHUNK) + _set(R0, 0) + _insn(0x95) + _add(R9, -CHUNK)
    return body + _set(R0, 0) + _insn(0x95)


class KernelMemory:
    """The kernel's own memory, to be read. Has one descriptor, until :meth:`close`.

    Linux kernel commit 79a7f8bdb159 ("bpf: Introduce bpf_sys_bpf() helper and program type.") (in v5.14).
    """

    def __init__(self) -> None:
        """Raises KernelError where it is refused."""
        code = ctypes.create_string_buffer(_reader())
        licence = ctypes.create_string_buffer(b"GPL")
        attr = bytearray(120)
        struct.pack_into(
            "<IIQQ", attr, 0, PROG_TYPE_SYSCALL, (len(code) - 1) // 8, ctypes.addressof(code), ctypes.addressof(licence)
        )
        struct.pack_into("<I", attr, 44, F_SLEEPABLE)
        attr[48:58] = b"torpor_mem"
        self.fd = call("bpf", PROG_LOAD, bytes(attr), len(attr))
        self._record = ctypes.create_string_buffer(16 + READ_MAX)

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at ``address``. Raises ValueError where the kernel has nothing."""
        found = []
        while size:
            # Never across the end of a page: what lies behind it need not be there.
            count = min(size, READ_MAX - address % READ_MAX)
            found.append(self._read(address, count))
            address, size = address + count, size - count
        return b"".join(found)

    def _read(self, address: int, size: int) -> bytes:
        struct.pack_into("<QQ", self._record, 0, address, size)
        attr = bytearray(80)
        struct.pack_into("<I", attr, 0, self.fd)
        struct.pack_into("<I", attr, 40, len(self._record))
        struct.pack_into("<Q", attr, 48, ctypes.addressof(self._record))
        result = ctypes.create_string_buffer(bytes(attr), len(attr))
        call("bpf", PROG_TEST_RUN, result, len(attr))
        if struct.unpack_from("<i", result, 4)[0]:
            raise ValueError(f"nothing can be read at {address:#x} of the kernel's memory")
        return self._record.raw[16 : 16 + size]

    def word(self, address: int) -> int:
        """The 64-bit word at ``address``. Raises ValueError."""
        return int.from_bytes(self.read(address, 8), "little")

    def close(self) -> None:
        """Drop the program."""
        os.close(self.fd)


def read_once(iterator: int, places: Sequence[Place], tid: int) -> TaskRecord | None:
    """The places of one thread, by a TaskReader that is not needed again. As :meth:`TaskReader.read`."""
    reader = TaskReader(iterator, places)
    try:
        return reader.read(tid)
    finally:
        reader.close()


def read_own(iterator: int, places: Sequence[Place]) -> Sequence[bytes]:
    """The bytes at ``places`` of our own task; ``iterator`` is the BTF id of bpf_iter_task().

    Raises KernelError, and Unsupported where we cannot be found by our pid.
    """
    record = read_once(iterator, places, os.getpid())
    if record is None:
        raise Unsupported("BPF cannot be told whose file it is to look at")
    return record.fields


def own_task(iterator: int) -> int:
    """The address of our own task_struct; ``iterator`` is the BTF id of bpf_iter_task(). Raises KernelError."""
    record = read_once(iterator, (), os.getpid())
    return record.address if record is not None else 0
