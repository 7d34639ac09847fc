"""eventfd(2): a counter behind a file descriptor.

Image: file_entry.efd (eventfd_file_entry). Kernel: fs/eventfd.c.
"""

from __future__ import annotations

import os

from ... import log
from ...errors import KernelError, Unsupported
from ...images import schema as pb
from ...proc import fdinfo_kinds
from ..base import FileResource, unsupported
from ..fown import SETTABLE, set_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

_FULL = (1 << 64) - 1
_FIRST_MAX = (1 << 32) - 1


class Eventfd(FileResource):
    """A 64-bit counter; EFD_SEMAPHORE makes a read take one instead of all."""

    FD_TYPE, FIELD = 6, "efd"
    LINKS = ("anon_inode:[eventfd]",)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        counter, semaphore = _look(source)
        if counter == _FULL:
            # Only the kernel itself (aio, vhost, …) can add to a counter until it overflows.
            raise unsupported(
                source, "its counter has overflowed, which no program can bring about"
            )
        entry = pb.eventfd_file_entry(
            id=source.id, flags=source.flags, fown=ctx.fown(source), counter=counter
        )
        if semaphore:
            entry.semaphore = True  # CRIU's image cannot say it
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        # eventfd2(2) takes an unsigned int, but the counter holds 64 bits.
        small = entry.counter <= _FIRST_MAX
        kind = entry.flags & os.O_NONBLOCK | os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if entry.semaphore else 0)
        fd = os.eventfd(entry.counter if small else 0, kind)
        try:
            if not small:
                os.eventfd_write(fd, entry.counter)
            if entry.flags & SETTABLE & ~os.O_NONBLOCK:
                set_flags(fd, entry.flags)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _look(source: SourceFile) -> tuple[int, bool]:
    """(counter, is it a semaphore)"""
    if source.seen is not None:
        return source.seen.count, bool(source.seen.event_flags & os.EFD_SEMAPHORE)
    shown = fdinfo_kinds.eventfd(source.fdinfo)
    return shown.counter, is_semaphore(source.borrow()) if shown.semaphore is None else shown.semaphore


def is_semaphore(fd: int) -> bool:
    """Has our eventfd EFD_SEMAPHORE? Read from the kernel's memory; taken not to have it where that is refused.

    For kernels whose fdinfo does not tell: Linux kernel commit 33d8b5d7824c ("eventfd: show the EFD_SEMAPHORE flag in
    fdinfo") (in v6.5).
    """
    from ...linux import bpf, btf

    way = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data")
    try:
        at = btf.lookup([*way, "eventfd_ctx.flags", "bpf_iter_task()"])
        files, table, array, private = (at[name] for name in way)
        flags = bpf.Place(at["eventfd_ctx.flags"], 4, through=(files, table, array, 8 * fd, private))
        (word,) = bpf.read_own(at["bpf_iter_task()"], [flags])
    except (KernelError, Unsupported) as error:
        log.warning(f"eventfd: whether it is a semaphore cannot be seen here, and it is taken for none: {error}")
        return False
    return bool(word[0] & os.EFD_SEMAPHORE)


RESOURCE = Eventfd()
