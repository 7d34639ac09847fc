"""Datagrams that wait in sockets of UDP and UDP-Lite: their bytes and bounds, who sent them, and what came with them.

Image: sk-queues (sk_packet_entry, each followed by its bytes), as for unix sockets; ``sender`` is a sockaddr,
``control`` what the socket had asked to be told about each. Kernel: net/ipv4/udp.c, net/ipv6/udp.c, net/ipv4/raw.c

A restore sends them again, with the addresses that they had, by a raw socket to the new socket while that has a port
that nobody knows, and before it gets its own. They are sent to an address of this machine alone, and what is sent
there goes through the loopback interface: none leaves the machine. The route is found as they are sent, and kept
(drivers/net/loopback.c), so no filter of source addresses is asked. A filter on the socket lets nothing else in.

What is not as it was: a time of arrival (SO_TIMESTAMP) is that of the restore, the port in IP_ORIGDSTADDR the one that
nobody knew; what was sent to a multicast or broadcast address shows one of the machine's own in IP_PKTINFO. Where a
packet filter keeps the loopback interface from carrying them they are dropped, with a warning: UDP may lose them.
"""

from __future__ import annotations

import errno
import os
import struct
import time

from .. import log
from ..errors import KernelError, Unsupported
from ..images import schema as pb
from ..linux import inet_diag, rtnetlink, sockets
from ..linux.call import call
from ..linux.inet_diag import AF_INET, AF_INET6
from ..linux.sockets import MSG_DONTWAIT, MSG_PEEK, SO_PEEK_OFF, SOL_SOCKET, Socket
from . import inet_options, sockopts, tcp, unix_queue
from .inet_options import IP_PKTINFO, IPV6_RECVPKTINFO, SOCK_RAW, SOL_IP, SOL_IPV6, SOL_UDP, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from ..images.schema import Message
    from .base import BuildContext, DumpContext, SourceFile

    #: Bytes, what came with them, the sender's sockaddr
    Seen = tuple[bytes, list[tuple[int, int, bytes]], bytes]

_DATAGRAM_BYTES, _CONTROL_BYTES = 1 << 17, 4096
IPPROTO_RAW, SO_DETACH_FILTER, SO_MEMINFO = 255, 27, 55
# include/uapi/linux/in.h, in6.h, udp.h
IP_TOS, IP_TTL, IPV6_FLOWINFO, IPV6_PKTINFO, IPV6_HOPLIMIT, IPV6_TCLASS, UDP_GRO = 1, 2, 11, 50, 52, 67, 104
#: What is kept of what came with a datagram
_KEPT = {
    (SOL_IP, IP_TOS), (SOL_IP, IP_TTL), (SOL_IP, IP_PKTINFO), (SOL_IPV6, IPV6_FLOWINFO), (SOL_IPV6, IPV6_PKTINFO),
    (SOL_IPV6, IPV6_HOPLIMIT), (SOL_IPV6, IPV6_TCLASS), (SOL_UDP, UDP_GRO),
}  # fmt: skip
_LOOPBACK = bytes((127, 0, 0, 1)), bytes(15) + b"\1"
_USUAL_TTL = 64
_BYTES_MAX, _BYTES_MAX_SIX = 65535 - 20 - 8, 65535 - 8
_ARRIVES_S = 2.0
_ROOM = 1 << 28


# ---------------------------------------------------------------------- dump


def dump(source: SourceFile, ctx: DumpContext) -> int:
    """Write all datagrams that wait to be read from a socket; they stay there. Returns how many they are."""
    with Socket(source.borrow()) as sock:
        before = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
        try:
            found = _peek_all(sock)
        finally:
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)
    for data, control, sender in found:
        entry = pb.sk_packet_entry(id_for=source.id, length=len(data), sender=sender)
        for level, name, value in control:
            if (level, name) in _KEPT:
                entry.control.add(level=level, name=name, value=value)
        ctx.images.append("sk-queues", entry, data)
    return len(found)


