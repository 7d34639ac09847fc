"""Socket calls on plain descriptors.

Addresses of unix sockets are bytes without the family: a path, or NUL and a name.
"""

from __future__ import annotations

import _socket  # what `socket` adds to it costs 5 ms to import and is not needed here
import errno
import os
import struct

from ..errors import KernelError
from .call import address_of, buffer, call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

AF_UNSPEC, AF_UNIX = 0, 1
SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET = 1, 2, 5
SOCK_NONBLOCK, SOCK_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
SOL_SOCKET = 1
SCM_RIGHTS, SCM_CREDENTIALS, SCM_PIDFD = 1, 2, 4
SIOCOUTQ = 0x5411
MSG_PEEK, MSG_TRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC = 0x2, 0x20, 0x40, 0x4000, 0x40000000
SO_ERROR, SO_PEERCRED, SO_DOMAIN, SO_PROTOCOL, SO_TYPE, SO_PEERGROUPS, SO_PEEK_OFF = 4, 17, 39, 38, 3, 59, 42
SUN_PATH_MAX = 108
_CONTROL_BYTES = 4096  # 253 descriptors, credentials, a pidfd, time stamps


class Socket:
    """``with Socket(fd) as sock``: Python's own methods for a descriptor that stays ours."""

    __slots__ = ("_sock",)

    def __init__(self, fd: int) -> None:
        self._sock = _socket.socket(fileno=fd)

    def __enter__(self) -> _socket.socket:
        return self._sock

    def __exit__(self, *_: object) -> None:
        self._sock.detach()


class Plain(Socket):
    """As Socket, for options only: what Python would ask the kernel about the socket is not needed, and for some
    families (AF_VSOCK) it takes no options as bytes once it knows.
    """

    __slots__ = ()

    def __init__(self, fd: int) -> None:
        self._sock = _socket.socket(0, 0, 0, fd)


def unix_address(name: bytes) -> bytes:
    """sockaddr_un for a path or an abstract name."""
    return struct.pack("=H", AF_UNIX) + name


def bind(fd: int, name: bytes) -> None:
    """bind(2) a unix socket."""
    address = unix_address(name)
    call("bind", fd, address, len(address))


def connect(fd: int, name: bytes) -> None:
    """connect(2) a unix socket."""
    address = unix_address(name)
    call("connect", fd, address, len(address))


def own_name(fd: int, size: int) -> bytes:
    """getsockname(2): ``size`` bytes, as the kernel writes them; zeros behind a shorter name."""
    return _name("getsockname", fd, size)


def peer_name(fd: int, size: int) -> bytes:
    """getpeername(2), as :func:`own_name`."""
    return _name("getpeername", fd, size)


def _name(call_name: str, fd: int, size: int) -> bytes:
    area, length = buffer(size), buffer(4)
    length.raw = size.to_bytes(4, "little")
    call(call_name, fd, area, length)
    return area.raw


def disconnect(fd: int) -> None:
    """Forget the peer of a datagram socket; its queue is emptied."""
    call("connect", fd, struct.pack("=H", AF_UNSPEC), 2)


def listen(fd: int, backlog: int) -> None:
    """listen(2)"""
    call("listen", fd, backlog)


def accept(fd: int) -> int:
    """accept4(2); the new descriptor is close-on-exec."""
    return call("accept4", fd, None, None, SOCK_CLOEXEC)


def socket(family: int, kind: int, protocol: int = 0) -> int:
    """socket(2); the descriptor is close-on-exec."""
    return call("socket", family, kind | SOCK_CLOEXEC, protocol)


def socketpair(kind: int) -> tuple[int, int]:
    """Two unix sockets that are connected to each other, close-on-exec."""
    area = bytearray(8)
    call("socketpair", AF_UNIX, kind | SOCK_CLOEXEC, 0, address_of(area))
    first, second = struct.unpack("=ii", area)
    return first, second


def shutdown(fd: int, how: int) -> None:
    """shutdown(2): SHUT_RD 0, SHUT_WR 1, SHUT_RDWR 2"""
    call("shutdown", fd, how)


def unsent(fd: int) -> int:
    """Memory, in bytes, of what was written and has not left the socket (SIOCOUTQ, for datagrams)."""
    from fcntl import ioctl

    return int.from_bytes(ioctl(fd, SIOCOUTQ, bytes(4)), "little")


def family(fd: int) -> int:
    """The address family of a socket."""
    sock = _socket.socket(0, 0, 0, fd)  # what it would ask first is not needed
    try:
        return int(sock.getsockopt(SOL_SOCKET, SO_DOMAIN))
    finally:
        sock.detach()


class Message:
    """What one recvmsg(2) gave: ``data``, descriptors ``fds``, ``cred`` (pid, uid, gid), address of the ``sender``.

    ``cut``: the buffer was too small for the message.
    """

    __slots__ = ("cred", "cut", "data", "fds", "sender")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fds: list[int] = []
        self.cred: tuple[int, int, int] | None = None
        self.sender = b""
        self.cut = False


def peek(fd: int, size: int) -> Message | None:
    """Look at what comes next, at most ``size`` bytes; None if nothing waits. Descriptors in it become ours."""
    with Socket(fd) as sock:
        try:
            data, control, flags, sender = sock.recvmsg(
                size, _CONTROL_BYTES, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
    found = Message(data)
    found.cut = bool(flags & MSG_TRUNC)
    if sender:
        found.sender = os.fsencode(sender) if isinstance(sender, str) else bytes(sender)
    for level, kind, content in control:
        if level != SOL_SOCKET:
            continue
        if kind == SCM_RIGHTS:
            found.fds += struct.unpack(f"={len(content) // 4}i", content[: len(content) & ~3])
        elif kind == SCM_CREDENTIALS:
            found.cred = struct.unpack("=iII", content)
        elif kind == SCM_PIDFD:
            os.close(struct.unpack("=i", content)[0])
    return found


def peek_ahead(fd: int, size: int) -> int:
    """How many of the next ``size`` bytes of a stream lie ahead of the kernel's buffer that the last of them is in.

    A place for the last byte is missing, and a buffer that cannot be copied whole is not counted. The descriptors
    in a buffer do not tell: those of the next one are shown along with what is just ahead of it.
    Kernel: net/unix/af_unix.c, unix_stream_read_generic()
    """
    area = buffer(max(size, 1))
    nowhere = 8
    vector = buffer(32)
    struct.pack_into("=QQQQ", vector, 0, address_of(area), size - 1, nowhere, 1)
    header = struct.pack("=QIIQQQQii", 0, 0, 0, address_of(vector), 2, 0, 0, 0, 0)
    try:
        return call("recvmsg", fd, header, MSG_PEEK | MSG_DONTWAIT)
    except KernelError as error:
        if error.errno != errno.EFAULT:
            raise
        return 0


def send(
    fd: int,
    data: bytes | memoryview,
    fds: Iterable[int] = (),
    cred: tuple[int, int, int] | None = None,
    to: bytes = b"",
) -> int:
    """One sendmsg(2) that does not wait: data, descriptors, credentials, receiver's address. Returns what was sent."""
    control: list[tuple[int, int, bytes]] = []
    given = list(fds)
    if given:
        control.append((SOL_SOCKET, SCM_RIGHTS, struct.pack(f"={len(given)}i", *given)))
    if cred is not None:
        control.append((SOL_SOCKET, SCM_CREDENTIALS, struct.pack("=iII", *cred)))
    flags = MSG_DONTWAIT | MSG_NOSIGNAL
    with Socket(fd) as sock:
        if to:
            return sock.sendmsg([data], control, flags, to)
        return sock.sendmsg([data], control, flags)
