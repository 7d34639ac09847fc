"""The calls by which a task gets a part of an io_uring that nobody else can give to it."""

from __future__ import annotations

import struct

from ..linux import io_uring
from .base import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..images.schema import Message
    from ..remote.program import Program

RESERVED = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
#: The default of vm.mmap_min_addr, below which no room is looked for; the end of what x86-64 gives away.
LOWEST_ADDRESS, ADDRESS_END = 1 << 16, 0x7FFFFFFFF000


def emit_mapping(
    entry: Message, fd: int, prot: int, occupied: Iterable[tuple[int, int]], program: Program
) -> None:
    """Emit the mapping of a ring.

    The kernel insists on choosing the address by itself, and does not let it be moved either
    (io_uring_get_unmapped_area()). So it gets no choice: all other room is taken for the moment.
    """
    size = entry.end - entry.start
    rooms = list(_gaps(sorted([*occupied, (entry.start, entry.end)])))
    for start, end in rooms:
        program.call("mmap", start, end - start, 0, RESERVED | MAP_FIXED_NOREPLACE, -1, 0, why="no room but one")
    program.call("mmap", 0, size, prot, MAP_SHARED, fd, entry.pgoff, why="io_uring")
    program.call("madvise", entry.start, size, 0, why="is it there?")
    for start, end in rooms:
        program.call("munmap", start, end - start)


def _gaps(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What lies between the spans, in ascending order."""
    at = LOWEST_ADDRESS
    for start, end in spans:
        if at < start:
            yield at, start
        at = max(at, end)
    if at < ADDRESS_END:
        yield at, ADDRESS_END


def emit_buffers(entry: Message, fd: int, program: Program) -> None:
    """Emit the registration of a ring's buffers."""
    if not entry.buffer:
        return
    vector = [number for one in entry.buffer for number in (one.address if one.length else 0, one.length)]
    data = program.put(struct.pack(f"<{len(vector)}Q", *vector))
    tags = program.put(struct.pack(f"<{len(entry.buffer)}Q", *(one.tag for one in entry.buffer)))
    argument = program.put(io_uring.rsrc_register(len(entry.buffer)))
    program.pointer(argument, 16, data)
    program.pointer(argument, 24, tags)
    size = len(io_uring.rsrc_register(0))
    program.call("io_uring_register", fd, io_uring.REGISTER_BUFFERS2, argument, size, why="registered buffers")
