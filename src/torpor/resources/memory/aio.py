"""The rings of io_setup(2): native asynchronous I/O.

Image: vma_entry with AIORING, aio_ring_entry in mm_entry, the pages of the ring in the task's
pagemap. Kernel: fs/aio.c

A ring is made by the task itself and moved to where it was: its address is the context's name, and
the kernel follows a move (Linux kernel commit e4a0d3e720e7 ("aio: Make it possible to remap aio
ring") (in v3.19)). The kernel has a tail of its own, which no write to the ring changes. So as
many reads of /dev/null are done as bring it to where it was, and only then does the ring get its
content: events that were completed and not fetched are there again.

Requests that are still under way when the task is stopped show nowhere; those that complete before
the ring is read are part of it. The context of a ring that was inherited by fork(2) belongs to the
parent alone; a restored child has one of its own.
"""

from __future__ import annotations

import os
import struct

from ...errors import ImageError, Unsupported
from ...linux.kernel import read_memory
from ...proc import maps
from ...remote.machine import RECORD_BYTES
from ...remote.program import Label, Program
from ..base import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    VMA_AIORING,
    MappingResource,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ..base import BuildContext, DumpContext

PAGE = 4096
#: struct aio_ring: id, nr, head, tail, magic, compat_features, incompat_features, header_length;
#: then struct io_event
_HEADER = struct.Struct("<8I")
_EVENT_BYTES = 32
_MAGIC, _COMPAT, _INCOMPAT = 0xA10A10A1, 1, 0
_OWN_BYTES = 8  # id and nr at the start, which the new ring has its own of
#: struct iocb: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2,
#: flags, resfd
_IOCB = struct.Struct("<QIIHhIQQqQII")
_BATCH = 256
_MOVE = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
_READ_WRITE = 3


class Ring:
    """The header of a ring: ``nr`` places for events, of which those from ``head`` to ``tail``
    wait to be fetched.
    """

    __slots__ = ("head", "nr", "tail")

    def __init__(self, nr: int, head: int, tail: int) -> None:
        self.nr = nr
        self.head = head
        self.tail = tail

    @classmethod
    def parse(cls, header: bytes, size: int) -> Ring:
        """From the first bytes of a ring of ``size`` bytes; raises ValueError if they are not a
        sane header.
        """
        if len(header) < _HEADER.size:
            raise ValueError("it cannot be read")
        _, nr, head, tail, *rest = _HEADER.unpack_from(header)
        if rest != [_MAGIC, _COMPAT, _INCOMPAT, _HEADER.size]:
            raise ValueError("its header is not the kernel's")
        if nr != events_in(size) or head >= nr or tail >= nr:
            raise ValueError(f"{nr} places, first event {head}, last {tail}, in {size} bytes")
        return cls(nr, head, tail)


def events_in(size: int) -> int:
    """Events that a ring of ``size`` bytes has room for."""
    return (size - _HEADER.size) // _EVENT_BYTES


def requests_for(size: int) -> int:
    """What to ask io_setup(2) for to get a ring of ``size`` bytes: it makes room for twice as
    many, and two.
    """
    return (events_in(size) - 2) // 2


def size_for(requests: int, processors: int) -> int:
    """Bytes of the ring that io_setup(2) makes: ioctx_alloc() and aio_setup_ring()."""
    events = 2 * max(requests, 4 * processors) + 2
    return (_HEADER.size + events * _EVENT_BYTES + PAGE - 1) & -PAGE


def possible_processors() -> int:
    """How many processors this machine may have: what the kernel sizes rings by."""
    with open("/sys/devices/system/cpu/possible") as file:
        ranges = [part.split("-") for part in file.read().strip().split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)


class _Cell:
    """Where an argument of a record lies when the program runs, for a call that stores to it."""

    __slots__ = ("_index", "_position", "_program")

    def __init__(self, program: Program, index: int, position: int) -> None:
        self._program = program
        self._index = index
        self._position = position

    @property
    def base(self) -> int:
        return self._program.base + self._index * RECORD_BYTES + 8 * (1 + self._position)


