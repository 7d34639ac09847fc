"""userfaultfd(2): page faults of a process that the process itself takes care of.

Image: file_entry.uffd, of Torpor's own. Only the process whose memory it is about can make one, so that is who makes
it again; its memory is registered last (task/userfault_ranges.py). A fault that nobody has resolved yet needs nothing:
the thread meets it again. Kernel: fs/userfaultfd.c
"""

from __future__ import annotations

import os
import struct

from ... import log
from ...errors import ImageError, KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux import kernel, userfault
from ...proc import fdinfo_kinds
from ..base import FileResource, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

MISSING, WP = 1, 2  # UFFDIO_REGISTER_MODE_*
USER_MODE_ONLY = userfault.USER_MODE_ONLY
MODES = {"um": MISSING, "uw": WP}
_WP_UNPOPULATED = 1 << 13
_HINT = "close the userfaultfd before the dump"


class Userfaultfd(FileResource):
    """A userfaultfd that only the process has whose memory it serves."""

    FD_TYPE, FIELD = 1008, "uffd"
    LINKS = ("anon_inode:[userfaultfd]",)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        _look(source)
        if fdinfo_kinds.userfaultfd(source.fdinfo).features is not None:
            ctx.memo["userfaultfd", source.pid] = source.fd  # its mappings may be registered

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        flags = _look(source)
        seen = fdinfo_kinds.userfaultfd(source.fdinfo)
        entry = pb.userfaultfd_entry(id=source.id, flags=source.flags, fown=ctx.fown(source))
        if flags & USER_MODE_ONLY:
            entry.user = True
        if seen.features is None:
            return entry
        entry.features = seen.features
        task = ctx.tasks[source.holder]
        served = [one for one in task.mappings if one.flags & MODES.keys()]
        if ("userfaultfd", source.pid) in ctx.memo and served:
            raise unsupported(
                source, "one of several userfaultfds of a process: which memory each serves cannot be seen", hint=_HINT
            )
        ctx.memo["userfaultfd", source.pid] = source.fd
        pagemap = os.open(f"/proc/{source.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for mapping in served:
                self._range(pagemap, mapping, seen.features, source, entry)
        finally:
            os.close(pagemap)
        return entry

    @staticmethod
    def _range(pagemap: int, mapping: Any, features: int, source: SourceFile, entry: Message) -> None:
        start, end = mapping.vma.start, mapping.vma.end
        mode = sum(bit for flag, bit in MODES.items() if flag in mapping.flags)
        one = entry.ranges.add(start=start, end=end, mode=mode)
        if mode & WP:
            if mode & MISSING and features & _WP_UNPOPULATED:
                raise unsupported(
                    source, "it protects pages that are missing (UFFD_FEATURE_WP_UNPOPULATED)", hint=_HINT
                )
            one.guarded.extend(_runs(pagemap, start, end, kernel.PM_WRITTEN, kernel.PM_WRITTEN))
        if mode & MISSING:
            one.zeros.extend(_runs(pagemap, start, end, 0, kernel.PM_PFNZERO))

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        """A file that keeps the place, until the task itself makes the right one."""
        with doing("userfaultfd"):
            _probe(entry)
        return os.eventfd(0, os.EFD_CLOEXEC)

    def settle_each(self, entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext) -> None:
        # Programs may be written twice, the last time counts.
        holders = ctx.memo.setdefault(("userfaultfd holders", entry.id), {})
        holders[task.pid, fd] = task
        if any(other is not task for other in holders.values()):
            raise Unsupported("a userfaultfd that several processes have")

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        holders = ctx.memo.get(("userfaultfd holders", entry.id))
        if not holders:
            raise ImageError("files.img", f"file {entry.id}", "a userfaultfd is in flight")
        task = next(iter(holders.values()))
        flags = entry.flags & os.O_NONBLOCK | os.O_CLOEXEC | (USER_MODE_ONLY if entry.user else 0)
        made = program.call("userfaultfd", flags)
        for number, file_id, cloexec in task.fds:
            if file_id == entry.id and number != fd:
                # Known to be what the call returned: a result can be passed on once only.
                program.call("dup3", _lowest(task, ctx), number, os.O_CLOEXEC if cloexec else 0)
        cloexec = next(cloexec for number, _, cloexec in task.fds if number == fd)
        program.call("dup3", made, fd, os.O_CLOEXEC if cloexec else 0)
        program.call("close", _lowest(task, ctx))
        if entry.HasField("features"):
            request = struct.pack("=QQQ", userfault.API, entry.features, 0)
            program.call("ioctl", fd, userfault.IOC_API, request, why="what it can do")
        ctx.memo.setdefault(("userfault ranges", task.pid), {})[entry.id] = (fd, entry)


def _look(source: SourceFile) -> int:
    """The flags of its making. Raises Unsupported when it serves another process than the one that has it."""
    from ...linux import bpf, btf

    way = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data")
    wanted = [*way, "task_struct.mm", "userfaultfd_ctx.mm", "userfaultfd_ctx.flags", "bpf_iter_task()"]
    try:
        at = btf.lookup(wanted)
        files, table, array, private = (at[name] for name in way)
        through = (files, table, array, 8 * source.fd, private)
        places = [
            bpf.Place(at["task_struct.mm"], 8),
            bpf.Place(at["userfaultfd_ctx.mm"], 8, through=through),
            bpf.Place(at["userfaultfd_ctx.flags"], 4, through=through),
        ]
        record = bpf.read_once(at["bpf_iter_task()"], places, source.pid)
    except (KernelError, Unsupported) as error:
        log.warning(f"fd {source.fd} ({source.link}): it is taken to serve its own process: {error}")
        return 0
    if record is None or record.fields[0] != record.fields[1]:
        raise unsupported(source, "a userfaultfd for the memory of another process", hint=_HINT)
    return int.from_bytes(record.fields[2], "little")


def _runs(pagemap: int, start: int, end: int, inverted: int, mask: int) -> list[int]:
    found = kernel.pagemap_scan(
        pagemap, start, end, inverted=inverted, mask=mask, anyof=kernel.PM_PRESENT | kernel.PM_SWAPPED,
        wanted=kernel.PM_PRESENT,
    )  # fmt: skip
    return [word for low, high, _ in found for word in (low, high - low)]


# ---------------------------------------------------------------------- restore


def _probe(entry: Message) -> None:
    """Raise Unsupported where this kernel has not what was agreed on."""
    fd = userfault.make(USER_MODE_ONLY if entry.user else 0)
    try:
        if entry.HasField("features"):
            userfault.start(fd, entry.features)
    except KernelError:
        raise Unsupported(f"this kernel has not all of its features ({entry.features:#x})") from None
    finally:
        os.close(fd)


def _lowest(task: Any, ctx: BuildContext) -> int:
    """The descriptor number that the task is given when it asks for one: its own are there, and ours still."""
    taken = {fd for fd, _, _ in task.fds} | set(ctx.kept)
    number = 0
    while number in taken:
        number += 1
    return number


RESOURCE = Userfaultfd()
