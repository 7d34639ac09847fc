"""/proc/PID/smaps: the mappings of a task with their flags and page counts.

Kernel: fs/proc/task_mmu.c, show_smap().

Reading the file walks all page tables and costs several times what parsing it does; who needs no
figures takes :func:`parse_flags` at least.
"""

from __future__ import annotations

from . import maps
from .record import Record

# The flags close each mapping's block. A path cannot forge this: its newlines are escaped.
_FLAGS = b"\nVmFlags: "
_WANTED = [b"KernelPageSize:", b"Rss:", b"Anonymous:", b"AnonHugePages:", b"Locked:"]
_SWAP = b"Swap:"
_KEY = b"ProtectionKey:"


class Smap(Record):
    """One mapping with its figures in bytes.

    ``vmflags`` are the kernel's two-letter names, ``protection_key`` is 0 where the CPU has none,
    ``swap`` is what of a private mapping is swapped out.
    """

    vma: maps.Vma
    vmflags: frozenset[str]
    kernel_page_size: int
    rss: int
    anonymous: int
    anon_huge_pages: int
    locked: int
    protection_key: int
    swap: int


def parse_flags(data: bytes) -> list[tuple[int, int, frozenset[str]]]:
    """Return (start, end, names of the flags) of each mapping. Raises ValueError."""
    found: list[tuple[int, int, frozenset[str]]] = []
    known: dict[bytes, frozenset[str]] = {}
    blocks = data.split(_FLAGS)
    header = blocks[0]
    try:
        for block in blocks[1:]:
            flags, _, following = block.partition(b"\n")
            names = known.get(flags)
            if names is None:
                names = known[flags] = frozenset(flags.decode("ascii").split())
            start, end = header[: header.index(b" ")].split(b"-")
            found.append((int(start, 16), int(end, 16), names))
            header = following
        if header:
            raise ValueError("a mapping without flags")
    except ValueError as error:
        raise ValueError(f"smaps: cannot read {header[:200]!r}: {error}") from None
    return found


def raw_flags(data: bytes) -> list[bytes]:
    """Return the kernel's text of each mapping's flags, without looking at it: good for comparing."""
    return [block[: block.find(b"\n")] for block in data.split(_FLAGS)[1:]]


def protection_keys(data: bytes) -> set[int]:
    """The protection keys in use other than 0; execute-only mappings have one too, which the kernel chose."""
    found: set[int] = set()
    for line in data.split(b"\nProtectionKey:")[1:]:
        found.add(int(line[: line.index(b"\n")]))
    return found - {0}


def parse(data: bytes) -> list[Smap]:
    """Return all mappings with the figures above, in ascending order. Raises ValueError."""
    flags = parse_flags(data)
    headers: list[bytes] = []
    figures: list[tuple[int, ...]] = []
    places: list[int] = []
    # Each block is closed by the flags of its mapping, which the next one then begins with.
    blocks = (b"\n" + data).split(_FLAGS)[:-1]
    block = b""
    try:
        for block in blocks:
            _, header, text = block.split(b"\n", 2)
            words = text.split()
            # All blocks of a file have the same lines, so the first one tells where values are.
            if [words[place] for place in places] != _WANTED:
                places = [words.index(key) for key in _WANTED]
            key = words.index(_KEY) + 1 if _KEY in words else None
            swap = words.index(_SWAP) + 1 if _SWAP in words else None
            headers.append(header)
            figures.append(
                (
                    *(int(words[place + 1]) * 1024 for place in places),
                    0 if key is None else int(words[key]),
                    0 if swap is None else int(words[swap]) * 1024,
                )
            )
        vmas = maps.parse(b"\n".join([*headers, b""]))
    except (ValueError, IndexError) as error:
        raise ValueError(f"smaps: cannot read {block[:200]!r}: {error}") from None
    return [
        Smap(vma, names, *values)
        for vma, (_, _, names), values in zip(vmas, flags, figures, strict=True)
    ]
