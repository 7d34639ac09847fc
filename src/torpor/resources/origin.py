"""Which file it was: to tell whether a name still leads to the one that was dumped.

An inode's number says so as long as the system runs; what was made anew elsewhere says so in an extended attribute,
where its file system has such.
"""

from __future__ import annotations

import os

ATTRIBUTE = "trusted.torpor"


def of(result: os.stat_result) -> str:
    """The origin of a file: this start of the system, device and inode."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {result.st_dev:x} {result.st_ino:x}"


def mark(fd: int, origin: str) -> None:
    """Note at a file that it was made in place of another."""
    try:
        os.setxattr(fd, ATTRIBUTE, origin.encode())
    except OSError:
        pass  # then it will not be known again, and is compared


def is_same(fd: int, origin: str) -> bool:
    """Is an open file the one of that origin, or was it made in its place?"""
    if of(os.fstat(fd)) == origin:
        return True
    try:
        return os.getxattr(fd, ATTRIBUTE) == origin.encode()
    except OSError:
        return False
