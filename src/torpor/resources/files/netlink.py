"""Netlink sockets: their port, groups, peer and options. Messages that wait to be read are refused: nobody but
the kernel could send them again.

Image: file_entry.nlsk (netlink_sk_entry). Kernel: net/netlink/af_netlink.c
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from ... import log
from ...errors import KernelError, doing
from ...images import schema as pb
from ...linux import sockets
from ...linux.call import buffer, call
from .. import sockopts
from ..base import FileResource, unsupported
from ..fown import set_flags
from ..inet_options import get, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

AF_NETLINK, SOCK_RAW, SOL_NETLINK = 16, 3, 270
NETLINK_ADD_MEMBERSHIP, NETLINK_LIST_MEMBERSHIPS = 1, 9
#: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK
_FLAGS = (3, 4, 5, 8, 10, 11, 12)
_NAME = struct.Struct("=HHII")  # struct sockaddr_nl: family, port, groups
_GROUP_WORDS = 64
CONNECTED = 1
_UNKNOWN = (errno.ENOPROTOOPT, errno.EINVAL)


class Netlink(FileResource):
    """A netlink socket."""

    FD_TYPE, FIELD = 13, "nlsk"
    MODES = (stat.S_IFSOCK,)
    PRIORITY = 40

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("socket:[") and sockets.family(source.borrow()) == AF_NETLINK

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        fd = source.borrow()
        if sockets.peek(fd, 1) is not None:
            raise unsupported(
                source, "netlink messages wait to be read", hint="try again when the program has read them"
            )
        with sockets.Socket(fd) as sock:
            protocol = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PROTOCOL)
            kind = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_TYPE)
        _, _, port, _ = _NAME.unpack(_name(fd, "getsockname"))
        _, _, peer, group = _NAME.unpack(_name(fd, "getpeername"))
        entry = pb.netlink_sk_entry(
            id=source.id, ino=source.stat.st_ino, protocol=protocol, flags=source.flags, portid=port,
            dst_portid=peer, dst_group=group.bit_length(), state=CONNECTED if peer or group else 0,
            groups=_groups(fd), fown=ctx.fown(source), opts=sockopts.dump(fd),
        )  # fmt: skip
        for option in _FLAGS:
            value = get(fd, SOL_NETLINK, option, 4)
            if value and any(value):
                entry.more.add(level=SOL_NETLINK, name=option, value=value)
        if kind != SOCK_RAW:
            entry.more.add(level=sockets.SOL_SOCKET, name=sockets.SO_TYPE, value=kind.to_bytes(4, "little"))
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        given = ctx.inherited.get(f"socket:[{entry.ino}]")
        if given is not None:
            return os.dup(given)
        kind = SOCK_RAW
        for one in entry.more:
            if (one.level, one.name) == (sockets.SOL_SOCKET, sockets.SO_TYPE):
                kind = int.from_bytes(one.value, "little")
        with doing(f"netlink socket of protocol {entry.protocol}"):
            fd = sockets.socket(AF_NETLINK, kind, entry.protocol)
            try:
                _fill(fd, entry)
            except BaseException:
                os.close(fd)
                raise
        return fd


def _name(fd: int, call_name: str) -> bytes:
    area, size = buffer(_NAME.size), buffer(4)
    size.raw = _NAME.size.to_bytes(4, "little")
    call(call_name, fd, area, size)
    return area.raw


def _groups(fd: int) -> list[int]:
    """The groups that it listens to, a bit each; no more words than needed."""
    area, size = buffer(4 * _GROUP_WORDS), buffer(4)
    size.raw = len(area).to_bytes(4, "little")
    call("getsockopt", fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, area, size)
    length = min(int.from_bytes(size.raw, "little"), len(area)) & ~3
    words = list(struct.unpack(f"={length // 4}I", area.raw[:length]))
    while words and not words[-1]:
        words.pop()
    return words


def _fill(fd: int, entry: Message) -> None:
    sockopts.restore(fd, entry.opts)
    for one in entry.more:
        if one.level == SOL_NETLINK:
            put(fd, SOL_NETLINK, one.name, one.value)
    if entry.portid:
        try:
            _bind(fd, entry.portid)
        except KernelError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Mostly nobody but the kernel chose it, and replies find their way to any.
            _bind(fd, 0)
            log.warning(f"netlink port {entry.portid} is in use: the socket has another one now")
    for index, word in enumerate(entry.groups):
        for bit in range(32):
            if word >> bit & 1:
                put(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 32 * index + bit + 1)
    if entry.state == CONNECTED:
        group = 1 << (entry.dst_group - 1) & 0xFFFFFFFF if entry.dst_group else 0
        name = _NAME.pack(AF_NETLINK, 0, entry.dst_portid, group)
        call("connect", fd, name, len(name))
    set_flags(fd, entry.flags)


def _bind(fd: int, port: int) -> None:
    name = _NAME.pack(AF_NETLINK, 0, port, 0)
    call("bind", fd, name, len(name))


RESOURCE = Netlink()
