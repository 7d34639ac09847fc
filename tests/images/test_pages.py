"""Pagemaps: written, read, checked, and followed into the snapshots before."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor import limits
from torpor.errors import ImageError
from torpor.images import schema as pb
from torpor.images.pages import (
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    PagemapWriter,
    Pages,
    Run,
    read_pagemap,
)
from torpor.images.store import ImageReader, ImageWriter

P = PAGE_SIZE


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


class opened:
    """The directory ``path`` as a descriptor."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def content(level: int, page: int) -> bytes:
    """What page number ``page`` holds in snapshot ``level``: different everywhere."""
    return b"%08d%08d" % (level, page) + bytes(P - 16)


#: One address space: for each of its first pages, nothing or the flags of that page.
SPACES = st.lists(
    st.sampled_from([None, PE_PRESENT, PE_PRESENT | PE_LAZY, PE_LAZY, PE_PARENT]), max_size=40
)


def write(
    path: str, level: int, space: list[int | None], parent: str = "", same_as: int = 0
) -> None:
    with opened(path) as fd, ImageWriter(fd) as writer:
        pagemap = PagemapWriter(writer, "pagemap-7", 1)
        raw = writer.raw("pages-1")
        for page, flags in enumerate(space):
            if flags is not None:
                pagemap.add(page * P, 1, flags, same_as if flags == PE_LAZY else 0)
            if flags is not None and flags & PE_PRESENT:
                os.write(raw, content(level, page))
        pagemap.close()
        if parent:
            writer.parent(parent)
        writer.commit()


@given(space=SPACES, same_as=st.integers(0, 2**32 - 1))
def test_what_is_written_is_read(space: list[int | None], same_as: int) -> None:
    with tempfile.TemporaryDirectory() as path, opened(path) as fd:
        write(path, 1, space, same_as=same_as)
        runs = read_pagemap(ImageReader(fd), "pagemap-7").runs
        with open(os.path.join(path, "pages-1.img"), "rb") as file:
            stored = file.read()
    found: list[int | None] = [None] * len(space)
    for run in runs:
        for index in range(run.nr_pages):
            page = run.vaddr // P + index
            assert found[page] is None
            found[page] = run.flags
            if run.flags & PE_PRESENT:
                at = run.offset + index * P
                assert stored[at : at + P] == content(1, page)
                assert run.same_as == 0
            else:
                assert run.offset == -1
                assert run.same_as == (same_as if run.flags == PE_LAZY else 0)
    assert found == space
    for before, after in itertools.pairwise(runs):
        touch = before.vaddr + before.nr_pages * P == after.vaddr
        assert not touch or before.flags != after.flags, "neighbours are merged"


@given(spaces=st.lists(SPACES, min_size=1, max_size=4))
def test_parents_are_followed(spaces: list[list[int | None]]) -> None:
    """Against a model: each page is looked for in one snapshot after the other."""
    expected: dict[int, Any] = {}
    lacking = False
    for page, flags in enumerate(spaces[0]):
        level = 0
        while flags == PE_PARENT:
            level += 1
            flags = dict(enumerate(spaces[level])).get(page) if level < len(spaces) else None
            lacking |= flags is None
        if flags is not None:
            expected[page] = (flags, content(level, page) if flags & PE_PRESENT else None)
    with tempfile.TemporaryDirectory() as place:
        for level, space in enumerate(spaces):
            os.mkdir(f"{place}/{level}")
            more = level + 1 < len(spaces)
            write(f"{place}/{level}", level, space, parent=f"../{level + 1}" if more else "")
        before = os.listdir("/proc/self/fd")
        with opened(f"{place}/0") as fd:
            if lacking:
                with (
                    pytest.raises(ImageError, match="parent"),
                    Pages(ImageReader(fd), "pagemap-7") as pages,
                ):
                    list(pages.runs())
            else:
                with Pages(ImageReader(fd), "pagemap-7") as pages:
                    assert collect(pages.runs()) == expected
        assert os.listdir("/proc/self/fd") == before


