from __future__ import annotations

import ctypes
import mmap
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.proc import pagemap, read

PAGE = mmap.PAGESIZE

FLAGS = [
    pagemap.PRESENT,
    pagemap.SWAPPED,
    pagemap.FILE,
    pagemap.GUARD,
    pagemap.UFFD_WP,
    pagemap.EXCLUSIVE,
]
MASKS = st.lists(st.sampled_from(FLAGS)).map(lambda flags: sum(set(flags)))
# Few distinct words, so that runs are long.
WORDS = st.lists(
    st.tuples(
        st.sampled_from([0, 1 << 55, pagemap.PRESENT | 5, pagemap.SWAPPED | 1 << 55, 2**64 - 1]),
        st.integers(1, 5),
    )
).map(lambda pieces: [word for word, count in pieces for _ in range(count)])


@given(WORDS, MASKS, MASKS)
def test_runs_are_those_found_page_by_page(words: list[int], any_of: int, none_of: int) -> None:
    data = struct.pack(f"<{len(words)}Q", *words)
    expected = [bool(word & any_of) and not word & none_of for word in words]
    runs = list(pagemap.runs(data, any_of, none_of))
    found = [False] * len(words)
    for first, count in runs:
        assert count > 0
        found[first : first + count] = [True] * count
    assert found == expected
    ends = [first + count for first, count in runs]
    assert all(end < start for end, (start, _) in zip(ends, runs[1:], strict=False))


# The frame's word, the same one written or swapped, and words that hold its bytes across their border.
AROUND_FRAME_5 = [
    pagemap.PRESENT | 5,
    pagemap.PRESENT | pagemap.SOFT_DIRTY | 5,
    pagemap.PRESENT | pagemap.EXCLUSIVE | 5,
    pagemap.SWAPPED | 5,
    pagemap.PRESENT | 5 << 8,
    pagemap.PRESENT | 0x80,
    pagemap.PRESENT,
    0,
]


@given(st.lists(st.sampled_from(AROUND_FRAME_5)))
def test_a_frame_can_be_left_out(words: list[int]) -> None:
    data = struct.pack(f"<{len(words)}Q", *words)
    expected = [
        page
        for page, word in enumerate(words)
        if word & pagemap.PRESENT and word & ~pagemap.SOFT_DIRTY != pagemap.PRESENT | 5
    ]
    runs = pagemap.runs(data, pagemap.PRESENT, but_frame=5)
    assert [page for first, count in runs for page in range(first, first + count)] == expected


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_words(words: list[int]) -> None:
    data = struct.pack(f"<{len(words)}Q", *words)
    assert pagemap.words(data).tolist() == words


def test_a_word_that_is_cut_off() -> None:
    with pytest.raises(ValueError, match="pagemap"):
        pagemap.words(b"123")


def test_a_word() -> None:
    assert pagemap.frame(pagemap.PRESENT | pagemap.SOFT_DIRTY | 12345) == 12345
    assert pagemap.frame(12345) is None
    assert pagemap.swap_entry(pagemap.SWAPPED | 77 << 5 | 3) == (3, 77)
    assert pagemap.swap_entry(pagemap.PRESENT) is None


def test_live() -> None:
    mapping = mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    for page in (3, 4, 5, 40):
        mapping[page * PAGE] = 1
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    fd = read.open_file(os.getpid(), "pagemap")
    data = os.pread(fd, 64 * pagemap.WORD, start // PAGE * pagemap.WORD)
    os.close(fd)
    assert list(pagemap.runs(data, pagemap.PRESENT)) == [(3, 3), (40, 1)]
    assert list(pagemap.runs(data, pagemap.PRESENT, pagemap.EXCLUSIVE)) == []
    words = pagemap.words(data)
    frames = {pagemap.frame(words[page]) for page in (3, 4, 5, 40)}
    assert len(frames) == (4 if os.geteuid() == 0 else 1)
    assert pagemap.frame(words[0]) is None


def test_live_pages_of_a_file() -> None:
    fd = os.memfd_create("x")
    os.write(fd, b"x" * 2 * PAGE)
    mapping = mmap.mmap(fd, 2 * PAGE, mmap.MAP_PRIVATE)
    os.close(fd)
    mapping[0] = 1  # this page is now our own
    assert mapping[PAGE] == ord("x")
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    fd = read.open_file(os.getpid(), "pagemap")
    data = os.pread(fd, 2 * pagemap.WORD, start // PAGE * pagemap.WORD)
    os.close(fd)
    assert list(pagemap.runs(data, pagemap.PRESENT, pagemap.FILE)) == [(0, 1)]
    assert list(pagemap.runs(data, pagemap.FILE)) == [(1, 1)]
