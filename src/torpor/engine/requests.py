"""Submitting again what waited in a restored tree's io_urings, as the last thing before it is let go.

By then everything that a request may be about is as it will be (a TCP socket does not receive before its repair mode
has ended), the rings have their content, and the counters stand where they stood before the requests were taken. Each
is submitted by the thread that it belongs to: the thread's entries are written over those that are in its ring, which
get their place again. What has come meanwhile completes at once, as it should.
"""

from __future__ import annotations

import errno
import os
import struct

from .. import log
from ..errors import ImageError, KernelError, Unsupported, doing
from ..linux import io_uring, ptrace
from ..linux.kernel import pidfd_getfd
from ..proc import fdinfo, fdinfo_kinds
from ..proc import maps as proc_maps
from ..proc import status as proc_status
from ..proc.read import read
from ..remote.guest import Guest
from ..remote.program import Data, Program, Ref, Run
from ..remote.tracee import Seized
from ..resources import uring_build
from ..resources.memory.io_uring import VMA_IO_URING
from ..resources.uring_requests import AT_ADDRESS, LINK_TIMEOUT, NS
from . import collect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ..images.schema import Message
    from ..model.snapshot import RestoredTask, RestoredThread, Snapshot
    from ..resources.base import BuildContext

#: How many completions a thread collects in one call at least (io_uring/io_uring.c, IO_LOCAL_TW_DEFAULT_MAX).
AT_ONCE = 20
#: What says that a request was not made as it had been.
WRONG = {errno.EINVAL, errno.EBADF, errno.EFAULT, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}


def submit(snapshot: Snapshot, ctx: BuildContext) -> None:
    """Submit them all; the tasks are stopped with the registers that they are to go on with. Raises TorporError."""
    left = {
        file_id: len(entry.request)
        for file_id, (resource, entry) in ctx.files.items()
        if resource.FIELD == "uring" and entry.request
    }
    count = sum(left.values())
    holders: dict[tuple[int, int], tuple[int, Message]] = {}
    for pid, fd, entry in ctx.memo["io_uring requests"]:  # by each descriptor that a task has for it
        holders.setdefault((entry.id, pid), (fd, entry))
    for (file_id, pid), (fd, entry) in holders.items():
        with doing(f"task {pid}"), doing(f"fd {fd} (io_uring)"):
            left[file_id] -= _Ring(snapshot.tasks[pid], fd, file_id, entry).submit()
    for file_id, some in left.items():
        if some:
            raise ImageError("files.img", f"file {file_id}: uring: request", f"{some} belong to no thread that has it")
    log.info(f"io_uring: {count} requests wait again")


