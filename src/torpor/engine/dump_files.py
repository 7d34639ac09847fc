"""The descriptors of a tree: which of them share an open file description, and what each description is."""

from __future__ import annotations

import os

from ..errors import doing
from ..images import schema as pb
from ..linux.kernel import KCMP_FILE, kcmp
from ..proc.read import numbers
from ..resources import FileKinds
from ..resources.base import SourceFile
from .collect import KcmpTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..model.source import SourceTask
    from ..resources.base import DumpContext, FileResource

O_CLOEXEC = os.O_CLOEXEC


def open_source(pid: int, fd: int, borrow: Callable[[], int]) -> SourceFile:
    """The SourceFile of one descriptor of a live task."""
    path = f"/proc/{pid}/fd/{fd}"
    return SourceFile(pid, fd, os.fsdecode(os.readlink(path)), os.stat(path), borrow)


class FileDumper:
    """Dumps the descriptor tables of tasks, each description once."""

    def __init__(self, ctx: DumpContext) -> None:
        self.ctx = ctx
        self.kinds = FileKinds()
        self.count = 0
        ctx.file_id = self.dump_own
        self._trees: dict[object, KcmpTree] = {}
        self._tables: set[int] = set()
        self._locks_seen = False

    def dump_task(self, task: SourceTask) -> None:
        """Write fdinfo-N for the task's table, and the entries of the descriptions that are new."""
        table = task.ids["files"]
        shared_with = next(
            (other for other in self.ctx.tasks.values() if other.ids.get("files") == table and other.fds), None
        )
        if shared_with is not None:
            task.fds = shared_with.fds
            return
        image = f"fdinfo-{table}"
        self.ctx.images.create(image)
        for fd in numbers(task.pid, "fd"):
            with doing(f"fd {fd}"):
                self._dump_fd(task, fd, image)

    def _dump_fd(self, task: SourceTask, fd: int, image: str) -> None:
        source = open_source(task.pid, fd, lambda: self.ctx.borrow(task, fd))
        resource = self._dump_source(source)
        self._locks_seen = self._locks_seen or b"lock" in source.fdinfo
        cloexec = bool(int(source.fdinfo[b"flags"][0], 8) & O_CLOEXEC)
        task.fds[fd] = (source.id, cloexec)
        self.ctx.images.append(
            image, pb.fdinfo_entry(id=source.id, flags=int(cloexec), type=resource.FD_TYPE, fd=fd)
        )

    def dump_own(self, fd: int, carrier: SourceFile) -> int:
        """The id of the description behind a descriptor of ours; it is dumped if it is new. See DumpContext.file_id."""
        source = open_source(os.getpid(), fd, lambda: fd)
        source.holder = carrier.holder
        with doing(f"in flight: {source.link}"):
            self._dump_source(source)
        return source.id

    def _dump_source(self, source: SourceFile) -> FileResource:
        """Number a description, and write its entry if it is new."""
        resource = self.kinds.find(source)
        stat = source.stat
        key = (stat.st_dev, stat.st_ino, stat.st_rdev, source.link, source.fdinfo[b"pos"][0], source.flags)
        tree = self._trees.get(key)
        if tree is None:
            tree = self._trees[key] = KcmpTree(_compare, lambda: self.ctx.new_id("file"))
        source.id, fresh = tree.number_of((source.pid, source.fd))
        if fresh:
            entry = resource.dump(source, self.ctx)
            self.write_entry(resource.FD_TYPE, resource.FIELD, source.id, entry)
        return resource

    def write_entry(self, kind: int, field: str, file_id: int, entry: object) -> None:
        """Add a file_entry to the images."""
        whole = pb.file_entry(type=kind, id=file_id)
        getattr(whole, field).CopyFrom(entry)
        self.ctx.images.append("files", whole)
        self.count += 1

    def finish(self) -> None:
        """All tasks are done."""
        self.ctx.memo["no locks"] = not self._locks_seen
        for hook in self.ctx.memo.get("after_files", ()):
            hook()


def _compare(a: tuple[int, int], b: tuple[int, int]) -> int:
    return kcmp(a[0], b[0], KCMP_FILE, a[1], b[1])

