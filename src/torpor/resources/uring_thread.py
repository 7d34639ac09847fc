"""What a thread does for the io_urings that belong to it: it makes them, or enables them and brings their counters to
where they were.
"""

from __future__ import annotations

import os
import struct

from ..errors import ImageError, Unsupported
from ..linux import io_uring
from ..linux.kernel import pidfd_getfd
from ..remote.machine import RECORD_BYTES
from . import uring, uring_build
from .uring_emit import ADDRESS_END, emit_buffers, emit_mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from ..remote.program import Program
    from .base import BuildContext

FUTEX_WAKE, FUTEX_WAKE_OP, FUTEX_PRIVATE = 1, 5, 128
FUTEX_OP_ADD_SHIFTED = 1 | 8  # *word += 1 << argument
IOV_MAX = 1024


def emit(own: dict[int, tuple[Message, bool]], task: Any, program: Program, ctx: BuildContext) -> None:
    """Emit it for the rings ``own``: fd → (entry, close-on-exec)."""
    first: dict[int, int] = {}
    # A ring whose polling thread others share comes first.
    for fd, (entry, cloexec) in sorted(own.items(), key=lambda item: (item[1][0].HasField("polled_as"), item[0])):
        if entry.id in first:
            if uring_build.made_by_task(entry):
                program.call("dup3", first[entry.id], fd, os.O_CLOEXEC if cloexec else 0)
        elif uring_build.made_by_task(entry):
            _emit_ring(entry, fd, cloexec, first, task, program, ctx)
        elif not entry.setup & io_uring.R_DISABLED:
            _emit_enabling(entry, fd, task, program, ctx)
        first.setdefault(entry.id, fd)
        for add_watch in ctx.memo["late fds", f"task {task.pid}"][fd]:
            add_watch(program)


def _emit_ring(
    entry: Message, fd: int, cloexec: bool, made: dict[int, int], task: Any, program: Program, ctx: BuildContext
) -> None:
    """Emit a ring that the task makes; the rest is done from outside when it is there."""
    leader = made.get(entry.polled_as, -1) if entry.HasField("polled_as") else -1
    if entry.HasField("polled_as") and leader < 0:
        raise ImageError("files.img", f"file {entry.id}: uring: polled_as", f"{entry.polled_as} is no ring of the task")
    shape = uring_build.params(entry, wq_fd=leader)
    numbers = {number for number, _, _ in task.fds}
    fresh = next(number for number in range(len(numbers) + 1) if number not in numbers)  # what the kernel will give
    program.call("io_uring_setup", entry.sq_entries, shape.pack().ljust(120, b"\0"), why="a ring")
    program.call("dup3", fresh, fd, os.O_CLOEXEC if cloexec else 0)
    program.call("close", fresh)
    for mapping in ctx.memo.get(("io_uring mappings", entry.id), {}).values():
        there = [one for one in task.mm.vmas if one.start != mapping.start and one.start < ADDRESS_END]
        others = [(one.start, one.end) for one in there]
        program.call("munmap", mapping.start, mapping.end - mapping.start)
        emit_mapping(mapping, fd, mapping.prot, [ctx.memo["arena"], *others], program)
        for bit in range(mapping.madv.bit_length()):
            if mapping.madv >> bit & 1:
                program.call("madvise", mapping.start, mapping.end - mapping.start, bit)
    emit_buffers(entry, fd, program)
    if entry.file:
        held = {file_id: number for number, file_id, _ in reversed(task.fds)}
        missing = [one.id for one in entry.file if one.id and one.id not in held]
        if missing:
            raise Unsupported(f"fd {fd} (io_uring): file {missing[0]} is registered with it and not open in its task")
        fds = [held[one.id] if one.id else -1 for one in entry.file]
        argument = program.put(io_uring.rsrc_register(len(fds)))
        program.pointer(argument, 16, program.put(struct.pack(f"<{len(fds)}i", *fds)))
        program.pointer(argument, 24, program.put(struct.pack(f"<{len(fds)}Q", *(one.tag for one in entry.file))))
        program.call("io_uring_register", fd, io_uring.REGISTER_FILES2, argument, 32, why="registered files")
    for what, data, count in uring_build.settings(entry):
        program.call("io_uring_register", fd, what, data, count)
    pid = task.pid
    key = ("io_uring finished from outside", entry.id)
    if key not in ctx.memo:
        ctx.memo[key] = True
        ctx.memo.setdefault("after_restore", []).append(lambda: _finish_ring(entry, fd, pid, ctx))


def _finish_ring(entry: Message, fd: int, pid: int, ctx: BuildContext) -> None:
    with uring_build.context(entry):
        pidfd = os.pidfd_open(ctx.live.get(pid, pid))
        try:
            ours = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
        try:
            shape = uring_build.params(entry)
            shape.unpack_offsets(entry.sq_entries, list(entry.offsets))
            uring_build.check_layout(entry, uring.layout(shape.flags, entry.sq_entries, entry.cq_entries))
            uring_build.bring_up(ours, shape, entry)
            if entry.eventfd:
                uring_build.register_eventfd(ours, entry, ctx)
        finally:
            os.close(ours)


