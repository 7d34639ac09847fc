"""What a resource is: one kernel object, how it is dumped and how it is made again.

Being in the folder is the registration: each module in ``files/`` ends in ``RESOURCE = …``, an instance of
:class:`FileResource`; in ``task/`` of :class:`TaskResource`.
"""

from __future__ import annotations

import fcntl
import os
import time

from ..errors import Unsupported
from ..linux.kernel import pidfd_getfd
from ..proc.fdinfo import parse as parse_fdinfo
from ..undo import Undo
from . import fown
from .descriptors import Descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, ClassVar

    from ..images.schema import Message
    from ..linux.task_files import OpenFile
    from ..proc.fdinfo import Fdinfo
    from ..remote.program import Program


#: Between looks at whether somebody else has what is needed. Who ended a moment ago may have it still: what requests to
#: an io_uring hold is released by a thread of the kernel's (fs/file_table.c, delayed_fput()).
PAUSES_S = (0.005, 0.02, 0.1, 0.2)


def patiently(action: Callable[[], None]) -> None:
    """Do ``action()``, and again after each of these pauses as long as it raises Unsupported."""
    for pause_s in PAUSES_S:
        try:
            action()
            return
        except Unsupported:
            time.sleep(pause_s)
    action()


class SourceFile:
    """An open file description of a task that is being dumped, seen through one of its descriptors.

    ``link`` is what /proc/PID/fd/N points to, ``stat`` the result of stat(2) through it, ``id`` its number in the
    images. ``seen`` is what the kernel itself has about it, None where that cannot be seen.
    """

    __slots__ = ("_fdinfo", "_flags", "borrow", "fd", "holder", "id", "link", "pid", "seen", "stat")

    def __init__(
        self, pid: int, fd: int, link: str, stat: os.stat_result, borrow: Callable[[], int], file_id: int = 0,
        seen: OpenFile | None = None,
    ) -> None:  # fmt: skip
        self.pid = pid
        #: The task that holds it, or the socket that it is in flight in: then ``pid`` is our own.
        self.holder = pid
        self.fd = fd
        self.link = link
        self.stat = stat
        self.id = file_id
        #: Gives a descriptor of ours for the same description (pidfd_getfd). The caller must not close it: it is
        #: shared by all who ask, and closed with the dump.
        self.borrow = borrow
        self.seen = seen
        self._fdinfo: Fdinfo | None = None
        self._flags = -1 if seen is None else seen.flags & ~os.O_CLOEXEC

    @property
    def path(self) -> str:
        """The /proc path of the descriptor."""
        return f"/proc/{self.pid}/fd/{self.fd}"

    @property
    def fdinfo(self) -> Fdinfo:
        """/proc/PID/fdinfo/N: key → all its values, in order (see proc/fdinfo.py)."""
        if self._fdinfo is None:
            from ..proc.read import read

            self._fdinfo = parse_fdinfo(read(self.pid, f"fdinfo/{self.fd}"))
        return self._fdinfo

    @property
    def flags(self) -> int:
        """Status flags of the description (octal in fdinfo); the descriptor's close-on-exec bit is not among them."""
        if self._flags < 0:
            self._flags = int(self.fdinfo[b"flags"][0], 8) & ~os.O_CLOEXEC
        return self._flags

    @property
    def pos(self) -> int:
        """The file position."""
        return self.seen.pos if self.seen is not None else int(self.fdinfo[b"pos"][0])


