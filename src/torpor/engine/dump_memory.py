"""The memory of a task: its mappings, and the pages that are its own.

Which pages exist is asked once for a whole address space (PAGEMAP_SCAN); they go from the task to the file in large pieces.
"""

from __future__ import annotations

import errno
import mmap
import os
import time

from ..errors import KernelError, TaskGone, Unsupported, doing
from ..images import schema as pb
from ..images.pages import PE_PARENT, PE_PRESENT, PagemapWriter
from ..linux import kernel
from ..proc import auxv as proc_auxv
from ..proc.read import read
from ..resources import MappingKinds, base
from ..resources.files import regular
from .sharing import Sharing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from ..images.schema import Message
    from ..model.source import Mapping, SourceTask
    from ..resources.base import DumpContext

PAGE = 4096
CHUNK_BYTES = 1 << 20
ADDRESS_END = 0x7FFFFFFFF000
IOV_MAX = 1024
WHOLE_KINDS = ("vdso", "aio")  # of these all pages are stored, in whatever way the kernel keeps them

#: VmFlags of smaps → MADV_* of the images (fs/proc/task_mmu.c, show_smap_vma_flags)
MADVICE = {"sr": 2, "rr": 1, "dc": 10, "dd": 16, "mg": 12, "hg": 14, "nh": 15, "wf": 18}
#: The kernel seals its own pages by itself where it is built so (CONFIG_MSEAL_SYSTEM_MAPPINGS).
SEALED_BY_KERNEL = ("vdso", "vvar", "vvar_vclock", "vsyscall")
#: VmFlags → MAP_*
MAP_FLAGS = {"gd": base.MAP_GROWSDOWN, "lo": base.MAP_LOCKED, "nr": base.MAP_NORESERVE, "ht": base.MAP_HUGETLB}
REFUSED = {
    "um": ("it is registered with userfaultfd (missing pages)", "close the userfaultfd first"),
    "ui": ("it is registered with userfaultfd (minor faults)", "close the userfaultfd first"),
    "pf": ("it maps page frames of a device", "close the device first"),
    "io": ("it maps a device's memory", "close the device first"),
    "ss": ("it is a shadow stack", "run the program without shadow stacks"),
}


def mapping_trouble(mapping: Mapping) -> tuple[str, str] | None:
    """(why, hint) where the kernel's flags say that a mapping cannot be dumped."""
    special = mapping.vma.kind in ("vvar", "vvar_vclock", "vdso", "vsyscall")
    for flag, why in REFUSED.items():
        if flag in mapping.flags and not special:
            return why
    return None


