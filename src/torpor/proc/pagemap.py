"""/proc/PID/pagemap: a 64-bit word for every page of an address space.

Kernel: fs/proc/task_mmu.c, pagemap_read().

The file is read at ``address // 4096 * 8``. It is the reference and the fallback for the
PAGEMAP_SCAN ioctl. Page frame numbers are 0 without CAP_SYS_ADMIN. Words are little-endian, as on
every machine that Torpor runs on.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PRESENT = 1 << 63
SWAPPED = 1 << 62
FILE = 1 << 61  # page of a file, or of shared memory, anonymous too
GUARD = 1 << 58  # guard region, since v6.14
UFFD_WP = 1 << 57
EXCLUSIVE = 1 << 56  # mapped once
SOFT_DIRTY = 1 << 55
PFN = (1 << 55) - 1

WORD = 8  # bytes


def words(data: bytes) -> memoryview[int]:
    """Return the words without copying. Raises ValueError when the last one is cut off."""
    if len(data) % WORD:
        raise ValueError(f"pagemap: {len(data)} bytes are no whole number of words")
    return memoryview(data).cast("Q")


def frame(word: int) -> int | None:
    """Return the page frame number of a page that is present, None of another."""
    return word & PFN if word & PRESENT else None


def swap_entry(word: int) -> tuple[int, int] | None:
    """Return (number of the swap area, offset in it) of a page swapped out, None of another."""
    return (word & 0x1F, (word & PFN) >> 5) if word & SWAPPED else None


def runs(
    data: bytes, any_of: int, none_of: int = 0, *, but_frame: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (first page, number of pages) of the runs of pages with a flag of ``any_of`` and none
    of ``none_of``, each as long as it can be. Left out is a page that has nothing but PRESENT, and
    maybe SOFT_DIRTY, and the frame ``but_frame``.

    The flags are those above but SOFT_DIRTY. A GiB of memory is 262,144 words, so this does not
    look at them one by one.
    """
    assert not (any_of | none_of) & (PFN | SOFT_DIRTY), "only the flags of the top byte"
    wanted, unwanted = any_of >> 56, none_of >> 56
    table = bytes(bool(flags & wanted) and not flags & unwanted for flags in range(256))
    matches: bytes | bytearray = data[WORD - 1 :: WORD].translate(table)
    if but_frame is not None:
        matches = bytearray(matches)
        for word in (PRESENT | but_frame, PRESENT | SOFT_DIRTY | but_frame):
            for page in _places(data, word):
                matches[page] = 0
    first = matches.find(1)
    while first >= 0:
        end = matches.find(0, first)
        if end < 0:
            end = len(matches)
        yield first, end - first
        first = matches.find(1, end)


def _places(data: bytes, word: int) -> Iterator[int]:
    pattern = word.to_bytes(WORD, "little")
    at = data.find(pattern)
    while at >= 0:
        if at % WORD == 0:  # else it lies across two words
            yield at // WORD
        at = data.find(pattern, at + 1 if at % WORD else at + WORD)