class FileResource:
    """A kind of open file. Subclasses set the class attributes and define dump and restore."""

    #: The image's fd_types number, and the field of file_entry that holds the entry.
    FD_TYPE: ClassVar[int] = 0
    FIELD: ClassVar[str] = ""
    #: What makes a description one of this kind: an exact /proc link, or the file type (stat.S_IFMT), then claims().
    LINKS: ClassVar[tuple[str, ...]] = ()
    MODES: ClassVar[tuple[int, ...]] = ()
    #: Among resources that share a MODE the one with the lower number is asked first.
    PRIORITY: ClassVar[int] = 50

    def claims(self, source: SourceFile) -> bool:
        """Is this description one of ours? Asked when LINKS or MODES match."""
        return True

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        """Raise Unsupported when it cannot be dumped. Runs before anything is frozen; must not change anything."""

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        """The entry for the images. The task is stopped. ``id``, ``flags`` and ``fown`` come from
        ``source``/``ctx``.
        """
        raise NotImplementedError

    def check_restore(self, entries: list[Message], ctx: BuildContext) -> None:
        """Raise Unsupported or ImageError for what cannot be restored here, given all entries of this kind.

        Nothing has been created yet, and ``ctx.inherited`` is known. Entries may be changed: what is left is restored.
        """

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        """Make the open file description again in this process; returns a descriptor, which the engine takes over."""
        raise NotImplementedError

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        """Emit what only a task that holds it as ``fd`` can do (epoll watches, a controlling terminal, …).

        Called once per description, for one task that holds it, after all descriptors of that task are in place.
        """

    def settle_each(self, entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext) -> None:
        """As settle, but called for every task (a RestoredTask) and descriptor that holds it: posix locks, …."""

    def settles_each(self, ctx: BuildContext) -> bool:
        """Is settle_each() to be called? All files have been made."""
        return type(self).settle_each is not FileResource.settle_each


