"""Making a set that CRIU can read from one in which tasks share pages.

Torpor stores a page that several tasks have in common once, with the first of them; the others name it
(pagemap_entry.same_as). CRIU knows no such thing: here every task gets its own copy. Everything else is copied as it
is.
"""

from __future__ import annotations

import os
from bisect import bisect_right

from ..errors import ImageError
from . import magic, pages
from .store import ImageReader, ImageWriter, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .pages import Run

COPY_BYTES = 1 << 20


class _Space:
    """The pages of one task: its runs, found by address."""

    __slots__ = ("name", "pages", "runs", "starts")

    def __init__(self, reader: ImageReader, name: str) -> None:
        self.name = name
        self.pages = pages.Pages(reader, name)
        self.runs = list(self.pages.runs())
        self.starts = [run.vaddr for run in self.runs]


def convert(source_fd: int, target_fd: int) -> int:
    """Write the set in the directory ``source_fd`` to the directory ``target_fd``, every task with its own pages.

    Returns how many pages were copied for tasks that shared them. Raises ImageError for a set that is not consistent;
    then nothing is left in the target.
    """
    reader = ImageReader(source_fd)
    spaces: dict[int, _Space] = {}
    try:
        for entry in reader.read_all("pstree", required=True):
            name = f"pagemap-{entry.pid}"
            if reader.has(name):
                spaces[entry.pid] = _Space(reader, name)
        rewritten = {
            space.name: pid for pid, space in spaces.items() if any(run.same_as for run in space.runs)
        }
        with ImageWriter(target_fd, existing="refuse") as writer:
            copied = _write(reader, writer, spaces, rewritten)
            writer.commit()
        return copied
    finally:
        for space in spaces.values():
            space.pages.close()


def _write(
    reader: ImageReader, writer: ImageWriter, spaces: dict[int, _Space], rewritten: dict[str, int]
) -> int:
    dropped = {f"pages-{pages.read_pagemap(reader, name).pages_id}" for name in rewritten}
    copied = 0
    for name in reader.names():
        if name in rewritten:
            copied += _rewrite(reader, writer, spaces, rewritten[name])
        elif name in dropped or name == "stats-dump":
            continue
        elif magic.kind_of(name).form == magic.RAW:
            fd = reader.open(name)
            try:
                _copy(fd, 0, writer.raw(name), os.fstat(fd).st_size, name)
            finally:
                os.close(fd)
        else:
            writer.create(name)
            for message, content in reader.iter_with_payload(name):
                writer.append(name, message, content)
    return copied


def _rewrite(
    reader: ImageReader, writer: ImageWriter, spaces: dict[int, _Space], pid: int
) -> int:
    space = spaces[pid]
    pages_id = pages.read_pagemap(reader, space.name).pages_id
    pagemap = pages.PagemapWriter(writer, space.name, pages_id)
    target = writer.raw(f"pages-{pages_id}")
    copied = 0
    for run in space.runs:
        pagemap.add(run.vaddr, run.nr_pages, pages.PE_PRESENT)
        end = run.vaddr + run.nr_pages * pages.PAGE_SIZE
        for fd, offset, size in _pieces(spaces, pid, run.vaddr, end, set()):
            _copy(fd, offset, target, size, f"pages-{pages_id}")
        copied += run.nr_pages if run.same_as else 0
    pagemap.close()
    return copied


def _pieces(
    spaces: dict[int, _Space], pid: int, start: int, end: int, seen: set[int]
) -> Iterator[tuple[int, int, int]]:
    """(descriptor, offset, bytes) of what a task has between two addresses, wherever it is stored."""
    space = spaces.get(pid)
    if space is None or pid in seen:
        raise ImageError("pagemap", f"{start:#x}", f"task {pid}, which is to have the page, has none")
    while start < end:
        run = _run_at(space, start)
        stop = min(end, run.vaddr + run.nr_pages * pages.PAGE_SIZE)
        if run.fd >= 0:
            yield run.fd, run.offset + start - run.vaddr, stop - start
        else:
            yield from _pieces(spaces, run.same_as, start, stop, seen | {pid})
        start = stop


def _run_at(space: _Space, address: int) -> Run:
    index = bisect_right(space.starts, address) - 1
    if index >= 0:
        run = space.runs[index]
        if address < run.vaddr + run.nr_pages * pages.PAGE_SIZE and (run.fd >= 0 or run.same_as):
            return run
    raise ImageError(magic.file_name(space.name), f"{address:#x}", "another task names this page, and it is not here")


def _copy(source: int, offset: int, target: int, size: int, name: str) -> None:
    while size:
        data = os.pread(source, min(size, COPY_BYTES), offset)
        if not data:
            raise ImageError(magic.file_name(name), "", "truncated")
        write_all(target, memoryview(data), magic.file_name(name))
        offset, size = offset + len(data), size - len(data)