class AioRing(MappingResource):
    """A ring of completed requests."""

    KINDS = (maps.AIO,)
    STATUS = VMA_AIORING
    PRIVATE_PAGES = False

    def check(self, mapping: Any, pid: int, ctx: DumpContext) -> None:
        _ring(mapping.vma, pid)

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        vma = mapping.vma
        _ring(vma, task.pid)
        entry.status = VMA_AIORING
        entry.flags = MAP_SHARED
        entry.pgoff = 0
        size = vma.end - vma.start
        ring = {"id": vma.start, "nr_req": requests_for(size), "ring_len": size}
        ctx.memo.setdefault(("aios", task.pid), []).append(ring)

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        return False

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        ctx.once("aio null", lambda: ctx.keep(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)))

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        """Emit the ring. ``ctx.memo["pieces"]``: (descriptor, address, bytes, offset) of the
        pages of this mapping.
        """
        size = entry.end - entry.start
        place = f"mapping {entry.start:x}-{entry.end:x}"
        told = next((one for one in ctx.memo["mm"].aios if one.id == entry.start), None)
        requests = told.nr_req if told is not None else requests_for(size)
        if size % PAGE or size_for(requests, possible_processors()) != size:
            raise Unsupported(
                f"{place}: a ring for {requests} requests has another size here than {size} bytes",
                hint="this machine has another number of processors",
            )
        pieces = _check_pieces(ctx.memo.get("pieces", ()), entry, place)
        try:
            ring = Ring.parse(os.pread(pieces[0][0], _HEADER.size, pieces[0][3]), size)
        except ValueError as error:
            raise ImageError("pagemap", place, str(error)) from None
        # Kept free: a ring that lay there, or overlapped it, could not be moved to it.
        reserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        program.call("mmap", entry.start, size, 0, reserved, -1, 0, why="place of a ring")
        index = len(program.records) + 1
        address = Label(_Cell(program, index, 0))  # type: ignore[arg-type]
        program.call("io_setup", requests, address, why="stores the address in the next call")
        program.call("mremap", 0, size, size, _MOVE, entry.start, why="the ring, where it was")
        _advance(program, entry.start, ring, ctx.memo["aio null"])
        for fd, start, count, offset in pieces:
            skip = _OWN_BYTES if start == entry.start else 0
            program.call("pread64", fd, start + skip, count - skip, offset + skip, transfer=True, why="events")
        if prot != _READ_WRITE:
            program.call("mprotect", entry.start, size, prot)


def _ring(vma: Any, pid: int) -> Ring:
    try:
        return Ring.parse(read_memory(pid, vma.start, _HEADER.size), vma.end - vma.start)
    except ValueError as error:
        raise Unsupported(f"mapping {vma.start:x}-{vma.end:x}: a ring for asynchronous I/O: {error}") from None


def _check_pieces(pieces: Any, entry: Message, place: str) -> list[tuple[int, int, int, int]]:
    """The pages of the ring, all of them."""
    at = entry.start
    for _, start, count, _ in pieces:
        if start != at:
            break
        at += count
    if at != entry.end:
        raise ImageError("pagemap", place, f"the page {at:#x} of a ring for asynchronous I/O is missing")
    return list(pieces)


def _advance(program: Program, context: int, ring: Ring, null: int) -> None:
    """Emit reads of /dev/null until the kernel's head and tail are those of ``ring``."""
    if not ring.head and not ring.tail:
        return
    batch = min(_BATCH, ring.nr // 4)
    request = program.put(_IOCB.pack(0, 0, 0, 0, 0, null, 0, 0, 0, 0, 0, 0))
    requests = program.put(bytes(8 * batch))
    for index in range(batch):
        program.pointer(requests, 8 * index, request)
    fetched = program.out(batch * _EVENT_BYTES)
    for count in _batches(ring.head, batch):
        program.call("io_submit", context, count, requests, why="advance the ring")
        program.call("io_getevents", context, count, count, fetched, 0)
    for count in _batches((ring.tail - ring.head) % ring.nr, batch):
        program.call("io_submit", context, count, requests, why="events to be fetched")


def _batches(total: int, most: int) -> list[int]:
    return [most] * (total // most) + ([total % most] if total % most else [])


RESOURCE = AioRing()
