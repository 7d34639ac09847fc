"""Requests of an io_uring that wait for an event or for their time: what the kernel knows of them, read by BPF, and the
submission entry that makes each of them again.

A request that waits has had no effect yet, so nothing is cancelled: it is recorded, and submitted again by the same
thread of the restored process. What has had a part of its effect (bytes received of those that it waits for) and what
cannot be told from the structures is refused by name. Kernel: include/linux/io_uring_types.h, struct io_kiocb;
io_uring/poll.c, net.c, rw.c and timeout.c, whose structures lie in its first bytes.
"""

from __future__ import annotations

import struct
import time

from ..linux import btf, io_uring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .uring_state import Kernel, State

OTHERS = """
    io_kiocb{} io_kiocb.opcode io_kiocb.file io_kiocb.flags io_kiocb.buf_index io_kiocb.cqe.user_data io_kiocb.tctx
    io_kiocb.hash_node io_kiocb.apoll io_kiocb.async_data io_kiocb.poll_refs io_kiocb.link
    io_poll.events io_poll.head io_poll.wait async_poll{} async_poll.poll
    wait_queue_head.head wait_queue_entry.entry wait_queue_entry.flags
    io_accept.addr io_accept.addr_len io_accept.flags io_accept.iou_flags io_accept.file_slot
    io_sr_msg.buf io_sr_msg.len io_sr_msg.done_io io_sr_msg.msg_flags io_sr_msg.flags io_sr_msg.buf_group
    io_sr_msg.mshot_len? io_sr_msg.mshot_total_len? io_async_msghdr{} io_async_msghdr.msg.msg_namelen
    io_rw.kiocb.ki_pos io_rw.addr io_rw.len io_rw.flags io_async_rw{} io_async_rw.bytes_done
    io_timeout.off io_timeout.target_seq io_timeout.list io_timeout_data{} io_timeout_data.timer.node.expires
    io_timeout_data.ts io_timeout_data.flags io_ring_ctx.timeout_list
""".split()

(READ, WRITE, POLL_ADD, TIMEOUT, ACCEPT, LINK_TIMEOUT, SEND, RECV, READ_MULTISHOT) = (
    io_uring.OPERATIONS.index(name)
    for name in "read write poll_add timeout accept link_timeout send recv read_multishot".split()
)
#: What can be made again.
SUPPORTED = (READ, WRITE, POLL_ADD, TIMEOUT, ACCEPT, SEND, RECV, READ_MULTISHOT)
LIST_MAX = 1 << 16
# IOSQE_*, which are the low bits of io_kiocb.flags
FIXED_FILE, DRAIN, LINK, HARDLINK, ASYNC, BUFFER_SELECT, CQE_SKIP = (1 << bit for bit in range(7))
EPOLLEXCLUSIVE, EPOLLONESHOT, EPOLLET = 1 << 28, 1 << 30, 1 << 31
POLL_ADD_MULTI, POLL_ADD_LEVEL = 1, 8
POLL_TRIGGERED = (1 << 30) - 1  # IO_POLL_REF_MASK
RECV_MULTISHOT, RECVSEND_KNOWN = 2, 0x13  # of sqe.ioprio: IORING_RECVSEND_POLL_FIRST, RECV_MULTISHOT, BUNDLE
RECVSEND_RETRIES = 0x1800 | 0xC000  # set by the kernel itself when it has a part: IORING_RECV_RETRY and its like
MSG_WAITALL = 0x100
TIMEOUT_ABS, TIMEOUT_BOOTTIME, TIMEOUT_REALTIME, TIMEOUT_MULTISHOT = 1, 4, 8, 64
WQ_FLAG_EXCLUSIVE = 1
NS = 1_000_000_000
#: Where in struct io_uring_sqe: the descriptor, and the address.
AT_FD, AT_ADDRESS = 4, 16


def sqe(
    opcode: int, flags: int = 0, *, ioprio: int = 0, off: int = 0, addr: int = 0, length: int = 0, op_flags: int = 0,
    user_data: int = 0, buf_index: int = 0, file_index: int = 0,
) -> bytes:  # fmt: skip
    """struct io_uring_sqe, without the descriptor."""
    head = (opcode, flags, ioprio, 0, off, addr, length, op_flags, user_data, buf_index, 0, file_index)
    return struct.pack("<BBHiQQIIQHHI", *head).ljust(io_uring.SQE_BYTES, b"\0")


