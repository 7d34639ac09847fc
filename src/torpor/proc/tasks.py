"""The tree of tasks: threads and children.

``children`` exists with CONFIG_PROC_CHILDREN and is only right while the children do not change,
which a frozen tree grants. Kernel: fs/proc/array.c, children_seq_show().
"""

from __future__ import annotations

from ..errors import TaskGone
from . import read as _read
from . import stat as _stat

PF_EXITING = 0x4  # include/linux/sched.h


def parse_children(data: bytes) -> list[int]:
    """Parse /proc/PID/task/TID/children.

    Raises ValueError when it is not what the kernel writes.
    """
    try:
        return [*map(int, data.split())]
    except ValueError as error:
        raise ValueError(f"children: cannot read {data[:200]!r}: {error}") from None


def threads(pid: int) -> list[int]:
    """Return the numbers of a process's threads, sorted. Raises TaskGone."""
    return _read.numbers(pid, "task")


def children(pid: int) -> list[int]:
    """Return the numbers of the processes whose parent is any thread of ``pid``, zombies included,
    sorted.

    Raises TaskGone.
    """
    found: list[int] = []
    for tid in threads(pid):
        try:
            found += parse_children(_read.read(pid, f"task/{tid}/children"))
        except FileNotFoundError:
            if not _read.alive(tid):
                continue  # a thread that ended since; its children have moved to another one
            return _children_by_parent(pid)
    return sorted(found)


def children_if_alive(pid: int) -> list[int]:
    """As :func:`children`; none of a process that is gone."""
    try:
        return children(pid)
    except (TaskGone, OSError):
        return []


def parent_of_ended(tid: int) -> int | None:
    """Return the parent's number where ``tid`` is ending or has ended and waits to be collected, else None.

    Raises TaskGone.
    """
    stat = _stat.parse(_read.read(tid, "stat"))
    return stat.ppid if stat.state in "ZX" or stat.flags & PF_EXITING else None


def _children_by_parent(pid: int) -> list[int]:
    found = []
    for other in _read.pids():
        try:
            if _stat.parse(_read.read(other, "stat")).ppid == pid:
                found.append(other)
        except TaskGone:
            continue
    return found
