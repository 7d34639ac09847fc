"""The memory of a task: its mappings, and the pages that are its own.

Which pages exist is asked once for a whole address space (PAGEMAP_SCAN); they go from the task to the file in large
pieces.
"""

from __future__ import annotations

import errno
import os
import time

from ..errors import TorporError, Unsupported, doing
from ..images import schema as pb
from ..images.pages import PE_PARENT, PE_PRESENT, PagemapWriter
from ..linux import kernel
from ..proc import auxv as proc_auxv
from ..proc.read import read
from ..resources import MappingKinds, base
from ..resources.files import regular
from . import alike
from .sharing import OWN_PAGES_MAX, Sharing, read_entries
from .spans import common, joined
from .transfer import Buffer, has_alone, reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from ..images.schema import Message
    from ..model.source import Mapping, SourceTask
    from ..resources.base import DumpContext, MappingResource
    from .precopy import Precopy

PAGE = 4096
ADDRESS_END = 0x7FFFFFFFF000
SIBLINGS_FEW = 2  # so many are compared page by page
WHOLE_KINDS = ("vdso", "aio")  # of these all pages are stored, in whatever way the kernel keeps them
#: Mappings of these kinds with the same line in maps and the same flags have the same entry; so have private ones of a
#: file.
ALIKE_KINDS = ("anon", "heap", "stack", "named", "vdso", "vvar", "vvar_vclock", "vsyscall")

#: VmFlags of smaps → MADV_* of the images (fs/proc/task_mmu.c, show_smap_vma_flags)
MADVICE = {"sr": 2, "rr": 1, "dc": 10, "dd": 16, "mg": 12, "hg": 14, "nh": 15, "wf": 18}
#: The kernel seals its own pages by itself where it is built so (CONFIG_MSEAL_SYSTEM_MAPPINGS).
SEALED_BY_KERNEL = ("vdso", "vvar", "vvar_vclock", "vsyscall")
#: VmFlags → MAP_*
MAP_FLAGS = {"gd": base.MAP_GROWSDOWN, "lo": base.MAP_LOCKED, "nr": base.MAP_NORESERVE, "ht": base.MAP_HUGETLB}
TOLD_BY_FLAGS = frozenset((*MADVICE, *MAP_FLAGS, "lf", "sl"))
REFUSED = {
    "um": ("it is registered with userfaultfd (missing pages)", "close the userfaultfd first"),
    "ui": ("it is registered with userfaultfd (minor faults)", "close the userfaultfd first"),
    "pf": ("it maps page frames of a device", "close the device first"),
    "io": ("it maps a device's memory", "close the device first"),
    "ss": ("it is a shadow stack", "run the program without shadow stacks"),
}


def mapping_trouble(mapping: Mapping, *, served: bool = False) -> tuple[str, str] | None:
    """(why, hint) where the kernel's flags say that a mapping cannot be dumped.

    ``served``: by a userfaultfd of the process itself, which goes with it (files/userfaultfd.py).
    """
    if REFUSED.keys().isdisjoint(mapping.flags):
        return None
    special = mapping.vma.kind in ("vvar", "vvar_vclock", "vdso", "vsyscall")
    for flag, why in REFUSED.items():
        if flag in mapping.flags and not special and not (served and flag == "um"):
            return why
    return None