def collect(runs: Iterator[Run]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for run in runs:
        assert (run.fd >= 0) == (run.offset >= 0) == bool(run.flags & PE_PRESENT)
        for index in range(run.nr_pages):
            data = os.pread(run.fd, P, run.offset + index * P) if run.fd >= 0 else None
            found[run.vaddr // P + index] = (run.flags, data)
    assert list(found) == sorted(found)
    return found


def test_the_bytes_are_criu_s(folder: str) -> None:
    with opened(folder) as fd, ImageWriter(fd) as writer:
        pagemap = PagemapWriter(writer, "pagemap-7", 3)
        pagemap.add(0x1000, 1)
        pagemap.add(0x2000, 2)
        pagemap.add(0x4000, 1, PE_PARENT)
        pagemap.add(0x6000, 1, PE_PARENT)
        pagemap.close()
        writer.commit()
        assert (pagemap.present, pagemap.in_parent, pagemap.elsewhere) == (3, 2, 0)
    with open(os.path.join(folder, "pagemap-7.img"), "rb") as file:
        data = file.read()
    assert data == bytes.fromhex(
        "19435654 25400856 02000000 0803"
        "09000000 088020 1000 2004 2803"
        "0a000000 08808001 1000 2001 2801"
        "0a000000 0880c001 1000 2001 2801"
    )


@pytest.fixture(autouse=True)
def kept() -> Iterator[list[int]]:
    """Descriptors that put() opened, until the test is over."""
    KEPT.clear()
    yield KEPT
    for fd in KEPT:
        os.close(fd)


KEPT: list[int] = []


def put(folder: str, *what: Any, stored: int = 1000) -> ImageReader:
    fd = os.open(folder, os.O_RDONLY)
    KEPT.append(fd)
    with ImageWriter(fd) as writer:
        writer.append("pagemap-7", pb.pagemap_head(pages_id=1))
        for one in what:
            writer.append("pagemap-7", one)
        if stored >= 0:
            os.truncate(writer.raw("pages-1"), stored * P)
        writer.commit()
    return ImageReader(fd)


def entry(vaddr: int, nr_pages: int, flags: int = PE_PRESENT) -> Any:
    return pb.pagemap_entry(vaddr=vaddr, compat_nr_pages=0, nr_pages=nr_pages, flags=flags)


def test_entries_of_older_versions(folder: str) -> None:
    reader = put(
        folder,
        pb.pagemap_entry(vaddr=0, compat_nr_pages=2),
        pb.pagemap_entry(vaddr=4 * P, compat_nr_pages=3, in_parent=True),
        pb.pagemap_entry(vaddr=8 * P, compat_nr_pages=1, in_parent=False),
        pb.pagemap_entry(vaddr=9 * P, compat_nr_pages=1, flags=PE_LAZY),
        pb.pagemap_entry(vaddr=10 * P, compat_nr_pages=1, nr_pages=2**33, flags=PE_LAZY),
    )
    assert [run[:3] + run[4:] for run in read_pagemap(reader, "pagemap-7").runs] == [
        (0, 2, PE_PRESENT, 0, 0),
        (4 * P, 3, PE_PARENT, -1, 0),
        (8 * P, 1, PE_PRESENT, 2 * P, 0),
        (9 * P, 1, PE_LAZY, -1, 0),
        (10 * P, 2**33, PE_LAZY, -1, 0),
    ]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ([entry(P, 2), entry(2 * P, 1)], "entry 2: 0x2000 comes after 0x3000: out of order"),
        ([entry(5 * P, 1), entry(P, 1)], "entry 2: 0x1000 comes after 0x6000: out of order"),
        ([entry(P + 1, 1)], "entry 1: 0x1001 is inside a page"),
        ([entry(P, 0)], "entry 1: no pages at 0x1000"),
        ([entry(2**64 - P, 2)], "entry 1: 2 pages from 0xfffffffffffff000 on"),
        ([entry(0, 2**64 - 1)], "entry 1: 18446744073709551615 pages from 0x0 on"),
        ([entry(0, 1, PE_PRESENT | PE_PARENT)], "entry 1: both here and in the parent"),
    ],
)
def test_a_wrong_entry_is_named(folder: str, what: list[Any], text: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_pagemap(put(folder, *what), "pagemap-7")
    assert str(caught.value).startswith(f"pagemap-7.img: {text}")


def test_the_last_page_of_all_may_be_there(folder: str) -> None:
    assert read_pagemap(put(folder, entry(2**64 - P, 1)), "pagemap-7").runs[0].nr_pages == 1


def test_the_pages_file_is_long_enough(folder: str) -> None:
    what = [entry(0, 2), entry(5 * P, 3, PE_LAZY), entry(9 * P, 2)]
    read_pagemap(put(folder, *what, stored=4), "pagemap-7")
    with pytest.raises(ImageError, match=r"pages-1\.img: 12288 bytes, .* announces 16384"):
        read_pagemap(put(folder, *what, stored=3), "pagemap-7")


def test_the_pages_file_is_only_needed_for_pages(folder: str) -> None:
    assert read_pagemap(put(folder, entry(0, 1, PE_LAZY), stored=-1), "pagemap-7").pages_id == 1
    with pytest.raises(ImageError, match=r"pages-1\.img: missing, named in pagemap-7\.img"):
        read_pagemap(put(folder, entry(0, 1), stored=-1), "pagemap-7")


def test_a_parent_must_exist(folder: str) -> None:
    reader = put(folder, entry(0, 1, PE_PARENT))
    with (
        Pages(reader, "pagemap-7") as pages,
        pytest.raises(ImageError, match=r"pagemap-7\.img: pages are in a parent snapshot, but"),
    ):
        list(pages.runs())


def test_a_parent_must_have_the_pages(folder: str) -> None:
    os.mkdir(f"{folder}/0")
    os.mkdir(f"{folder}/1")
    write(f"{folder}/0", 0, [PE_PARENT] * 3, parent="../1")
    write(f"{folder}/1", 1, [PE_PRESENT, None, PE_PRESENT])
    with (
        opened(f"{folder}/0") as fd,
        Pages(ImageReader(fd), "pagemap-7") as pages,
        pytest.raises(ImageError, match="the parent snapshot lacks 0x1000"),
    ):
        list(pages.runs())


def test_a_chain_that_loops_ends(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PARENTS_MAX", 20)
    before = len(os.listdir("/proc/self/fd"))
    write(folder, 0, [PE_PARENT, PE_PRESENT], parent=".")
    with (
        opened(folder) as fd,
        Pages(ImageReader(fd), "pagemap-7") as pages,
        pytest.raises(ImageError, match="parent: more than 20 snapshots"),
    ):
        list(pages.runs())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_long_chain(folder: str) -> None:
    last = limits.PARENTS_MAX + 1
    for level in range(last + 1):
        os.mkdir(f"{folder}/{level}")
        parent = f"../{level + 1}" if level < last else ""
        write(f"{folder}/{level}", level, [PE_PARENT if parent else PE_PRESENT], parent=parent)
    with opened(f"{folder}/1") as fd, Pages(ImageReader(fd), "pagemap-7") as pages:
        assert collect(pages.runs()) == {0: (PE_PRESENT, content(last, 0))}
    with (
        opened(f"{folder}/0") as fd,
        Pages(ImageReader(fd), "pagemap-7") as pages,
        pytest.raises(ImageError, match="more than"),
    ):
        list(pages.runs())


@pytest.mark.parametrize(
    "add",
    [(P + 1, 1), (0, 1), (3 * P, 0), (3 * P, 1, PE_PRESENT | PE_PARENT)],
)
def test_our_own_mistakes_are_seen(folder: str, add: tuple[int, ...]) -> None:
    with opened(folder) as fd, ImageWriter(fd) as writer:
        pagemap = PagemapWriter(writer, "pagemap-7", 1)
        pagemap.add(P, 2)
        with pytest.raises(AssertionError):
            pagemap.add(*add)