class Request:
    """A request that waits: its operation, and the address of the struct file that it is about (0: none)."""

    __slots__ = ("address", "behind", "context", "file", "opcode", "order", "sqe", "time_ns", "triggered", "trouble")

    def __init__(self, address: int, opcode: int, file: int, context: int) -> None:
        self.address = address
        self.opcode = opcode
        self.file = file
        #: The address of the struct io_uring_task of who has submitted it.
        self.context = context
        #: What makes it again, but for its descriptor and the address of its time; why that is not possible.
        self.sqe = b""
        self.trouble = ""
        #: Of a timeout: what is left of it, or the point in time.
        self.time_ns: int | None = None
        #: Has its event come already, and only its task has not seen to it?
        self.triggered = False
        #: The timeout that is linked to it.
        self.behind: Request | None = None
        #: Among those that wait for the same thing: when it is to be submitted.
        self.order = 0

    @property
    def name(self) -> str:
        """What the operation is called."""
        known = self.opcode < len(io_uring.OPERATIONS)
        return io_uring.OPERATIONS[self.opcode] if known else f"operation {self.opcode}"

    @property
    def count(self) -> int:
        """How many requests it is, with what is linked to it."""
        return 1 + (self.behind is not None)

    @property
    def fixed_file(self) -> bool:
        """Is its file one that is registered with the ring?"""
        return bool(self.sqe[1] & FIXED_FILE)


class _Struct:
    """A structure of the kernel's: ``word("struct.field")`` is an unsigned number there."""

    def __init__(self, data: bytes, at: dict[str, int], start: int = 0) -> None:
        self.data = data
        self.at = at
        self.start = start

    def word(self, question: str, size: int = 8) -> int:
        at = self.start + self.at[question]
        return int.from_bytes(self.data[at : at + size], "little")