def _peek_all(sock: _socket.socket) -> list[Seen]:
    found: list[Seen] = []
    at = -1  # the first is looked at without: an empty one that was looked at before would be passed over
    while True:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)
        try:
            data, control, _, sender = sock.recvmsg(_DATAGRAM_BYTES, _CONTROL_BYTES, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return found
        except OSError:
            continue  # an error that an earlier datagram of its own met with: told, and forgotten
        at = max(at, 0) + len(data)
        found.append((data, control, _sockaddr(sender)))


def _sockaddr(name: tuple[object, ...]) -> bytes:
    from _socket import inet_pton

    host, port, *rest = name
    assert isinstance(host, str) and isinstance(port, int)
    if not rest:
        return struct.pack("=HH4s8x", AF_INET, inet_diag.swap(port), inet_pton(AF_INET, host))
    flow, scope = rest
    address = inet_pton(AF_INET6, host.partition("%")[0])
    head = struct.pack("=HH", AF_INET6, inet_diag.swap(port)) + struct.pack(">I", flow)
    return head + address + struct.pack("=I", scope)


# ---------------------------------------------------------------------- restore


def restore(fd: int, entry: Message, ctx: BuildContext) -> None:
    """Put what waited for the socket of an inet_sk_entry into ``fd``, a new socket that is not bound yet.

    Afterwards it is not bound either, but its options of receiving are not as they were: set them then.
    """
    waiting = unix_queue.packets(ctx, entry.id)
    if not waiting:
        return
    for one, _ in waiting:
        _check(one)
    six = entry.family == AF_INET6
    with Socket(fd) as sock:
        sock.setsockopt(SOL_SOCKET, sockopts.SO_RCVBUFFORCE, _ROOM)
        if six:
            sock.setsockopt(SOL_IPV6, IPV6_RECVPKTINFO, 1)  # else a datagram would not note where it came in
        else:
            sock.setsockopt(SOL_IP, IP_PKTINFO, 1)
        sock.bind(("::" if six else "0.0.0.0", 0))
        port = sock.getsockname()[1]
    arrived = 0
    try:
        for one, data in waiting:
            arrived += _bring(fd, port, entry, one, data)
    finally:
        sockets.disconnect(fd)  # as the port was not asked for, it is given back
        try:
            put(fd, SOL_SOCKET, SO_DETACH_FILTER, 0)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        put(fd, SOL_IPV6 if six else SOL_IP, IPV6_RECVPKTINFO if six else IP_PKTINFO, 0)
    if arrived < len(waiting):
        log.warning(
            f"{len(waiting) - arrived} of {len(waiting)} datagrams that waited in socket {entry.ino} are dropped: "
            "the loopback interface does not carry them"
        )


def _check(packet: Message) -> None:
    from ..errors import ImageError

    family = int.from_bytes(packet.sender[:2], "little")
    if len(packet.sender) != {AF_INET: 16, AF_INET6: 28}.get(family):
        raise ImageError("sk-queues.img", f"packet for {packet.id_for}: sender", "is no address of IPv4 or IPv6")
    six = family == AF_INET6 and len(inet_diag.unmapped(packet.sender[8:24])) == 16
    pieces = [one.value for one in packet.control if (one.level, one.name) == (SOL_UDP, UDP_GRO)]
    step = int.from_bytes(pieces[0], "little") if pieces else packet.length
    if min(step, packet.length) > (_BYTES_MAX_SIX if six else _BYTES_MAX):
        raise ImageError("sk-queues.img", f"packet for {packet.id_for}: length", "is more than a datagram can have")


def _bring(fd: int, port: int, entry: Message, packet: Message, data: bytes) -> bool:
    """Send a datagram again, in the pieces that it came in; did all arrive?"""
    control = {(one.level, one.name): bytes(one.value) for one in packet.control}
    step = int.from_bytes(control.get((SOL_UDP, UDP_GRO), b""), "little") or len(data)
    pieces = [data[at : at + step] for at in range(0, len(data), step)] if step else [data]
    source = inet_diag.unmapped(packet.sender[4:8] if len(packet.sender) == 16 else packet.sender[8:24])
    scope = int.from_bytes(packet.sender[24:28], "little") if len(source) == 16 else 0
    try:
        target, index = _target(entry, control, len(source), scope)
    except Unsupported as error:
        log.warning(str(error))
        return False
    sender_port = int.from_bytes(packet.sender[2:4], "big")
    return all(
        _send(fd, entry.proto, Packet(source, sender_port, target, port, control, piece), index) for piece in pieces
    )


def _target(entry: Message, control: dict[tuple[int, int], bytes], size: int, scope: int) -> tuple[bytes, int]:
    """The address of this machine that a datagram is sent to, and its interface if it has a meaning there only."""
    wanted = []
    told = control.get((SOL_IP, IP_PKTINFO))
    if told is not None and len(told) == 12:
        wanted.append((told[8:12], 0))
    told = control.get((SOL_IPV6, IPV6_PKTINFO))
    if told is not None and len(told) == 20:
        wanted.append((inet_diag.unmapped(told[:16]), int.from_bytes(told[16:20], "little")))
    bound = b"".join(word.to_bytes(4, "little") for word in entry.src_addr)[: 4 if entry.family == AF_INET else 16]
    wanted.append((inet_diag.unmapped(bound), scope))
    if scope:
        wanted += [(address, scope) for address in _addresses_of(scope)]
    else:
        wanted.append((_LOOPBACK[size == 16], 0))
    for address, index in wanted:
        index = index if _is_link_local(address) else 0
        if len(address) == size and any(address) and rtnetlink.is_local(address, index):
            return address, index
    raise Unsupported(f"no address of this machine will do for a datagram that waited in socket {entry.ino}")


def _is_link_local(address: bytes) -> bool:
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def _addresses_of(index: int) -> list[bytes]:
    try:
        with open("/proc/thread-self/net/if_inet6", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except FileNotFoundError:
        return []
    return [bytes.fromhex(words[0]) for words in lines if int(words[1], 16) == index]


class Packet:
    """One packet: addresses of 4 or 16 bytes, ports, what came with it, bytes."""

    __slots__ = ("control", "data", "label", "ports", "source", "target")

    def __init__(
        self, source: bytes, sender_port: int, target: bytes, port: int, control: dict[tuple[int, int], bytes],
        data: bytes,
    ) -> None:  # fmt: skip
        self.source = source
        self.target = target
        self.ports = sender_port, port
        self.control = control
        self.data = data
        #: By this the filter knows it: the identification (IPv4), the flow label (IPv6)
        self.label = int.from_bytes(os.urandom(2), "big") or 1
        flow = control.get((SOL_IPV6, IPV6_FLOWINFO))
        if len(source) == 16 and flow:
            self.label = int.from_bytes(flow[-4:], "big") & 0xFFFFF

    def _told(self, level: int, name: int, usual: int) -> int:
        value = self.control.get((level, name))
        return value[0] if value else usual  # a byte, or a number of which the others are zero

    def assemble(self, protocol: int) -> bytes:
        """The packet with its heads, as it goes over a network. ``protocol``: UDP or UDP-Lite."""
        length = 8 + len(self.data)
        # UDP-Lite has there how much of it the checksum covers: 0 for all.
        body = struct.pack(">HHHH", *self.ports, length if protocol == inet_diag.IPPROTO_UDP else 0, 0) + self.data
        pseudo = self.source + self.target + struct.pack(">II", length, protocol)
        body = body[:6] + struct.pack(">H", checksum(pseudo + body) or 0xFFFF) + body[8:]
        if len(self.source) == 4:
            head = struct.pack(
                ">BBHHHBBH4s4s", 0x45, self._told(SOL_IP, IP_TOS, 0), 20 + length, self.label, 0,
                self._told(SOL_IP, IP_TTL, _USUAL_TTL), protocol, 0, self.source, self.target,
            )  # fmt: skip
        else:
            word = 6 << 28 | self._told(SOL_IPV6, IPV6_TCLASS, 0) << 20 | self.label
            hops = self._told(SOL_IPV6, IPV6_HOPLIMIT, _USUAL_TTL)
            head = struct.pack(">IHBB16s16s", word, length, protocol, hops, self.source, self.target)
        return head + body

    def filter(self) -> list[tuple[int, int, int, int]]:
        """Instructions (classic BPF) that let in this packet alone: by the loopback interface, with its label."""
        network, ancillary = 0xFFF00000, 0xFFFFF000  # SKF_NET_OFF, SKF_AD_OFF
        four, six = [(0x28, 0, 0, network + 4)], [(0x20, 0, 0, network), (0x54, 0, 0, 0xFFFFF)]
        label = four if len(self.source) == 4 else six
        rest = len(label) + 2
        return [
            (0x20, 0, 0, ancillary + 8), (0x15, 0, rest, 1), *label, (0x15, 0, 1, self.label),
            (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0),
        ]  # fmt: skip


def checksum(data: bytes) -> int:
    """The checksum of the internet (RFC 1071)."""
    total = int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF  # 2**16 is 1 modulo 0xffff: the sum of words
    return 0xFFFF - total


def _send(fd: int, protocol: int, packet: Packet, index: int) -> bool:
    """Send a packet and wait until it is in the socket; False when it does not arrive."""
    words = [code << 48 | jt << 40 | jf << 32 | k for code, jt, jf, k in packet.filter()]
    sockopts.attach_filter(fd, words)
    family = AF_INET if len(packet.source) == 4 else AF_INET6
    raw = sockets.socket(family, SOCK_RAW, IPPROTO_RAW)
    try:
        before = _held(fd)
        put(raw, SOL_SOCKET, sockopts.SO_SNDBUFFORCE, _ROOM)
        name = tcp.sockaddr(family, packet.target, 0, index)
        data = packet.assemble(protocol)
        call("sendto", raw, data, len(data), 0, name, len(name))
        deadline = time.monotonic() + _ARRIVES_S
        while _held(fd) == before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True
    except KernelError as error:
        log.warning(f"a datagram from {inet_diag.text(packet.source)}: {error}")
        return False
    finally:
        os.close(raw)


def _held(fd: int) -> int:
    """Memory that what waits in a socket takes."""
    return int.from_bytes((inet_options.get(fd, SOL_SOCKET, SO_MEMINFO, 36) or b"")[:4], "little")
