"""Making an io_uring again: a new ring, with its counters where they were, and with its memory's content.

The kernel counts the requests that it has taken and the completions that it has posted by itself
(ctx->cached_sq_head, ctx->cached_cq_tail), from zero, and shows copies of its counts in the ring. Nothing sets them;
IORING_REGISTER_RESIZE_RINGS copies what it shows and leaves the counts alone. So as many empty requests are done as it
takes (IORING_OP_NOP: a submission entry of zeros, as all are in a new ring): about ten million in a second. Some
complete without a completion; where there were more completions than requests, another ring sends the rest
(IORING_OP_MSG_RING).

The kernel takes places for completions in advance, up to where the program's head allows (ctx->cqe_cached). So the
head never goes further than where it will stand: no place of a completion that waits to be reaped is ever taken.

Who makes a ring: the builder, with two exceptions. The thread of one with IORING_SETUP_SQPOLL is a part of the process
and has the credentials of its maker, and registered buffers count as memory pinned by the maker; so these are made by
the task itself, when it has its own credentials, and completed from outside. A ring with IORING_SETUP_SINGLE_ISSUER is
made disabled; it then belongs to the thread that enables it.
"""

from __future__ import annotations

import os
import struct
import time

from ..errors import ImageError, KernelError, Unsupported, doing
from ..limits import RING_REQUESTS_MAX
from ..linux import io_uring
from ..linux.io_uring import Params, Rings
from ..proc import fdinfo, fdinfo_kinds
from ..proc.read import read
from . import uring_memory
from .fown import set_flags
from .uring import KNOWN_FLAGS, LOTS_MAX
from .uring_requests import LINK_TIMEOUT, SUPPORTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..images.schema import Message
    from .base import BuildContext

WORD = (1 << 32) - 1
FILES_MAX, BUFFERS_MAX, OVERFLOW_MAX = 1 << 20, 1 << 14, 1 << 20
POLL_WAIT_S = 60.0
REQUESTS = (*SUPPORTED, LINK_TIMEOUT)
HELPER_ENTRIES = 256
_NUMBER = {f"sq {name}": index for index, name in enumerate(Params.SQ)} | {
    f"cq {name}": index + len(Params.SQ) for index, name in enumerate(Params.CQ)
}


class Target:
    """Where the counters of a ring have to get: requests taken, completions posted, of those reaped."""

    __slots__ = ("posted", "reaped", "taken")

    def __init__(self, taken: int, posted: int, reaped: int) -> None:
        self.taken = taken
        self.posted = posted
        self.reaped = reaped

    @classmethod
    def of(cls, entry: Message) -> Target:
        """What an image says. The requests that wait are taken later."""
        return cls(taken(entry), entry.cq_tail, word(entry, "cq head"))

    def steps(self) -> tuple[int, int, int, int, int]:
        """How to get there: requests with a completion that is reaped, messages of which that is true, requests with
        a completion that is not, messages of that kind, requests without a completion; in this order.
        """
        reaped = min(self.taken, self.reaped)
        waiting = min(self.taken - reaped, self.posted - self.reaped) if reaped == self.reaped else 0
        messages = self.reaped - reaped
        return reaped, messages, waiting, self.posted - self.reaped - waiting, self.taken - reaped - waiting


def word(entry: Message, name: str) -> int:
    """A word of the rings' memory in an image, by a name as in ``sq head``."""
    at = entry.offsets[_NUMBER[name]]
    return int.from_bytes(entry.rings[at : at + 4], "little")


def taken(entry: Message) -> int:
    """How many requests the kernel is to have taken, but for those that wait."""
    return int(entry.sq_head) - len(entry.request)