class Reader:
    """Reads the requests of rings."""

    def __init__(self, kernel: Kernel) -> None:
        """Raises Unsupported where the kernel describes them in another way."""
        self.memory = kernel.memory
        self.at = btf.lookup(OTHERS)
        self.kernel = kernel

    def read(self, state: State) -> list[Request]:
        """The requests of a ring that wait, as far as the kernel lists them, in the order to submit them in."""
        polled, timed = self._polled(state), self._timed(state)
        size = self.at["io_kiocb{}"]
        structs = [_Struct(data, self.at) for data in self.memory.read((one, size) for one in (*polled, *timed))]
        found = []
        for address, request in zip((*polled, *timed), structs, strict=True):
            opcode, file = request.word("io_kiocb.opcode", 1), request.word("io_kiocb.file")
            found.append(Request(address, opcode, file, request.word("io_kiocb.tctx")))
        waiting = found[: len(polled)]
        for one, request in zip(waiting, structs, strict=False):
            one.triggered = bool(request.word("io_kiocb.poll_refs", 4) & POLL_TRIGGERED)
        self._find_order(waiting, structs)
        seconds = self._second_structs(found, structs)
        for one, request, second in zip(found, structs, seconds, strict=True):
            _explain(one, request, _Struct(second, self.at), state)
            if link := request.word("io_kiocb.link"):
                self._follow(one, link, state)
        return [*sorted(waiting, key=lambda one: one.order), *found[len(polled) :]]

    def _polled(self, state: State) -> list[int]:
        stride, bits = self.kernel.at["io_hash_bucket{}"], state.numbers["cancel_bits"]
        table = state.numbers["cancel_table"]
        nodes = self.memory.words(table + stride * index for index in range(1 << bits)) if table else []
        found: dict[int, None] = {}  # what is taken out meanwhile may lead round in a circle
        while nodes := [node for node in nodes if node and node not in found]:
            found.update(dict.fromkeys(nodes))
            if len(found) > LIST_MAX:
                break
            nodes = self.memory.words(nodes)
        return [node - self.at["io_kiocb.hash_node"] for node in found]

    def _timed(self, state: State) -> list[int]:
        head = state.address + self.at["io_ring_ctx.timeout_list"]
        (node,) = self.memory.words([head])
        found: dict[int, None] = {}  # one whose time has come leads to itself (list_del_init())
        while node not in (head, 0) and node not in found and len(found) < LIST_MAX:
            found[node] = None
            (node,) = self.memory.words([node])
        return [node - self.at["io_timeout.list"] for node in found]

    def _second_structs(self, found: list[Request], structs: list[_Struct]) -> list[bytes]:
        """What the kernel has allocated besides, for each."""
        sizes = dict.fromkeys((READ, WRITE, READ_MULTISHOT), self.at["io_async_rw{}"])
        sizes |= dict.fromkeys((SEND, RECV), self.at["io_async_msghdr{}"])
        sizes |= dict.fromkeys((TIMEOUT, LINK_TIMEOUT), self.at["io_timeout_data{}"])
        spans = [
            (request.word("io_kiocb.async_data") if one.opcode in sizes else 0, sizes.get(one.opcode, 0))
            for one, request in zip(found, structs, strict=True)
        ]
        return self.memory.read(spans)

    def _follow(self, one: Request, link: int, state: State) -> None:
        (data,) = self.memory.read([(link, self.at["io_kiocb{}"])])
        request = _Struct(data, self.at)
        behind = Request(link, request.word("io_kiocb.opcode", 1), 0, one.context)
        if behind.opcode != LINK_TIMEOUT or request.word("io_kiocb.link"):
            one.trouble = one.trouble or f"{behind.name} is linked to it"
            return
        (second,) = self._second_structs([behind], [request])
        _explain(behind, request, _Struct(second, self.at), state)
        one.trouble = one.trouble or behind.trouble
        one.behind = behind

    def _find_order(self, waiting: list[Request], structs: list[_Struct]) -> None:
        """Those that wait for the same thing are woken in the order of its queue: the last comes first, or, of those of
        whom one alone is woken, the first (add_wait_queue(), add_wait_queue_exclusive()).
        """
        at = self.at
        pointers = [request.word("io_kiocb.apoll") if one.opcode != POLL_ADD else 0 for one, request in zip(
            waiting, structs, strict=False)]  # fmt: skip
        polls = self.memory.read((pointer, at["async_poll{}"]) for pointer in pointers)
        queues: dict[int, list[tuple[int, Request]]] = {}
        for one, request, pointer, data in zip(waiting, structs, pointers, polls, strict=False):
            poll = _Struct(data, at, at["async_poll.poll"]) if pointer else request
            entry = at["io_poll.wait"] + at["wait_queue_entry.entry"]
            place = (pointer + at["async_poll.poll"] if pointer else one.address) + entry
            queues.setdefault(poll.word("io_poll.head"), []).append((place, one))
        for head, members in queues.items():
            if head and len(members) > 1:
                self._number(head + at["wait_queue_head.head"], dict(members))

    def _number(self, head: int, members: dict[int, Request]) -> None:
        (node,) = self.memory.words([head])
        seen: set[int] = set()
        flags_at = self.at["wait_queue_entry.flags"] - self.at["wait_queue_entry.entry"]
        while node not in (head, 0) and node not in seen and len(seen) < LIST_MAX:
            seen.add(node)
            if node in members:
                (flags,) = self.memory.read([(node + flags_at, 4)])
                members[node].order = len(seen) if flags[0] & WQ_FLAG_EXCLUSIVE else -len(seen)
            (node,) = self.memory.words([node])


# ---------------------------------------------------------------- what makes a request again, by its operation


def _explain(one: Request, request: _Struct, second: _Struct, state: State) -> None:
    flags = request.word("io_kiocb.flags") & 0x7F
    user_data = request.word("io_kiocb.cqe.user_data")
    if flags & DRAIN:
        one.trouble = "it waits for all that came before it (IOSQE_IO_DRAIN)"
    if not request.word("io_kiocb.link"):
        flags &= ~(LINK | HARDLINK)
    if one.opcode == POLL_ADD:
        one.sqe = _poll_add(request, flags, user_data)
    elif one.opcode == ACCEPT:
        one.sqe = _accept(request, flags, user_data)
    elif one.opcode in (SEND, RECV):
        _send_or_recv(one, request, second, flags, user_data)
    elif one.opcode in (READ, WRITE, READ_MULTISHOT):
        _read_or_write(one, request, second, flags, user_data)
    elif one.opcode in (TIMEOUT, LINK_TIMEOUT):
        _timeout(one, request, second, state, flags, user_data)
    else:
        one.sqe = sqe(one.opcode, flags, user_data=user_data)
        one.trouble = "this operation is not supported"


