"""The bytes of an image that is open for reading."""

from __future__ import annotations

import errno
import os

from .. import limits
from ..errors import ImageError, KernelError


def refused(what: str, error: OSError) -> KernelError:
    """What to raise where the kernel refuses something about the images directory."""
    assert error.errno is not None
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "the file system of the images directory is full"
    return KernelError(what, error.errno, hint=hint)


def size_of(fd: int, file: str) -> int:
    """The bytes in an open image. Raises KernelError."""
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise refused(f"stat `{file}`", error) from None


class Source:
    """Bytes of an open file by offset; small files are read once, large ones through a window."""

    __slots__ = ("_at", "_data", "fd", "file", "size")

    def __init__(self, fd: int, file: str) -> None:
        self.fd = fd
        self.file = file
        self.size = size_of(fd, file)
        self._data = b""
        self._at = 0

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``; ImageError past the end of the file."""
        if offset + size > self.size:
            raise ImageError(self.file, f"byte {offset}", f"{size} bytes expected, file ends")
        start = offset - self._at
        if start < 0 or start + size > len(self._data):
            self._data = self._fill(offset, max(size, limits.READ_WINDOW_BYTES))
            self._at, start = offset, 0
            if len(self._data) < size:
                raise ImageError(self.file, f"byte {offset}", "the file shrinks as it is read")
        return self._data[start : start + size]

    def _fill(self, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            try:
                part = os.pread(self.fd, min(size, 1 << 30), offset)
            except OSError as error:
                raise refused(f"read `{self.file}`", error) from None
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