class MemoryDumper:
    """Writes mm-N, pagemap-N and pages-N of one task after the other."""

    def __init__(self, ctx: DumpContext, precopy: Precopy) -> None:
        self.ctx = ctx
        self.precopy = precopy
        self.kinds = MappingKinds()
        self.mappings = self.pages = self.shared_pages = 0
        self.seconds = 0.0
        self._buffer = Buffer()
        self.sharing = Sharing()
        self._models = alike.Models()
        self._walks: dict[int, _Walk] = {}

    def dump_task(self, task: SourceTask) -> None:
        """Write the task's memory."""
        started = time.monotonic()
        entry = self._mm_entry(task)
        walk = self._walks.get(id(task.mappings))
        if walk is None:
            walk = self._walks[id(task.mappings)] = self._walk(task)
        entry.vmas.MergeFrom(walk.entries.vmas)
        for index, mapping, resource in walk.each_time if walk.task is not task else ():
            entry.vmas[index].Clear()
            self._vma_entry(mapping, entry.vmas[index])
            with _place_of(mapping):
                resource.dump(mapping, task, self.ctx, entry.vmas[index])
        self.mappings += len(task.mappings)
        runs, guards = self._present(task, walk)
        for start, end in guards:
            entry.vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, status=base.VMA_GUARD, fd=-1)
        for ring in self.ctx.memo.get(("aios", task.pid), ()):
            entry.aios.add(**ring)
        self.ctx.images.write_one(f"mm-{task.vpid}", entry)
        self._write_pages(task, runs)
        self.seconds += time.monotonic() - started

    def _walk(self, task: SourceTask) -> _Walk:
        """Look at all mappings of a task. Others that have the same ones get the same entries."""
        walk = _Walk(task)
        vmas = walk.entries.vmas
        for mapping in task.mappings:
            vma = mapping.vma
            try:
                trouble = mapping_trouble(mapping, served=("userfaultfd", task.pid) in self.ctx.memo)
                if trouble:
                    raise Unsupported(trouble[0], hint=trouble[1])
                resource = self.kinds.find(mapping)
                one = vmas.add()
                self._vma_entry(mapping, one)
                resource.dump(mapping, task, self.ctx, one)
            except (TorporError, OSError):
                with _place_of(mapping):
                    raise
            if vma.kind in WHOLE_KINDS or (resource.PRIVATE_PAGES and one.flags & base.MAP_PRIVATE):
                walk.spans.append((vma.start, vma.end))
            if vma.kind in WHOLE_KINDS:
                walk.whole.add((vma.start, vma.end))
            if vma.kind == "vvar_vclock":
                _join_vvar(vmas)
            elif vma.kind not in ALIKE_KINDS and not (vma.kind == "file" and vma.flags & base.MAP_PRIVATE):
                walk.each_time.append((len(vmas) - 1, mapping, resource))
        return walk

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
        # Without the terminator, which the kernel adds: with it CRIU 4.2, which takes 44 words, refuses the 46 of Linux
        # 6.18.
        words = proc_auxv.words(read(task.pid, "auxv"))
        entry.mm_saved_auxv.extend(words[:-2] if words[-2:-1] == [proc_auxv.AT_NULL] else words)
        return entry

    @staticmethod
    def _vma_entry(mapping: Mapping, entry: Message) -> None:
        vma, names = mapping.vma, mapping.flags
        entry.start, entry.end, entry.pgoff, entry.prot, entry.fd = vma.start, vma.end, vma.pgoff, vma.prot, -1
        entry.shmid = 0
        entry.flags = vma.flags
        if TOLD_BY_FLAGS.isdisjoint(names):
            return
        for name in names & MAP_FLAGS.keys():
            entry.flags |= MAP_FLAGS[name]
        advice = 0
        for name in names & MADVICE.keys():
            advice |= 1 << MADVICE[name]
        if advice:
            entry.madv = advice
        # Linux 6.1 has no letters for VM_LOCKONFAULT: "??", the only such flag there that stands beside "lo".
        if "lf" in names or ("lo" in names and "??" in names):
            entry.lock_on_fault = True
        if "sl" in names and entry.start < ADDRESS_END and vma.kind not in SEALED_BY_KERNEL:
            entry.sealed = True

    def _present(self, task: SourceTask, walk: _Walk) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The runs of pages to store, and the guard regions, as (start, end)."""
        fd = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            regions = kernel.present_pages(fd, 0, ADDRESS_END, also=kernel.PM_FILE | kernel.PM_GUARD)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            from . import find_pages

            return clip(find_pages.own_pages(fd, task, walk.spans), walk.spans, walk.whole), []
        finally:
            os.close(fd)
        guards = [(start, end) for start, end, what in regions if what & kernel.PM_GUARD]
        wanted = [(start, end) for start, end, what in regions if not what & (kernel.PM_GUARD | kernel.PM_FILE)]
        return clip(wanted, walk.spans, walk.whole), guards

    def _write_pages(self, task: SourceTask, runs: list[tuple[int, int]]) -> None:
        early = self.precopy.of(task.pid)
        pages_id = early.pages_id if early else self.ctx.new_id("pages")
        pages = PagemapWriter(self.ctx.images, f"pagemap-{task.vpid}", pages_id)
        image = f"pages-{pages_id}"
        if len(self.ctx.tasks) > 1 and self.ctx.options.share_pages:
            model = None if task.children or early else self._models.find(task.ppid, runs)
            if model is not None:
                self._write_alike(task, runs, model, pages, image)
                pages.close()
                return
            shared = list(self.sharing.split(task, runs))
            if _is_forked(shared):
                self._write_forked(task, runs, shared, pages, image)
                pages.close()
                return
        for start, end in runs:
            pages.add(start, (end - start) // PAGE, PE_PRESENT)
        self._write_runs(task, runs, image)
        self.pages += sum(end - start for start, end in runs) // PAGE
        pages.close()

    def _write_runs(self, task: SourceTask, runs: list[tuple[int, int]], image: str) -> None:
        """Append the content of the runs to an image."""
        early = self.precopy.of(task.pid)
        if early:
            for _, view in self._read(task, early.settle(runs)):
                early.add(view)
            return
        fd = self.ctx.images.raw(image)
        reserve(fd, os.fstat(fd).st_size, sum(end - start for start, end in runs), f"{image}.img")
        for _, view in self._read(task, runs):
            self.ctx.images.write(image, view)

    def _read(
        self, task: SourceTask, runs: list[tuple[int, int]]
    ) -> Iterator[tuple[list[tuple[int, int]], memoryview]]:
        """The content of the runs, in pieces: (its (address, bytes) spans, the content), valid until the next one."""
        return self._buffer.read(task, runs, alone=has_alone(task.pid, runs))

    def _write_forked(
        self, task: SourceTask, runs: list[tuple[int, int]], shared: list[tuple[int, int, int]], pages: PagemapWriter,
        image: str,
    ) -> None:  # fmt: skip
        """Write the pages of a task that has some in common with earlier ones: those are only named.

        What it has of its own may still be equal to what another has stored at the same place.
        """
        own = [(start, start + count * PAGE) for start, count, owner in shared if not owner]
        named = [one for one in shared if one[2]]
        if self.precopy.of(task.pid) or sum(end - start for start, end in own) > OWN_PAGES_MAX * PAGE:
            found = sorted([*named, *((start, (end - start) // PAGE, 0) for start, end in own)])
            self._write_runs(task, own, image)
        else:
            equal, content = self._write_unequal(task, own, image)
            found = sorted([*named, *equal])
            if not task.children and len(self.ctx.tasks[task.ppid].children) > SIBLINGS_FEW:
                self._remember(task, runs, own, content, found)
        for start, count, owner in found:
            if owner:
                # PE_PARENT makes CRIU, which does not know the field, refuse the set rather than restore zeroes.
                pages.add(start, count, PE_PARENT, same_as=self.ctx.tasks[owner].vpid)
                self.shared_pages += count
            else:
                pages.add(start, count, PE_PRESENT)
                self.pages += count

    def _remember(
        self, task: SourceTask, runs: list[tuple[int, int]], own: list[tuple[int, int]], content: bytes,
        found: list[tuple[int, int, int]],
    ) -> None:  # fmt: skip
        """Have the task's pages as a model for its siblings."""
        entries = read_entries(task.pid, runs)
        if alike.all_known(entries):
            parents = self.sharing.addresses(task.ppid)
            tasks = self.ctx.tasks
            model = alike.Model(
                task.pid, runs, entries, found, own, content, parents, lambda pid: tasks[pid].vpid
            )
            self._models.add(task.ppid, runs, model)

    def _write_alike(
        self, task: SourceTask, runs: list[tuple[int, int]], model: alike.Model, pages: PagemapWriter, image: str
    ) -> None:
        """Write the pages of a task in so far as they are not those of its sibling."""
        changes: list[tuple[int, int]] = []
        own: list[tuple[int, int]] = []
        for address, inherited in model.differing(read_entries(task.pid, runs)):
            if inherited:
                if model.owner(address) != task.ppid:
                    changes.append((address, task.ppid))
            elif own and own[-1][1] == address:
                own[-1] = (own[-1][0], address + PAGE)
            else:
                own.append((address, address + PAGE))
        chunks: list[bytes] = []
        for batch, view in self._read(task, own):
            place = 0
            for start, length in batch:
                content = bytes(view[place : place + length])
                place += length
                if not model.same_content(start, content):
                    changes += self._compare_pages(task.pid, model, start, content, chunks)
        changes.sort()
        if chunks:
            self.ctx.images.write(image, b"".join(chunks))
        total = sum(end - start for start, end in runs) // PAGE
        pages.add_framed(model.pagemap(changes), present=len(chunks), elsewhere=total - len(chunks))
        self.pages += len(chunks)
        self.shared_pages += total - len(chunks)

    def _compare_pages(
        self, pid: int, model: alike.Model, start: int, content: bytes, chunks: list[bytes]
    ) -> Iterator[tuple[int, int]]:
        """Those pages of a run that differ from the model's: (address, pid of who stores it or 0). What is to be stored
        is added to ``chunks``.
        """
        for at in range(0, len(content), PAGE):
            address, page = start + at, content[at : at + PAGE]
            if not model.same_content(address, page):
                owner = self.sharing.owner_of(address, page, pid)
                if not owner:
                    chunks.append(page)
                if owner != model.owner(address):
                    yield address, owner

    def _write_unequal(
        self, task: SourceTask, own: list[tuple[int, int]], image: str
    ) -> tuple[list[tuple[int, int, int]], bytes]:
        """Write those of a task's ``own`` pages that no earlier task has stored; all as (start, pages, pid of that
        task or 0), and their content.
        """
        found: list[tuple[int, int, int]] = []
        whole: list[bytes] = []
        chunks: list[bytes] = []
        owner_of, pid = self.sharing.owner_of, task.pid
        for batch, view in self._read(task, own):
            place = 0
            whole.append(bytes(view))
            for start, length in batch:
                for address in range(start, start + length, PAGE):
                    content = bytes(view[place : place + PAGE])
                    place += PAGE
                    owner = owner_of(address, content, pid)
                    found.append((address, 1, owner))
                    if not owner:
                        chunks.append(content)
        if chunks:
            self.ctx.images.write(image, b"".join(chunks))
        return found, b"".join(whole)

    def finish(self) -> None:
        """All tasks are done."""
        self._buffer.close()