def check(entry: Message) -> None:
    """Raise ImageError for what no ring can be, Unsupported for what takes too long."""

    def require(truth: bool, field: str, why: str) -> None:
        if not truth:
            raise ImageError("files.img", f"file {entry.id}: uring: {field}", why)

    for field, most in (("sq_entries", io_uring.ENTRIES_MAX), ("cq_entries", 2 * io_uring.ENTRIES_MAX)):
        value = getattr(entry, field)
        require(0 < value <= most and not value & (value - 1), field, f"{value} is no size of a ring")
    require(not entry.setup & ~KNOWN_FLAGS, "setup", f"{entry.setup:#x} has flags that are not known")
    require(len(entry.offsets) == len(_NUMBER), "offsets", f"{len(entry.offsets)} of {len(_NUMBER)}")
    require(len(entry.file) <= FILES_MAX, "file", f"{len(entry.file)} are more than a ring can have")
    require(len(entry.buffer) <= BUFFERS_MAX, "buffer", f"{len(entry.buffer)} are more than a ring can have")
    require(len(entry.overflow) <= OVERFLOW_MAX, "overflow", f"{len(entry.overflow)} are too many")
    require(len(entry.max_workers) in (0, 2), "max_workers", "there are two of them")
    require(len(entry.alloc_range) in (0, 2), "alloc_range", "it has a start and a length")
    wrong = uring_memory.check(entry)
    require(not wrong, "memory", wrong)
    bound = entry.setup & (io_uring.SQPOLL | io_uring.SINGLE_ISSUER) or any(one.length for one in entry.buffer)
    require(not (entry.memory and (bound or entry.request)), "memory", "not of a ring of this kind")
    reaped = word(entry, "cq head")
    require(entry.cq_tail - reaped in range(entry.cq_entries + 1), "cq_tail", f"{entry.cq_tail}, with head {reaped}")
    require(taken(entry) >= 0, "request", f"{len(entry.request)} are more than the ring has taken")
    for one in entry.request:
        require(len(one.sqe) == io_uring.SQE_BYTES, "request", f"an entry of {len(one.sqe)} bytes")
        require(one.sqe[0] in REQUESTS, "request", f"operation {one.sqe[0]} does not wait")
    if entry.request:
        require(not entry.setup & (io_uring.SQPOLL | io_uring.R_DISABLED), "request", "not in a ring of this kind")
    if entry.setup & io_uring.SINGLE_ISSUER and not entry.setup & io_uring.SQPOLL:
        more = entry.cq_tail - taken(entry)
        require(more <= LOTS_MAX * entry.cq_entries, "cq_tail", f"{entry.cq_tail}: {more} more than requests")
        require(not entry.overflow, "overflow", "not in a ring of one thread")
    if max(entry.sq_head, entry.cq_tail) > RING_REQUESTS_MAX:
        raise Unsupported(f"file {entry.id}: an io_uring that has had {max(entry.sq_head, entry.cq_tail)} requests")


def params(entry: Message, *, wq_fd: int = -1) -> Params:
    """How to make it; ``wq_fd`` is the ring whose polling thread it shares."""
    flags = entry.setup & ~(io_uring.CLAMP | io_uring.ATTACH_WQ) | io_uring.CQSIZE
    if wq_fd >= 0:
        flags |= io_uring.ATTACH_WQ
    return Params(flags, entry.cq_entries, cpu=entry.sq_cpu, idle_ms=entry.idle_ms, wq_fd=max(wq_fd, 0))


def check_layout(entry: Message, made: Params) -> None:
    """Raise Unsupported if a program that remembers the old ring's layout would not find its way about the new one."""
    if made.offsets != list(entry.offsets):
        raise Unsupported("the kernel lays out an io_uring's memory in another way than the one that it was dumped on")
    if len(entry.rings) > made.ring_bytes or len(entry.sqes) > made.sqe_bytes:
        raise ImageError("files.img", f"file {entry.id}: uring: rings", "they are larger than the ring")


def made_by_task(entry: Message) -> bool:
    """Is it for the task to make it, and not for the builder?"""
    pinned = any(one.length for one in entry.buffer) and not entry.setup & io_uring.SINGLE_ISSUER
    return bool(entry.setup & io_uring.SQPOLL or pinned)


# ------------------------------------------------------------------------- those that the builder makes


def make(entry: Message, ctx: BuildContext) -> int:
    """A descriptor for a ring as it was; for one of a thread's own, all but the counters and the content."""
    shape = params(entry)
    single = bool(shape.flags & io_uring.SINGLE_ISSUER)
    if single:
        shape.flags |= io_uring.R_DISABLED
    memory = uring_memory.empty(entry, shape, ctx) if entry.memory else None
    try:
        fd = io_uring.setup(entry.sq_entries, shape)
    except BaseException:
        if memory is not None:
            memory.close()
        raise
    try:
        check_layout(entry, shape)
        set_flags(fd, entry.flags)
        if not single:
            bring_up(fd, shape, entry, memory)
        register(fd, entry, ctx)
        if entry.eventfd and (not single or entry.setup & io_uring.R_DISABLED):
            register_eventfd(fd, entry, ctx)
    except BaseException:
        os.close(fd)
        raise
    return fd


def register(fd: int, entry: Message, ctx: BuildContext) -> None:
    """Register its files, and what else can be said to it at any time."""
    if entry.file:
        fds = [ctx.build(one.id) if one.id else -1 for one in entry.file]
        io_uring.register_files(fd, fds, [one.tag for one in entry.file])
    for what, data, count in settings(entry):
        io_uring.register(fd, what, data, count)


def settings(entry: Message) -> list[tuple[int, bytes, int]]:
    """(what, argument, its length) of registrations that are numbers alone."""
    found = []
    if entry.alloc_range:
        found.append((io_uring.REGISTER_FILE_ALLOC_RANGE, struct.pack("<IIQ", *entry.alloc_range, 0), 0))
    if entry.max_workers:
        found.append((io_uring.REGISTER_IOWQ_MAX_WORKERS, struct.pack("<II", *entry.max_workers), 2))
    if entry.HasField("clockid"):
        found.append((io_uring.REGISTER_CLOCK, struct.pack("<I12x", entry.clockid), 0))
    return found


