"""/proc/PID/fdinfo/FD: an open file description and what its file system or driver adds.

Kernel: fs/proc/fd.c, seq_show(). The first lines are the same for every file; :mod:`.fdinfo_kinds`
and :mod:`.fdinfo_watches` know the lines of the kernel's own kinds of files.
"""

from __future__ import annotations

from . import locks as _locks


class Fdinfo(dict[bytes, list[bytes]]):
    """Key → values of all lines with this key, in the kernel's order, without space around.

    The key is what stands before the first colon: ``inotify wd`` in ``inotify wd:1 ino:…``. An
    indented line is one more value of the key above it: the lists of io_uring.
    """

    __slots__ = ()

    @property
    def pos(self) -> int:
        """The file position."""
        return int(self[b"pos"][0])

    @property
    def flags(self) -> int:
        """The flags of open(2), with O_CLOEXEC for the descriptor's own flag."""
        return int(self[b"flags"][0], 8)

    @property
    def mnt_id(self) -> int:
        """The number of the mount, which of the kernel's own mounts is not in mountinfo."""
        return int(self[b"mnt_id"][0])

    @property
    def ino(self) -> int | None:
        """The inode number; None where the kernel does not tell (before v5.14)."""
        return int(self[b"ino"][0]) if b"ino" in self else None

    @property
    def locks(self) -> list[_locks.Lock]:
        """The locks taken through this description, leases included. Raises ValueError."""
        return [_locks.parse_line(line) for line in self.get(b"lock", ())]


def parse(data: bytes) -> Fdinfo:
    """Parse the file. Raises ValueError when it is not what the kernel writes."""
    info = Fdinfo()
    values: list[bytes] = []
    for line in data.split(b"\n"):
        if line[:1] in _INDENTS:
            values.append(line.strip())
            continue
        key, colon, value = line.partition(b":")
        if colon:
            values = info.setdefault(key, [])
            values.append(value.strip())
    if not data.startswith(b"pos:\t") or b"flags" not in info or b"mnt_id" not in info:
        raise ValueError(f"fdinfo: cannot read {data[:200]!r}")
    return info


_INDENTS = frozenset((b" ", b"\t"))
