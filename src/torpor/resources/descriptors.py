"""Looking into the descriptor tables of a tree: many descriptors at once where BPF shows them (linux/task_files.py),
else one by one through /proc, which is what is always true and works everywhere.
"""

from __future__ import annotations

import os

from .. import log
from ..errors import KernelError, Unsupported
from ..proc.read import numbers

TYPE_CHECKING = False
if TYPE_CHECKING:

    from ..linux.task_files import OpenFile, TaskFiles

    Table = dict[int, OpenFile]

#: From this number of descriptors on it pays to have a program loaded into the kernel, which takes as long as they do.
BULK_FROM = 128


class Descriptors:
    """What the tasks of a tree have open. A table that was read is remembered until :meth:`close`."""

    def __init__(self) -> None:
        self._reader: TaskFiles | None = None
        self._refused = False
        self._count = 0
        self._tables: dict[int, Table] = {}
        self._stats: dict[int, os.stat_result] = {}

    def table(self, pid: int) -> Table:
        """fd → what is open there; empty if it is to be looked for in /proc."""
        found = self._tables.get(pid)
        if found is None:
            found = self._tables[pid] = self._read(pid)
        return found

    def _read(self, pid: int) -> Table:
        if self._refused:
            return {}
        try:
            # 0 before v6.2: Linux kernel commit f1f1f2569901 ("proc: report open files as size in stat() for
            # /proc/pid/fd").
            self._count += os.stat(f"/proc/{pid}/fd").st_size or BULK_FROM
        except OSError:
            return {}
        if self._count < BULK_FROM:
            return {}
        try:
            if self._reader is None:
                from ..linux.task_files import TaskFiles

                self._reader = TaskFiles()
            found = self._reader.read(pid)
        except (KernelError, Unsupported) as error:
            log.info(f"descriptors: they are looked at one by one: {error}")
            self._refused = True
            return {}
        return {one.fd: one for one in found or ()}

    def numbers(self, pid: int) -> list[int]:
        """The numbers of all descriptors, sorted. Raises TaskGone, OSError."""
        return [*self.table(pid)] or numbers(pid, "fd")

    def link(self, pid: int, fd: int) -> str:
        """What /proc/PID/fd/N reads as. Raises OSError."""
        seen = self.table(pid).get(fd)
        if seen is not None and seen.link is not None:
            return seen.link  # type: ignore[no-any-return]
        return os.fsdecode(os.readlink(f"/proc/{pid}/fd/{fd}"))

    def links(self, pid: int) -> list[tuple[int, str]]:
        """(fd, link) of all descriptors; those that are closed meanwhile are left out. Raises TaskGone, OSError."""
        found = []
        for fd in self.numbers(pid):
            try:
                found.append((fd, self.link(pid, fd)))
            except FileNotFoundError:
                continue
        return found

    def stat(self, pid: int, seen: OpenFile) -> os.stat_result:
        """stat(2) of a file that a task has open; asked once for each inode. Raises OSError."""
        found = self._stats.get(seen.inode)
        if found is None:
            found = self._stats[seen.inode] = os.stat(f"/proc/{pid}/fd/{seen.fd}")
        return found

    def close(self) -> None:
        """Forget everything."""
        self._tables.clear()
        self._stats.clear()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
