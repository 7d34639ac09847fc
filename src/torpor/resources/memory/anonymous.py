"""Private anonymous memory: the heap, stacks, plain and named maps, hugetlb, droppable.

Image: vma_entry with ANON_PRIVATE; the name given by PR_SET_VMA_ANON_NAME in our field ``anon_name``.
Kernel: mm/mmap.c, mm/madvise.c
"""

from __future__ import annotations

import os

from ...proc import maps
from ..base import (
    MAP_ANONYMOUS,
    MAP_DROPPABLE,
    MAP_FIXED,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_PRIVATE,
    VMA_ANON_PRIVATE,
    VMA_HEAP,
    VMA_REGULAR,
    VMA_VDSO,
    VMA_VVAR,
    MappingResource,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

MAP_HUGE_SHIFT = 26


class Anonymous(MappingResource):
    """Memory of one task that no file stands behind."""

    KINDS = (maps.ANON, maps.HEAP, maps.STACK, maps.NAMED, maps.HUGEPAGE)
    STATUS = VMA_ANON_PRIVATE
    STATUS_NOT = VMA_VDSO | VMA_VVAR

    def claims(self, mapping: Any) -> bool:
        return bool(mapping.vma.flags & MAP_PRIVATE) or "dp" in mapping.flags

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        entry.status = VMA_REGULAR | VMA_ANON_PRIVATE
        if mapping.vma.kind == maps.HEAP:
            entry.status |= VMA_HEAP
        entry.flags |= MAP_ANONYMOUS
        entry.pgoff = 0
        if "dp" in mapping.flags:
            entry.flags = entry.flags & ~MAP_PRIVATE | MAP_DROPPABLE
        if mapping.vma.kind == maps.HUGEPAGE:
            status = os.stat(f"/proc/{task.pid}/map_files/{mapping.vma.start:x}-{mapping.vma.end:x}")
            entry.flags |= (status.st_blksize.bit_length() - 1) << MAP_HUGE_SHIFT  # several sizes may be there
        if mapping.vma.kind == maps.NAMED:
            entry.anon_name = mapping.vma.name

    def joins(self, entry: Message) -> bool:
        return not entry.flags & (MAP_GROWSDOWN | MAP_HUGETLB) and not entry.HasField("anon_name")

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        length = entry.end - entry.start
        # Locked later: MAP_LOCKED would make all pages here, and those from outside find theirs taken.
        flags = entry.flags & ~MAP_LOCKED | MAP_ANONYMOUS | MAP_FIXED
        program.call("mmap", entry.start, length, prot, flags, -1, 0)


RESOURCE = Anonymous()