class _Walk:
    """What was found out about a list of mappings."""

    __slots__ = ("each_time", "entries", "spans", "task", "whole")

    def __init__(self, task: SourceTask) -> None:
        #: The one that was looked at.
        self.task = task
        #: A mm_entry with the entries of all mappings.
        self.entries: Message = pb.mm_entry()
        #: (index in them, mapping, resource) of mappings that may be different behind the same look.
        self.each_time: list[tuple[int, Mapping, MappingResource]] = []
        #: (start, end) of what may have pages to be stored; those of which all pages are
        self.spans: list[tuple[int, int]] = []
        self.whole: set[tuple[int, int]] = set()


def _place_of(mapping: Mapping) -> AbstractContextManager[object]:
    return doing(f"mapping {mapping.vma.start:x}-{mapping.vma.end:x}")


def _is_forked(shared: list[tuple[int, int, int]]) -> bool:
    """Has the task pages in common with others?"""
    return any(owner for _, _, owner in shared)


def _join_vvar(vmas: Any) -> None:
    """Make the last entry a part of the vvar before it, as in all images: [vvar_vclock] was split off in Linux 6.13
    only.
    """
    last = vmas[-1]
    if len(vmas) > 1 and vmas[-2].status & base.VMA_VVAR and vmas[-2].end == last.start:
        vmas[-2].end = last.end
        del vmas[-1]


def clip(
    runs: list[tuple[int, int]], spans: list[tuple[int, int]], whole: Collection[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """The parts of ``runs`` inside ``spans`` (both ascending); spans in ``whole`` are taken whole. Neighbours are
    joined.
    """
    parts = common(runs, [span for span in spans if span not in whole])
    return joined(sorted([*parts, *(span for span in spans if span in whole)]))
