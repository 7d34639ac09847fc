"""The io_urings of a tree: which there are, who holds them, whether they are at rest, and what cannot be dumped.

A request that is being done has a part of the program's state in it that nobody can read, so a ring is dumped when it
is at rest: nothing under way but what only waits and can be made again (uring_requests.py), and, if a kernel thread
polls it, nothing that the thread is about to take. Disk I/O ends by itself in a moment.
"""

from __future__ import annotations

import os
import struct
import time

from ..errors import KernelError, Unsupported
from ..limits import RING_REQUESTS_MAX
from ..linux import io_uring
from ..linux.kernel import KCMP_FILES, kcmp, pidfd_getfd
from ..proc import fdinfo, fdinfo_kinds
from ..proc.read import numbers, read
from . import uring_memory, uring_requests
from .uring_memory import frame_at
from .uring_state import Kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from ..proc.fdinfo import Fdinfo
    from .base import DumpContext
    from .uring_requests import Request
    from .uring_state import State, User

LINK = "anon_inode:[io_uring]"
EVENTFD_LINK = "anon_inode:[eventfd]"
PAGE = 4096
WORD = (1 << 32) - 1
#: How often a thread is sent to collect completions that its ring had without requests, each time as many as fit.
LOTS_MAX = 20_000
KNOWN_FLAGS = 0x3FFFF & ~io_uring.REGISTERED_FD_ONLY
SAMPLES, BETWEEN_SAMPLES_S = 5, 0.02
LOOKS, BETWEEN_LOOKS_S = 1000, 0.001
_TURN_OFF = "make the program do without io_uring for the dump, or close the ring before it"


class Ring:
    """One ring of the tree. ``fd`` is a descriptor of ours for it, ``holders`` the tree's (pid, fd)."""

    __slots__ = ("_fdinfo", "fd", "file", "holders", "layout", "requests", "rings", "spots", "state")

    def __init__(self, fd: int, file: int) -> None:
        self.fd = fd
        self.file = file
        self.holders: list[tuple[int, int]] = []
        #: (thread, request) of those that wait and can be made again, as they were found last.
        self.requests: list[tuple[int, Request]] = []
        self.state: State
        self._fdinfo: Fdinfo | None = None
        self.layout: io_uring.Params
        self.rings: io_uring.Rings | None = None
        #: Where it lies in the program's memory, if it does and that is shared.
        self.spots: list[uring_memory.Spot] | None = None

    def look(self) -> fdinfo_kinds.IoUring:
        """What fdinfo says now. Raises Unsupported if it says nothing for a second."""
        for _ in range(LOOKS):
            self._fdinfo = fdinfo.parse(read(os.getpid(), f"fdinfo/{self.fd}"))
            found = fdinfo_kinds.io_uring(self._fdinfo)
            if not found.busy:
                return found
            time.sleep(BETWEEN_LOOKS_S)  # somebody has its lock, and be it only another one who looks
        raise Unsupported("an io_uring that is in use at every moment", hint="try again")

    def overflow(self) -> list[tuple[int, int, int]]:
        """(user data, result, flags) of completions that did not fit."""
        self.look()
        assert self._fdinfo is not None
        found = []
        for line in self._fdinfo.get(b"CqOverflowList", [b""])[1:]:
            words = dict(part.strip().split(b"=") for part in line.split(b","))
            found.append((int(words[b"user_data"]), int(words[b"res"]), int(words[b"flags"], 16)))
        return found

    def map(self) -> io_uring.Rings:
        """Its memory."""
        if self.rings is None:
            if self.spots is None:
                self.rings = io_uring.Rings(self.fd, self.layout)
            else:
                self.rings = uring_memory.rings(self.spots, self.layout)
        return self.rings

    def close(self) -> None:
        """Unmap it."""
        if self.rings is not None:
            self.rings.close()


