"""Memory that is copied while its tasks run, so that they stand still for what they have written meanwhile only.

For a dump after which the tree goes on, of tasks with much memory of their own::

    stop, watch, let go          a few milliseconds, with the tree as a whole
    copy                         the tree runs, and what it writes is noted (engine/tracking.py)
    stop, dump                   pages written since are read again, into a file of their own
    let go, settle               each page is put where it belongs in the pages file

A pages file holds the pages in the order of their addresses. Where pages have come or gone since they were copied, what
lies behind them is moved: that is left for when the tree runs again. The images are those of any other dump.
"""

from __future__ import annotations

import os
from bisect import bisect_right

from .. import log
from ..errors import TaskGone, doing
from ..images.source import refused
from ..images.store import write_all
from ..linux import kernel
from ..model.source import Mapping
from ..proc import maps as proc_maps
from ..proc.read import numbers, read
from ..remote.tracee import Seized
from . import collect, tracking
from .restart import Restarts
from .spans import common, minus
from .transfer import Buffer, has_alone, reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..model.source import SourceTask
    from ..resources.base import DumpContext
    from .tracking import Tracker

#: A tree with less stands still hardly longer if its memory is read at once; a task with less is not looked at.
TREE_BYTES_MIN, TASK_BYTES_MIN, MAPPING_BYTES_MIN = 48 << 20, 16 << 20, 1 << 20
#: Whoever has one of these has memory into which the kernel writes unseen, or watches it himself.
UNSEEN = ("anon_inode:[io_uring]", "anon_inode:[userfaultfd]")
KINDS = (proc_maps.ANON, proc_maps.HEAP, proc_maps.NAMED)
MOVE_BYTES = 1 << 20
PAGE = 4096


class Precopy:
    """What was copied of the tasks of one dump before they were stopped for it."""

    def __init__(self, ctx: DumpContext, timeout_s: float) -> None:
        self.ctx = ctx
        self.timeout_s = timeout_s
        self._copies: dict[int, Copy] = {}

    def run(self, root: int) -> None:
        """Copy what is worth it of the tree below and with ``root``, which runs on. Raises TorporError."""
        pids = list(collect.look(root))
        wanted = {pid: spans for pid in pids if (spans := _worthwhile(pid, alone=len(pids) == 1))}
        total = sum(present for spans in wanted.values() for _, _, present in spans)
        if total < TREE_BYTES_MIN:
            return
        tasks = self._watch(root, wanted)
        try:
            for task in tasks:
                with doing(f"task {task.pid}"):
                    self._copies[task.pid].read(task)
        finally:
            for task in tasks:
                collect.close_handles(task)

    def _watch(self, root: int, wanted: dict[int, list[tuple[int, int, int]]]) -> list[SourceTask]:
        """Stop the tree, have what is wanted of it watched, and let it go."""
        restarts = Restarts()
        seized = Seized(self.timeout_s)
        found: list[SourceTask] = []
        try:
            restarts.look(wanted)
            tasks = collect.freeze(root, seized)
            for task in tasks.values():
                for thread in task.threads:
                    restarts.mend(thread)
            for task in tasks.values():
                if task.pid in wanted and not task.zombie:
                    found.append(task)
                    collect.open_handles(task)
                    self._start(task, [(start, end) for start, end, _ in wanted[task.pid]], seized)
        except BaseException:
            for task in found:
                collect.close_handles(task)
            raise
        finally:
            seized.release_all()
            restarts.close()
        watched = [task for task in found if task.pid in self._copies]
        for task in found:
            if task not in watched:
                collect.close_handles(task)
        return watched

    def _start(self, task: SourceTask, spans: list[tuple[int, int]], seized: Seized) -> None:
        task.mappings = [Mapping(vma, frozenset()) for vma in proc_maps.parse(read(task.pid, "maps"))]
        guest = collect.guest_in(task, seized)
        try:
            tracker = tracking.start(task, guest)
            if tracker is not None:
                self._copies[task.pid] = Copy(self.ctx, tracker, spans)
        finally:
            guest.leave()

    @property
    def pages(self) -> int:
        """How many pages were copied early and are still the same."""
        return sum(end - start for copy in self._copies.values() for start, end in copy.kept) // PAGE

    def of(self, pid: int) -> Copy | None:
        """What was copied of a task."""
        return self._copies.get(pid)

    def complete(self) -> None:
        """Bring the pages files into their order; what no task has claimed goes. Raises TorporError."""
        for pid, copy in self._copies.items():
            with doing(f"task {pid}"):
                copy.complete()

    def close(self) -> None:
        """Stop watching."""
        for copy in self._copies.values():
            copy.tracker.close()
        self._copies.clear()


