"""A tree of live tasks as a dump sees it: plain data, filled in by engine/collect.py."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..linux.ptrace import user_regs_struct
    from ..proc.maps import Vma
    from ..proc.stat import Stat
    from ..proc.status import Status
    from ..remote.tracee import Stop


class SourceThread:
    """One thread: ``tid`` as we see it, ``vtid`` as the tree's root would and the images do, ``own_tid`` as it does
    itself.
    """

    __slots__ = ("own_tid", "regs", "sigmask", "stat", "status", "stop", "task", "tid", "vtid")

    def __init__(self, task: SourceTask, tid: int, stat: Stat, status: Status, stop: Stop) -> None:
        self.task = task
        self.tid = tid
        self.vtid = status.NSpid[task.level]
        self.own_tid = status.NSpid[-1]
        self.stat = stat
        self.status = status
        self.stop = stop
        self.regs: user_regs_struct  # set once the thread is stopped
        self.sigmask = 0


class Mapping:
    """One mapping: the line of maps and the kernel's two-letter flags of smaps."""

    __slots__ = ("flags", "vma")

    def __init__(self, vma: Vma, flags: frozenset[str]) -> None:
        self.vma = vma
        self.flags = flags


class SourceTask:
    """One process of the tree. ``threads`` begins with the main thread and is empty for a zombie.

    ``pid`` is how we see it, ``vpid`` how the tree's root would and the images do, ``own_pid`` how it sees itself.
    ``level``: how many pid namespaces below ours the root is; -1: as many as the task.
    """

    __slots__ = (
        "answers", "children", "fds", "ids", "level", "mappings", "mem_fd", "own_pid", "pid", "pidfd", "ppid", "stat",
        "status", "threads", "vpid",
    )  # fmt: skip

    def __init__(self, pid: int, ppid: int, stat: Stat, status: Status, level: int = -1) -> None:
        self.pid = pid
        self.level = level
        self.vpid = status.NSpid[level]
        self.own_pid = status.NSpid[-1]
        self.ppid = ppid
        self.stat = stat
        self.status = status
        self.threads: list[SourceThread] = []
        self.children: list[SourceTask] = []
        self.mappings: list[Mapping] = []
        #: fd → (file id, close-on-exec); filled by the dump of files.
        self.fds: dict[int, tuple[int, bool]] = {}
        #: kind ("vm", "files", "fs", "sighand") → number in the images.
        self.ids: dict[str, int] = {}
        #: What the getters run in the main thread found, for those who need it besides the one who asked.
        self.answers: dict[str, Any] = {}
        self.mem_fd = -1
        self.pidfd = -1

    @property
    def zombie(self) -> bool:
        """Has it ended and not been waited for?"""
        return not self.threads

    @property
    def stopped(self) -> bool:
        """Is it stopped by job control (SIGSTOP and its kind)?"""
        return bool(self.threads) and self.threads[0].stop.by_group

    @property
    def session(self) -> int:
        """Session id in the pid namespace of the tree's root; 0 when the leader is outside of it."""
        return self.status.NSsid[self.level]

    @property
    def group(self) -> int:
        """Process group id in the pid namespace of the tree's root."""
        return self.status.NSpgid[self.level]