class Rings:
    """All rings that a task of the tree has a descriptor for."""

    def __init__(self, ctx: DumpContext, pids: Iterable[int]) -> None:
        self.pids = list(pids)
        self.all: dict[int, Ring] = {}
        self.pages: dict[int, Ring] = {}  # by the number of the first page frame
        #: Thread → the struct file at each place of its own table of rings, when busy() was asked last.
        self.tables: dict[int, list[int]] = {}
        #: Has it been seen to that nothing is under way, while the tree stands still?
        self.at_rest = False
        self.counts_at_rest: list[tuple[int, int]] = []
        self._of_fd: dict[tuple[int, int], Ring] = {}
        self._kernel: Kernel | None = None
        self._frames: uring_memory.Frames | None = None
        self._ctx = ctx
        self._open_files: dict[int, tuple[int, int]] | None = None
        self._files_of: dict[int, dict[int, int]] = {}
        ctx.at_end.append(self.close)
        for pid in self.pids:
            self._find(pid)
        self._read()

    @classmethod
    def of(cls, ctx: DumpContext) -> Rings:
        """Those of the tree that is dumped or, in the preflight, looked at."""
        if "io_urings" not in ctx.memo:
            pids = [pid for pid, task in ctx.tasks.items() if not task.zombie] or ctx.memo.get("pids", [])
            ctx.memo["io_urings"] = cls(ctx, pids)
        found: Rings = ctx.memo["io_urings"]
        return found

    @property
    def kernel(self) -> Kernel:
        """For reading what the kernel does not show. Raises Unsupported."""
        if self._kernel is None:
            from .memory.aio import possible_processors

            try:
                self._kernel = Kernel(possible_processors())
            except (Unsupported, KernelError) as error:
                raise Unsupported(
                    f"an io_uring, whose state only BPF can read here: {error.what}",
                    hint="this needs CAP_BPF and CAP_PERFMON, and a kernel since v6.13 with BTF",
                ) from None
        return self._kernel

    def _find(self, pid: int) -> None:
        fds = []
        for fd in _fds(pid):
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == LINK:
                    fds.append(fd)
            except OSError:
                continue  # closed in the meantime
        if not fds:
            return
        pidfd = os.pidfd_open(pid)
        try:
            for fd, file in self.kernel.files_of(pid, fds).items():
                ring = self.all.get(file)
                if ring is None:
                    ring = self.all[file] = Ring(pidfd_getfd(pidfd, fd), file)
                    self._ctx.adopt(ring.fd)
                ring.holders.append((pid, fd))
                self._of_fd[pid, fd] = ring
        finally:
            os.close(pidfd)

    def _read(self) -> None:
        rings = list(self.all.values())
        addresses = self.kernel.private_data(self.all) if rings else []
        for ring, state in zip(rings, self.kernel.read(addresses) if rings else [], strict=True):
            ring.state = state
            if state.flags & ~KNOWN_FLAGS:
                continue
            ring.layout = layout_of(state)
            if state.flags & io_uring.NO_MMAP:
                self._frames = self._frames or uring_memory.Frames(self.kernel)
                pids = [pid for pid, _ in ring.holders]
                ring.spots = uring_memory.find(state, pids, self.kernel, self._frames)
            else:
                self.pages[_frame(os.getpid(), ring.map(), 0)] = ring
                self.pages[_frame(os.getpid(), ring.map(), 1)] = ring

    def close(self) -> None:
        """Unmap them."""
        for ring in self.all.values():
            ring.close()

    def read_again(self) -> None:
        """The tree stands still now."""
        rings = list(self.all.values())
        for ring, state in zip(rings, self.kernel.read([ring.state.address for ring in rings]), strict=True):
            ring.state = state

    def ring(self, pid: int, fd: int) -> Ring:
        """The ring behind a descriptor of a task. Raises Unsupported."""
        found = self._of_fd.get((pid, fd))
        if found is None and pid == os.getpid():  # a borrowed one
            found = self.all.get(self.kernel.files_of(pid, [fd])[fd])
        if found is None:
            raise Unsupported("an io_uring that no task of the tree holds", hint=_TURN_OFF)
        return found

    def mapped_at(self, pid: int, start: int) -> Ring:
        """The ring that a task has mapped at ``start``. Raises Unsupported."""
        found = self.pages.get(frame_at(pid, start))
        if found is None:
            raise Unsupported(
                "an io_uring of which no task of the tree has a descriptor",
                hint="a ring that is used by its registered number alone cannot be dumped",
            )
        return found

    def is_mapped(self, ring: Ring, task: Any) -> bool:
        """Has a task mapped all of a ring?"""
        parts = {
            one.vma.pgoff
            for one in task.mappings
            if one.vma.path == LINK.encode() and self.pages.get(frame_at(task.pid, one.vma.start)) is ring
        }
        return io_uring.OFF_SQES in parts and bool(parts & {io_uring.OFF_SQ_RING, io_uring.OFF_CQ_RING})

    # ----------------------------------------------------------------------------------- at rest?

    def busy(self) -> list[tuple[Ring, dict[int, int]]]:
        """The rings that are not at rest, and how many requests of which threads are under way and do not just wait."""
        rings = list(self.all.values())
        self.read_again()
        # In this order: when there is nothing left to be taken, what was taken is counted.
        submitting = [self._about_to_submit(ring) for ring in rings]
        users = self.kernel.users([ring.state.address for ring in rings])
        self.tables = {user.tid: user.rings for some in users for user in some}
        waiting: dict[int, int] = {}
        for ring, some in zip(rings, users, strict=True):
            ring.requests = []
            for tid, one in self._requests(ring, some) if any(user.under_way for user in some) else ():
                if not one.trouble and not one.triggered:
                    ring.requests.append((tid, one))
                    waiting[tid] = waiting.get(tid, 0) + one.count
        found = []
        for ring, busy, some in zip(rings, submitting, users, strict=True):
            counts = {user.tid: user.under_way - waiting.get(user.tid, 0) for user in some}
            counts = {tid: count for tid, count in counts.items() if count}
            if counts or busy:
                found.append((ring, counts))
        return found

    def _about_to_submit(self, ring: Ring) -> bool:
        if not ring.state.flags & io_uring.SQPOLL or ring.state.flags & (io_uring.R_DISABLED | ~KNOWN_FLAGS):
            return False
        if not self._to_be_taken(ring):
            return False
        # A thread that says it sleeps looks once more before it does.
        asleep = ring.map().sq("flags") & io_uring.SQ_NEED_WAKEUP
        if asleep:
            time.sleep(BETWEEN_SAMPLES_S)
            asleep = ring.map().sq("flags") & io_uring.SQ_NEED_WAKEUP
        return not asleep and self._to_be_taken(ring)

    @staticmethod
    def _to_be_taken(ring: Ring) -> bool:
        return ring.map().sq("tail") != ring.look().CachedSqHead

    def counts(self) -> list[tuple[int, int]]:
        """How many requests each ring has taken, how many completions it has posted, by now."""
        states = self.kernel.read([ring.state.address for ring in self.all.values()])
        return [(state.numbers["sq_head"], state.numbers["cq_tail"]) for state in states]

    def require_rest(self) -> None:
        """Raise Unsupported if they are not known to be at rest, and are not."""
        if not self.at_rest and (busy := self.busy()):
            raise Unsupported(f"requests are under way: {self.explain_busy(busy)}")
        if not self.at_rest:
            self.note_rest()

    def note_rest(self) -> None:
        """They are at rest, and their counters are to stay as they are now."""
        self.at_rest = True
        self.counts_at_rest = self.counts()

    def in_the_way(self, ring: Ring) -> list[str]:
        """The requests that have been waiting for a while and cannot be made again, in words."""
        (users,) = self.kernel.users([ring.state.address])
        seen = {one.address: one for _, one in self._requests(ring, users) if one.trouble}
        for _ in range(SAMPLES if seen else 0):
            time.sleep(BETWEEN_SAMPLES_S)
            still = {one.address for one in self.kernel.waiting(ring.state)}
            seen = {address: one for address, one in seen.items() if address in still}
        return [self._describe(one) for one in seen.values()]

    def _requests(self, ring: Ring, users: list[User]) -> list[tuple[int, Request]]:
        """(thread, request) of all that wait; the thread is 0 if it is none of the tree's."""
        tids = {user.context: user.tid for user in users}
        found = []
        for one in self.kernel.waiting(ring.state):
            tid = tids.get(one.context, 0)
            self._find_file(ring, one, tid)
            if ring.state.flags & io_uring.SQPOLL:
                one.trouble = "a thread of the kernel's polls the ring, and could be about to do it"
            elif ring.state.flags & io_uring.NO_MMAP:
                one.trouble = "the ring lies in the program's own memory"
            found.append((tid, one))
        return found

    def _find_file(self, ring: Ring, one: Request, tid: int) -> None:
        """Fill in the descriptor, or the place in the table of registered files, by which it is submitted again."""
        pid = next((pid for pid in self.pids if os.path.exists(f"/proc/{pid}/task/{tid}")), 0)
        fd: int | None = -1
        if not pid:
            one.trouble = "the thread that has submitted it is none of the tree's"
        elif one.file and one.fixed_file:
            fd = next((index for index, (file, _) in enumerate(ring.state.files) if file == one.file), None)
        elif one.file:
            fd = self._fds_of(pid).get(one.file)
        if fd is None:
            one.trouble = one.trouble or "its file is not open any more in the task that has submitted it"
        elif one.sqe:
            one.sqe = one.sqe[: uring_requests.AT_FD] + struct.pack("<i", fd) + one.sqe[uring_requests.AT_FD + 4 :]

    def _fds_of(self, pid: int) -> dict[int, int]:
        """Address of a struct file → descriptor of one task."""
        if pid not in self._files_of:
            files = self.kernel.files_of(pid, _fds(pid))
            self._files_of[pid] = {file: fd for fd, file in reversed(files.items())}
        return self._files_of[pid]

    def explain_busy(self, busy: list[tuple[Ring, dict[int, int]]]) -> str:
        """What is under way, in words."""
        texts = []
        for ring, counts in busy:
            pid, fd = ring.holders[0]
            (users,) = self.kernel.users([ring.state.address])
            named = [self._describe(one) for _, one in self._requests(ring, users) if one.trouble]
            count = sum(counts.values())
            if len(named) < count:
                named.append(f"{count - len(named)} that the kernel does not list" if named else f"{count} requests")
            texts.append(f"task {pid}: fd {fd} ({LINK}): {', '.join(named) or 'entries that are being taken'}")
        return "; ".join(texts)

    def _describe(self, one: Request) -> str:
        holder = self.open_files().get(one.file) if one.file else None
        name = f"{one.name} on fd {holder[1]}" if holder else one.name
        return f"{name} ({one.trouble})" if one.trouble else name

    # --------------------------------------------------------------------------------- open files

    def open_files(self) -> dict[int, tuple[int, int]]:
        """Address of a struct file → (pid, fd) of a task of the tree that has it open."""
        if self._open_files is None:
            self._open_files = {}
            for pid in self.pids:
                for fd, file in self.kernel.files_of(pid, _fds(pid)).items():
                    self._open_files.setdefault(file, (pid, fd))
        return self._open_files

    def eventfds(self) -> dict[int, tuple[int, int]]:
        """Address of an eventfd_ctx → (pid, fd)."""
        files = {}
        for file, (pid, fd) in self.open_files().items():
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == EVENTFD_LINK:
                    files[file] = (pid, fd)
            except OSError:
                continue
        return dict(zip(self.kernel.private_data(files), files.values(), strict=True))

    # --------------------------------------------------------------------------------- what is not

    def check(self, ring: Ring, *, tids: Iterable[int] | None = None) -> None:
        """Raise Unsupported for what cannot be made again."""
        state = ring.state
        for trouble, hint in _troubles(state):
            raise Unsupported(trouble, hint=hint)
        requests = max(state.numbers["sq_head"], state.numbers["cq_tail"])
        if requests > RING_REQUESTS_MAX:
            raise Unsupported(
                f"its counters stand at {requests}, and a new ring gets there only by as many requests: this would "
                "take minutes",
                hint="have the program close the ring and make a new one before the dump",
            )
        self._check_holders(ring)
        if state.flags & io_uring.NO_MMAP:
            _check_memory(ring)
        if state.submitter and tids is not None and state.submitter not in tids:
            raise Unsupported("the only thread that may use it (IORING_SETUP_SINGLE_ISSUER) has ended")
        if state.flags & io_uring.SINGLE_ISSUER:
            _check_single(ring)
        files = self.open_files()
        for index, (file, _) in enumerate(state.files):
            if file and file not in files:
                raise Unsupported(
                    f"the file registered with it at {index} is open nowhere else in the tree",
                    hint="keep a descriptor of it open",
                )
        if state.eventfd and state.eventfd not in self.eventfds():
            raise Unsupported(
                "the eventfd registered with it is open nowhere else in the tree", hint="keep a descriptor of it open"
            )

    def _check_holders(self, ring: Ring) -> None:
        pids = [pid for pid, _ in ring.holders]
        bound = _bound(ring.state)
        other = next((pid for pid in pids[1:] if kcmp(pids[0], pid, KCMP_FILES)), 0)
        if other and bound:
            raise Unsupported(
                f"{bound}, and tasks {pids[0]} and {other} share it",
                hint="close it in the child, or open it with close-on-exec",
            )
        owner = ring.state.numbers["mm"]
        if bound and self.kernel.memory_of(pids[0]) != owner:
            # Not the tree's at all: that of whoever restored it, which has nothing to do with it any more.
            ours = any(self.kernel.memory_of(pid) == owner for pid in self.pids)
            if ours or ring.state.flags & io_uring.SQPOLL:
                raise Unsupported(f"{bound}, and it belongs to another process, from which it was inherited")