def _poll_add(request: _Struct, flags: int, user_data: int) -> bytes:
    events = request.word("io_poll.events", 4)
    how = (0 if events & EPOLLONESHOT else POLL_ADD_MULTI) | (0 if events & EPOLLET else POLL_ADD_LEVEL)
    return sqe(POLL_ADD, flags, length=how, op_flags=events & (EPOLLEXCLUSIVE | 0xFFFF), user_data=user_data)


def _accept(request: _Struct, flags: int, user_data: int) -> bytes:
    return sqe(
        ACCEPT, flags, ioprio=request.word("io_accept.iou_flags", 2), addr=request.word("io_accept.addr"),
        off=request.word("io_accept.addr_len"), op_flags=request.word("io_accept.flags", 4), user_data=user_data,
        file_index=request.word("io_accept.file_slot", 4),
    )  # fmt: skip


def _send_or_recv(one: Request, request: _Struct, second: _Struct, flags: int, user_data: int) -> None:
    how = request.word("io_sr_msg.flags", 2)
    length, address, group = request.word("io_sr_msg.len", 4), request.word("io_sr_msg.buf"), 0
    if request.word("io_sr_msg.done_io", 4):
        one.trouble = "a part of its bytes has been moved"
    if how & RECVSEND_RETRIES or (request.at["io_sr_msg.mshot_total_len?"] >= 0
                                  and request.word("io_sr_msg.mshot_total_len?", 4)):  # fmt: skip
        one.trouble = "it has been done in part"
    if second.word("io_async_msghdr.msg.msg_namelen", 4):
        one.trouble = "it has an address of its own"
    if flags & BUFFER_SELECT:
        group, address = request.word("io_kiocb.buf_index", 2), 0
        if how & RECV_MULTISHOT:  # of what it has chosen the last time nothing is left
            length = request.word("io_sr_msg.mshot_len?", 4) if request.at["io_sr_msg.mshot_len?"] >= 0 else 0
    one.sqe = sqe(
        one.opcode, flags, ioprio=how & RECVSEND_KNOWN, addr=address, length=length,
        op_flags=request.word("io_sr_msg.msg_flags", 4), user_data=user_data, buf_index=group,
    )  # fmt: skip


def _read_or_write(one: Request, request: _Struct, second: _Struct, flags: int, user_data: int) -> None:
    address, length, group = request.word("io_rw.addr"), request.word("io_rw.len", 4), 0
    if second.word("io_async_rw.bytes_done"):
        one.trouble = "a part of its bytes has been moved"
    if flags & BUFFER_SELECT:
        group, address = request.word("io_kiocb.buf_index", 2), 0
        length = 0 if one.opcode == READ_MULTISHOT else length
    # Only files without a position wait (FMODE_STREAM, or those that ignore it).
    one.sqe = sqe(
        one.opcode, flags, addr=address, length=length, off=request.word("io_rw.kiocb.ki_pos"),
        op_flags=request.word("io_rw.flags", 4), user_data=user_data, buf_index=group,
    )  # fmt: skip


def _timeout(
    one: Request, request: _Struct, second: _Struct, state: State, flags: int, user_data: int
) -> None:
    how = second.word("io_timeout_data.flags", 4)
    completions = 0
    if how & TIMEOUT_MULTISHOT:
        one.trouble = "it comes again and again (IORING_TIMEOUT_MULTISHOT)"
    elif request.word("io_timeout.off", 4):
        now = state.numbers["cq_tail"] - state.numbers["cq_timeouts"]
        completions = request.word("io_timeout.target_seq", 4) - now & 0xFFFFFFFF
    expires = struct.unpack_from("<q", second.data, second.at["io_timeout_data.timer.node.expires"])[0]
    if how & TIMEOUT_ABS:
        seconds, nanoseconds = struct.unpack_from("<qq", second.data, second.at["io_timeout_data.ts"])
        one.time_ns = seconds * NS + nanoseconds
    else:
        clock = time.CLOCK_BOOTTIME if how & TIMEOUT_BOOTTIME else time.CLOCK_MONOTONIC
        if how & TIMEOUT_REALTIME:
            clock = time.CLOCK_REALTIME
        one.time_ns = max(0, expires - time.clock_gettime_ns(clock))
    one.sqe = sqe(one.opcode, flags, length=1, off=completions, op_flags=how, user_data=user_data)


def total(requests: Iterable[Request]) -> int:
    """How many they are, with what is linked to them."""
    return sum(one.count for one in requests)