class TaskResource:
    """A part of a task's or thread's state. Subclasses set ORDER and define some of ask, dump, restore."""

    #: "process": once, in the main thread; "thread": in every thread, the main one included.
    PER: ClassVar[str] = "process"
    #: Do copies have what :meth:`outside` does from their template's held process, which they are forked from?
    INHERITED: ClassVar[bool] = True
    #: Restored in this order within a task: 10 early (needs nothing) … 50 usual … 90 takes privileges away.
    ORDER: ClassVar[int] = 50

    def ask(self, program: Program, thread: Any) -> Any:
        """Append getters that the thread itself runs; returns whatever dump() needs to find their results.

        They are asked for once, and run in all threads with as many supplementary groups, main threads and others
        apart; what else they depend on, :meth:`varies` says.
        """
        return None

    def varies(self, thread: Any) -> object:
        """What the getters of this thread depend on, to be compared with another's."""
        return None

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        """Fill in the thread's core_entry. ``run.result(ref)`` and ``run.bytes(data)`` read what ``ask`` asked for.

        ``thread`` is a SourceThread: .tid, .task (a SourceTask: .pid, .stat, .status, .threads …), .status
        (proc.status), .stat (proc.stat), .regs, .sigmask. For a process-wide resource it is the main thread.
        """
        raise NotImplementedError

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise Unsupported or ImageError for what cannot be restored here; nothing has been created yet."""

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        """Emit the calls that give the calling thread this state. ``thread``: RestoredThread (.tid, .task)."""
        raise NotImplementedError

    def outside(self, task: Any, core: Message, ctx: BuildContext) -> None:
        """Do from outside what the stopped task (a RestoredTask) cannot do for itself, once its program is through."""


# vma_entry.status
VMA_REGULAR, VMA_STACK, VMA_VSYSCALL, VMA_VDSO, VMA_HEAP = 0x1, 0x2, 0x4, 0x8, 0x20
VMA_FILE_PRIVATE, VMA_FILE_SHARED, VMA_ANON_SHARED, VMA_ANON_PRIVATE = 0x40, 0x80, 0x100, 0x200
VMA_SYSVIPC, VMA_SOCKET, VMA_VVAR, VMA_AIORING, VMA_MEMFD = 0x400, 0x800, 0x1000, 0x2000, 0x4000
VMA_SHSTK, VMA_GUARD = 0x8000, 0x10000
# uapi/asm-generic/mman-common.h, mman.h
MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE, MAP_FIXED, MAP_ANONYMOUS = 0x1, 0x2, 0x8, 0x10, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE, MAP_HUGETLB, MAP_FIXED_NOREPLACE = 0x100, 0x2000, 0x4000, 0x40000, 0x100000


class MappingResource:
    """A kind of mapping."""

    #: The kinds of proc/maps.py that it takes, and the vma_entry.status by which restore knows it: some bit of STATUS,
    #: and none of STATUS_NOT.
    KINDS: ClassVar[tuple[str, ...]] = ()
    STATUS: ClassVar[int] = 0
    STATUS_NOT: ClassVar[int] = 0
    PRIORITY: ClassVar[int] = 50
    #: Are there pages that belong to the task alone (as against a file or a shared object)?
    PRIVATE_PAGES: ClassVar[bool] = True
    #: Is it to be made before other mappings? ``ctx.memo["occupied"]`` has the (start, end) of what is there by then.
    FIRST: ClassVar[bool] = False

    def claims(self, mapping: Any) -> bool:
        """Is this mapping (model.source.Mapping) one of ours? Asked when KINDS matches."""
        return True

    def check(self, mapping: Any, pid: int, ctx: DumpContext) -> None:
        """Raise Unsupported when it cannot be dumped; nothing is frozen yet."""

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        """Complete ``entry`` (a vma_entry whose start, end, pgoff, prot, flags and madv are set): status, shmid,
        ....
        """
        raise NotImplementedError

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        """May copies of one snapshot have it from a common ancestor by fork(2), being alone with what they write?"""
        return True

    def joins(self, entry: Message) -> bool:
        """May it be made by one call together with a neighbour of which this is true as well, with the same flags?"""
        return False

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        """Make what the mapping needs (open its file) in the builder."""

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        """Emit the mmap(2) that makes it, with ``prot`` for now; its pages and final protection follow."""
        raise NotImplementedError


class DumpContext:
    """What dumping code may use: options, the image writer, identifiers, borrowed descriptors, the tree."""

    def __init__(self, options: Any, images: Any) -> None:
        self.options = options
        self.images = images
        #: pid → SourceTask for all tasks of the tree.
        self.tasks: dict[int, Any] = {}
        #: Anything that entries of one kind must share (a pipe's two ends): key → value, keys are (kind, …).
        self.memo: dict[Any, Any] = {}
        #: What the preflight has found, where it may save a search: it may be true no longer.
        self.hints: dict[Any, Any] = {}
        #: What the tasks have open.
        self.descriptors = Descriptors()
        #: Gives the id of the description behind a descriptor of ours, which is dumped if it is new: for files
        #: that are in flight in the socket that is the second argument. Set by the engine; the descriptor must
        #: stay open as long as the dump.
        self.file_id: Callable[[int, SourceFile], int]
        #: The number by which the tree knows what is a task, process group or session of this number to us; 0: it does
        #: not.
        self.number: Callable[[int], int] = self._number
        #: Where the tree's /proc is.
        self.proc = "/proc"
        #: What was changed about the tasks' things, to be taken back if they are to live on.
        self.undo = Undo()
        #: Called when the dump ends, however it does.
        self.at_end: list[Callable[[], object]] = []
        self._next: dict[str, int] = {}
        self._borrowed: dict[tuple[int, int], int] = {}
        self._adopted: list[int] = []

    def borrow(self, task: Any, fd: int) -> int:
        """A descriptor of ours for the description behind a task's ``fd``; it is ours until the dump ends."""
        key = (task.pid, fd)
        if key not in self._borrowed:
            self._borrowed[key] = pidfd_getfd(task.pidfd, fd)
        return self._borrowed[key]

    def adopt(self, fd: int) -> None:
        """Close ``fd`` when the dump ends."""
        self._adopted.append(fd)

    def close(self) -> None:
        """Give back what was borrowed."""
        for step in self.at_end:
            step()
        self.at_end.clear()
        for fd in (*self._borrowed.values(), *self._adopted):
            os.close(fd)
        self._borrowed.clear()
        self._adopted.clear()
        self.descriptors.close()

    def new_id(self, kind: str) -> int:
        """The next number (from 1) of an id space of the images: "file", "shmem", "pipe", "ghost", …"""
        number = self._next.get(kind, 0) + 1
        self._next[kind] = number
        return number

    def fown(self, source: SourceFile) -> Message:
        """The fown_entry of a description: who gets SIGIO, and with which credentials it was asked for."""
        return fown.dump(source, self.number)

    def _number(self, pid: int) -> int:
        """As ``number``, where the tree's root may be in a pid namespace below ours."""
        numbers: dict[int, int] | None = self.memo.get("numbers")
        if numbers is None and self.tasks:
            numbers = self.memo["numbers"] = {}
            for task in self.tasks.values():
                if task.pid != task.vpid:
                    numbers[task.stat.pgrp] = task.group
                    numbers[task.pid] = task.vpid
                    numbers.update((thread.tid, thread.vtid) for thread in task.threads)
        return numbers.get(pid, pid) if numbers else pid


