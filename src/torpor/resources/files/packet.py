"""Packet sockets: what interface they see, their rings, memberships and fanout groups. Packets that wait are lost.

Image: file_entry.psk (packet_sock_entry). Kernel: net/packet/af_packet.c
"""

from __future__ import annotations

import os
import stat
import struct

from ... import log
from ...errors import ImageError, doing
from ...images import schema as pb
from ...linux import packet_diag, sockets
from ...linux.call import call
from ...linux.inet_diag import swap
from ...linux.packet_diag import AF_PACKET, AUXDATA, LOSS, ORIGDEV, VNETHDR, PacketSocket
from .. import packet_heads, sockopts
from ..base import FileResource, unsupported
from ..fown import set_flags
from ..inet_options import get, interface, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

SOL_PACKET = 263
SOCK_PACKET = 10
# include/uapi/linux/if_packet.h
PACKET_ADD_MEMBERSHIP, PACKET_RX_RING, PACKET_COPY_THRESH, PACKET_AUXDATA, PACKET_ORIGDEV = 1, 5, 7, 8, 9
PACKET_VERSION, PACKET_RESERVE, PACKET_TX_RING, PACKET_LOSS, PACKET_VNET_HDR = 10, 12, 13, 14, 15
PACKET_TIMESTAMP, PACKET_FANOUT = 17, 18
FANOUT_CBPF, FANOUT_EBPF = 6, 7
#: TX_HAS_OFF, QDISC_BYPASS, IGNORE_OUTGOING, VNET_HDR_SZ
_MORE = (19, 20, 23, 24)
_FLAGS = {"aux_data": (AUXDATA, PACKET_AUXDATA), "orig_dev": (ORIGDEV, PACKET_ORIGDEV),
          "vnet_hdr": (VNETHDR, PACKET_VNET_HDR), "loss": (LOSS, PACKET_LOSS)}  # fmt: skip
_RING_FIELDS = ("block_size", "block_nr", "frame_size", "frame_nr", "retire_tmo", "sizeof_priv", "features")
_ADDRESS_BYTES = 32


class Packet(FileResource):
    """A packet socket. A mapping of its rings finds it in ``ctx.memo["packet socket", inode]``."""

    FD_TYPE, FIELD = 10, "psk"
    MODES = (stat.S_IFSOCK,)
    PRIORITY = 50

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("socket:[") and sockets.family(source.borrow()) == AF_PACKET

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        fanout = _shown(source, ctx).fanout
        if fanout is not None and fanout >> 16 & 0xFF in (FANOUT_CBPF, FANOUT_EBPF):
            raise unsupported(
                source,
                "a BPF program chooses among the sockets of its group (PACKET_FANOUT), and cannot be read back",
            )

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        self.check(source, ctx)
        fd, shown = source.borrow(), _shown(source, ctx)
        ctx.memo["packet socket", source.stat.st_ino] = source.id
        entry = pb.packet_sock_entry(
            id=source.id, type=shown.type, protocol=swap(shown.protocol), flags=source.flags, ifindex=shown.ifindex,
            fown=ctx.fown(source), opts=sockopts.dump(fd), version=shown.version, reserve=shown.reserve,
            timestamp=shown.timestamp, copy_thresh=shown.copy_thresh,
        )  # fmt: skip
        for field, (flag, _) in _FLAGS.items():
            setattr(entry, field, bool(shown.flags & flag))
        for index, count, kind, address in shown.members:
            for _ in range(count):
                entry.mclist.add(index=index, type=kind, addr=address)
        if shown.fanout is not None:
            entry.fanout = shown.fanout
        for ring, values in ((entry.rx_ring, shown.rx_ring), (entry.tx_ring, shown.tx_ring)):
            for field, value in zip(_RING_FIELDS, values, strict=False):
                setattr(ring, field, value)
        if shown.rx_ring or shown.tx_ring:
            receives, sends, lost = packet_heads.find(fd, shown)
            for ring, head in ((entry.rx_ring, receives), (entry.tx_ring, sends)):
                if head:
                    ring.head = head
        else:
            lost = _waits(fd)
        if lost:
            log.warning(f"fd {source.fd} ({source.link}): packets that wait in it are lost")
        if shown.ifindex:
            from _socket import if_indextoname

            entry.ifname = if_indextoname(shown.ifindex)
        for option in _MORE:
            set_ = get(fd, SOL_PACKET, option, 4)
            if set_ and any(set_):
                entry.more.add(level=SOL_PACKET, name=option, value=set_)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        with doing(f"packet socket on {entry.ifname or entry.ifindex or 'all interfaces'}"):
            index = interface(entry.ifindex, entry.ifname)
            # Without a protocol it sees nothing until it is bound; the old kind cannot be given one then.
            fd = sockets.socket(AF_PACKET, entry.type, entry.protocol if entry.type == SOCK_PACKET else 0)
            try:
                _fill(fd, entry, index)
            except BaseException:
                os.close(fd)
                raise
        return fd


def _waits(fd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _shown(source: SourceFile, ctx: DumpContext) -> PacketSocket:
    found = ctx.memo.get(("packet diag",))
    if found is None or source.stat.st_ino not in found:
        found = ctx.memo["packet diag",] = packet_diag.packet_sockets()
    shown: PacketSocket | None = found.get(source.stat.st_ino)
    if shown is None:
        raise unsupported(source, "a packet socket of another network namespace")
    return shown


def _fill(fd: int, entry: Message, index: int) -> None:
    if entry.type != SOCK_PACKET:
        _set_options(fd, entry, index)
    sockopts.restore(fd, entry.opts)
    if entry.type == SOCK_PACKET:
        if index:
            from _socket import if_indextoname

            name = struct.pack("=H14s", AF_PACKET, if_indextoname(index).encode()[:13])
            call("bind", fd, name, len(name))
    elif index or entry.protocol:
        name = struct.pack("=HHiHBB8s", AF_PACKET, entry.protocol, index, 0, 0, 0, b"")
        call("bind", fd, name, len(name))
    if entry.HasField("fanout"):
        put(fd, SOL_PACKET, PACKET_FANOUT, struct.pack("=I", entry.fanout))
    set_flags(fd, entry.flags)


def _set_options(fd: int, entry: Message, index: int) -> None:
    put(fd, SOL_PACKET, PACKET_VERSION, entry.version)
    put(fd, SOL_PACKET, PACKET_RESERVE, entry.reserve)
    put(fd, SOL_PACKET, PACKET_TIMESTAMP, entry.timestamp)
    put(fd, SOL_PACKET, PACKET_COPY_THRESH, entry.copy_thresh)
    for field, (_, option) in _FLAGS.items():
        if getattr(entry, field):
            put(fd, SOL_PACKET, option, 1)
    for one in entry.more:
        put(fd, one.level, one.name, one.value)
    for member in entry.mclist:
        if len(member.addr) > _ADDRESS_BYTES:
            raise ImageError("files.img", f"file {entry.id}: mclist", "an address is too long")
        where = index if member.index == entry.ifindex else member.index
        # struct packet_mreq_max in the kernel's own sources
        request = struct.pack("=iHH32s", where, member.type, len(member.addr), member.addr)
        put(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
    for field, option in (("rx_ring", PACKET_RX_RING), ("tx_ring", PACKET_TX_RING)):
        if entry.HasField(field):
            ring = [getattr(getattr(entry, field), name) for name in _RING_FIELDS]
            put(fd, SOL_PACKET, option, struct.pack("=7I", *ring))
    packet_heads.advance(fd, entry)


RESOURCE = Packet()
