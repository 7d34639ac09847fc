"""Rings that lie in the program's own memory (IORING_SETUP_NO_MMAP): where that is, and how they get there again.

The kernel keeps the pages, not the address. So they are looked for by their frames, in the memory that the ring's
holders share: liburing takes such memory, and databases with many processes have their rings in it. There a ring is
made again by the builder, in a mapping of its own of the same memory. Image: io_uring_entry.memory, the place of the
two rings, then that of the submission entries. Kernel: io_uring/memmap.c, io_region_pin_pages()
"""

from __future__ import annotations

import mmap
import os
import struct

from ..errors import ImageError
from ..linux import io_uring
from ..linux.call import address_of
from ..linux.io_uring import Params, Rings
from ..proc import maps
from ..proc.read import read
from .files import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..images.schema import Message
    from ..proc.maps import Vma
    from .base import BuildContext
    from .uring_state import Kernel, State

PAGE = 4096
KINDS = (maps.SHMEM, maps.MEMFD, maps.NAMED_SHMEM, maps.HUGEPAGE)
WINDOW = 1 << 30  # bytes of memory looked at by one read of a pagemap
# fs/proc/task_mmu.c: of a page of a file that is present; the two others may be set or not.
PRESENT, FILE, SOFT_DIRTY, EXCLUSIVE = 1 << 63, 1 << 61, 1 << 55, 1 << 56
PFN_MASK = (1 << 55) - 1


def frame_at(pid: int, address: int) -> int:
    """The number of the page frame at an address; 0 if there is none."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        data = os.pread(pagemap.fileno(), 8, address // PAGE * 8)
    (word,) = struct.unpack("<Q", data) if len(data) == 8 else (0,)
    return word & PFN_MASK if word & PRESENT else 0


class Spot:
    """A place in a task's memory that others share."""

    __slots__ = ("address", "pid", "vma")

    def __init__(self, pid: int, vma: Vma, address: int) -> None:
        self.pid = pid
        self.vma = vma
        self.address = address

    @property
    def link(self) -> str:
        """The memory, as a file."""
        return f"/proc/{self.pid}/map_files/{self.vma.start:x}-{self.vma.end:x}"

    @property
    def offset(self) -> int:
        """Where in that file it is."""
        return self.vma.pgoff + self.address - self.vma.start


class Frames:
    """Tells the frame of a page from the address of its struct page."""

    def __init__(self, kernel: Kernel) -> None:
        """By a ring of our own, of which both are known."""
        area = mmap.mmap(-1, 2 * PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        area[0] = area[PAGE] = 0
        start = address_of(area)
        params = Params(io_uring.NO_MMAP)
        params.sq_address, params.cq_address = start, start + PAGE
        fd = io_uring.setup(1, params)
        try:
            (ring,) = kernel.private_data(kernel.files_of(os.getpid(), [fd]).values())
            (state,) = kernel.read([ring])
            (page,) = kernel.memory.words([state.ring_pages])
        finally:
            os.close(fd)
        self._size: int = kernel.at["page{}"]
        self._base = page - frame_at(os.getpid(), start + PAGE) * self._size

    def of(self, page: int) -> int:
        """The frame of a page."""
        return int(page - self._base) // self._size


def find(state: State, pids: Iterable[int], kernel: Kernel, frames: Frames) -> list[Spot] | None:
    """Where a ring's two parts are; None if not in memory that is shared."""
    wanted = [frames.of(page) for page in kernel.memory.words([state.ring_pages, state.sqe_pages])]
    for pid in pids:
        found: dict[int, Spot] = {}
        for vma in maps.parse(read(pid, "maps")):
            if vma.flags & maps.MAP_SHARED and vma.kind in KINDS:
                for frame, address in _look(pid, vma, [one for one in wanted if one not in found]):
                    found[frame] = Spot(pid, vma, address)
        if len(found) == len(set(wanted)):
            return [found[frame] for frame in wanted]
    return None


def _look(pid: int, vma: Vma, frames: list[int]) -> Iterator[tuple[int, int]]:
    """(frame, address) of those that a mapping has."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start in range(vma.start, vma.end if frames else 0, WINDOW):
            count = (min(vma.end, start + WINDOW) - start) // PAGE
            data = os.pread(pagemap.fileno(), 8 * count, start // PAGE * 8)
            for frame in frames:
                at = _find(data, frame)
                if at >= 0:
                    yield frame, start + at // 8 * PAGE


def _find(data: bytes, frame: int) -> int:
    for more in (0, SOFT_DIRTY, EXCLUSIVE, SOFT_DIRTY | EXCLUSIVE):
        entry = struct.pack("<Q", PRESENT | FILE | more | frame)
        at = data.find(entry)
        while at % 8 and at >= 0:
            at = data.find(entry, at + 1)
        if at >= 0:
            return at
    return -1


def rings(spots: list[Spot], params: Params) -> Rings:
    """The memory of a ring that was found."""
    fds: list[int] = []
    try:
        for spot in spots:
            fds.append(os.open(spot.link, os.O_RDWR | os.O_CLOEXEC))
        return Rings(-1, params, [(fd, spot.offset) for fd, spot in zip(fds, spots, strict=True)])
    finally:
        for fd in fds:
            os.close(fd)


# ------------------------------------------------------------------------------------------ restore


def check(entry: Message) -> str:
    """What is wrong with what an image says; "" if nothing is."""
    if len(entry.memory) != (2 if entry.setup & io_uring.NO_MMAP else 0):
        return f"{len(entry.memory)} places"
    if any(one.offset % PAGE for one in entry.memory):
        return "a place is inside a page"
    return ""


def empty(entry: Message, shape: Params, ctx: BuildContext) -> Rings:
    """The memory that a ring is to be made in, empty, as it is in a new ring, and ``shape`` told of it. Raises
    ImageError.
    """
    shape.unpack_offsets(entry.sq_entries, list(entry.offsets))
    fds: list[int] = []
    try:
        for one, size in zip(entry.memory, (shape.ring_bytes, shape.sqe_bytes), strict=True):
            fds.append(memfd.open_file(ctx, one.id, os.O_RDWR))
            if one.offset + size > os.fstat(fds[-1]).st_size:
                raise ImageError("files.img", f"file {entry.id}: uring: memory", f"{one.offset:#x} is beyond its end")
        found = Rings(-1, shape, [(fd, one.offset) for fd, one in zip(fds, entry.memory, strict=True)])
    finally:
        for fd in fds:
            os.close(fd)
    found.ring[:] = bytes(len(found.ring))
    found.sqes[:] = bytes(len(found.sqes))
    shape.cq_address, shape.sq_address = address_of(found.ring), address_of(found.sqes)
    return found