def post_completions(ctx: BuildContext) -> None:
    """Bring the rings of threads to where they were that have had more completions than requests, which is done before
    they get their content. Raises TorporError.
    """
    found = {one[1].id: one for one in ctx.memo["io_uring completions"]}
    for fd, entry, task, tid in found.values():
        thread = next(thread for thread in task.threads if thread.tid == tid)

        def collect(count: int, fd: int = fd, task: RestoredTask = task, thread: RestoredThread = thread) -> None:
            program = Program("completions")
            for _ in range(count // AT_ONCE + 1):
                program.call("io_uring_enter", fd, 0, 0, io_uring.ENTER_GETEVENTS, 0, 0, why="collect them")
            _run(task, thread, program)

        with doing(f"task {task.pid}"), doing(f"fd {fd} (io_uring)"):
            ours = _borrow(task, fd)
            try:
                uring_build.post_more(ours, entry, collect)
            finally:
                os.close(ours)


class _Ring:
    """A ring in one of its tasks."""

    def __init__(self, task: RestoredTask, fd: int, file_id: int, entry: Message) -> None:
        self.task = task
        self.fd = fd
        self.entry = entry
        places = {
            one.pgoff: one.start for one in task.mm.vmas if one.status & VMA_IO_URING and one.shmid == file_id
        }
        ring = places.get(io_uring.OFF_SQ_RING, places.get(io_uring.OFF_CQ_RING, 0))
        self.sqes = places.get(io_uring.OFF_SQES, 0)
        if not ring or not self.sqes:
            raise Unsupported("requests wait in a ring that is not mapped")
        shape = uring_build.params(entry)
        shape.unpack_offsets(entry.sq_entries, list(entry.offsets))
        self.shape = shape
        self.tail, self.array = ring + shape.sq_off["tail"], ring + shape.sq_off["array"]
        self.size = io_uring.SQE_BYTES * (2 if shape.flags & io_uring.SQE128 else 1)

    def submit(self) -> int:
        """Submit the task's requests; returns their number."""
        mine = {thread.tid: thread for thread in self.task.threads}
        taken = uring_build.taken(self.entry)
        ours = _borrow(self.task, self.fd)
        try:
            for tid, requests in _by_thread(self.entry.request, mine, self.entry.sq_entries):
                program = Program("requests")
                at = _counts(ours)[0]
                entered = self._emit(requests, at, program)
                run = _run(self.task, mine[tid], program)
                if run.result(entered) != len(requests):
                    raise KernelError("submitting the requests that wait", max(-run.result(entered), 1))
                taken += len(requests)
            self._check(ours)
        finally:
            os.close(ours)
        return taken - uring_build.taken(self.entry)

    def _emit(self, requests: list[Message], at: int, program: Program) -> Ref:
        """Emit it for at most as many as the ring has places, when ``at`` have been taken; returns the call."""
        mask = self.entry.sq_entries - 1
        places = [(at + index) & mask for index in range(len(requests))]
        array = not self.shape.flags & io_uring.NO_SQARRAY
        for place, one in zip(places, requests, strict=True):
            content = program.put(one.sqe.ljust(self.size, b"\0"))
            if one.HasField("time_ns"):
                moment = program.put(struct.pack("<qq", *divmod(one.time_ns, NS)))
                program.pointer(content, AT_ADDRESS, moment)
            self._write(self.sqes + place * self.size, content, self.size, program)
            if array:
                self._write(self.array + 4 * place, program.put(struct.pack("<I", place)), 4, program)
        self._write(self.tail, program.put(struct.pack("<I", at + len(requests) & 0xFFFFFFFF)), 4, program)
        entered = program.call("io_uring_enter", self.fd, len(requests), 0, 0, 0, 0, why="requests that wait")
        for place in places:
            self._write_back(self.sqes + place * self.size, self.entry.sqes, place * self.size, self.size, program)
            if array:
                self._write_back(self.array + 4 * place, self.entry.rings, self.shape.sq_off["array"] + 4 * place, 4,
                                 program)  # fmt: skip
        self._write_back(self.tail, self.entry.rings, self.shape.sq_off["tail"], 4, program)
        return entered

    def _write_back(self, address: int, content: bytes, start: int, size: int, program: Program) -> None:
        self._write(address, program.put(content[start : start + size].ljust(size, b"\0")), size, program)

    def _write(self, address: int, content: Data, size: int, program: Program) -> None:
        """A transfer from the task to itself."""
        source = program.put(struct.pack("<QQ", 0, size))
        program.pointer(source, 0, content)
        target = struct.pack("<QQ", address, size)
        program.call("process_vm_readv", self.task.own_pid, target, 1, source, 1, 0, why="write")

    def _check(self, ours: int) -> None:
        """Are they all under way, or have ended as they may?"""
        now, posted = _counts(ours)
        if len({one.thread for one in self.entry.request}) == 1 and now != self.entry.sq_head:
            raise Unsupported(f"an io_uring has taken {now} requests, not {self.entry.sq_head}")
        rings = io_uring.Rings(ours, self.shape)
        try:
            numbers = {struct.unpack_from("<Q", one.sqe, 32)[0] for one in self.entry.request}
            size = io_uring.cqe_bytes(self.shape.flags)
            for number in range(self.entry.cq_tail, posted):
                place = rings.params.cq_off["cqes"] + (number & self.entry.cq_entries - 1) * size
                user_data, result = struct.unpack_from("<Qi", rings.ring, place)
                if user_data in numbers and -result in WRONG:
                    raise KernelError("making a request again that waited", -result)
        finally:
            rings.close()


def _by_thread(
    requests: Iterable[Message], mine: Mapping[int, object], most: int
) -> Iterator[tuple[int, list[Message]]]:
    """(thread, requests) in their order, at most so many at once; what is linked stays together."""
    tid = 0
    lot: list[Message] = []
    for one in requests:
        if one.thread not in mine:
            continue
        linked = one.sqe[0] == LINK_TIMEOUT
        if lot and (one.thread != tid or len(lot) >= most - 1) and not linked:
            yield tid, lot
            lot = []
        tid = one.thread
        lot.append(one)
    if lot:
        yield tid, lot


def _counts(fd: int) -> tuple[int, int]:
    """Requests taken and completions posted."""
    while True:
        now = fdinfo_kinds.io_uring(fdinfo.parse(read(os.getpid(), f"fdinfo/{fd}")))
        if not now.busy:
            return now.CachedSqHead, now.CachedCqTail


def _borrow(task: RestoredTask, fd: int) -> int:
    """A descriptor of ours for a restored task's."""
    pidfd = os.pidfd_open(task.live_pid)
    try:
        return pidfd_getfd(pidfd, fd)
    finally:
        os.close(pidfd)


def _run(task: RestoredTask, thread: RestoredThread, program: Program) -> Run:
    """Run a program in a restored thread, which has its registers already and keeps them."""
    tid = thread.live_tid
    guest, mem_fd = _guest(task)
    try:
        run = guest.run(tid, thread.own_tid, program, ptrace.get_regs(tid), ptrace.get_sigmask(tid))
        guest.leave()
    finally:
        os.close(mem_fd)
    return run


def _guest(task: RestoredTask) -> tuple[Guest, int]:
    """A place in a restored task for programs, and a descriptor of its memory."""
    pid = task.live_pid
    status = proc_status.parse(read(pid, "status"))
    in_use = status.SigCgt | status.ShdPnd
    for thread in task.threads:
        in_use |= proc_status.parse(read(pid, f"task/{thread.live_tid}/status")).SigPnd
    rooms = collect.rooms_for_guest(proc_maps.parse(read(pid, "maps")))
    mem_fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        return Guest(pid, task.own_pid, mem_fd, rooms, in_use, Seized()), mem_fd
    except BaseException:
        os.close(mem_fd)
        raise
