"""What the kernel tells about the packet sockets of our network namespace: NETLINK_SOCK_DIAG.

Kernel: net/packet/diag.c, include/uapi/linux/packet_diag.h
"""

from __future__ import annotations

import struct

from .sock_diag import ask, attributes

AF_PACKET = 17
AUXDATA, ORIGDEV, VNETHDR, LOSS = 2, 4, 8, 16
_REQUEST = struct.Struct("=BBHII8s")
_MESSAGE = struct.Struct("=BBHI8s")
_SHOW = 0xF  # PACKET_SHOW_INFO, MCLIST, RING_CFG, FANOUT
_MEMBER = struct.Struct("=IIHH32s")

#: (block size, blocks, frame size, frames, retire_tmo, sizeof_priv, features)
Ring = tuple[int, ...]


class PacketSocket:
    """One socket. ``protocol`` is in host order, ``members`` are (ifindex, count, type, address).

    ``fanout`` is None outside of any group.
    """

    __slots__ = (
        "copy_thresh", "fanout", "flags", "ifindex", "ino", "members", "protocol", "reserve", "rx_ring", "timestamp",
        "tx_ring", "type", "version",
    )  # fmt: skip

    def __init__(self, reply: bytes) -> None:
        _, self.type, self.protocol, self.ino, _ = _MESSAGE.unpack_from(reply)
        self.ifindex = self.version = self.reserve = self.copy_thresh = self.timestamp = self.flags = 0
        self.members: list[tuple[int, int, int, bytes]] = []
        self.rx_ring: Ring = ()
        self.tx_ring: Ring = ()
        self.fanout: int | None = None
        for kind, content in attributes(reply, _MESSAGE.size):
            if kind == 0:
                (
                    self.ifindex, self.version, self.reserve, self.copy_thresh, self.timestamp, self.flags,
                ) = struct.unpack_from("=6I", content)  # fmt: skip
            elif kind == 1:
                for at in range(0, len(content), _MEMBER.size):
                    index, count, what, length, address = _MEMBER.unpack_from(content, at)
                    self.members.append((index, count, what, address[:length]))
            elif kind == 2:
                self.rx_ring = struct.unpack_from("=7I", content)
            elif kind == 3:
                self.tx_ring = struct.unpack_from("=7I", content)
            elif kind == 4:
                (self.fanout,) = struct.unpack_from("=I", content)


def packet_sockets() -> dict[int, PacketSocket]:
    """All packet sockets by inode. Raises KernelError (ENOENT) where the kernel does not tell."""
    request = _REQUEST.pack(AF_PACKET, 0, 0, 0, _SHOW, b"\xff" * 8)
    return {one.ino: one for one in map(PacketSocket, ask(request))}
