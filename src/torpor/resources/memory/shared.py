"""Shared anonymous memory, and mapped memfds: the same thing to the kernel, a file in memory without a path.

Image: vma_entry with FILE_SHARED or FILE_PRIVATE and MEMFD; ``shmid`` is the id of a memfd entry in files.img, whose
inode is called ``/dev/zero`` for memory that mmap(2) shared. The content is the inode's, see files/memfd.py. Kernel:
mm/shmem.c
"""

from __future__ import annotations

import os

from ...proc import maps
from ..base import (
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    VMA_FILE_PRIVATE,
    VMA_FILE_SHARED,
    VMA_MEMFD,
    VMA_REGULAR,
    MappingResource,
)
from ..files import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class SharedMemory(MappingResource):
    """Memory that other mappings, of this task or of another, may see too."""

    KINDS = (maps.SHMEM, maps.MEMFD, maps.NAMED_SHMEM, maps.HUGEPAGE)
    STATUS = VMA_MEMFD
    PRIORITY = 60  # a private mapping of nameless huge pages is anonymous memory

    def claims(self, mapping: Any) -> bool:
        # Nameless huge pages that are private have no file that anybody could map again.
        return bool(mapping.vma.kind != maps.HUGEPAGE or mapping.vma.flags & MAP_SHARED)

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        vma = mapping.vma
        entry.status = VMA_REGULAR | VMA_MEMFD
        entry.status |= VMA_FILE_PRIVATE if vma.flags & MAP_PRIVATE else VMA_FILE_SHARED
        link = f"/proc/{task.pid}/map_files/{vma.start:x}-{vma.end:x}"
        mode = os.lstat(link).st_mode
        entry.fdflags = {0o400: os.O_RDONLY, 0o200: os.O_WRONLY}.get(mode & 0o600, os.O_RDWR)
        entry.shmid = memfd.file_id_for(ctx, link, flags=entry.fdflags)
        if vma.kind == maps.NAMED_SHMEM:
            entry.anon_name = vma.name

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        return False

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        flags = entry.fdflags if entry.HasField("fdflags") else os.O_RDWR
        ctx.once(("map", entry.shmid, flags), lambda: ctx.keep(memfd.open_file(ctx, entry.shmid, flags)))

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        flags = entry.fdflags if entry.HasField("fdflags") else os.O_RDWR
        fd = ctx.memo["map", entry.shmid, flags]
        program.call("mmap", entry.start, entry.end - entry.start, prot, entry.flags | MAP_FIXED, fd, entry.pgoff)


RESOURCE = SharedMemory()
