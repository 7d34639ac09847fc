"""TCP connections: taken down and put up again by TCP_REPAIR, in every state that one can be in.

Image: tcp-stream-INODE (tcp_stream_entry, then what waits to be read, then what waits to be sent or
acknowledged). Kernel: net/ipv4/tcp.c (do_tcp_setsockopt: TCP_REPAIR…), tcp_output.c.

A socket under repair sends nothing when it is closed, takes over sequence numbers, and what is written to its
send queue counts as sent. The FIN of the peer is the one thing that it cannot be told: that comes as a packet.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..errors import ImageError, KernelError, Unsupported
from ..images import schema as pb
from ..linux import inet_diag as states
from ..linux import sockets
from ..linux.call import address_of, buffer, call
from ..linux.inet_diag import AF_INET6, text, unmapped
from . import inet_options, sockopts
from .inet_options import SOL_TCP, get, number, put
from .network_lock import MARK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..images.schema import Message
    from .network_lock import Quad

# include/uapi/linux/tcp.h
TCP_MAXSEG, TCP_INFO, TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 2, 11, 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
NO_QUEUE, RECV_QUEUE, SEND_QUEUE = 0, 1, 2
OFF_IN_SILENCE = -1  # out of repair mode without a packet to the peer
TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE = 1, 2, 4
# TCP's own numbers of its options
_MSS, _WINDOW, _SACK_PERMITTED, _TIMESTAMP = 2, 3, 4, 8
SIOCINQ, SIOCOUTQ, SIOCOUTQNSD = 0x541B, 0x5411, 0x894B
SO_PEERNAME, SO_DETACH_FILTER = 28, 27
_FIN, _ACK = 1, 16
# include/net/tcp.h: TCP_MIN_MSS, MAX_TCP_WINDOW, TCP_MSS_DEFAULT, TCPOLEN_TSTAMP_ALIGNED
_MSS_MIN, _MSS_MAX, _MSS_DEFAULT, _TIMESTAMP_BYTES = 88, 32767, 536, 12
_WINDOW_FIELDS = ("snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")
_CHUNK_BYTES = 1 << 16  # one linear buffer in the kernel
_BUFFER_BYTES_MAX = (1 << 30) - 1
_TRIES = 64

#: Our FIN was sent, before and after the peer's; the peer has acknowledged it.
FIRST_FIN = (states.FIN_WAIT1, states.FIN_WAIT2, states.CLOSING)
SECOND_FIN = (states.LAST_ACK, states.CLOSE)
FIN_ACKED = (states.FIN_WAIT2, states.CLOSE)
#: The peer's FIN has come.
FIN_CAME = (states.CLOSE_WAIT, states.LAST_ACK, states.CLOSE, states.CLOSING)
CONNECTED = (
    states.ESTABLISHED, states.SYN_SENT, states.FIN_WAIT1, states.FIN_WAIT2, states.CLOSE_WAIT,
    states.LAST_ACK, states.CLOSING,
)  # fmt: skip


class Info:
    """What TCP_INFO tells: state, options agreed upon, window scales; ``pending`` and ``backlog`` of a listener."""

    __slots__ = ("backlog", "options", "pending", "rcv_wscale", "snd_wscale", "state")

    def __init__(self, fd: int) -> None:
        raw = get(fd, SOL_TCP, TCP_INFO, 104)
        assert raw is not None
        self.state, self.options, scales = raw[0], raw[5], raw[6]
        self.snd_wscale, self.rcv_wscale = scales & 15, scales >> 4
        self.pending, self.backlog = struct.unpack_from("=II", raw, 24)  # tcpi_unacked, tcpi_sacked


def repair(fd: int, *, on: bool) -> None:
    """Turn repair mode on or off. Off, it lets the peer know where we are, and clears SO_REUSEADDR."""
    put(fd, SOL_TCP, TCP_REPAIR, int(on))


def peer_name(fd: int, size: int) -> bytes:
    """The sockaddr (``size`` bytes) of the peer, also of one that is not connected any more; b"" for none."""
    with sockets.Plain(fd) as sock:
        try:
            return sock.getsockopt(sockets.SOL_SOCKET, SO_PEERNAME, size)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            return b""


# ---------------------------------------------------------------------- dump


Sizes = tuple[int, int, int, int]


def save(fd: int) -> tuple[Message, bytes, bytes, Sizes]:
    """(tcp_stream_entry, bytes to be read, bytes to be acknowledged or sent, sizes) of a socket under repair.

    Raises Unsupported when it cannot be read.
    """
    before = sizes(fd)
    for _ in range(_TRIES):
        found, after = _save(fd, before), sizes(fd)
        if found is not None and after == before:
            return (*found, after)
        before = after
    raise Unsupported("the connection does not come to rest", hint="use --network-lock nftables, not skip")


def sizes(fd: int) -> Sizes:
    """What moves as long as packets do, while nobody reads and writes: the state, and how much is in the queues."""
    return Info(fd).state, _queued(fd, SIOCINQ), _queued(fd, SIOCOUTQ), _queued(fd, SIOCOUTQNSD)


def _queued(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little")


def _save(fd: int, shown: Sizes) -> tuple[Message, bytes, bytes] | None:
    info = Info(fd)
    state, received, sending, unsent = shown
    if state == states.CLOSE:
        sending = unsent = 0  # nobody will take it any more
    elif state in FIRST_FIN or state in SECOND_FIN:
        # The FIN counts as a byte.
        sending, unsent = max(sending - 1, 0), max(unsent - 1, 0)
    entry = pb.tcp_stream_entry(
        inq_len=received, outq_len=sending, unsq_len=unsent, opt_mask=info.options, snd_wscale=0
    )
    entry.mss_clamp = number(fd, SOL_TCP, TCP_MAXSEG)
    if info.options & TCPI_OPT_WSCALE:
        entry.snd_wscale, entry.rcv_wscale = info.snd_wscale, info.rcv_wscale
    if info.options & TCPI_OPT_TIMESTAMPS:
        entry.timestamp = number(fd, SOL_TCP, TCP_TIMESTAMP)
    window = get(fd, SOL_TCP, TCP_REPAIR_WINDOW, 20)
    if window is not None:
        for field, value in zip(_WINDOW_FIELDS, struct.unpack("=5I", window), strict=True):
            setattr(entry, field, value)
    entry.inq_seq, to_read = _read_queue(fd, RECV_QUEUE, received)
    entry.outq_seq, to_send = _read_queue(fd, SEND_QUEUE, sending)
    put(fd, SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
    if (len(to_read), len(to_send)) != (received, sending):
        return None  # an acknowledgement came in between
    return entry, to_read, to_send


def _read_queue(fd: int, queue: int, size: int) -> tuple[int, bytes]:
    """(sequence number behind the last byte, bytes) of a queue."""
    put(fd, SOL_TCP, TCP_REPAIR_QUEUE, queue)
    sequence = number(fd, SOL_TCP, TCP_QUEUE_SEQ)
    if not size:
        return sequence, b""
    with sockets.Plain(fd) as sock:
        return sequence, sock.recv(size + 1, sockets.MSG_PEEK | sockets.MSG_DONTWAIT)


# ---------------------------------------------------------------------- restore


class Connection:
    """A connection that is put up: :meth:`build`, and when all others are there too :meth:`release`.

    Until then a filter on the socket drops every packet but those that we make ourselves, so that nobody's
    answer can harm it, and closing it tells nobody.
    """

    __slots__ = ("_put", "entry", "fd", "local", "peer", "sending", "stream", "unsent")

    def __init__(
        self,
        fd: int,
        entry: Message,
        local: bytes,
        peer: bytes,
        stream: Message,
        to_read: bytes,
        to_send: bytes,
    ) -> None:
        self.fd = fd
        self.entry = entry
        self.local, self.peer = local, peer  # struct sockaddr
        self.stream = pb.tcp_stream_entry()
        self.stream.CopyFrom(stream)
        length = min(stream.unsq_len, len(to_send))
        self.sending = to_send[: len(to_send) - length]
        self.unsent = to_send[len(to_send) - length :]
        self._check()
        with sockets.Plain(fd) as sock:  # one for all its options
            self._put = sock.setsockopt
            self.build(to_read)

    def _check(self) -> None:
        image = f"tcp-stream-{self.entry.ino:x}.img"
        for flag, field in ((TCPI_OPT_WSCALE, "rcv_wscale"), (TCPI_OPT_TIMESTAMPS, "timestamp")):
            if self.stream.opt_mask & flag and not self.stream.HasField(field):
                raise ImageError(image, field, "is missing")
        if not self.stream.HasField("unsq_len"):
            raise ImageError(image, "unsq_len", "is missing")
        for scale in (self.stream.snd_wscale, self.stream.rcv_wscale):
            if scale > 14:
                raise ImageError(image, "wscale", f"{scale} is more than TCP allows")

    @property
    def quad(self) -> Quad:
        """(our address, our port, the peer's address, the peer's port)"""
        return (*address_of_sockaddr(self.local), *address_of_sockaddr(self.peer))

    @property
    def unsent_fin(self) -> bool:
        """Does our FIN follow data that was not sent yet?"""
        return bool(self.unsent) and self.entry.state in (*FIRST_FIN, *SECOND_FIN)

    def build(self, to_read: bytes) -> None:
        """Everything that does not make the socket send."""
        fd, state, stream = self.fd, self.entry.state, self.stream
        _hold_back(self._put)
        self._put(SOL_TCP, TCP_REPAIR, 1)
        call("bind", fd, self.local, len(self.local))
        if state in FIN_CAME:
            stream.inq_seq = (stream.inq_seq - 1) & 0xFFFFFFFF
        if state in FIRST_FIN or state in SECOND_FIN:
            stream.outq_seq = (stream.outq_seq - 1) & 0xFFFFFFFF
        for option in (sockopts.SO_RCVBUFFORCE, sockopts.SO_SNDBUFFORCE):
            self._put(sockets.SOL_SOCKET, option, _room(stream))
        self._set_sequence(RECV_QUEUE, stream.inq_seq - len(to_read))
        first = stream.outq_seq - len(self.sending) - len(self.unsent)
        self._set_sequence(SEND_QUEUE, first - (state == states.SYN_SENT))
        if state == states.SYN_SENT:
            return  # its SYN goes out when we let go
        self._put(SOL_TCP, TCP_MAXSEG, self._segment())
        call("connect", fd, self.peer, len(self.peer))
        self._put(SOL_TCP, TCP_MAXSEG, 0)
        self._set_options()
        self._fill(RECV_QUEUE, to_read)
        self._fill(SEND_QUEUE, self.sending)
        if self.unsent_fin:
            # As long as we know of no window of the peer's nothing is sent.
            self._put(SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
            self._put(SOL_TCP, TCP_REPAIR, OFF_IN_SILENCE)
            _write(fd, self.unsent)
            self._put(SOL_TCP, TCP_REPAIR, 1)
        self._set_window()
        if self.entry.opts.so_rcvbuf:
            # Before it says how much it takes: the peer would send segments of half of that, and wait for room.
            self._put(sockets.SOL_SOCKET, sockopts.SO_RCVBUFFORCE, self.entry.opts.so_rcvbuf // 2)
        self._close_as_it_was()

    def _segment(self) -> int:
        """Bytes of the largest segment that it is to send.

        The kernel settles that when it connects, by what it knows then, and does not come back to it when it is told
        what was agreed on (tcp_connect_init(), tcp_repair_options_est()): it would stay at 536.
        """
        stream, room = self.stream, self.stream.max_window
        half = room // 2 if room > _MSS_DEFAULT else room  # tcp_bound_to_half_wnd()
        most = min(stream.mss_clamp, half + _TIMESTAMP_BYTES) if room else stream.mss_clamp
        return int(min(max(most, _MSS_MIN), _MSS_MAX))

    def _set_sequence(self, queue: int, sequence: int) -> None:
        self._put(SOL_TCP, TCP_REPAIR_QUEUE, queue)
        self._put(SOL_TCP, TCP_QUEUE_SEQ, struct.pack("=I", sequence & 0xFFFFFFFF))

    def _set_options(self) -> None:
        stream, mask, agreed = self.stream, self.stream.opt_mask, []
        if mask & TCPI_OPT_SACK:
            agreed.append((_SACK_PERMITTED, 0))
        if mask & TCPI_OPT_WSCALE:
            agreed.append((_WINDOW, stream.snd_wscale | stream.rcv_wscale << 16))
        if mask & TCPI_OPT_TIMESTAMPS:
            agreed.append((_TIMESTAMP, 0))
        agreed.append((_MSS, stream.mss_clamp))
        self._put(SOL_TCP, TCP_REPAIR_OPTIONS, b"".join(struct.pack("=II", *pair) for pair in agreed))
        if mask & TCPI_OPT_TIMESTAMPS:
            self._put(SOL_TCP, TCP_TIMESTAMP, struct.pack("=I", stream.timestamp))

    def _fill(self, queue: int, data: bytes) -> None:
        self._put(SOL_TCP, TCP_REPAIR_QUEUE, queue)
        _write(self.fd, data)

    def _set_window(self) -> None:
        stream = self.stream
        if not stream.HasField("snd_wnd"):
            return
        window = [getattr(stream, field) for field in _WINDOW_FIELDS]
        if self.entry.state in FIN_CAME:
            # The FIN took one; rcv_wup must not be ahead of what was received.
            window[3] += 1
            window[4] = (window[4] - 1) & 0xFFFFFFFF
        self._put(SOL_TCP, TCP_REPAIR_WINDOW, struct.pack("=5I", *window))

    def _close_as_it_was(self) -> None:
        state, stream = self.entry.state, self.stream
        if state in FIRST_FIN:
            self._send_fin()
        if state in FIN_CAME:
            acknowledged = stream.outq_seq - len(self.sending) - len(self.unsent)
            self._inject(_FIN | _ACK, stream.inq_seq, acknowledged)
        if state in SECOND_FIN:
            self._send_fin()
        if state in FIN_ACKED:
            received = stream.inq_seq + (state in FIN_CAME)
            self._inject(_ACK, received, stream.outq_seq + 1)

    def _send_fin(self) -> None:
        """Our FIN, as one that was sent: for the send queue under repair nothing goes out."""
        self._put(SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE if self.unsent_fin else SEND_QUEUE)
        try:
            sockets.shutdown(self.fd, 1)
        except KernelError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def _inject(self, flags: int, sequence: int, acknowledged: int) -> None:
        send_packet(self.peer, self.local, flags, sequence, acknowledged, self.stream.rcv_wnd)

    def release(self, fd: int) -> None:
        """Leave repair mode: from now on it sends. What had not been sent yet follows. ``fd`` is what it is now."""
        entry = self.entry
        if entry.state == states.SYN_SENT:
            repair(fd, on=False)
            _let_packets_in(fd)
            _connect_later(fd, self.peer)
        else:
            put(fd, SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
            _let_packets_in(fd)
            repair(fd, on=False)
        inet_options.restore_tcp(fd, self._options())
        if self.unsent_fin:
            put(fd, SOL_TCP, inet_options.TCP_NODELAY, 1)  # which sends what waits
            put(fd, SOL_TCP, inet_options.TCP_NODELAY, int(self._options().nodelay))
        elif self.unsent:
            _write(fd, self.unsent)
        sockopts.restore(fd, entry.opts)

    def _options(self) -> Message:
        options = pb.tcp_opts_entry()
        options.CopyFrom(self.entry.tcp_opts)
        for field in ("cork", "nodelay"):  # where older images have them
            if getattr(self.stream, field):
                setattr(options, field, True)
        return options


def _room(stream: Message) -> int:
    """Bytes for a buffer that takes either queue with the kernel's own overhead."""
    most = max(stream.inq_len, stream.outq_len)
    return int(min(8 * most + (1 << 20), _BUFFER_BYTES_MAX // 2))


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


def _let_packets_in(fd: int) -> None:
    put(fd, sockets.SOL_SOCKET, SO_DETACH_FILTER, 0)


def _hold_back(put: Callable[[int, int, bytes], None]) -> None:
    """Let only packets through that carry our mark: load it (SKF_AD_MARK), compare, take all or nothing."""
    if not _filter:
        code = ((0x20, 0, 0, 0xFFFFF000 + 20), (0x15, 0, 1, MARK), (6, 0, 0, 0xFFFFFFFF), (6, 0, 0, 0))
        program = buffer(8 * len(code))
        program.raw = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
        _filter.extend((program, struct.pack("@HP", len(code), address_of(program))))
    put(sockets.SOL_SOCKET, sockopts.SO_ATTACH_FILTER, _filter[1])


#: The filter's instructions, which must stay where they are, and the struct sock_fprog that points to them.
_filter: list[Any] = []


# ---------------------------------------------------------------------- packets


def sockaddr(family: int, address: bytes, port: int, scope: int = 0) -> bytes:
    """struct sockaddr_in or sockaddr_in6"""
    if family == AF_INET6:
        return struct.pack("=H2sI16sI", family, port.to_bytes(2, "big"), 0, address, scope)
    return struct.pack("=H2s4s8x", family, port.to_bytes(2, "big"), address)


def address_of_sockaddr(name: bytes) -> tuple[bytes, int]:
    """(address, port)"""
    port = int.from_bytes(name[2:4], "big")
    return (name[8:24] if name[0] == AF_INET6 else name[4:8]), port


def shown(name: bytes) -> str:
    """A sockaddr as people write it."""
    address, port = address_of_sockaddr(name)
    written = text(address)
    return f"[{written}]:{port}" if ":" in written else f"{written}:{port}"


def send_packet(
    source: bytes, target: bytes, flags: int, sequence: int, acknowledged: int, window: int
) -> None:
    """Send one TCP segment without data that seems to come from ``source`` (struct sockaddr) to us, ``target``."""
    sport, dport = address_of_sockaddr(source)[1], address_of_sockaddr(target)[1]
    there, here = unmapped(address_of_sockaddr(source)[0]), unmapped(address_of_sockaddr(target)[0])
    segment = struct.pack(
        ">HHIIBBHHH", sport, dport, sequence & 0xFFFFFFFF, acknowledged & 0xFFFFFFFF, 5 << 4, flags,
        min(window, 0xFFFF), 0, 0,
    )  # fmt: skip
    # The pseudo header differs in layout only, not in its sum (RFC 9293, RFC 8200 8.1).
    total = _sum(there + here + struct.pack(">HH", 6, len(segment)) + segment)
    segment = segment[:16] + struct.pack(">H", ~total & 0xFFFF) + segment[18:]
    if len(here) == 4:
        family = states.AF_INET
        packet = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, there, here) + segment
        name = sockaddr(family, here, 0)
    else:
        family = AF_INET6
        packet = struct.pack(">IHBB16s16s", 6 << 28, len(segment), 6, 64, there, here) + segment
        name = sockaddr(family, here, 0, int.from_bytes(target[24:28], "little"))
    raw = sockets.socket(family, inet_options.SOCK_RAW, 255)  # IPPROTO_RAW: the header is ours
    try:
        put(raw, sockets.SOL_SOCKET, sockopts.SO_MARK, MARK)
        call("sendto", raw, packet, len(packet), 0, name, len(name))
    finally:
        os.close(raw)


def _sum(data: bytes) -> int:
    """The Internet checksum before it is inverted (RFC 1071)."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