def register_eventfd(fd: int, entry: Message, ctx: BuildContext) -> None:
    """From here on completions are signalled."""
    what = io_uring.REGISTER_EVENTFD_ASYNC if entry.eventfd_async else io_uring.REGISTER_EVENTFD
    io_uring.register(fd, what, struct.pack("<i", ctx.build(entry.eventfd)), 1)


# --------------------------------------------------------------------------------- counters and content


def bring_up(fd: int, shape: Params, entry: Message, memory: Rings | None = None) -> None:
    """Bring a ring that we may submit to, or whose thread does so, to where it was. ``memory``: its own, if we have it
    already; it is closed.
    """
    rings = memory or Rings(fd, shape)
    try:
        if not shape.flags & io_uring.R_DISABLED:
            _advance(fd, rings, Target.of(entry), entry)
        fill(rings, entry)
        verify(fd, entry)
    finally:
        rings.close()


def finish(fd: int, entry: Message) -> None:
    """Give a ring that has been brought to where it was its content."""
    shape = params(entry)
    shape.unpack_offsets(entry.sq_entries, list(entry.offsets))
    rings = Rings(fd, shape)
    try:
        fill(rings, entry)
        verify(fd, entry)
    finally:
        rings.close()


def _advance(fd: int, rings: Rings, target: Target, entry: Message) -> None:
    submit = _Polled(fd, rings) if rings.params.flags & io_uring.SQPOLL else _Submitted(fd, rings)
    reaped, reaped_sent, waiting, waiting_sent, silent = target.steps()
    submit(reaped, follow=True)
    if reaped_sent or waiting_sent or entry.overflow:
        with _Sender(fd) as sender:
            sender.send(reaped_sent, after=lambda: rings.set_cq("head", rings.cq("tail")), room=rings.params.cq_entries)
            submit(waiting, follow=False)
            sender.send(waiting_sent, after=lambda: None, room=rings.params.cq_entries)
            for one in entry.overflow:
                sender.post(io_uring.message(fd, one.user_data, one.res, one.flags), 1)
    else:
        submit(waiting, follow=False)
    if silent:
        size = io_uring.SQE_BYTES * (2 if rings.params.flags & io_uring.SQE128 else 1)
        for place in range(0, len(rings.sqes) if rings.params.flags & io_uring.NO_SQARRAY else size, size):
            rings.sqes[place + 1] = io_uring.CQE_SKIP_SUCCESS
        submit(silent, follow=False)


class _Submitted:
    """Submits empty requests."""

    def __init__(self, fd: int, rings: Rings) -> None:
        self.fd = fd
        self.rings = rings

    def __call__(self, count: int, *, follow: bool) -> None:
        """``follow``: have their completions reaped."""
        rings, fd = self.rings, self.fd
        batch, enter = rings.params.sq_entries, io_uring.enter
        head, reaped = rings.params.cq_off["head"], rings.cq("head")
        pack, ring = struct.pack_into, rings.ring
        # All at once: the kernel takes no more at a time than fit into the ring.
        rings.set_sq("tail", rings.sq("tail") + count)
        while count > 0:
            done = enter(fd, min(count, batch))
            if not done:
                raise Unsupported("the kernel does not take an empty request for an io_uring")
            count -= done
            if follow:
                reaped += done
                pack("<I", ring, head, reaped & WORD)


class _Polled:
    """Lets the ring's thread take empty requests."""

    def __init__(self, fd: int, rings: Rings) -> None:
        self.fd = fd
        self.rings = rings

    def __call__(self, count: int, *, follow: bool) -> None:
        """``follow``: have their completions reaped."""
        rings = self.rings
        tail = rings.sq("tail")
        while count > 0:
            part = min(count, rings.params.sq_entries)
            tail += part
            rings.set_sq("tail", tail)
            self._await(tail)
            count -= part
            if follow:
                rings.set_cq("head", rings.cq("tail"))

    def _await(self, head: int) -> None:
        rings = self.rings
        tries, deadline = 0, time.monotonic() + POLL_WAIT_S
        while rings.sq("head") != head & WORD:
            if rings.sq("flags") & io_uring.SQ_NEED_WAKEUP:
                io_uring.enter(self.fd, 0, io_uring.ENTER_SQ_WAKEUP)
            tries += 1
            if tries > 100:
                time.sleep(0.0001)
            if tries % 1000 == 0 and time.monotonic() > deadline:
                raise Unsupported("the thread that polls an io_uring takes no requests")


