"""Mapped files, private and shared, deleted ones included.

Image: vma_entry with FILE_PRIVATE or FILE_SHARED; ``shmid`` is the id of the file's entry, ``fdflags`` how it was
opened. Kernel: mm/mmap.c, fs/proc/base.c (map_files)
"""

from __future__ import annotations

import os

from ...proc import maps
from .. import generation, own_shm
from ..base import (
    MAP_FIXED,
    MAP_SHARED,
    VMA_FILE_PRIVATE,
    VMA_FILE_SHARED,
    VMA_MEMFD,
    VMA_REGULAR,
    VMA_SOCKET,
    MappingResource,
)
from ..files import regular
from ..remap import remap_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class FileMapping(MappingResource):
    """A file seen as memory. Pages that a private mapping has written to are the task's own."""

    KINDS = (maps.FILE,)
    STATUS = VMA_FILE_PRIVATE | VMA_FILE_SHARED
    STATUS_NOT = VMA_MEMFD | VMA_SOCKET

    def check(self, mapping: Any, pid: int, ctx: DumpContext) -> None:
        if mapping.vma.deleted:
            regular.check_link(ctx, pid, f"/proc/{pid}/map_files/{mapping.vma.start:x}-{mapping.vma.end:x}")

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        vma = mapping.vma
        shared = bool(vma.flags & MAP_SHARED)
        entry.status = VMA_REGULAR | (VMA_FILE_SHARED if shared else VMA_FILE_PRIVATE)
        link = f"/proc/{task.pid}/map_files/{vma.start:x}-{vma.end:x}"
        mode = os.lstat(link).st_mode
        entry.fdflags = {0o400: os.O_RDONLY, 0o200: os.O_WRONLY}.get(mode & 0o600, os.O_RDWR)
        # A library is mapped in several pieces, by many tasks.
        key = ("mapped", vma.dev, vma.inode, vma.path, entry.fdflags)
        if key not in ctx.memo:
            ctx.memo[key] = regular.file_id_for(ctx, task.pid, link, flags=entry.fdflags)
        entry.shmid = ctx.memo[key]

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        # A file without a name is made for each copy, and so is what stands in for a generation file, and what lies in
        # a /dev/shm of its own.
        own = generation.is_renewed(ctx, entry.shmid) or own_shm.has(ctx, entry.shmid)
        return remap_of(ctx, entry.shmid) is None and not own

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        flags = entry.fdflags if entry.HasField("fdflags") else os.O_RDONLY
        key = "map", entry.shmid, flags
        if key not in ctx.memo:
            ctx.memo[key] = ctx.keep(regular.open_file(ctx, entry.shmid, flags))

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        flags = entry.fdflags if entry.HasField("fdflags") else os.O_RDONLY
        fd = ctx.memo["map", entry.shmid, flags]
        program.call("mmap", entry.start, entry.end - entry.start, prot, entry.flags | MAP_FIXED, fd, entry.pgoff)


RESOURCE = FileMapping()
