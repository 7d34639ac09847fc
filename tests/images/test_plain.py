"""images/plain.py: a set in which tasks share pages, made one that CRIU can read."""

from __future__ import annotations

import os

import pytest

from torpor.errors import ImageError, UsageError
from torpor.images import pages
from torpor.images import schema as pb
from torpor.images.plain import convert
from torpor.images.store import ImageReader, ImageWriter

PAGE = pages.PAGE_SIZE


@pytest.fixture
def shared(tmp_path) -> int:
    """Three tasks: 2 shares a page with 1, and 3 one with 2 that 2 shares with 1, and has one of its own."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with ImageWriter(fd) as writer:
        for pid, parent in ((1, 0), (2, 1), (3, 2)):
            writer.append("pstree", pb.pstree_entry(pid=pid, ppid=parent, pgid=1, sid=1, threads=[pid]))
        first = pages.PagemapWriter(writer, "pagemap-1", 1)
        first.add(0x10000, 2)
        os.write(writer.raw("pages-1"), b"a" * PAGE + b"b" * PAGE)
        first.close()
        second = pages.PagemapWriter(writer, "pagemap-2", 2)
        second.add(0x10000, 2, pages.PE_PARENT, same_as=1)
        second.close()
        writer.raw("pages-2")
        third = pages.PagemapWriter(writer, "pagemap-3", 3)
        third.add(0x11000, 1, pages.PE_PARENT, same_as=2)
        third.add(0x12000, 1)
        os.write(writer.raw("pages-3"), b"c" * PAGE)
        third.close()
        writer.commit()
    yield fd
    os.close(fd)


def content(fd: int, pid: int) -> dict[int, bytes]:
    """address → first byte of each page, of pages that lie with the task itself."""
    found = {}
    with pages.Pages(ImageReader(fd), f"pagemap-{pid}") as space:
        for run in space.runs():
            assert run.fd >= 0 and not run.same_as
            for index in range(run.nr_pages):
                found[run.vaddr + index * PAGE] = os.pread(run.fd, 1, run.offset + index * PAGE)
    return found


def test_every_task_has_its_pages(shared: int, tmp_path) -> None:
    target_path = tmp_path / "plain"
    target_path.mkdir()
    target = os.open(target_path, os.O_RDONLY | os.O_DIRECTORY)
    assert convert(shared, target) == 3
    assert content(target, 1) == {0x10000: b"a", 0x11000: b"b"}
    assert content(target, 2) == {0x10000: b"a", 0x11000: b"b"}
    assert content(target, 3) == {0x11000: b"b", 0x12000: b"c"}
    assert len(ImageReader(target).read_all("pstree")) == 3
    with pytest.raises(UsageError):
        convert(shared, target)
    os.close(target)


def test_a_page_that_nobody_has(shared: int, tmp_path) -> None:
    with ImageWriter(shared) as writer:
        for pid, parent in ((1, 0), (2, 1)):
            writer.append("pstree", pb.pstree_entry(pid=pid, ppid=parent, pgid=1, sid=1, threads=[pid]))
        wrong = pages.PagemapWriter(writer, "pagemap-2", 2)
        wrong.add(0x40000, 1, pages.PE_PARENT, same_as=1)
        wrong.close()
        writer.commit()
    target_path = tmp_path / "plain"
    target_path.mkdir()
    target = os.open(target_path, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(ImageError, match=r"pagemap-1\.img: 0x40000"):
        convert(shared, target)
    assert os.listdir(target) == []
    os.close(target)
