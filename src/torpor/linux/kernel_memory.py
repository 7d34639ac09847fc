"""Reading the kernel's own memory, by address, with the programs of bpf.py. Needs what they need."""

from __future__ import annotations

import os
import struct

from ..errors import Unsupported
from . import bpf, btf
from .call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# The walk's buffer holds eight pages and one task's output has to fit in (kernel/bpf/bpf_iter.c); a jump reaches over
# 32767 instructions.
BYTES_MAX, PLACES_MAX = 24_000, 1_500


class KernelMemory:
    """Reads any number of places at once. Keeps nothing open."""

    def __init__(self) -> None:
        """Raises Unsupported when the kernel does not describe its types."""
        answers = btf.lookup(["bpf_iter_task()", "bpf_array.pptrs"])
        self._iterator = answers["bpf_iter_task()"]
        self._pptrs = answers["bpf_array.pptrs"]

    def walk(self, places: Sequence[bpf.Place], tid: int) -> list[bytes]:
        """The bytes at ``places`` of the thread ``tid``, or at their bases. Zeros where nothing can be read.

        Raises KernelError, and Unsupported when the thread is gone.
        """
        found: list[bytes] = []
        for batch in _batches(places):
            record = bpf.read_once(self._iterator, batch, tid)
            if record is None:
                raise Unsupported(f"BPF cannot look at task {tid}")
            found += record.fields
        return found

    def read(self, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes of the (address, size) spans; nothing of what has no address."""
        spans = list(spans)
        places = [place for address, size in spans for place in _pieces(address, size)]
        pieces = iter(self.walk(places, os.getpid()) if places else ())
        return [b"".join(next(pieces) for _ in _pieces(address, size)) for address, size in spans]

    def per_cpu_offsets(self, processors: int) -> list[int]:
        """What is to be added to a per-CPU pointer for each processor (mod 2^64).

        A map with a value for each processor is made for it: the kernel tells where the values lie, and what its
        pointer to them all is. bpf_map_lookup_percpu_elem() came with v5.19: Linux kernel commit 07343110b293.
        """
        form = struct.pack("<5I", bpf.MAP_TYPE_PERCPU_ARRAY, 4, 8, 1, 0)
        table = call("bpf", bpf.MAP_CREATE, form, len(form))
        try:
            program = bpf.load(self._iterator, bpf.per_cpu_program(table, processors))
            try:
                data = bpf.walk(program, os.getpid())
            finally:
                os.close(program)
            address, *values = struct.unpack(f"<{len(data) // 8}Q", data)
            (pointer,) = self.words([address + self._pptrs])
        finally:
            os.close(table)
        if len(values) != processors:
            raise Unsupported("BPF does not tell where the values of each processor lie")
        return [value - pointer & (1 << 64) - 1 for value in values if value]

    def words(self, addresses: Iterable[int]) -> list[int]:
        """The 64-bit words at the addresses."""
        return [int.from_bytes(data, "little") for data in self.read((address, 8) for address in addresses)]


def _pieces(address: int, size: int) -> list[bpf.Place]:
    return [
        bpf.Place(0, min(BYTES_MAX, size - start), base=address + start & (1 << 64) - 1)
        for start in range(0, size if address else 0, BYTES_MAX)
    ]


def _batches(places: Sequence[bpf.Place]) -> list[list[bpf.Place]]:
    batches: list[list[bpf.Place]] = []
    room = 0
    for place in places:
        if place.size > room or len(batches[-1]) == PLACES_MAX:
            batches.append([])
            room = BYTES_MAX
        batches[-1].append(place)
        room -= place.size
    return batches
