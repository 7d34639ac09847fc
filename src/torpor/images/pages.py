"""Which pages a snapshot holds, and where they lie.

``pagemap-PID.img`` (``pagemap-shmem-ID.img`` for shared memory, whose addresses are offsets into
the segment) lists runs of pages in order of their addresses. The contents of the runs that are
PE_PRESENT lie one after another in ``pages-N.img``; those of PE_PARENT runs are to be looked for
in the snapshot that the link ``parent`` names, at the same addresses.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import namedtuple

from .. import limits
from ..errors import ImageError
from . import magic
from . import schema as pb
from .store import ImageReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Any

    from .store import ImageWriter

# pagemap_entry.flags, CRIU's criu/include/pagemap.h.
PE_PARENT = 1 << 0  # in the parent snapshot
PE_LAZY = 1 << 1  # may be brought in after the restore
PE_PRESENT = 1 << 2  # in this snapshot's pages file

_ENTRIES_AT_ONCE = 4096
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

#: ``nr_pages`` pages from ``vaddr`` on. ``fd`` and ``offset``: where their contents begin, -1 for
#: both where no snapshot of the chain holds them (``same_as`` says which task does, or the run is
#: only PE_LAZY). In a Pagemap, which is not resolved, fd is -1, and offset too unless present.
Run = namedtuple("Run", "vaddr nr_pages flags fd offset same_as")


class PagemapWriter:
    """Writes one pagemap: runs in order of addresses, neighbours with equal flags made one.

    ``name`` is the image (``pagemap-42``), ``pages_id`` the number of the pages file, which the
    caller fills with the contents of the PE_PRESENT runs in the same order.
    """

    def __init__(self, writer: ImageWriter, name: str, pages_id: int) -> None:
        assert magic.kind_of(name).form == magic.HEADED, f"{name} is no pagemap"
        self._writer = writer
        self._name = name
        self._start = self._end = self._flags = self._same_as = 0
        #: pages announced so far, by what became of them
        self.present = self.in_parent = self.elsewhere = 0
        self._framed: list[bytes] = []
        writer.append(name, pb.pagemap_head(pages_id=pages_id))

    def add(
        self, vaddr: int, nr_pages: int, flags: int = PE_PRESENT, same_as: int = 0
    ) -> None:
        """The next ``nr_pages`` pages, from ``vaddr`` on."""
        assert vaddr % PAGE_SIZE == 0, f"{vaddr:#x} is inside a page"
        assert nr_pages > 0 and vaddr >= self._end, f"{vaddr:#x}, {nr_pages} pages: out of order"
        assert flags & (PE_PRESENT | PE_PARENT) != PE_PRESENT | PE_PARENT, "present and in parent"
        if flags & PE_PRESENT:
            self.present += nr_pages
        elif flags & PE_PARENT:
            self.in_parent += nr_pages
        else:
            self.elsewhere += nr_pages
        if vaddr == self._end and flags == self._flags and same_as == self._same_as and self._start != self._end:
            self._end = vaddr + nr_pages * PAGE_SIZE
            return
        if self._start != self._end:
            self._emit()
        self._start, self._flags, self._same_as = vaddr, flags, same_as
        self._end = vaddr + nr_pages * PAGE_SIZE

    def add_framed(self, entries: Iterable[bytes], *, present: int, elsewhere: int) -> None:
        """All runs at once, encoded by :func:`framed_run` and in order; how many pages are here and how many not."""
        self.present += present
        self.in_parent += elsewhere
        self._writer.append_framed(self._name, list(entries))

    def close(self) -> None:
        """Write the last run. Nothing may be added afterwards."""
        if self._start != self._end:
            self._emit()
            self._start = self._end
        self._flush()

    def _emit(self) -> None:
        count = (self._end - self._start) // PAGE_SIZE
        self._framed.append(framed_run(self._start, count, self._flags, self._same_as))
        if len(self._framed) > _ENTRIES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._writer.append_framed(self._name, self._framed)
        self._framed = []


_entry: list[Any] = []  # one for all: making it costs as much as encoding it


def framed_run(vaddr: int, nr_pages: int, flags: int, same_as: int) -> bytes:
    """One run as it stands in a pagemap: the length of its entry, and the entry."""
    if not _entry:
        # compat_nr_pages is 32 bits wide and only there because it was a required field once.
        _entry.append(pb.pagemap_entry(compat_nr_pages=0))
    entry = _entry[0]
    entry.vaddr, entry.flags, entry.nr_pages = vaddr, flags, nr_pages
    if same_as:
        entry.same_as = same_as
        body: bytes = entry.SerializeToString()
        entry.ClearField("same_as")
    else:
        body = entry.SerializeToString()
    return len(body).to_bytes(4, "little") + body


class Pagemap:
    """One pagemap as read: ``runs`` in order, and ``pages_id``, the number of its pages file."""

    __slots__ = ("name", "pages_id", "runs")

    def __init__(self, name: str, pages_id: int, runs: list[Run]) -> None:
        self.name = name
        self.pages_id = pages_id
        self.runs = runs


def read_pagemap(reader: ImageReader, name: str) -> Pagemap:
    """Read and check the pagemap ``name``: alignment, order, overlap, length of the pages file.

    Raises ImageError naming the entry that is wrong.
    """
    messages = reader.read_all(name, required=True)
    pages_id: int = messages[0].pages_id
    runs, stored = _checked(messages, magic.file_name(name))
    if stored:
        _check_pages_file(reader, f"pages-{pages_id}", stored, magic.file_name(name))
    return Pagemap(name, pages_id, runs)


def _checked(messages: list[Any], file: str) -> tuple[list[Run], int]:
    """The runs, and how many bytes the pages file has to have for them. The first message is the head."""
    runs: list[Run] = []
    end = offset = 0
    for index in range(1, len(messages)):
        entry = messages[index]
        vaddr, nr_pages, flags, same_as = entry.vaddr, entry.nr_pages, entry.flags, entry.same_as
        if not nr_pages:
            nr_pages = _nr_pages(entry)
        if vaddr < end or vaddr % PAGE_SIZE or not nr_pages:
            raise ImageError(file, f"entry {index}", _wrong(vaddr, nr_pages, end))
        size = nr_pages * PAGE_SIZE
        end = vaddr + size
        if end > limits.ADDRESS_MAX:
            raise ImageError(file, f"entry {index}", f"{nr_pages} pages from {vaddr:#x} on")
        if same_as or flags != PE_PRESENT:
            flags = _flags(entry)
        if flags & PE_PRESENT:
            if flags & PE_PARENT:
                raise ImageError(file, f"entry {index}", "both here and in the parent snapshot")
            runs.append(Run(vaddr, nr_pages, flags, -1, offset, 0))
            offset += size
        else:
            runs.append(Run(vaddr, nr_pages, flags, -1, -1, same_as))
    return runs, offset


def _nr_pages(entry: Any) -> int:
    count: int = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
    return count


def _flags(entry: Any) -> int:
    """Sets of CRIU before 2.12 have no flags: a run is present unless it is marked in_parent."""
    flags: int = entry.flags
    if entry.same_as:
        return flags & ~PE_PARENT  # set for CRIU alone, which then refuses the set
    if entry.in_parent:
        flags |= PE_PARENT
    elif not entry.HasField("flags"):
        flags = PE_PRESENT
    return flags


def _wrong(vaddr: int, nr_pages: int, end: int) -> str:
    if not nr_pages:
        return f"no pages at {vaddr:#x}"
    if vaddr % PAGE_SIZE:
        return f"{vaddr:#x} is inside a page"
    return f"{vaddr:#x} comes after {end:#x}: out of order"


def _check_pages_file(reader: ImageReader, pages: str, needed: int, file: str) -> None:
    if not reader.has(pages):
        raise ImageError(magic.file_name(pages), "", f"missing, named in {file}")
    size = reader.size(pages)
    if size < needed:
        raise ImageError(
            magic.file_name(pages), "", f"{size} bytes, {file} announces {needed}: truncated"
        )


class _Level:
    """One snapshot of a chain: its runs, their addresses for searching, its pages file."""

    __slots__ = ("fd", "file", "runs", "starts")

    def __init__(self, reader: ImageReader, name: str) -> None:
        pagemap = read_pagemap(reader, name)
        self.file = magic.file_name(name)
        self.runs = pagemap.runs
        self.starts: list[int] = []
        present = any(run[4] >= 0 for run in pagemap.runs)
        self.fd = reader.pages(f"pages-{pagemap.pages_id}") if present else -1


class Pages:
    """The pages of one address space, wherever in a chain of snapshots they lie.

    Holds the pages files open until :meth:`close` (or the end of a ``with`` block); the
    descriptors in the runs are its own.
    """

    def __init__(self, reader: ImageReader, name: str) -> None:
        self._name = name
        self._reader = reader  # of the last level
        self._directory = -1  # where that one lies, unless it is the caller's
        self._levels = [_Level(reader, name)]  # grows as pages are looked for in parents

    def runs(self) -> Iterator[Run]:
        """All runs in order of addresses; PE_PARENT ones are replaced by what the parents hold."""
        top = self._levels[0]
        for run in top.runs:
            vaddr, nr_pages, flags, _, offset, same_as = run
            if flags & PE_PARENT:
                yield from self._inherited(1, vaddr, vaddr + nr_pages * PAGE_SIZE)
            elif offset >= 0:
                yield Run(vaddr, nr_pages, flags, top.fd, offset, same_as)
            else:
                yield run

    def close(self) -> None:
        """Close the pages files."""
        for fd in (self._directory, *(level.fd for level in self._levels)):
            if fd >= 0:
                os.close(fd)
        self._directory, self._levels = -1, []

    def __enter__(self) -> Pages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _level(self, depth: int) -> _Level:
        """The snapshot ``depth`` steps before this one; ImageError if there is none."""
        if depth == len(self._levels):
            if depth > limits.PARENTS_MAX:
                raise ImageError("parent", "", f"more than {limits.PARENTS_MAX} snapshots")
            parent = self._reader.open_parent()
            if parent < 0:
                file = magic.file_name(self._name)
                raise ImageError(file, "", "pages are in a parent snapshot, but there is none")
            if self._directory >= 0:
                os.close(self._directory)
            self._directory, self._reader = parent, ImageReader(parent)
            self._levels.append(_Level(self._reader, self._name))
        return self._levels[depth]

    def _inherited(self, depth: int, start: int, end: int) -> Iterator[Run]:
        """What the snapshots from ``depth`` on hold of the addresses from start to end."""
        level = self._level(depth)
        if len(level.starts) != len(level.runs):
            level.starts = [run.vaddr for run in level.runs]
        index = max(bisect_right(level.starts, start) - 1, 0)
        while start < end:
            run = level.runs[index] if index < len(level.runs) else None
            if run is None or not run.vaddr <= start < run.vaddr + run.nr_pages * PAGE_SIZE:
                raise ImageError(level.file, "", f"the parent snapshot lacks {start:#x}")
            stop = min(end, run.vaddr + run.nr_pages * PAGE_SIZE)
            if run.flags & PE_PARENT:
                yield from self._inherited(depth + 1, start, stop)
            else:
                yield _part(run, level.fd, start, stop)
            start, index = stop, index + 1


def _part(run: Run, fd: int, start: int, stop: int) -> Run:
    count = (stop - start) // PAGE_SIZE
    if run.offset < 0:
        return Run(start, count, run.flags, -1, -1, run.same_as)
    return Run(start, count, run.flags, fd, run.offset + start - run.vaddr, 0)