def _troubles(state: State) -> list[tuple[str, str]]:
    flags, numbers = state.flags, state.numbers
    known = (
        (flags & io_uring.REGISTERED_FD_ONLY, "nobody has a descriptor of it (IORING_SETUP_REGISTERED_FD_ONLY)"),
        (flags & ~KNOWN_FLAGS, f"it was made with flags that Torpor does not know ({flags:#x})"),
        (numbers["restricted"], "restrictions are in force on it"),
        (numbers["personalities"], "credentials are registered with it (personalities)"),
        (numbers["provided"], "buffers are provided to it (IORING_REGISTER_PBUF_RING)"),
        (numbers["zcrx"], "it receives from a network interface without copying"),
        (numbers["napi_enabled"], "it polls network interfaces"),
        (numbers["region"], "it has a memory region of its own (IORING_REGISTER_MEM_REGION)"),
    )  # fmt: skip
    return [(f"{trouble}, which is not supported", _TURN_OFF) for found, trouble in known if found]


def _bound(state: State) -> str:
    """What binds a ring to one process; "" if nothing does."""
    if state.flags & io_uring.SQPOLL:
        return "a thread of the process polls it"
    if state.flags & io_uring.SINGLE_ISSUER:
        return "one thread alone may use it"
    return "it has registered buffers" if any(length for _, length, _ in state.buffers) else ""


