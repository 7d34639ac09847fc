from __future__ import annotations

import ctypes
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.proc import maps, read, smaps

PAGE = mmap.PAGESIZE

HEADER = b"7f5a1000-7f5a9000 r--s 00002000 fe:01 12345          /a file: VmFlags: rd"
FIGURES = b"""\
Size:                 32 kB
KernelPageSize:     2048 kB
MMUPageSize:           4 kB
Rss:                  24 kB
Pss:                  12 kB
Anonymous:             8 kB
AnonHugePages:      4096 kB
Swap:                 20 kB
Locked:               16 kB
THPeligible:           0
"""
FLAGS = b"VmFlags: rd mr mw me dd \n"


def test_recorded() -> None:
    [one] = smaps.parse(HEADER + b"\n" + FIGURES + FLAGS)
    assert one.vma == maps.parse_line(HEADER)
    assert one.vmflags == {"rd", "mr", "mw", "me", "dd"}
    assert (one.kernel_page_size, one.rss, one.anonymous) == (2 << 20, 24 << 10, 8 << 10)
    assert (one.anon_huge_pages, one.locked, one.protection_key) == (4 << 20, 16 << 10, 0)
    assert one.swap == 20 << 10


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**35),
            st.integers(1, 2**20),
            st.lists(st.integers(0, 2**50), min_size=5, max_size=5),
            st.none() | st.integers(0, 15),
            st.lists(st.sampled_from(["rd", "wr", "ex", "sh", "mg", "uw", "dp"]), unique=True),
            st.sampled_from([b"", b"/Rss: 9 kB", b"/x VmFlags: rd", b"[heap]"]),
        )
    )
)
def test_what_is_printed_is_parsed(
    blocks: list[tuple[int, int, list[int], int | None, list[str], bytes]],
) -> None:
    text = b""
    for start, pages, (page_size, rss, anonymous, huge, locked), key, flags, name in blocks:
        text += b"%08x-%08x rw-p 00000000 00:00 0 " % (start * PAGE, (start + pages) * PAGE)
        text += b"        %s\n" % name
        text += b"Size: %8d kB\nKernelPageSize: %8d kB\nRss: %8d kB\n" % (pages, page_size, rss)
        text += b"Anonymous: %8d kB\nAnonHugePages: %8d kB\n" % (anonymous, huge)
        text += b"Locked: %8d kB\n" % locked
        text += b"" if key is None else b"ProtectionKey:  %8d\n" % key
        text += b"VmFlags: %s \n" % " ".join(flags).encode()
    ranges = [(b[0] * PAGE, (b[0] + b[1]) * PAGE, frozenset(b[4])) for b in blocks]
    assert smaps.parse_flags(text) == ranges
    parsed = smaps.parse(text)
    assert [(one.vma.start, one.vma.end, one.vmflags) for one in parsed] == ranges
    for one, (_, _, figures, key, _, name) in zip(parsed, blocks, strict=True):
        assert one.vma.path == name
        assert [*one[2:7]] == [figure * 1024 for figure in figures]
        assert one.protection_key == (key or 0)


@pytest.mark.parametrize(
    "text",
    [
        HEADER,
        HEADER + b"\n" + FIGURES,
        HEADER + b"\n" + FIGURES + FLAGS + HEADER + b"\n",
        b"Rss: 1 kB\n" + FLAGS,
        b"\n" + FLAGS,
    ],
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="smaps"):
        smaps.parse_flags(text)
    with pytest.raises(ValueError, match="smaps"):
        smaps.parse(text)


def test_missing_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="smaps"):
        smaps.parse(HEADER + b"\nRss:   1 kB\n" + FLAGS)


def test_live() -> None:
    mapping = mmap.mmap(-1, 8 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_DONTFORK)
    mapping[: 3 * PAGE] = b"x" * (3 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    data = read.read(os.getpid(), "smaps")
    [one] = [one for one in smaps.parse(data) if one.vma.start == start]
    # A neighbour of the same kind may have been merged with it, but not one with other flags.
    assert one.vma.end == start + 8 * PAGE
    assert {"rd", "wr", "dc"} <= one.vmflags
    assert (one.rss, one.anonymous, one.kernel_page_size) == (3 * PAGE, 3 * PAGE, PAGE)
    assert [vma[:2] for vma in smaps.parse_flags(data)] == [
        one.vma[:2] for one in smaps.parse(data)
    ]
    now = {vma.start for vma in maps.parse(read.read(os.getpid(), "maps"))}
    assert start in now


def test_protection_keys() -> None:
    block = b"1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nProtectionKey:         %d\nVmFlags: rd wr \n"
    assert smaps.protection_keys(block % 0) == set()
    assert smaps.protection_keys(block % 0 + block % 3 + block % 0) == {3}
    assert smaps.protection_keys(b"") == set()
