"""Requests to the kernel about our network namespace: NETLINK_ROUTE (rtnetlink(7)), and others that work alike.

Kernel: net/core/rtnetlink.c, net/ipv4/route.c, include/uapi/linux/rtnetlink.h
"""

from __future__ import annotations

import errno
import os
import struct

from ..errors import KernelError
from .call import call
from .sock_diag import (
    AF_NETLINK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOCK_CLOEXEC,
    SOCK_RAW,
    attributes,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 0x4, 0x200, 0x400
RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 16, 18, 20, 21, 22
RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 24, 26, 32, 33, 34
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
RTA_DST, RTA_OIF, RTN_LOCAL = 1, 4, 2
_HEAD = struct.Struct("=IHHII")
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, bits of both addresses, tos, table, protocol, scope, type, flags
_RECEIVE_BYTES = 1 << 16
_NLM_F_MULTI = 0x2
_SEQUENCE = 24680  # CRIU sends messages about tracked connections again as they are, and waits for this


def attribute(kind: int, content: bytes) -> bytes:
    """An attribute with its head, filled up to whole words."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def ask(kind: int, body: bytes, *, flags: int = 0, protocol: int = NETLINK_ROUTE) -> list[bytes]:
    """Send one request; the bodies of the replies. ``flags``: NLM_F_DUMP for all there are; else it is confirmed.

    Raises KernelError with what the kernel answers.
    """
    fd = call("socket", AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
    try:
        many = flags & NLM_F_DUMP == NLM_F_DUMP
        flags |= NLM_F_REQUEST | (0 if many else NLM_F_ACK)
        os.write(fd, _HEAD.pack(_HEAD.size + len(body), kind, flags, 1, 0) + body)
        found: list[bytes] = []
        while True:
            data, at = os.read(fd, _RECEIVE_BYTES), 0
            while at < len(data):
                size, what, _, _, _ = _HEAD.unpack_from(data, at)
                if what in (NLMSG_DONE, NLMSG_ERROR):
                    (number,) = struct.unpack_from("=i", data, at + _HEAD.size)
                    if number < 0:
                        raise KernelError(f"{'rtnetlink' if not protocol else 'netfilter'} request {kind:#x}", -number)
                    return found
                found.append(data[at + _HEAD.size : at + size])
                at += (size + 3) & ~3
    finally:
        os.close(fd)


def framed(kind: int, bodies: Iterable[bytes]) -> bytes:
    """Replies as `ip address save` and its like put them into a file: with their heads, one after the other."""
    return b"".join(
        _HEAD.pack(_HEAD.size + len(body), kind, _NLM_F_MULTI, _SEQUENCE, 0) + body + bytes(-len(body) % 4)
        for body in bodies
    )


def unframed(data: bytes) -> list[tuple[int, bytes]]:
    """The (kind, body) of messages in a file. Raises ValueError where they do not follow one another."""
    found, at = [], 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise ValueError(f"byte {at}: it is cut off")
        size, kind, _, _, _ = _HEAD.unpack_from(data, at)
        if not _HEAD.size <= size <= len(data) - at:
            raise ValueError(f"byte {at}: a message of {size} bytes")
        found.append((kind, data[at + _HEAD.size : at + size]))
        at += (size + 3) & ~3
    return found


def is_local(address: bytes, index: int = 0) -> bool:
    """Is this one of the machine's own addresses, what is sent to it (by the interface ``index``) staying here?

    ``address`` has 4 or 16 bytes; neither a multicast nor a broadcast address is one.
    """
    family = 2 if len(address) == 4 else 10
    body = _RTMSG.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, address)
    if index:
        body += attribute(RTA_OIF, struct.pack("=I", index))
    try:
        replies = ask(RTM_GETROUTE, body)
    except KernelError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.ENODEV, errno.EAFNOSUPPORT):
            return False
        raise
    return bool(replies) and _RTMSG.unpack_from(replies[0])[7] == RTN_LOCAL


def find(reply: bytes, head: int, kind: int) -> bytes | None:
    """The content of an attribute behind ``head`` bytes of a reply; None if there is none."""
    found: Iterable[bytes] = (content for one, content in attributes(reply, head) if one & 0x3FFF == kind)
    return next(iter(found), None)
