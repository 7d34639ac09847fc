"""Netlink sockets: their port, groups, peer and options. Messages that wait to be read are lost where netlink may lose
them, and the program is told so; others are refused (netlink_queue.py).

Image: file_entry.nlsk (netlink_sk_entry). Kernel: net/netlink/af_netlink.c
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time

from ... import log
from ...errors import KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux import sockets
from ...linux.call import buffer, call
from .. import netlink_queue, sockopts
from ..base import FileResource, unsupported
from ..fown import set_flags
from ..inet_options import get, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

AF_NETLINK, SOCK_RAW, SOL_NETLINK = 16, 3, 270
NETLINK_ADD_MEMBERSHIP, NETLINK_NO_ENOBUFS, NETLINK_LIST_MEMBERSHIPS = 1, 5, 9
#: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK
_FLAGS = (3, 4, 5, 8, 10, 11, 12)
_NAME = struct.Struct("=HHII")  # struct sockaddr_nl: family, port, groups
_GROUP_WORDS = 64
_LOOKS, _LOOK_S = 10, 0.01
CONNECTED = 1
_UNKNOWN = (errno.ENOPROTOOPT, errno.EINVAL)


class Netlink(FileResource):
    """A netlink socket."""

    FD_TYPE, FIELD = 13, "nlsk"
    MODES = (stat.S_IFSOCK,)
    PRIORITY = 40

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("socket:[") and sockets.family(source.borrow()) == AF_NETLINK

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        for _ in range(_LOOKS):  # mostly the program is about to read its answer
            if not _is_owed(source.borrow()):
                return
            time.sleep(_LOOK_S)
        raise _owed(source)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        fd = source.borrow()
        lost = netlink_queue.waits(fd)
        if lost and _is_owed(fd):
            raise _owed(source)
        with sockets.Socket(fd) as sock:
            protocol = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PROTOCOL)
            kind = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_TYPE)
        _, _, port, _ = _NAME.unpack(sockets.own_name(fd, _NAME.size))
        _, _, peer, group = _NAME.unpack(sockets.peer_name(fd, _NAME.size))
        entry = pb.netlink_sk_entry(
            id=source.id, ino=source.stat.st_ino, protocol=protocol, flags=source.flags, portid=port,
            dst_portid=peer, dst_group=group.bit_length(), state=CONNECTED if peer or group else 0,
            groups=_groups(fd), fown=ctx.fown(source), opts=sockopts.dump(fd),
        )  # fmt: skip
        for option in _FLAGS:
            value = get(fd, SOL_NETLINK, option, 4)
            if value and any(value):
                entry.more.add(level=SOL_NETLINK, name=option, value=value)
        if lost:
            log.warning(f"fd {source.fd} ({source.link}): netlink events that wait are lost; the program will be told")
            entry.overrun = True
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


def _is_owed(fd: int) -> bool:
    """Does a message wait that was sent to this socket alone?"""
    return netlink_queue.waits(fd) and not netlink_queue.all_to_groups(fd)


def _owed(source: SourceFile) -> Unsupported:
    return unsupported(source, "netlink messages wait to be read", hint="try again when the program has read them")


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
    if entry.portid:
        _take_port(fd, entry.portid)
    quiet = any(one.name == NETLINK_NO_ENOBUFS and any(one.value) for one in entry.more)
    if entry.overrun and entry.portid and not quiet:
        _, _, port, _ = _NAME.unpack(sockets.own_name(fd, _NAME.size))
        netlink_queue.overrun(fd, entry.protocol, port)
    sockopts.restore(fd, entry.opts)
    for one in entry.more:
        if one.level == SOL_NETLINK:
            put(fd, SOL_NETLINK, one.name, one.value)
    for index, word in enumerate(entry.groups):
        for bit in range(32):
            if word >> bit & 1:
                put(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 32 * index + bit + 1)
    if entry.state == CONNECTED:
        group = 1 << (entry.dst_group - 1) & 0xFFFFFFFF if entry.dst_group else 0
        name = _NAME.pack(AF_NETLINK, 0, entry.dst_portid, group)
        call("connect", fd, name, len(name))
    set_flags(fd, entry.flags)


def _take_port(fd: int, port: int) -> None:
    try:
        _bind(fd, port)
    except KernelError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Mostly nobody but the kernel chose it, and replies find their way to any.
        _bind(fd, 0)
        log.warning(f"netlink port {port} is in use: the socket has another one now")


def _bind(fd: int, port: int) -> None:
    name = _NAME.pack(AF_NETLINK, 0, port, 0)
    call("bind", fd, name, len(name))


RESOURCE = Netlink()