def _check_memory(ring: Ring) -> None:
    trouble = _bound(ring.state)
    if not trouble and ring.spots is None:
        trouble = "that memory is not shared anonymous memory"
    if trouble:
        raise Unsupported(
            f"its rings lie in the program's own memory (IORING_SETUP_NO_MMAP), and {trouble}: not supported",
            hint=_TURN_OFF,
        )


def _check_single(ring: Ring) -> None:
    state = ring.state
    if state.flags & io_uring.SQPOLL:
        if state.submitter and state.submitter not in [pid for pid, _ in ring.holders]:
            raise Unsupported(
                "a ring with IORING_SETUP_SQPOLL and IORING_SETUP_SINGLE_ISSUER is supported for the main thread only",
                hint="make it without IORING_SETUP_SINGLE_ISSUER, which adds nothing to it",
            )
        if state.eventfd:
            raise Unsupported(
                "a ring with IORING_SETUP_SQPOLL and IORING_SETUP_SINGLE_ISSUER and an eventfd is not supported",
                hint="unregister the eventfd",
            )
        return
    taken = state.numbers["sq_head"] - uring_requests.total(one for _, one in ring.requests)
    if state.numbers["cq_tail"] - taken > LOTS_MAX * state.numbers["cq_entries"]:
        raise Unsupported(
            f"it has had {state.numbers['cq_tail'] - taken} more completions than requests, and a new ring with "
            "IORING_SETUP_SINGLE_ISSUER would take minutes to get there",
            hint=_TURN_OFF,
        )
    if ring.overflow():
        raise Unsupported(
            "completions did not fit into a ring with IORING_SETUP_SINGLE_ISSUER", hint="reap them before the dump"
        )


def layout_of(state: State) -> io_uring.Params:
    """Where the kernel puts what in a ring like this one."""
    return layout(state.flags, state.numbers["sq_entries"], state.numbers["cq_entries"])


def layout(flags: int, sq_entries: int, cq_entries: int) -> io_uring.Params:
    """Where the kernel puts what in a ring: another one is made and asked."""
    shape = io_uring.NO_SQARRAY | io_uring.SQE128 | io_uring.CQE32
    params = io_uring.Params(flags & shape | io_uring.CQSIZE, cq_entries)
    os.close(io_uring.setup(sq_entries, params))
    return params


def _frame(pid: int, rings: io_uring.Rings, which: int) -> int:
    from ..linux.call import address_of

    return frame_at(pid, address_of(rings.sqes if which else rings.ring))


def _fds(pid: int) -> list[int]:
    from ..errors import TaskGone

    try:
        return numbers(pid, "fd")
    except (TaskGone, OSError):
        return []


