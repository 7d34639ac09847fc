"""A tree of tasks as the images hold it: plain data, filled in by engine/load.py."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message


#: pid namespaces in the images: that of the dumping process, and one that a task has made and that has no process yet.
HOST_SPACE, EMPTY_SPACE = 1, 0
INIT_PID = 1


class RestoredThread:
    """One thread: its ``tid`` in the pid namespace of the tree's root and its core_entry. ``live_tid`` is how we see it
    once it runs, ``numbers`` are its ids from the namespace of the root inwards to its own.
    """

    __slots__ = ("core", "live_tid", "numbers", "task", "tid")

    def __init__(self, task: RestoredTask, tid: int, core: Message) -> None:
        self.task = task
        self.tid = tid
        self.core = core
        self.live_tid = tid
        self.numbers: tuple[int, ...] = (tid,)

    @property
    def own_tid(self) -> int:
        """How it sees itself."""
        return self.numbers[-1]

    @property
    def image(self) -> str:
        """The file its state came from."""
        return f"core-{self.tid}.img"


class RestoredTask:
    """One process. ``threads`` begins with the main thread, also for a zombie.

    ``pid``, ``group`` and ``session`` are numbers in the pid namespace of the tree's root; ``numbers``, ``groups`` and
    ``sessions`` those from there inwards, in each of the namespaces ``spaces`` (their ids in the images).
    """

    __slots__ = (
        "children", "children_space", "core", "fds", "fs", "group", "groups", "helper", "ids", "live_pid", "mm",
        "numbers", "pages", "parent", "pid", "runs", "session", "sessions", "spaces", "threads",
    )  # fmt: skip

    def __init__(self, pid: int, group: int, session: int) -> None:
        self.pid = pid
        self.group = group
        self.session = session
        self.numbers: tuple[int, ...] = (pid,)
        self.groups: tuple[int, ...] = (group,)
        self.sessions: tuple[int, ...] = (session,)
        self.spaces: tuple[int, ...] = (HOST_SPACE,)
        #: The pid namespace that its children are born into; None: its own; EMPTY_SPACE: one without processes.
        self.children_space: int | None = None
        self.parent: RestoredTask | None = None
        self.children: list[RestoredTask] = []
        self.threads: list[RestoredThread] = []
        self.core: Any = None
        self.mm: Any = None
        self.fs: Any = None
        self.ids: Any = None
        #: (fd, file id, close-on-exec)
        self.fds: list[tuple[int, int, bool]] = []
        #: Stored pages, see images/pages.py: (vaddr, nr_pages, flags, fd, offset, same_as)
        self.runs: list[Any] = []
        self.pages: Any = None
        #: Made only to have been a session or group leader; it ends before the tree runs.
        self.helper = False
        self.live_pid = pid

    @property
    def own_pid(self) -> int:
        """How it sees itself."""
        return self.numbers[-1]

    @property
    def space(self) -> int:
        """The pid namespace that it is in."""
        return self.spaces[-1]

    @property
    def zombie(self) -> bool:
        """Has it ended and not been waited for?"""
        return bool(self.core is not None and self.core.tc.task_state == 2)

    @property
    def stopped(self) -> bool:
        """Is it stopped by job control?"""
        return bool(self.core is not None and self.core.tc.task_state == 3)

    @property
    def alive(self) -> bool:
        """Has it memory and descriptors: neither a zombie nor a helper?"""
        return not self.zombie and not self.helper

    def __repr__(self) -> str:
        return f"<task {self.pid}>"


class Snapshot:
    """Everything that the images say. ``tasks`` has parents before children; ``files`` is file id → file_entry.

    ``apart``: the tree lives in a pid namespace of its own; ``between``: how many there were between that and the one
    of the dumping process. ``outer``: thread id → its number outside of that, as the
    dumping process saw it. ``mounts``: how mounts that we make propagate (MS_SLAVE, MS_PRIVATE) to the mount namespace
    that the tree has with a /proc of its own; 0: it has none. ``settings``: id of a pid namespace → pidns_entry.
    """

    __slots__ = ("apart", "between", "files", "inventory", "mounts", "outer", "root", "settings", "tasks")

    def __init__(self) -> None:
        self.tasks: dict[int, RestoredTask] = {}
        self.files: dict[int, Message] = {}
        self.inventory: Any = None
        self.apart = False
        self.between = 0
        self.mounts = 0
        self.settings: dict[int, Message] = {}
        self.outer: dict[int, int] = {}
        self.root: RestoredTask

    def seen_by(self, task: RestoredTask, number: int) -> int:
        """How a task sees the process, thread or group with a number in the images; 0: not at all."""
        depth = len(task.spaces)
        if depth == 1:
            return number
        for other in self.tasks.values():
            if other.spaces[:depth] == task.spaces:
                for numbers in (other.numbers, other.groups, *(thread.numbers for thread in other.threads)):
                    if numbers[0] == number and len(numbers) >= depth:
                        return numbers[depth - 1]
        return 0
