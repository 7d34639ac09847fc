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

from ..errors import Unsupported
from ..images import schema as pb
from ..linux import inet_diag as states
from ..linux import sockets
from ..linux.call import call
from ..linux.inet_diag import AF_INET6, text, unmapped
from . import inet_options, sockopts
from .inet_options import SOL_TCP, get, number, put
from .network_lock import MARK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message

# include/uapi/linux/tcp.h
TCP_MAXSEG, TCP_INFO, TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 2, 11, 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
NO_QUEUE, RECV_QUEUE, SEND_QUEUE = 0, 1, 2
TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE = 1, 2, 4
SIOCINQ, SIOCOUTQ, SIOCOUTQNSD = 0x541B, 0x5411, 0x894B
SO_PEERNAME = 28
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

    def __init__(self, raw: bytes) -> None:
        self.state, self.options, scales = raw[0], raw[5], raw[6]
        self.snd_wscale, self.rcv_wscale = scales & 15, scales >> 4
        self.pending, self.backlog = struct.unpack_from("=II", raw, 24)  # tcpi_unacked, tcpi_sacked


def info(fd: int) -> Info:
    """TCP_INFO of a socket."""
    raw = get(fd, SOL_TCP, TCP_INFO, 104)
    assert raw is not None
    return Info(raw)


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
    return info(fd).state, _queued(fd, SIOCINQ), _queued(fd, SIOCOUTQ), _queued(fd, SIOCOUTQNSD)


def _queued(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little")


def _save(fd: int, shown: Sizes) -> tuple[Message, bytes, bytes] | None:
    state, received, sending, unsent = shown
    if state == states.CLOSE:
        sending = unsent = 0  # nobody will take it any more
    elif state in FIRST_FIN or state in SECOND_FIN:
        # The FIN counts as a byte.
        sending, unsent = max(sending - 1, 0), max(unsent - 1, 0)
    entry = begin_entry(
        info(fd), received, sending, unsent, number(fd, SOL_TCP, TCP_MAXSEG), number(fd, SOL_TCP, TCP_TIMESTAMP),
        get(fd, SOL_TCP, TCP_REPAIR_WINDOW, 20),
    )  # fmt: skip
    entry.inq_seq, to_read = _read_queue(fd, RECV_QUEUE, received)
    entry.outq_seq, to_send = _read_queue(fd, SEND_QUEUE, sending)
    put(fd, SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
    if (len(to_read), len(to_send)) != (received, sending):
        return None  # an acknowledgement came in between
    return entry, to_read, to_send


def begin_entry(
    found: Info, received: int, sending: int, unsent: int, mss: int, timestamp: int, window: bytes | None
) -> Message:  # fmt: skip
    """A tcp_stream_entry with everything but the sequence numbers."""
    entry = pb.tcp_stream_entry(
        inq_len=received, outq_len=sending, unsq_len=unsent, opt_mask=found.options, snd_wscale=0, mss_clamp=mss
    )
    if found.options & TCPI_OPT_WSCALE:
        entry.snd_wscale, entry.rcv_wscale = found.snd_wscale, found.rcv_wscale
    if found.options & TCPI_OPT_TIMESTAMPS:
        entry.timestamp = timestamp
    if window:
        entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup = struct.unpack("=5I", window)
    return entry


def _read_queue(fd: int, queue: int, size: int) -> tuple[int, bytes]:
    """(sequence number behind the last byte, bytes) of a queue."""
    put(fd, SOL_TCP, TCP_REPAIR_QUEUE, queue)
    sequence = number(fd, SOL_TCP, TCP_QUEUE_SEQ)
    if not size:
        return sequence, b""
    with sockets.Plain(fd) as sock:
        return sequence, sock.recv(size + 1, sockets.MSG_PEEK | sockets.MSG_DONTWAIT)


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
