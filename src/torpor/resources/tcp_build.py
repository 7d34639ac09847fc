"""TCP connections that are put up again, thousands at a time: all the same steps, by columns (remote/many.py).

They are built, and when everything else is there released (:func:`build`, :func:`release`). In between a filter on each
socket drops every packet but those that we make ourselves, so that nobody's answer can harm it, and closing it tells
nobody. How it is done, and the kernel's part in it: see tcp.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct

from ..errors import ImageError, KernelError
from ..images import schema as pb
from ..linux import inet_diag as states
from ..linux import sockets
from ..linux.call import address_of, buffer, call
from ..linux.function import Area
from ..remote.many import Many, parts
from . import inet_options, sockopts, tcp
from .fown import SETTABLE
from .inet_options import SOL_TCP, put
from .network_lock import MARK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from ..images.schema import Message
    from ..remote.many import Block
    from .network_lock import Quad
    from .sockopts import Put

OFF_IN_SILENCE = -1  # out of repair mode without a packet to the peer
SO_DETACH_FILTER = 27
F_SETFL = 4
# TCP's own numbers of its options
_MSS, _WINDOW, _SACK_PERMITTED, _TIMESTAMP = 2, 3, 4, 8
_FIN, _ACK = 1, 16
# include/net/tcp.h: TCP_MIN_MSS, MAX_TCP_WINDOW, TCP_MSS_DEFAULT, TCPOLEN_TSTAMP_ALIGNED
_MSS_MIN, _MSS_MAX, _MSS_DEFAULT, _TIMESTAMP_BYTES = 88, 32767, 536, 12
_CHUNK_BYTES = 1 << 16  # one linear buffer in the kernel
_BUFFER_BYTES_MAX = (1 << 30) - 1
_PLAIN_WINDOW_MAX = 65535  # of a connection without a scale
#: What the kernel is to read for one connection: both sockaddrs, room, sequence numbers of either queue, largest
#: segment, time stamp, size of the receive buffer, window, options agreed upon.
_VALUES = struct.Struct("=28s28s6I20s32s")
_PEER, _ROOM, _RECEIVED, _SENT, _SEGMENT, _TIME, _BUFFER, _OPEN, _AGREED = 28, 56, 60, 64, 68, 72, 76, 80, 100
_NUMBERS = struct.pack("=4i", 0, 1, 2, OFF_IN_SILENCE)

#: The filter's instructions, which must stay where they are, and the struct sock_fprog that points to them.
_filter: list[Any] = []


class Connection:
    """A connection that is to be put up on ``fd``; ``local`` and ``peer`` are struct sockaddr."""

    __slots__ = (
        "agreed", "at", "calls", "entry", "fd", "inet_options", "local", "peer", "received", "sending", "sent",
        "stream", "to_read", "unsent",
    )  # fmt: skip

    def __init__(
        self, fd: int, entry: Message, local: bytes, peer: bytes, stream: Message, to_read: bytes, to_send: bytes
    ) -> None:  # fmt: skip
        """Raises ImageError."""
        self.fd = fd
        self.entry = entry
        self.local, self.peer = local, peer
        self.stream = stream
        self.to_read = to_read
        length = min(stream.unsq_len, len(to_send)) if to_send else 0
        self.sending = to_send[: len(to_send) - length]
        self.unsent = to_send[len(to_send) - length :]
        self._check()
        # The FINs count as a byte each.
        self.received = stream.inq_seq - (entry.state in tcp.FIN_CAME)
        self.sent = stream.outq_seq - (entry.state in tcp.FIRST_FIN or entry.state in tcp.SECOND_FIN)
        self.agreed = self._agreed()
        #: Is its SYN all that it has sent? It goes out again when it is released.
        self.calls = entry.state == states.SYN_SENT
        own = entry.ip_opts.SerializeToString(deterministic=True)
        more = [(one.level, one.name, one.value) for one in entry.more]
        #: All that inet_options.puts() depends on.
        self.inet_options = entry.family, entry.v6only, own, *more
        self.at = 0  # where its values lie

    def _check(self) -> None:
        stream, image = self.stream, f"tcp-stream-{self.entry.ino:x}.img"
        for flag, field in ((tcp.TCPI_OPT_WSCALE, "rcv_wscale"), (tcp.TCPI_OPT_TIMESTAMPS, "timestamp")):
            if stream.opt_mask & flag and not stream.HasField(field):
                raise ImageError(image, field, "is missing")
        if not stream.HasField("unsq_len"):
            raise ImageError(image, "unsq_len", "is missing")
        for scale in (stream.snd_wscale, stream.rcv_wscale):
            if scale > 14:
                raise ImageError(image, "wscale", f"{scale} is more than TCP allows")

    @property
    def quad(self) -> Quad:
        """(our address, our port, the peer's address, the peer's port)"""
        return (*tcp.address_of_sockaddr(self.local), *tcp.address_of_sockaddr(self.peer))

    @property
    def unsent_fin(self) -> bool:
        """Does our FIN follow data that was not sent yet?"""
        return bool(self.unsent) and (self.entry.state in tcp.FIRST_FIN or self.entry.state in tcp.SECOND_FIN)

    @property
    def values(self) -> bytes:
        """What the kernel is to read for it."""
        stream = self.stream
        first = self.sent - len(self.sending) - len(self.unsent) - self.calls
        return _VALUES.pack(
            self.local, self.peer, self._room(), self.received - len(self.to_read) & 0xFFFFFFFF, first & 0xFFFFFFFF,
            self._segment(), stream.timestamp, self.entry.opts.so_rcvbuf // 2, self._window(), self.agreed,
        )  # fmt: skip

    def _room(self) -> int:
        """Bytes for a buffer that takes either queue with the kernel's own overhead."""
        most = max(self.stream.inq_len, self.stream.outq_len)
        return int(min(8 * most + (1 << 20), _BUFFER_BYTES_MAX // 2))

    def _segment(self) -> int:
        """Bytes of the largest segment that it is to send.

        The kernel settles that when it connects, by what it knows then, and does not come back to it when it is told
        what was agreed on (tcp_connect_init(), tcp_repair_options_est()): it would stay at 536.
        """
        stream, room = self.stream, self.stream.max_window
        half = room // 2 if room > _MSS_DEFAULT else room  # tcp_bound_to_half_wnd()
        most = min(stream.mss_clamp, half + _TIMESTAMP_BYTES) if room else stream.mss_clamp
        return int(min(max(most, _MSS_MIN), _MSS_MAX))

    def _agreed(self) -> bytes:
        stream, mask, agreed = self.stream, self.stream.opt_mask, b""
        if mask & tcp.TCPI_OPT_SACK:
            agreed += struct.pack("=II", _SACK_PERMITTED, 0)
        if mask & tcp.TCPI_OPT_WSCALE:
            agreed += struct.pack("=II", _WINDOW, stream.snd_wscale | stream.rcv_wscale << 16)
        if mask & tcp.TCPI_OPT_TIMESTAMPS:
            agreed += struct.pack("=II", _TIMESTAMP, 0)
        return agreed + struct.pack("=II", _MSS, stream.mss_clamp)

    def _window(self) -> bytes:
        """struct tcp_repair_window. What the kernel would refuse is made the next to it that it takes."""
        stream, came = self.stream, self.entry.state in tcp.FIN_CAME
        # A FIN took one; rcv_wup must not be ahead of what was received.
        opened, told = stream.rcv_wnd + came & 0xFFFFFFFF, stream.rcv_wup - came & 0xFFFFFFFF
        # The segment that has told of the peer's window last may have been beyond ours, and dropped for want of memory.
        last = stream.snd_wl1
        if _is_after(last, self.received + opened):
            last = self.received & 0xFFFFFFFF
        return struct.pack("=5I", last, stream.snd_wnd, max(stream.max_window, stream.snd_wnd), opened, told)

    def fill(self) -> None:
        """Put into its queues what was in them."""
        for queue, data in ((tcp.RECV_QUEUE, self.to_read), (tcp.SEND_QUEUE, self.sending)):
            if data:
                put(self.fd, SOL_TCP, tcp.TCP_REPAIR_QUEUE, queue)
                _write(self.fd, data)
        if self.unsent_fin:
            # As long as we know of no window of the peer's nothing is sent.
            put(self.fd, SOL_TCP, tcp.TCP_REPAIR_QUEUE, tcp.NO_QUEUE)
            put(self.fd, SOL_TCP, tcp.TCP_REPAIR, OFF_IN_SILENCE)
            _write(self.fd, self.unsent)
            put(self.fd, SOL_TCP, tcp.TCP_REPAIR, 1)

    def close_as_it_was(self) -> None:
        """Have it send and get the FINs that it has sent and got."""
        state = self.entry.state
        if state in tcp.FIRST_FIN:
            self._send_fin()
        if state in tcp.FIN_CAME:
            self._inject(_FIN | _ACK, self.received, self.sent - len(self.sending) - len(self.unsent))
        if state in tcp.SECOND_FIN:
            self._send_fin()
        if state in tcp.FIN_ACKED:
            self._inject(_ACK, self.received + (state in tcp.FIN_CAME), self.sent + 1)

    def _send_fin(self) -> None:
        """Our FIN, as one that was sent: for the send queue under repair nothing goes out."""
        put(self.fd, SOL_TCP, tcp.TCP_REPAIR_QUEUE, tcp.NO_QUEUE if self.unsent_fin else tcp.SEND_QUEUE)
        try:
            sockets.shutdown(self.fd, 1)
        except KernelError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def _inject(self, flags: int, sequence: int, acknowledged: int) -> None:
        tcp.send_packet(self.peer, self.local, flags, sequence, acknowledged, self.stream.rcv_wnd)

    def send_what_waits(self) -> None:
        """Send what had not been sent yet; it has been released."""
        if self.unsent_fin:
            put(self.fd, SOL_TCP, inet_options.TCP_NODELAY, 1)  # which sends what waits
            put(self.fd, SOL_TCP, inet_options.TCP_NODELAY, int(self.tcp_options.nodelay))
        elif self.unsent:
            _write(self.fd, self.unsent)

    @property
    def tcp_options(self) -> Message:
        """Those of TCP that CRIU has."""
        if not self.stream.cork and not self.stream.nodelay:
            return self.entry.tcp_opts
        options = pb.tcp_opts_entry()
        options.CopyFrom(self.entry.tcp_opts)
        for field in ("cork", "nodelay"):  # where older images have them
            if getattr(self.stream, field):
                setattr(options, field, True)
        return options


class Steps:
    """Calls for many connections, by columns. An error is told by ``explain(connection, error)``, which gives what to
    raise.
    """

    def __init__(self, explain: Callable[[Connection, KernelError], Exception]) -> None:
        self._explain = explain
        self._values: Area
        self._start()

    def _start(self) -> None:
        self._many = Many()
        self._rows: dict[int, Sequence[Connection]] = {}
        self._numbers = self._many.place(_NUMBERS)

    def place_values(self, connections: Sequence[Connection]) -> None:
        """Place what the kernel is to read for each, for as long as these steps are taken."""
        self._values = Area(b"".join([one.values for one in connections]))
        at = self._values.address
        for one in connections:
            one.at = at
            at += _VALUES.size

    def call(self, name: str, connections: Sequence[Connection], *columns: int | list[int]) -> Block | None:
        """A call that has each one's socket as its first argument."""
        if not connections:
            return None
        block = self._many.calls(name, [one.fd for one in connections], *columns)
        self._rows[block.start] = connections
        return block

    def put(self, connections: Sequence[Connection], level: int, option: int, number: int) -> None:
        """Set an option to 0, 1, 2 or -1."""
        self.call("setsockopt", connections, level, option, self._numbers + 4 * (number & 3), 4)

    def put_own(self, connections: Sequence[Connection], level: int, option: int, field: int, size: int) -> None:
        """Set an option to each one's own value."""
        self.call("setsockopt", connections, level, option, [one.at + field for one in connections], size)

    def put_numbers(self, connections: Sequence[Connection], level: int, option: int, numbers: list[int]) -> None:
        """Set an option to numbers, one for each connection."""
        at = self._many.place(struct.pack(f"={len(numbers)}i", *numbers))
        self.call("setsockopt", connections, level, option, list(range(at, at + 4 * len(numbers), 4)), 4)

    def put_groups(self, groups: Iterable[tuple[Sequence[Connection], Iterable[Put]]]) -> None:
        """Set options to values that groups of connections have in common."""
        for connections, puts in groups:
            for level, option, value in puts:
                self.call("setsockopt", connections, level, option, self._many.place(value), len(value))

    def run(self, tolerates: Callable[[Connection, Block, KernelError], bool] | None = None) -> None:
        """Make the calls, and begin anew."""

        def failed(block: Block, row: int, error: KernelError) -> None:
            one = self._rows[block.start][row]
            if tolerates is not None and tolerates(one, block, error):
                return
            if block.name == "setsockopt" and error.errno is not None:
                error = KernelError(f"socket option {block.columns[1]}:{block.columns[2]}", error.errno)
            raise self._explain(one, error) from None

        try:
            self._many.run(failed)
        finally:
            self._start()


def build(connections: Sequence[Connection], explain: Callable[[Connection, KernelError], Exception]) -> None:
    """Everything that does not make the sockets send. ``explain``: see Steps. Raises TorporError."""
    for some in parts(connections):
        _restore_inet_options(some, explain)
        _build(some, explain)


def _build(connections: Sequence[Connection], explain: Callable[[Connection, KernelError], Exception]) -> None:
    steps = Steps(explain)
    steps.place_values(connections)
    _hold_back(connections, steps)
    steps.put(connections, SOL_TCP, tcp.TCP_REPAIR, 1)
    steps.call("bind", connections, [one.at for one in connections], [len(one.local) for one in connections])
    for option in (sockopts.SO_RCVBUFFORCE, sockopts.SO_SNDBUFFORCE):
        steps.put_own(connections, sockets.SOL_SOCKET, option, _ROOM, 4)
    for queue, field in ((tcp.RECV_QUEUE, _RECEIVED), (tcp.SEND_QUEUE, _SENT)):
        steps.put(connections, SOL_TCP, tcp.TCP_REPAIR_QUEUE, queue)
        steps.put_own(connections, SOL_TCP, tcp.TCP_QUEUE_SEQ, field, 4)
    there = [one for one in connections if not one.calls]
    steps.put_own(there, SOL_TCP, tcp.TCP_MAXSEG, _SEGMENT, 4)
    # The kernel settles on a scale for its window when it connects, and does not forget it when it is told of none.
    # Where the window is held to what goes without, it is 0 (tcp_select_initial_window()).
    plain = [one for one in there if not one.stream.opt_mask & tcp.TCPI_OPT_WSCALE]
    steps.put_groups([(plain, [(SOL_TCP, inet_options.TCP_WINDOW_CLAMP, struct.pack("=i", _PLAIN_WINDOW_MAX))])])
    steps.call("connect", there, [one.at + _PEER for one in there], [len(one.peer) for one in there])
    steps.put(there, SOL_TCP, tcp.TCP_MAXSEG, 0)
    agreed = [one.at + _AGREED for one in there], [len(one.agreed) for one in there]
    steps.call("setsockopt", there, SOL_TCP, tcp.TCP_REPAIR_OPTIONS, *agreed)
    timed = [one for one in there if one.stream.opt_mask & tcp.TCPI_OPT_TIMESTAMPS]
    steps.put_own(timed, SOL_TCP, tcp.TCP_TIMESTAMP, _TIME, 4)
    steps.run()
    for one in there:
        if one.to_read or one.sending or one.unsent:
            _explained(one, one.fill, explain)
    _open(there, steps)
    for one in there:
        if one.entry.state != states.ESTABLISHED:
            _explained(one, one.close_as_it_was, explain)


def _open(connections: Sequence[Connection], steps: Steps) -> None:
    """Tell the sockets of their windows."""
    told = [one for one in connections if one.stream.HasField("snd_wnd")]
    steps.put_own(told, SOL_TCP, tcp.TCP_REPAIR_WINDOW, _OPEN, 20)
    # Before it says how much it takes: the peer would send segments of half of that, and wait for room.
    sized = [one for one in connections if one.entry.opts.so_rcvbuf]
    steps.put_own(sized, sockets.SOL_SOCKET, sockopts.SO_RCVBUFFORCE, _BUFFER, 4)
    steps.run()


def _explained(
    one: Connection, action: Callable[[], object], explain: Callable[[Connection, KernelError], Exception]
) -> None:
    try:
        action()
    except OSError as error:
        assert error.errno is not None
        raise explain(one, error if isinstance(error, KernelError) else KernelError("sendmsg", error.errno)) from None


def release(connections: Sequence[Connection], explain: Callable[[Connection, KernelError], Exception]) -> None:
    """Leave repair mode: from now on they send. What had not been sent yet follows. Their ``fd`` is what it is now.

    Raises TorporError.
    """
    for some in parts(connections):
        _release(some, explain)


def _release(connections: Sequence[Connection], explain: Callable[[Connection, KernelError], Exception]) -> None:
    steps = Steps(explain)
    there = [one for one in connections if not one.calls]
    steps.put(there, SOL_TCP, tcp.TCP_REPAIR_QUEUE, tcp.NO_QUEUE)
    steps.put(there, sockets.SOL_SOCKET, SO_DETACH_FILTER, 0)
    steps.put(there, SOL_TCP, tcp.TCP_REPAIR, 0)
    steps.put_groups(
        (members, inet_options.tcp_puts(members[0].tcp_options))
        for members in _alike(there, lambda one: one.tcp_options.SerializeToString(deterministic=True))
    )
    steps.run()
    for one in connections:
        if one.calls:
            _explained(one, lambda one=one: _call_again(one), explain)  # type: ignore[misc]
        elif one.unsent:
            _explained(one, one.send_what_waits, explain)
    _restore_options(connections, steps)
    changed = [one for one in connections if one.entry.flags & SETTABLE or one.calls]
    steps.call("fcntl", changed, F_SETFL, [one.entry.flags & SETTABLE for one in changed])
    steps.run(lambda _, block, error: block.columns[1:2] == (sockets.SOL_SOCKET,) and _no_loss(block, error))


def _no_loss(block: Block, error: KernelError) -> bool:
    option = block.columns[2]
    return isinstance(option, int) and sockopts.is_no_loss(option, error)


def take_back(connections: Sequence[Connection]) -> None:
    """Put them under repair again, so that nobody hears of it when they are closed. What has ended is left alone."""
    for one in connections:
        with contextlib.suppress(OSError):
            tcp.repair(one.fd, on=True)


def _call_again(one: Connection) -> None:
    tcp.repair(one.fd, on=False)
    put(one.fd, sockets.SOL_SOCKET, SO_DETACH_FILTER, 0)
    _connect_later(one.fd, one.peer)
    inet_options.restore_tcp(one.fd, one.tcp_options)


def _alike(
    connections: Iterable[Connection], key: Callable[[Connection], object]
) -> Iterable[Sequence[Connection]]:
    """Groups of connections for which ``key()`` gives the same."""
    groups: dict[object, list[Connection]] = {}
    for one in connections:
        groups.setdefault(key(one), []).append(one)
    return groups.values()


def _restore_inet_options(
    connections: Sequence[Connection], explain: Callable[[Connection, KernelError], Exception]
) -> None:  # fmt: skip
    """Set the options that inet_options.restore() sets, before anything else is done to the sockets."""
    steps = Steps(explain)
    groups = _alike(connections, lambda one: one.inet_options)
    steps.put_groups((members, inet_options.puts(members[0].entry)) for members in groups)

    def has_it(one: Connection, block: Block, error: KernelError) -> bool:
        _, level, option, *_ = block.columns
        assert isinstance(level, int) and isinstance(option, int)
        return inet_options.has_already(one.fd, one.entry, level, option)

    steps.run(has_it)


def _restore_options(connections: Sequence[Connection], steps: Steps) -> None:
    """The options of all kinds of sockets. Sizes of buffers are each one's own; of the others there are few different
    sets, and what one of their sockets needs is what all others need that were made like it.
    """
    for field, option in (("so_sndbuf", sockopts.SO_SNDBUFFORCE), ("so_rcvbuf", sockopts.SO_RCVBUFFORCE)):
        sized = [one for one in connections if getattr(one.entry.opts, field)]
        steps.put_numbers(sized, sockets.SOL_SOCKET, option, [getattr(one.entry.opts, field) // 2 for one in sized])
    for members in _alike(connections, _all_options):
        first = members[0]
        steps.put_groups([(members, sockopts.changes(first.fd, first.entry.opts))])
        for one in members if first.entry.opts.so_filter else ():
            sockopts.attach_filter(one.fd, list(one.entry.opts.so_filter))


def _all_options(one: Connection) -> object:
    return sockopts.but_for_sizes(one.entry.opts), one.inet_options, one.calls


def _hold_back(connections: Sequence[Connection], steps: Steps) -> None:
    """Let only packets through that carry our mark: load it (SKF_AD_MARK), compare, take all or nothing."""
    if not _filter:
        code = ((0x20, 0, 0, 0xFFFFF000 + 20), (0x15, 0, 1, MARK), (6, 0, 0, 0xFFFFFFFF), (6, 0, 0, 0))
        program = buffer(8 * len(code))
        program.raw = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
        _filter.extend((program, struct.pack("@HP", len(code), address_of(program))))
    steps.put_groups([(connections, [(sockets.SOL_SOCKET, sockopts.SO_ATTACH_FILTER, _filter[1])])])


def _is_after(one: int, other: int) -> bool:
    """Is one sequence number after the other? (include/net/tcp.h, after())"""
    return 0 < one - other & 0xFFFFFFFF < 1 << 31


def _write(fd: int, data: bytes) -> None:
    """Write all of it. The kernel takes what goes into one buffer, and less when memory is short."""
    view, size = memoryview(data), _CHUNK_BYTES
    while view:
        try:
            view = view[sockets.send(fd, view[:size]) :]
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN) or size <= 1024:
                raise
            size //= 2


def _connect_later(fd: int, peer: bytes) -> None:
    os.set_blocking(fd, False)
    try:
        call("connect", fd, peer, len(peer))
    except KernelError as error:
        if error.errno != errno.EINPROGRESS:
            raise