def _emit_enabling(entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext) -> None:
    """Emit what only the thread that owns a ring may do."""
    program.call("io_uring_register", fd, io_uring.REGISTER_ENABLE_RINGS, 0, 0, why="the ring is this thread's")
    if uring_build.taken(entry):
        mappings = {one.pgoff: one.start for one in ctx.memo.get(("io_uring mappings", entry.id), {}).values()}
        ring = mappings.get(io_uring.OFF_SQ_RING, mappings.get(io_uring.OFF_CQ_RING, 0))
        if not ring or io_uring.OFF_SQES not in mappings:
            raise Unsupported(f"fd {fd} (io_uring): it has been used and is not mapped")
        _Advance(entry, fd, task.own_pid, ring, mappings[io_uring.OFF_SQES], program).emit()
    if entry.eventfd:
        number = next((number for number, file_id, _ in task.fds if file_id == entry.eventfd), -1)
        if number < 0:
            raise Unsupported(f"fd {fd} (io_uring): the eventfd registered with it is not open in its task")
        what = io_uring.REGISTER_EVENTFD_ASYNC if entry.eventfd_async else io_uring.REGISTER_EVENTFD
        program.call("io_uring_register", fd, what, struct.pack("<i", number), 1, why="eventfd")


class _Place:
    """Where a record lies when the program runs, for a jump to it: a record whose result is 0 goes on at its child."""

    __slots__ = ("_index", "_program")

    def __init__(self, program: Program, index: int) -> None:
        self._program = program
        self._index = index

    @property
    def base(self) -> int:
        return self._program.base + self._index * RECORD_BYTES


class _Advance:
    """The calls that bring the counters of a thread's own ring to where they were.

    Loops, because there may be a billion requests: io_uring_enter(2) returns 0 when there is nothing left to submit,
    and the futex calls always do.
    """

    def __init__(self, entry: Message, fd: int, pid: int, ring: int, sqes: int, program: Program) -> None:
        self.entry = entry
        self.fd = fd
        self.pid = pid
        self.sqes = sqes
        self.program = program
        names = [f"sq {name}" for name in io_uring.Params.SQ] + [f"cq {name}" for name in io_uring.Params.CQ]
        self.at = {name: ring + offset for name, offset in zip(names, entry.offsets, strict=True)}

    def emit(self) -> None:
        """Emit them."""
        target = uring_build.Target.of(self.entry)
        reaped, _, waiting, _, silent = target.steps()
        batch = self.entry.sq_entries
        whole = reaped - reaped % batch
        if whole:
            self._poke(self.at["sq tail"], struct.pack("<I", whole))
            self._loop(self._add, batch.bit_length() - 1)
        if reaped % batch:
            self._poke(self.at["sq tail"], struct.pack("<I", reaped))
            self._enter(reaped % batch)
            self._poke(self.at["cq head"], struct.pack("<I", reaped))
        if waiting:
            self._poke(self.at["sq tail"], struct.pack("<I", reaped + waiting))
            for _ in range(-(-waiting // batch)):
                self._enter(batch)
        if silent:
            self._skip_completions()
            self._poke(self.at["sq tail"], struct.pack("<I", target.taken))
            self._loop(self._nothing, 0)

    def _loop(self, between: Any, argument: int) -> None:
        """Submit lot after lot until nothing is left."""
        start = len(self.program)
        self._enter(self.entry.sq_entries, at_end=_Place(self.program, start + 2))
        between(argument, _Place(self.program, start))

    def _enter(self, count: int, at_end: Any = None) -> None:
        self.program.call("io_uring_enter", self.fd, count, 0, 0, 0, 0, child=at_end, why="empty requests")

    def _add(self, shift: int, back: Any) -> None:
        """Have the completions reaped, by adding to the head."""
        head = self.at["cq head"]
        operation = FUTEX_OP_ADD_SHIFTED << 28 | shift << 12
        self.program.call(
            "futex", head, FUTEX_WAKE_OP | FUTEX_PRIVATE, 0, 0, head, operation, child=back, why="reap them; again"
        )

    def _nothing(self, _: int, back: Any) -> None:
        self.program.call("futex", self.at["cq head"], FUTEX_WAKE | FUTEX_PRIVATE, 0, 0, 0, 0, child=back, why="again")

    def _poke(self, address: int, content: bytes) -> None:
        """Write to the task's memory: a transfer from the task to itself."""
        program = self.program
        source = program.put(struct.pack("<QQ", 0, len(content)))
        program.pointer(source, 0, program.put(content))
        target = struct.pack("<QQ", address, len(content))
        program.call("process_vm_readv", self.pid, target, 1, source, 1, 0, why="write")

    def _skip_completions(self) -> None:
        """Have the entries ask for no completion: the first one, which is the only one that is used where there is an
        array of their numbers; else all of them.
        """
        setup = self.entry.setup
        size = io_uring.SQE_BYTES * (2 if setup & io_uring.SQE128 else 1)
        count = self.entry.sq_entries if setup & io_uring.NO_SQARRAY else 1
        one = bytes((0, io_uring.CQE_SKIP_SUCCESS)).ljust(size, b"\0")
        lot = min(count, IOV_MAX)
        for start in range(0, count, lot):
            self._poke(self.sqes + start * size, one * min(lot, count - start))
