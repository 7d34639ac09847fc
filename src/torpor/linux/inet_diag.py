"""What the kernel tells about the TCP, UDP and raw sockets of our network namespace: NETLINK_SOCK_DIAG.

Kernel: net/ipv4/inet_diag.c, include/uapi/linux/inet_diag.h. Sockets that are neither bound nor connected are
in no table, so they are not shown.
"""

from __future__ import annotations

import errno
import struct

from ..errors import KernelError
from .sock_diag import ask, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

AF_INET, AF_INET6 = 2, 10
IPPROTO_TCP, IPPROTO_UDP = 6, 17
# include/net/tcp_states.h
ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE = 1, 2, 4, 5, 6, 7
CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 8, 9, 10, 11
ALL_STATES = 0xFFF
LIVE_STATES = ALL_STATES & ~(1 << TIME_WAIT)  # of sockets that somebody may have; of the others there may be many
_INET_DIAG_SHUTDOWN, _INET_DIAG_SKV6ONLY = 8, 11
_REQUEST = struct.Struct("=BBBBI48x")
_MESSAGE = struct.Struct("=BBBBHH16s16sI8sIIIII")  # ports in network order
_PORT = slice(4, 6)  # of a message: where the source's lies
_MAPPED = bytes(10) + b"\xff\xff"


class InetSocket:
    """One socket: ``source`` and ``destination`` are (address as 4 or 16 bytes, port).

    ``queues`` is (bytes to read, bytes to send), of a listening one (connections waiting, backlog). ``shutdown``
    is 1 reading, 2 writing, 3 both; ``device`` the index of the interface that it is bound to, 0 for none.
    """

    __slots__ = ("destination", "device", "family", "ino", "queues", "shutdown", "source", "state", "v6only")

    def __init__(self, reply: bytes) -> None:
        (
            self.family, self.state, _, _, sport, dport, source, destination, self.device, _,
            _, to_read, to_send, _, self.ino,
        ) = _MESSAGE.unpack_from(reply)  # fmt: skip
        size = 4 if self.family == AF_INET else 16
        self.source: tuple[bytes, int] = source[:size], swap(sport)
        self.destination: tuple[bytes, int] = destination[:size], swap(dport)
        self.queues: tuple[int, int] = to_read, to_send
        self.shutdown = 0
        self.v6only = False
        for kind, content in attributes(reply, _MESSAGE.size):
            if kind == _INET_DIAG_SHUTDOWN:
                self.shutdown = content[0]
            elif kind == _INET_DIAG_SKV6ONLY:
                self.v6only = bool(content[0])


def swap(port: int) -> int:
    """A port from network order, or into it."""
    return port >> 8 | (port & 0xFF) << 8


def unmapped(address: bytes) -> bytes:
    """The IPv4 address in an IPv4-mapped IPv6 one; any other address as it is."""
    return address[12:] if len(address) == 16 and address[:12] == _MAPPED else address


def text(address: bytes) -> str:
    """An address of 4 or 16 bytes as people write it."""
    from _socket import inet_ntop

    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def sockets(
    protocol: int, *, family: int = 0, states: int = LIVE_STATES, ports: Collection[int] | None = None
) -> list[InetSocket]:  # fmt: skip
    """The sockets of one protocol, IPv4's and IPv6's unless ``family`` is given, that are in one of ``states`` and
    bound to one of ``ports``; None: to any.

    ``states`` has a bit for each. Nothing is shown where the kernel has no such protocol.
    """
    found: list[InetSocket] = []
    wanted = None if ports is None else {port.to_bytes(2, "big") for port in ports}
    for one in (family,) if family else (AF_INET, AF_INET6):
        try:
            replies: Iterable[bytes] = ask(_REQUEST.pack(one, protocol, 0, 0, states))
            if wanted is not None:
                replies = (reply for reply in replies if reply[_PORT] in wanted)
            found += map(InetSocket, replies)
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
    return found