class Inherited(dict[str, int]):
    """Keys given by --inherit-fd → descriptor. ``wanted``: those of the keys that were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: set[str] = set()

    def lend(self, key: str, fd: int) -> None:
        """Let ``fd`` stand for what ``key`` names, in the form of /proc or that of CRIU's manual (``pipe[INODE]``)."""
        for kind in ("pipe", "socket"):
            if key.startswith(f"{kind}["):
                key = f"{kind}:{key.removeprefix(kind)}"
        self[key] = fd

    def get(self, key: str, default: Any = None) -> Any:
        self.wanted.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.wanted.add(str(key))
        return super().__contains__(key)

    def unused(self) -> list[str]:
        """Keys that nobody has asked for."""
        return [key for key in self if key not in self.wanted]


class BuildContext:
    """What restoring code may use in the builder: options, images, the memory of shared things, the undo journal."""

    def __init__(self, options: Any, images: Any, undo: Any) -> None:
        self.options = options
        self.images = images
        #: What is taken back in any case, once the tasks run; ``on_failure``: what only a failed restore takes back.
        self.undo = undo
        self.on_failure = Undo()
        self.memo: dict[Any, Any] = {}
        #: file id → (resource, entry) of every file_entry in the images.
        self.files: dict[int, tuple[FileResource, Any]] = {}
        #: file id → the builder's descriptor, once made.
        self.built: dict[int, int] = {}
        #: Descriptors below this number belong to restored tasks; the builder's own lie above, listed in ``kept``.
        self.first_free_fd = 3
        self.kept: list[int] = []
        #: Those of ``kept`` that have the numbers of a task's descriptors already.
        self.in_place: set[int] = set()
        #: Where that is not possible: numbers between the tasks'.
        self.gaps: Iterator[int] | None = None
        #: Numbers of processes and threads in the images → as we see them, once they are there.
        self.live: dict[int, int] = {}
        #: What will not be as it was, a line each, for who wants it explained.
        self.notes: list[str] = []
        #: Keys given by --inherit-fd → descriptor.
        self.inherited = Inherited()

    def keep(self, fd: int) -> int:
        """Take over a descriptor that tasks will need: it is moved out of the way of theirs and lasts until they
        run.
        """
        if self.gaps is None:
            kept = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.first_free_fd)
        else:
            kept = next((number for number in self.gaps if not _is_open(number)), -1)
            if kept < 0:
                raise Unsupported("the tasks use all descriptor numbers up to our own limit (RLIMIT_NOFILE)")
            os.dup2(fd, kept, inheritable=False)
        os.close(fd)
        self.kept.append(kept)
        return kept

    def keep_at(self, fd: int, number: int, spare: list[int]) -> int:
        """As :meth:`keep`, but under the ``number`` that it is to have in the end if that is free here.

        The kernel gives the lowest free number; one below is left in ``spare`` to be taken, so that of numbers that go
        up most come by themselves.
        """
        if fd < number:
            spare.append(fd)
            fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number)
        if fd != number:
            return self.keep(fd)
        self.kept.append(fd)
        self.in_place.add(fd)
        return fd

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value remembered under ``key``; ``make()`` it the first time."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def build(self, file_id: int) -> int:
        """The builder's descriptor of a file by its id, made now if it is not there yet."""
        if file_id not in self.built:
            resource, entry = self.files[file_id]
            self.built[file_id] = self.keep(resource.restore(entry, self))
        return self.built[file_id]


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def make_group(ctx: BuildContext, make: Callable[[], dict[int, int]]) -> dict[int, int]:
    """``make()`` descriptors (file id → descriptor) that have to be made together, each to be popped by its restore.

    Those that nobody pops, because no task holds such a file, are closed in the end.
    """
    made = make()

    def close_rest() -> None:
        while made:
            os.close(made.popitem()[1])

    ctx.undo.add("descriptors that no task holds", close_rest)
    return made


def reopen(fd: int, flags: int) -> int:
    """Another open file description of what ``fd`` refers to (through /proc/self/fd)."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def unsupported(source: SourceFile, why: str, hint: str = "") -> Unsupported:
    """The error for a descriptor that cannot be dumped, in the one form all use."""
    return Unsupported(f"fd {source.fd} ({source.link}): {why}", hint=hint)
