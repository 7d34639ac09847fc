"""/proc/locks and the ``lock:`` lines of /proc/PID/fdinfo.

Kernel: fs/locks.c, lock_get_status().
"""

from __future__ import annotations

from .record import Record

POSIX, OFD, FLOCK, LEASE, DELEGATION = "POSIX", "OFDLCK", "FLOCK", "LEASE", "DELEG"
EOF = (1 << 63) - 1  # `end` of a lock that grows with the file


class Lock(Record):
    """One lock.

    ``kind`` is POSIX, OFDLCK, FLOCK, LEASE, DELEG or whatever else the kernel says. ``mode`` is
    ADVISORY, or of a lease ACTIVE, BREAKING or BREAKER. ``type`` is READ, WRITE or UNLCK. ``pid``
    is seen from the PID namespace of the procfs: -1 for an OFD lock, and locks of processes
    outside of it are not shown. ``dev`` is (major, minor), or None with ``inode`` 0 where there
    is no file. ``start`` and ``end`` are byte offsets, both included; ``end`` is EOF for no end.
    ``blocked`` marks a request that waits for the lock listed above it.
    """

    id: int
    blocked: bool
    kind: str
    mode: str
    type: str
    pid: int
    dev: tuple[int, int] | None
    inode: int
    start: int
    end: int


def parse(data: bytes) -> list[Lock]:
    """Parse /proc/locks. Raises ValueError when it is not what the kernel writes."""
    return [parse_line(line) for line in data.split(b"\n") if line]


def parse_line(line: bytes) -> Lock:
    """Parse one line; in fdinfo, what follows ``lock:``. Raises ValueError."""
    try:
        number, *words = line.decode("ascii").split()
        blocked = words[0] == "->"
        if blocked:
            del words[0]
        # The kernel has a lock type of two words: `FLOCK  MSNFS` is one that it no longer makes.
        kind, mode, access, pid, place, start, end = words
        device, _, inode = place.rpartition(":")
        major, _, minor = device.partition(":")
        return Lock(
            int(number.removesuffix(":")),
            blocked,
            kind,
            mode,
            access,
            int(pid),
            None if device == "<none>" else (int(major, 16), int(minor, 16)),
            int(inode),
            int(start),
            EOF if end == "EOF" else int(end),
        )
    except (ValueError, IndexError) as error:
        raise ValueError(f"locks: cannot read {line!r}: {error}") from None
