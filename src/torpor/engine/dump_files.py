"""The descriptors of a tree: which of them share an open file description, and what each description is."""

from __future__ import annotations

import os

from ..errors import doing
from ..images import quick
from ..images import schema as pb
from ..linux.kernel import KCMP_FILE, kcmp
from ..proc.fdinfo import parse as parse_fdinfo
from ..proc.read import read
from ..resources import FileKinds
from ..resources.base import SourceFile
from .collect import KcmpTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..linux.task_files import OpenFile
    from ..model.source import SourceTask
    from ..resources.base import DumpContext, FileResource

O_CLOEXEC = os.O_CLOEXEC
EVENTFD_LINK = "anon_inode:[eventfd]"
_NOTHING = [b""]


def open_source(ctx: DumpContext, pid: int, fd: int, borrow: Callable[[], int]) -> SourceFile:
    """The SourceFile of one descriptor of a live task."""
    seen = ctx.descriptors.table(pid).get(fd)
    if seen is None:
        path = f"/proc/{pid}/fd/{fd}"
        return SourceFile(pid, fd, os.fsdecode(os.readlink(path)), os.stat(path), borrow)
    link = seen.link or ctx.descriptors.link(pid, fd)
    return SourceFile(pid, fd, link, ctx.descriptors.stat(pid, seen), borrow, seen=seen)


class FileDumper:
    """Dumps the descriptor tables of tasks, each description once."""

    def __init__(self, ctx: DumpContext) -> None:
        self.ctx = ctx
        self.kinds = FileKinds()
        self.count = 0
        ctx.file_id = self.dump_own
        self._trees: dict[object, KcmpTree] = {}
        #: Address of a description, where it is seen → (its id, type).
        self._known: dict[int, tuple[int, int]] = {}
        #: What is known by its address alone; it goes into the trees as soon as there is something without one.
        self._unsorted: list[SourceFile] | None = []
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
        fd = -1
        seen, known, entry = self.ctx.descriptors.table(task.pid), self._known, pb.fdinfo_entry
        entries = []
        with doing(lambda: f"fd {fd}"):
            for fd in self.ctx.descriptors.numbers(task.pid):
                one = seen.get(fd)
                # A description that is there already needs no second look.
                found = known.get(one.file) if one is not None else None
                number, kind = found or self._dump_fd(task, fd)
                cloexec = self._is_cloexec(task, fd, one)
                task.fds[fd] = number, cloexec
                entries.append(entry(id=number, flags=int(cloexec), type=kind, fd=fd))
        self.ctx.images.append_framed(image, quick.framed(entries, f"{image}.img"))

    def _dump_fd(self, task: SourceTask, fd: int) -> tuple[int, int]:
        """The id and the type of what is behind a descriptor."""
        source = open_source(self.ctx, task.pid, fd, lambda: self.ctx.borrow(task, fd))
        kind = self._dump_source(source).FD_TYPE
        if source.seen is not None:
            self._known[source.seen.file] = source.id, kind
        return source.id, kind

    def _is_cloexec(self, task: SourceTask, fd: int, seen: OpenFile | None) -> bool:
        """Is the descriptor closed by exec? Notes on the way whether there is a lock on its file."""
        if seen is not None and (self._locks_seen or not seen.locks):
            return bool(seen.cloexec)
        info = parse_fdinfo(read(task.pid, f"fdinfo/{fd}"))
        self._locks_seen = self._locks_seen or b"lock" in info
        if seen is not None:
            return bool(seen.cloexec)
        return bool(task.answers.get(f"cloexec {fd}", info.flags & O_CLOEXEC))

    def dump_own(self, fd: int, carrier: SourceFile) -> int:
        """The id of the description behind a descriptor of ours; it is dumped if it is new. See DumpContext.file_id."""
        path = f"/proc/self/fd/{fd}"
        source = SourceFile(os.getpid(), fd, os.fsdecode(os.readlink(path)), os.stat(path), lambda: fd)
        source.holder = carrier.holder
        with doing(f"in flight: {source.link}"):
            self._dump_source(source)
        return source.id

    def _dump_source(self, source: SourceFile) -> FileResource:
        """Number a description, and write its entry if it is new."""
        resource = self.kinds.find(source)
        if source.seen is not None and self._unsorted is not None:
            source.id, fresh = self.ctx.new_id("file"), True
            self._unsorted.append(source)
        else:
            source.id, fresh = self._number(source)
        if fresh:
            entry = resource.dump(source, self.ctx)
            self.write_entry(resource.FD_TYPE, resource.FIELD, source.id, entry)
        return resource

    def _number(self, source: SourceFile) -> tuple[int, bool]:
        """(id, is it new) of a description, by comparing it with all that are like it."""
        unsorted, self._unsorted = self._unsorted, None
        for other in unsorted or ():
            self._tree(other).number_of((other.pid, other.fd), other.id)
        return self._tree(source).number_of((source.pid, source.fd))

    def _tree(self, source: SourceFile) -> KcmpTree:
        """Where descriptions are that are like this one in all that can be had for little."""
        stat, number = source.stat, _NOTHING
        if source.link == EVENTFD_LINK:
            number = source.fdinfo.get(b"eventfd-id", _NOTHING)
        key = (stat.st_dev, stat.st_ino, stat.st_rdev, source.link, source.pos, source.flags, number[0])
        tree = self._trees.get(key)
        if tree is None:
            tree = self._trees[key] = KcmpTree(_compare, lambda: self.ctx.new_id("file"))
        return tree

    def write_entry(self, kind: int, field: str, file_id: int, entry: object) -> None:
        """Add a file_entry to the images."""
        self.ctx.images.append("files", pb.file_entry(type=kind, id=file_id, **{field: entry}))
        self.count += 1

    def finish(self) -> None:
        """All tasks are done."""
        self.ctx.memo["no locks"] = not self._locks_seen
        for hook in self.ctx.memo.get("after_files", ()):
            hook()


def _compare(a: tuple[int, int], b: tuple[int, int]) -> int:
    return kcmp(a[0], b[0], KCMP_FILE, a[1], b[1])

