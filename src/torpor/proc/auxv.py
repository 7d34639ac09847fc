"""/proc/PID/auxv: the auxiliary vector, as the kernel saved it at exec.

Kernel: fs/proc/base.c, auxv_read().
"""

from __future__ import annotations

AT_NULL = 0


def words(data: bytes) -> list[int]:
    """Return all 64-bit words, terminator included: what PR_SET_MM_MAP takes. Raises ValueError."""
    if len(data) % 16:
        raise ValueError(f"auxv: {len(data)} bytes are no whole number of entries")
    return memoryview(data).cast("Q").tolist()


def parse(data: bytes) -> dict[int, int]:
    """Return type → value (AT_* of getauxval(3)) up to the terminator. Raises ValueError."""
    flat = words(data)
    entries: dict[int, int] = {}
    for kind, value in zip(flat[::2], flat[1::2], strict=True):
        if kind == AT_NULL:
            break
        entries[kind] = value
    return entries
