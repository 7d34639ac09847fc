"""What the kernel tells about sockets that nobody need have open: NETLINK_SOCK_DIAG.

Kernel: net/core/sock_diag.c, net/unix/diag.c, include/uapi/linux/unix_diag.h. A reply is a message of
a fixed head and attributes; which attribute becomes which field is said once, in a table.
"""

from __future__ import annotations

import os
import struct

from ..errors import KernelError
from .call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC, NETLINK_SOCK_DIAG = 16, 3, os.O_CLOEXEC, 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3
AF_UNIX = 1
#: include/net/tcp_states.h; unix sockets use these three.
ESTABLISHED, CLOSE, LISTEN = 1, 7, 10
_HEAD = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_UNIX_REQUEST = struct.Struct("=BBHIII8s")
_UNIX_REPLY = struct.Struct("=BBBxI8s")
_SHOW_ALL = 0x5F  # UDIAG_SHOW_NAME, VFS, PEER, ICONS, RQLEN, UID
_RECEIVE_BYTES = 1 << 16
_TRIES = 16


def ask(body: bytes) -> Iterator[bytes]:
    """Send one SOCK_DIAG_BY_FAMILY request for all sockets; gives the body of each reply.

    Raises KernelError when the kernel refuses it: ENOENT where it does not know the family.
    """
    fd = call("socket", AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    try:
        flags = NLM_F_REQUEST | NLM_F_DUMP
        os.write(fd, _HEAD.pack(_HEAD.size + len(body), SOCK_DIAG_BY_FAMILY, flags, 1, 0) + body)
        while True:
            data = os.read(fd, _RECEIVE_BYTES)
            at = 0
            while at < len(data):
                size, kind, flags, _, _ = _HEAD.unpack_from(data, at)
                if kind == NLMSG_DONE:
                    # A protocol that the kernel has no module for is told at the end of an empty list.
                    (number,) = struct.unpack_from("=i", data, at + _HEAD.size)
                    if number < 0:
                        raise KernelError("sock_diag", -number)
                    return
                if kind == NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", data, at + _HEAD.size)
                    raise KernelError("sock_diag", -number)
                if flags & NLM_F_DUMP_INTR:
                    raise InterruptedError("the table of sockets changed as it was read")
                yield data[at + _HEAD.size : at + size]
                at += (size + 3) & ~3
    finally:
        os.close(fd)


def attributes(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """The (type, content) of the netlink attributes in ``data`` from ``at`` on."""
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind, data[at + _ATTRIBUTE.size : at + size]
        at += (size + 3) & ~3


def words(data: bytes) -> tuple[int, ...]:
    """An array of 32-bit numbers."""
    return struct.unpack(f"={len(data) // 4}I", data)


def number(data: bytes) -> int:
    """A number of any width."""
    return int.from_bytes(data, "little")


class UnixSocket:
    """One socket of the family AF_UNIX, as the kernel shows it.

    ``name`` is the address without its family, b"" for none; a path ends in NUL. ``vfs`` is (inode,
    device in the kernel's form) of a bound path. ``peer`` is the inode of the socket that it sends
    to: None if there is none, 0 if that one is closed or not accepted yet. ``pending`` has the inodes
    of those who wait to be accepted, oldest first, 0 for one that is closed. ``queue`` is (bytes to
    read, bytes not read by the peer), of a listening socket (connections waiting, backlog).
    ``shutdown`` is 1 reading, 2 writing, 3 both.
    """

    __slots__ = ("ino", "name", "peer", "pending", "queue", "shutdown", "state", "type", "uid", "vfs")

    def __init__(self, kind: int, state: int, ino: int) -> None:
        self.type, self.state, self.ino = kind, state, ino
        self.name = b""
        self.vfs: tuple[int, int] | None = None
        self.peer: int | None = None
        self.pending: tuple[int, ...] = ()
        self.queue = (0, 0)
        self.shutdown = 0
        self.uid = 0


#: enum in include/uapi/linux/unix_diag.h → field of UnixSocket, how it is read
_UNIX_FIELDS: dict[int, tuple[str, Callable[[bytes], Any]]] = {
    0: ("name", bytes),
    1: ("vfs", words),
    2: ("peer", number),
    3: ("pending", words),
    4: ("queue", words),
    6: ("shutdown", number),
    7: ("uid", number),
}


def parse_unix(reply: bytes) -> UnixSocket:
    """The UnixSocket in the body of a reply."""
    _, kind, state, ino, _ = _UNIX_REPLY.unpack_from(reply)
    found = UnixSocket(kind, state, ino)
    for attribute, content in attributes(reply, _UNIX_REPLY.size):
        if attribute in _UNIX_FIELDS:
            field, read = _UNIX_FIELDS[attribute]
            setattr(found, field, read(content))
    return found


def unix_sockets() -> dict[int, UnixSocket]:
    """All unix sockets of our network namespace, by inode."""
    request = _UNIX_REQUEST.pack(AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_ALL, b"\xff" * 8)
    for _ in range(_TRIES - 1):
        try:
            return {one.ino: one for one in map(parse_unix, ask(request))}
        except InterruptedError:
            continue
    return {one.ino: one for one in map(parse_unix, ask(request))}
