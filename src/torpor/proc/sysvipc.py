"""/proc/sysvipc/{shm,sem,msg}: the System V objects of the reader's IPC namespace.

Kernel: ipc/{shm,sem,msg}.c.

Keys are signed here and in the calls. ``perms`` are mode bits, with those of shm above them
(SHM_DEST 0o1000, SHM_LOCKED 0o2000). Identities are seen from the reader's user namespace. Times
are seconds since 1970.
"""

from __future__ import annotations

from .record import Record


class Shm(Record):
    """A segment of shared memory; ``size``, ``rss`` and ``swap`` in bytes."""

    key: int
    shmid: int
    perms: int
    size: int
    cpid: int
    lpid: int
    nattch: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    atime: int
    dtime: int
    ctime: int
    rss: int
    swap: int


class Sem(Record):
    """A set of ``nsems`` semaphores."""

    key: int
    semid: int
    perms: int
    nsems: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    otime: int
    ctime: int


class Msg(Record):
    """A message queue with ``qnum`` messages of ``cbytes`` bytes in all."""

    key: int
    msqid: int
    perms: int
    cbytes: int
    qnum: int
    lspid: int
    lrpid: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    stime: int
    rtime: int
    ctime: int


def parse_shm(data: bytes) -> list[Shm]:
    """Parse /proc/sysvipc/shm. Raises ValueError."""
    return [Shm(*row) for row in _rows(data, "shm", Shm._fields)]


def parse_sem(data: bytes) -> list[Sem]:
    """Parse /proc/sysvipc/sem. Raises ValueError."""
    return [Sem(*row) for row in _rows(data, "sem", Sem._fields)]


def parse_msg(data: bytes) -> list[Msg]:
    """Parse /proc/sysvipc/msg. Raises ValueError."""
    return [Msg(*row) for row in _rows(data, "msg", Msg._fields)]


def _rows(data: bytes, table: str, fields: tuple[str, ...]) -> list[list[int]]:
    header, *lines = data.split(b"\n")
    if header.decode("ascii", "replace").split() != [*fields]:
        raise ValueError(f"sysvipc/{table}: unknown columns {header!r}")
    rows = []
    for line in lines:
        words = line.split()
        if not words:
            continue
        try:
            # The third column of every table, perms, is in octal.
            row = [int(word, 8) if column == 2 else int(word) for column, word in enumerate(words)]
        except ValueError as error:
            raise ValueError(f"sysvipc/{table}: cannot read {line!r}: {error}") from None
        if len(row) != len(fields):
            raise ValueError(f"sysvipc/{table}: cannot read {line!r}: {len(row)} columns")
        rows.append(row)
    return rows
