"""/proc/PID/cgroup: the control groups of a task.

Kernel: kernel/cgroup/cgroup.c, proc_cgroup_show().
"""

from __future__ import annotations

from .record import Record

_DELETED = b" (deleted)"


class Cgroup(Record):
    """Where a task is in one hierarchy.

    ``hierarchy`` is 0 for version 2. ``controllers`` are names, empty for version 2;
    ``name=systemd`` stands for a hierarchy of version 1 with a name. ``path`` is relative to the
    root of the reader's cgroup namespace and begins with ``/..`` outside of it; ``deleted`` tells
    that the group has been removed.
    """

    hierarchy: int
    controllers: tuple[str, ...]
    path: bytes
    deleted: bool


def parse(data: bytes) -> list[Cgroup]:
    """Parse the file. Raises ValueError when it is not what the kernel writes."""
    return [_cgroup(line) for line in data.split(b"\n") if line]


def _cgroup(line: bytes) -> Cgroup:
    try:
        number, controllers, path = line.split(b":", 2)
        # Only version 2 marks a removed group.
        deleted = number == b"0" and path.endswith(_DELETED)
        return Cgroup(
            int(number),
            tuple(controllers.decode().split(",")) if controllers else (),
            path[: -len(_DELETED)] if deleted else path,
            deleted,
        )
    except ValueError as error:
        raise ValueError(f"cgroup: cannot read {line!r}: {error}") from None