class MemoryDumper:
    """Writes mm-N, pagemap-N and pages-N of one task after the other."""

    def __init__(self, ctx: DumpContext) -> None:
        self.ctx = ctx
        self.kinds = MappingKinds()
        self.mappings = self.pages = self.shared_pages = 0
        self.seconds = 0.0
        self._buffer = mmap.mmap(-1, CHUNK_BYTES)
        self.sharing = Sharing()

    def dump_task(self, task: SourceTask) -> None:
        """Write the task's memory."""
        started = time.monotonic()
        entry = self._mm_entry(task)
        spans: list[tuple[int, int]] = []
        for mapping in task.mappings:
            vma = mapping.vma
            with doing(f"mapping {vma.start:x}-{vma.end:x}"):
                trouble = mapping_trouble(mapping)
                if trouble:
                    raise Unsupported(trouble[0], hint=trouble[1])
                resource = self.kinds.find(mapping)
                one = entry.vmas.add()
                self._vma_entry(mapping, one)
                resource.dump(mapping, task, self.ctx, one)
                if vma.kind in WHOLE_KINDS or (resource.PRIVATE_PAGES and one.flags & base.MAP_PRIVATE):
                    spans.append((vma.start, vma.end))
                elif vma.kind == "vvar_vclock":
                    _join_vvar(entry.vmas)
        self.mappings += len(task.mappings)
        runs, guards = self._present(task, spans)
        for start, end in guards:
            entry.vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, status=base.VMA_GUARD, fd=-1)
        for ring in self.ctx.memo.get(("aios", task.pid), ()):
            entry.aios.add(**ring)
        self.ctx.images.write_one(f"mm-{task.vpid}", entry)
        self._write_pages(task, runs)
        self.seconds += time.monotonic() - started

    def _mm_entry(self, task: SourceTask) -> Message:
        stat = task.stat
        entry = pb.mm_entry(
            mm_start_code=stat.start_code, mm_end_code=stat.end_code, mm_start_data=stat.start_data,
            mm_end_data=stat.end_data, mm_start_stack=stat.start_stack, mm_start_brk=stat.start_brk,
            mm_brk=task.answers["brk"], mm_arg_start=stat.arg_start, mm_arg_end=stat.arg_end,
            mm_env_start=stat.env_start, mm_env_end=stat.env_end, dumpable=task.answers.get("dumpable", 1),
            thp_disabled=bool(task.answers.get("thp_disabled", 0)),
            exe_file_id=regular.file_id_for(self.ctx, task.pid, f"/proc/{task.pid}/exe", flags=os.O_RDONLY),
        )  # fmt: skip
        # Without the terminator, which the kernel adds: with it CRIU 4.2, which takes 44 words, refuses the 46 of Linux 6.18.
        words = proc_auxv.words(read(task.pid, "auxv"))
        entry.mm_saved_auxv.extend(words[:-2] if words[-2:-1] == [proc_auxv.AT_NULL] else words)
        return entry

    @staticmethod
    def _vma_entry(mapping: Mapping, entry: Message) -> None:
        vma = mapping.vma
        entry.start, entry.end, entry.pgoff, entry.prot, entry.fd = vma.start, vma.end, vma.pgoff, vma.prot, -1
        entry.shmid = 0
        flags = vma.flags
        advice = 0
        for name in mapping.flags:
            if name in MAP_FLAGS:
                flags |= MAP_FLAGS[name]
            elif name in MADVICE:
                advice |= 1 << MADVICE[name]
        entry.flags = flags
        if advice:
            entry.madv = advice
        if "lf" in mapping.flags:
            entry.lock_on_fault = True
        if "sl" in mapping.flags and entry.start < ADDRESS_END and vma.kind not in SEALED_BY_KERNEL:
            entry.sealed = True

    def _present(
        self, task: SourceTask, spans: list[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The runs of pages to store inside ``spans``, and the guard regions, as (start, end)."""
        whole = {(m.vma.start, m.vma.end) for m in task.mappings if m.vma.kind in WHOLE_KINDS}
        fd = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            regions = kernel.pagemap_scan(
                fd, 0, ADDRESS_END,
                inverted=kernel.PM_PFNZERO, mask=kernel.PM_PFNZERO, anyof=kernel.PM_PRESENT | kernel.PM_SWAPPED,
                wanted=kernel.PM_PRESENT | kernel.PM_SWAPPED | kernel.PM_FILE | kernel.PM_GUARD,
            )  # fmt: skip
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            from . import find_pages

            return clip(find_pages.own_pages(fd, task, spans), spans, whole), []
        finally:
            os.close(fd)
        guards = [(start, end) for start, end, what in regions if what & kernel.PM_GUARD]
        wanted = [(start, end) for start, end, what in regions if not what & (kernel.PM_GUARD | kernel.PM_FILE)]
        return clip(wanted, spans, whole), guards

    def _write_pages(self, task: SourceTask, runs: list[tuple[int, int]]) -> None:
        pages_id = self.ctx.new_id("pages")
        pages = PagemapWriter(self.ctx.images, f"pagemap-{task.vpid}", pages_id)
        if len(self.ctx.tasks) > 1 and self.ctx.options.share_pages:
            runs = self._write_shared(task, runs, pages)
        else:
            for start, end in runs:
                pages.add(start, (end - start) // PAGE, PE_PRESENT)
        self.pages += sum(end - start for start, end in runs) // PAGE
        fd = self.ctx.images.raw(f"pages-{pages_id}")
        address = kernel.writable_address(self._buffer)
        view = memoryview(self._buffer)
        for batch in batches(runs):
            total = sum(length for _, length in batch)
            try:
                count = kernel.read_memory_into(task.pid, address, batch)
            except KernelError as error:
                if error.errno != errno.EFAULT:
                    raise
                count = 0
            if count != total:
                read_protected(task, batch, view)
            _write_all(fd, view[:total])
        pages.close()

    def _write_shared(
        self, task: SourceTask, runs: list[tuple[int, int]], pages: PagemapWriter
    ) -> list[tuple[int, int]]:
        """Announce the runs; those that an earlier task has too are only named. Returns what is left to be stored."""
        own: list[tuple[int, int]] = []
        for start, count, owner in self.sharing.split(task, runs):
            if owner:
                # PE_PARENT makes CRIU, which does not know the field, refuse the set rather than restore zeroes.
                pages.add(start, count, PE_PARENT, same_as=self.ctx.tasks[owner].vpid)
                self.shared_pages += count
            else:
                pages.add(start, count, PE_PRESENT)
                own.append((start, start + count * PAGE))
        return own

    def finish(self) -> None:
        """All tasks are done."""
        self._buffer.close()


def _join_vvar(vmas: Any) -> None:
    """Make the last entry a part of the vvar before it, as in all images: [vvar_vclock] was split off in Linux 6.13 only."""
    last = vmas[-1]
    if len(vmas) > 1 and vmas[-2].status & base.VMA_VVAR and vmas[-2].end == last.start:
        vmas[-2].end = last.end
        del vmas[-1]


def clip(
    runs: list[tuple[int, int]], spans: list[tuple[int, int]], whole: Collection[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """The parts of ``runs`` inside ``spans`` (both ascending); spans in ``whole`` are taken whole. Neighbours are joined."""
    found: list[tuple[int, int]] = []
    index = 0
    for low, high in spans:
        if (low, high) in whole:
            pieces = [(low, high)]
        else:
            while index < len(runs) and runs[index][1] <= low:
                index += 1
            pieces = []
            here = index
            while here < len(runs) and runs[here][0] < high:
                pieces.append((max(low, runs[here][0]), min(high, runs[here][1])))
                here += 1
        for start, end in pieces:
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    return found


def batches(runs: list[tuple[int, int]]) -> Any:
    """The runs as lists of (address, length) of at most CHUNK_BYTES and IOV_MAX pieces each."""
    batch: list[tuple[int, int]] = []
    room = CHUNK_BYTES
    for start, end in runs:
        while start < end:
            length = min(end - start, room)
            batch.append((start, length))
            start += length
            room -= length
            if room == 0 or len(batch) == IOV_MAX:
                yield batch
                batch, room = [], CHUNK_BYTES
    if batch:
        yield batch


def read_protected(task: SourceTask, batch: list[tuple[int, int]], view: memoryview) -> None:
    """As process_vm_readv, for memory that the task itself may not read: /proc/PID/mem does not ask."""
    done = 0
    for start, length in batch:
        while length:
            count = os.preadv(task.mem_fd, [view[done : done + length]], start)
            if not count:
                raise TaskGone(f"task {task.pid}: memory at {start:#x} could not be read")
            done, start, length = done + count, start + count, length - count


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
