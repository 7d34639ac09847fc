"""Which pages a task has of its own, from /proc/PID/pagemap: for kernels without PAGEMAP_SCAN (before Linux 6.7).

The file has a word for each page of the address space, holes too, so a mapping costs by its size: 2 MiB of words for
each GiB. Mappings without a page of their own are left out, as smaps tells. Kernel: fs/proc/task_mmu.c,
pte_to_pagemap_entry().
"""

from __future__ import annotations

import mmap
import os

from ..linux.kernel import writable_address
from ..proc import pagemap, smaps
from ..proc.read import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.source import SourceTask

PAGE = 4096
CHUNK_PAGES = 1 << 17


def zero_frame() -> int | None:
    """The number of the page frame that the kernel shows where memory was read and never written; None if it is hidden.

    Such a page is not told from others by a flag here.
    """
    # Mapped from /dev/zero, it is anonymous memory like any other, but does not become part of a larger mapping beside
    # it, in which the kernel might show its huge page of zeros.
    with open("/dev/zero", "rb") as zero, mmap.mmap(zero.fileno(), PAGE, mmap.MAP_PRIVATE) as area:
        assert area[0] == 0
        address = writable_address(area)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            (word,) = pagemap.words(os.pread(fd, pagemap.WORD, address // PAGE * pagemap.WORD))
        finally:
            os.close(fd)
    shared = not word & (pagemap.FILE | pagemap.EXCLUSIVE)
    return pagemap.frame(word) or None if shared else None


def own_pages(fd: int, task: SourceTask, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of pages inside ``spans`` that hold something and are no file's, as (start, end).

    ``spans`` are whole mappings; ``fd`` is the task's pagemap.
    """
    empty = {
        one.vma.start
        for one in smaps.parse(read(task.pid, "smaps"))
        if not one.anonymous and not one.swap and "ht" not in one.vmflags  # huge pages of a pool are not counted there
    }
    zero = zero_frame()
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if start in empty:
            continue
        for address in range(start, end, CHUNK_PAGES * PAGE):
            count = min(CHUNK_PAGES, (end - address) // PAGE)
            data = os.pread(fd, count * pagemap.WORD, address // PAGE * pagemap.WORD)
            found += [
                (address + first * PAGE, address + (first + pages) * PAGE)
                for first, pages in pagemap.runs(data, pagemap.PRESENT | pagemap.SWAPPED, pagemap.FILE, but_frame=zero)
            ]
    return found
