"""CPUID, by a few bytes of machine code: Python has no way to ask."""

from __future__ import annotations

import ctypes
import mmap
import struct

# push rbx; mov r8, rdx (out); mov eax, edi; mov ecx, esi; cpuid; store eax ebx ecx edx at [r8]; pop rbx; ret
_CODE = bytes.fromhex("53 49 89 d0 89 f8 89 f1 0f a2 41 89 00 41 89 58 04 41 89 48 08 41 89 50 0c 5b c3")
_page: mmap.mmap | None = None


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """(eax, ebx, ecx, edx) of a CPUID leaf."""
    global _page
    if _page is None:
        _page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
        _page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(_page))
    function = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address)
    out = ctypes.create_string_buffer(16)
    function(leaf, subleaf, ctypes.addressof(out))
    return struct.unpack("<4I", out.raw)


def xsave_components() -> dict[int, tuple[int, int]]:
    """Component number → (offset, size) in the uncompacted XSAVE area, for those that this CPU enumerates."""
    low, _, _, high = cpuid(13, 0)
    enabled = low | high << 32
    found: dict[int, tuple[int, int]] = {}
    for bit in range(2, 63):
        if enabled >> bit & 1:
            size, offset, _, _ = cpuid(13, bit)
            found[bit] = (offset, size)
    return found