class _Sender:
    """A ring that posts completions to another one."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __enter__(self) -> _Sender:
        shape = Params(0)
        self.fd = io_uring.setup(HELPER_ENTRIES, shape)
        try:
            self.rings = Rings(self.fd, shape)
        except BaseException:
            os.close(self.fd)
            raise
        self._submit = _Submitted(self.fd, self.rings)
        return self

    def __exit__(self, *_: object) -> None:
        self.rings.close()
        os.close(self.fd)

    def send(self, count: int, *, after: Callable[[], None], room: int) -> None:
        """Post completions of no matter what; ``after`` each lot, of at most ``room``, call that."""
        entry = io_uring.message(self.target, 0, 0, 0)
        while count > 0:
            part = min(count, room, HELPER_ENTRIES)
            self.post(entry, part)
            after()
            count -= part

    def post(self, entry: bytes, count: int) -> None:
        """Do the request ``entry`` that often."""
        self.rings.sqes[: len(entry)] = entry
        self._submit(count, follow=False)
        if self.rings.cq("tail"):
            at = self.rings.params.cq_off["cqes"]
            (result,) = struct.unpack_from("<i", self.rings.ring, at + 8)
            raise KernelError("posting a completion to an io_uring", max(-result, 1))


def has_more(entry: Message) -> bool:
    """Has a ring of one thread had completions beyond its requests?"""
    single = entry.setup & io_uring.SINGLE_ISSUER and not entry.setup & (io_uring.SQPOLL | io_uring.R_DISABLED)
    return bool(single and entry.cq_tail > taken(entry))


def post_more(fd: int, entry: Message, collect: Callable[[int], None]) -> None:
    """Post those completions, which nobody but another ring can (IORING_OP_MSG_RING). ``collect`` sends the thread for
    so many: with IORING_SETUP_DEFER_TASKRUN it is the thread that posts them.
    """
    _, reaped, _, waiting, _ = Target.of(entry).steps()
    shape = params(entry)
    shape.unpack_offsets(entry.sq_entries, list(entry.offsets))
    rings = Rings(fd, shape)
    message = io_uring.message(fd, 0, 0, 0)
    try:
        with _Sender(fd) as sender:
            while reaped:
                lot = min(reaped, entry.cq_entries)
                sender.post(message, lot)
                collect(lot)
                rings.set_cq("head", rings.cq("tail"))
                reaped -= lot
            if waiting:
                sender.post(message, waiting)
                collect(waiting)
    finally:
        rings.close()


def fill(rings: Rings, entry: Message) -> None:
    """Write the content: all but what the kernel alone says. The tail last, for a thread may be polling it."""
    shape = rings.params
    for name in ("ring_mask", "ring_entries"):
        if (word(entry, f"sq {name}"), word(entry, f"cq {name}")) != (rings.sq(name), rings.cq(name)):
            raise ImageError("files.img", f"file {entry.id}: uring: rings", f"the {name} is not that of such a ring")
    content = bytearray(entry.rings.ljust(shape.ring_bytes, b"\0"))
    flags, tail = shape.sq_off["flags"], shape.sq_off["tail"]
    rings.sqes[:] = entry.sqes.ljust(shape.sqe_bytes, b"\0")
    kept = sorted((flags, tail))
    start = 0
    for at in (*kept, len(content)):
        rings.ring[start:at] = bytes(content[start:at])
        start = at + 4
    rings.ring[tail : tail + 4] = bytes(content[tail : tail + 4])


def verify(fd: int, entry: Message) -> None:
    """Raise Unsupported if the kernel's own counters are not where they were."""
    now = fdinfo_kinds.io_uring(fdinfo.parse(read(os.getpid(), f"fdinfo/{fd}")))
    if entry.setup & io_uring.SQPOLL:
        return  # its thread may have taken the next ones already
    if (now.CachedSqHead, now.CachedCqTail) != (taken(entry), entry.cq_tail):
        raise Unsupported(
            f"an io_uring's counters stand at {now.CachedSqHead} and {now.CachedCqTail}, not at {taken(entry)} and "
            f"{entry.cq_tail}",
            hint="please report this",
        )


def moved(before: int, now: int, ctx: BuildContext) -> None:
    """A process of one thread gets another number than it had: its rings are that thread's. Before its program is
    written.
    """
    ctx.files = dict(ctx.files)  # those of its siblings stay as they are
    for file_id, (resource, entry) in ctx.files.items():
        if resource.FIELD != "uring" or before not in (entry.submitter, *(one.thread for one in entry.request)):
            continue
        own = type(entry)()
        own.CopyFrom(entry)
        for one in own.request:
            one.thread = now if one.thread == before else one.thread
        own.submitter = now if own.submitter == before else own.submitter
        ctx.files[file_id] = resource, own


def context(entry: Message) -> doing:
    """What is being done, for errors."""
    return doing(f"file {entry.id} (io_uring)")
