"""Machine code of ours that is called like a function of C."""

from __future__ import annotations

import ctypes
import mmap

from .kernel import writable_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Function:
    """Code that takes an address and gives one; it stays for as long as this object does. Raises OSError."""

    __slots__ = ("_area", "_call")

    def __init__(self, code: bytes) -> None:
        self._area = mmap.mmap(-1, len(code), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
        self._area[: len(code)] = code
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self._call: Callable[[int], int] = kind(writable_address(self._area))

    def __call__(self, address: int) -> int:
        return self._call(address)


class Area:
    """Bytes that stay where they are: ``address``."""

    __slots__ = ("_buffer", "address", "size")

    def __init__(self, content: bytes | bytearray) -> None:
        self.size = len(content)
        self._buffer = (ctypes.c_char * self.size).from_buffer_copy(content)
        self.address = ctypes.addressof(self._buffer)

    @property
    def content(self) -> bytes:
        """They, as they are now."""
        return self._buffer.raw