class Copy:
    """The memory of one task as it was at some time after the first stop: pages-N, in which pages have to change their
    places once it is known which there are.
    """

    def __init__(self, ctx: DumpContext, tracker: Tracker, spans: list[tuple[int, int]]) -> None:
        """Watches the mappings ``spans`` of a stopped task from now on."""
        self.images = ctx.images
        self.pages_id = ctx.new_id("pages")
        self.image = f"pages-{self.pages_id}"
        self.tracker = tracker
        self._wanted = tracker.protect(spans)
        #: (start, end, offset in the file), ascending.
        self._runs: list[tuple[int, int, int]] = []
        self._aside = -1
        self._missing: list[tuple[int, int]] = []
        self._final: list[tuple[int, int]] | None = None
        #: (start, end) of what nobody has written since.
        self.kept: list[tuple[int, int]] = []

    def read(self, task: SourceTask) -> None:
        """Copy what there is, while the task runs. Raises TorporError."""
        fd = self.images.raw(self.image)
        runs = self._wanted
        reserve(fd, 0, sum(end - start for start, end in runs), f"{self.image}.img")
        offset = 0
        with Buffer() as buffer:
            for batch, view in buffer.read_running(task, runs, alone=has_alone(task.pid, runs)):
                self.images.write(self.image, view)
                for start, length in batch:
                    self._add(start, length, offset)
                    offset += length
        log.info(f"task {task.pid}: {offset >> 10} KiB copied before it is stopped")

    def _add(self, start: int, length: int, offset: int) -> None:
        if self._runs and self._runs[-1][1] == start:
            self._runs[-1] = (self._runs[-1][0], start + length, self._runs[-1][2])
        else:
            self._runs.append((start, start + length, offset))

    def settle(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """These are the pages to be stored, now that the task is stopped. Returns those that have to be read again, for
        :meth:`add`.
        """
        assert self._final is None
        self._final = runs
        written = self.tracker.written(runs[0][0], runs[-1][1]) if runs else []
        known = [(start, end) for start, end, _ in self._runs]
        self.kept = minus(list(common(known, runs)), written)
        self._missing = minus(runs, self.kept)
        return self._missing

    def add(self, content: memoryview) -> None:
        """The next piece of what :meth:`settle` has asked for."""
        if self._aside < 0:
            self._aside = self.images.scratch()
        write_all(self._aside, content, f"{self.image}.img")

    def complete(self) -> None:
        """Put every page where it belongs. Raises TorporError."""
        if self._final is None:
            self.images.drop(self.image)  # the task has ended in between
            return
        fd = self.images.raw(self.image)
        places = _Places(self._final)
        olds = _Places([(start, end) for start, end, _ in self._runs])
        try:
            move(fd, [(olds.offset(start), places.offset(start), end - start) for start, end in self.kept])
            at = 0
            for start, end in self._missing:
                _copy(self._aside, at, fd, places.offset(start), end - start)
                at += end - start
            os.ftruncate(fd, places.size)
            os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            raise refused(f"write `{self.image}.img`", error) from None


class _Places:
    """Where pages lie in a file that holds runs of them one after the other."""

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in runs]
        self._offsets: list[int] = []
        self.size = 0
        for start, end in runs:
            self._offsets.append(self.size)
            self.size += end - start

    def offset(self, address: int) -> int:
        index = bisect_right(self._starts, address) - 1
        return self._offsets[index] + address - self._starts[index]


def move(fd: int, moves: Iterable[tuple[int, int, int]]) -> None:
    """Move the (old offset, new offset, bytes) pieces of a file, which stay in their order. None is overwritten before
    it has been moved itself.
    """
    up: list[tuple[int, int, int]] = []
    for old, new, size in moves:
        if new < old:
            _copy(fd, old, fd, new, size)
        elif new > old:
            up.append((old, new, size))
    for old, new, size in reversed(up):
        # From its end, in pieces: it may overlap with its own new place.
        while size:
            piece = min(size, MOVE_BYTES)
            size -= piece
            _copy(fd, old + size, fd, new + size, piece)


def _copy(source: int, at: int, target: int, to: int, size: int) -> None:
    while size:
        content = os.pread(source, min(size, MOVE_BYTES), at)
        assert content, f"a copy has lost {size} bytes at {at}"
        done = os.pwrite(target, content, to)
        at, to, size = at + done, to + done, size - done


def _worthwhile(pid: int, *, alone: bool) -> list[tuple[int, int, int]]:
    """The (start, end, bytes that are there) of a task's large mappings whose pages can be copied early; ``alone``: it
    has no relatives in the tree that may share them.
    """
    try:
        _, resident, shared, *_ = map(int, read(pid, "statm").split())
        if (resident - shared) * PAGE < TASK_BYTES_MIN:
            return []
        vmas = proc_maps.parse(read(pid, "maps"))
        if any(vma.kind == proc_maps.AIO for vma in vmas):
            return []
        large = [
            (vma.start, vma.end)
            for vma in vmas
            if vma.kind in KINDS and vma.flags & proc_maps.MAP_PRIVATE and vma.end - vma.start >= MAPPING_BYTES_MIN
        ]
        if not large or _is_unseen(pid):
            return []
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            return [
                (start, end, sum(high - low for low, high in runs))
                for start, end in large
                if (runs := _present(pagemap.fileno(), start, end)) and (alone or has_alone(pid, runs))
            ]
    except (TaskGone, OSError) as error:
        log.debug(f"task {pid}: nothing is copied early: {error}")
        return []


def _present(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    return [(low, high) for low, high, _ in kernel.present_pages(pagemap, start, end)]


def _is_unseen(pid: int) -> bool:
    return any(os.readlink(f"/proc/{pid}/fd/{fd}") in UNSEEN for fd in numbers(pid, "fd"))
