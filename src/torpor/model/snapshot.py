"""A tree of tasks as the images hold it: plain data, filled in by engine/load.py."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message


class RestoredThread:
    """One thread: its ``tid`` in the tree's own pid namespace and its core_entry. ``live_tid`` is how we see it once
    it runs.
    """

    __slots__ = ("core", "live_tid", "task", "tid")

    def __init__(self, task: RestoredTask, tid: int, core: Message) -> None:
        self.task = task
        self.tid = tid
        self.core = core
        self.live_tid = tid

    @property
    def image(self) -> str:
        """The file its state came from."""
        return f"core-{self.tid}.img"


class RestoredTask:
    """One process. ``threads`` begins with the main thread, also for a zombie."""

    __slots__ = (
        "children", "core", "fds", "fs", "group", "helper", "ids", "live_pid", "mm", "pages", "parent", "pid", "runs",
        "session", "threads",
    )  # fmt: skip

    def __init__(self, pid: int, group: int, session: int) -> None:
        self.pid = pid
        self.group = group
        self.session = session
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
    """Everything that the images say. ``tasks`` has parents before children; ``files`` is file id → file_entry."""

    __slots__ = ("files", "inventory", "root", "tasks")

    def __init__(self) -> None:
        self.tasks: dict[int, RestoredTask] = {}
        self.files: dict[int, Message] = {}
        self.inventory: Any = None
        self.root: RestoredTask
