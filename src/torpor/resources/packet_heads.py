"""Where a packet socket and its program are in their common rings: both count for themselves.

A new ring begins at its first frame. A program that is somewhere in the middle would wait there for a frame that the
kernel fills only when it has come round. So the kernel's place is read (BPF), what the program has not read yet is
counted as lost, and a restore sends packets through the loopback interface until the kernel is where the program waits.

Image: ``head`` in packet_ring. Kernel: net/packet/af_packet.c, include/uapi/linux/if_packet.h
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time

from .. import log
from ..errors import KernelError, Unsupported
from ..linux import packet_diag, sockets
from ..linux.call import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message

AF_PACKET, SOCK_RAW, SOL_PACKET, PACKET_STATISTICS = 17, 3, 263, 6
TP_STATUS_USER, TP_STATUS_SEND_REQUEST = 1, 1
LOOPBACK = 1  # the index of lo in every network namespace
_ETHERTYPE = 0x88B5  # for local experiments (IEEE 802)
_SOON_S = 5.0
_FRAME_BYTES_MAX = 60000


class Ring:
    """One ring in a mapping of both: frames, of a receiving ring of version 3 blocks, and their status."""

    __slots__ = ("area", "base", "block_bytes", "count", "per_block", "status", "step", "wide")

    def __init__(self, area: mmap.mmap, base: int, ring: packet_diag.Ring, version: int, *, sends: bool) -> None:
        block_bytes, blocks, frame_bytes, frames = ring[:4]
        self.area, self.base, self.block_bytes = area, base, block_bytes
        in_blocks = version == 2 and not sends
        self.count = blocks if in_blocks else frames
        self.step = block_bytes if in_blocks else frame_bytes
        self.per_block = 1 if in_blocks else max(block_bytes // frame_bytes, 1)
        #: Where the status lies in a frame (struct tpacket_hdr, tpacket2_hdr, tpacket3_hdr) or block
        self.status = 8 if in_blocks else 20 if version == 2 else 0
        self.wide = version == 0

    def at(self, index: int) -> int:
        """Where a frame or block begins."""
        block, frame = divmod(index, self.per_block)
        return self.base + block * self.block_bytes + frame * self.step

    def get(self, index: int) -> int:
        """The status of a frame or block."""
        return int(struct.unpack_from("=I", self.area, self.at(index) + self.status)[0])

    def put(self, index: int, status: int) -> None:
        """Set it."""
        struct.pack_into("=Q" if self.wide else "=I", self.area, self.at(index) + self.status, status)


def _map(
    fd: int, rings: tuple[packet_diag.Ring, packet_diag.Ring], version: int
) -> tuple[mmap.mmap, list[Ring | None]]:
    sizes = [ring[0] * ring[1] if ring else 0 for ring in rings]
    area = mmap.mmap(fd, sum(sizes))
    made = [
        Ring(area, base, ring, version, sends=sends) if ring else None
        for base, ring, sends in ((0, rings[0], False), (sizes[0], rings[1], True))
    ]
    return area, made


# ---------------------------------------------------------------------- dump


def find(fd: int, shown: packet_diag.PacketSocket) -> tuple[int, int, bool]:
    """Where the program is in the rings of our ``fd``, for receiving and for sending; is anything in them lost?"""
    try:
        kernel = _kernel_heads(fd, shown.version)
    except (KernelError, Unsupported) as error:
        log.warning(f"packet socket: where it is in its rings cannot be seen, taken for their start: {error}")
        return 0, 0, False
    area, (receiving, sending) = _map(fd, (shown.rx_ring, shown.tx_ring), shown.version)
    try:
        lost, heads = False, list(kernel)
        if receiving is not None:
            unread, count = 0, receiving.count
            while unread < count and receiving.get((kernel[0] - 1 - unread) % count) & TP_STATUS_USER:
                unread += 1
            heads[0] = (kernel[0] - unread) % count
            lost = unread > 0
        if sending is not None:
            unsent = 0
            while unsent < sending.count and sending.get((kernel[1] + unsent) % sending.count):
                unsent += 1
            heads[1] = (kernel[1] + unsent) % sending.count
            lost = lost or unsent > 0
    finally:
        area.close()
    return heads[0], heads[1], lost


def _kernel_heads(fd: int, version: int) -> tuple[int, int]:
    from ..linux import bpf, btf

    way = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data", "socket.sk")
    block, frame, sent = (
        "packet_sock.rx_ring.prb_bdqc.kactive_blk_num", "packet_sock.rx_ring.head", "packet_sock.tx_ring.head",
    )  # fmt: skip
    at = btf.lookup([*way, block, frame, sent, "bpf_iter_task()"])
    files, table, array, private, sock = (at[name] for name in way)
    through = (files, table, array, 8 * fd, private, sock)
    first = bpf.Place(at[block], 2, through=through) if version == 2 else bpf.Place(at[frame], 4, through=through)
    fields = bpf.read_own(at["bpf_iter_task()"], [first, bpf.Place(at[sent], 4, through=through)])
    here, there = (int.from_bytes(field, "little") for field in fields)
    return here, there


# ---------------------------------------------------------------------- restore


def advance(fd: int, entry: Message) -> None:
    """Bring the kernel to the ``head`` of each ring of a new socket, which is bound to the loopback interface by it.

    Its rings are empty afterwards. Where it does not get there, it stays where it is, with a warning.
    """
    fields = ("block_size", "block_nr", "frame_size", "frame_nr")
    rings = [
        tuple(getattr(ring, name) for name in fields) if entry.HasField(field) and ring.frame_nr else ()
        for field, ring in (("rx_ring", entry.rx_ring), ("tx_ring", entry.tx_ring))
    ]
    if not any(rings) or (not entry.rx_ring.head and not entry.tx_ring.head):
        return
    area, (receiving, sending) = _map(fd, (rings[0], rings[1]), entry.version)
    try:
        there = True
        if receiving is not None and entry.rx_ring.head and entry.protocol:
            there = _receive(fd, receiving, min(entry.rx_ring.head, receiving.count - 1), entry.version)
        if sending is not None and entry.tx_ring.head:
            there = _send(fd, sending, min(entry.tx_ring.head, sending.count - 1), entry) and there
        with sockets.Plain(fd) as sock:
            sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 64)  # these do not count: asking begins anew
    except KernelError as error:
        log.warning(f"packet socket: {error}")
        there = False
    finally:
        area.close()
        with sockets.Plain(fd) as sock:
            sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_ERROR)  # the loopback interface may be down
    if not there:
        log.warning("packet socket: its rings begin at their first frame, where the program may not look for it soon")


def _address(protocol: int) -> bytes:
    return struct.pack("=HHiHBB8s", AF_PACKET, protocol, LOOPBACK, 0, 0, 6, b"")


def _network(number: int) -> int:
    return number >> 8 | (number & 0xFF) << 8


def _receive(fd: int, ring: Ring, head: int, version: int) -> bool:
    name = _address(_network(_ETHERTYPE))
    call("bind", fd, name, len(name))
    sender = sockets.socket(AF_PACKET, SOCK_RAW, 0)
    deadline = time.monotonic() + _SOON_S
    try:
        while not ring.get(head - 1) & TP_STATUS_USER:
            if time.monotonic() > deadline:
                return False
            size = _next_size(ring, head) if version == 2 else 60
            if not size:
                time.sleep(0.001)  # until the kernel closes a block that is not full
                continue
            packet = (bytes(12) + struct.pack(">H", _ETHERTYPE)).ljust(size, b"\0")
            try:
                call("sendto", sender, packet, len(packet), 0, name, len(name))
            except KernelError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                time.sleep(0.001)
        for index in range(ring.count):
            ring.put(index, 0)
        return True
    finally:
        os.close(sender)


def _next_size(ring: Ring, head: int) -> int:
    """Bytes of the next packet for a ring of blocks: large ones fill them; 0 to wait."""
    last = head - 1
    if head > 1 and not ring.get(last - 1) & TP_STATUS_USER:
        return min(ring.block_bytes // 2, _FRAME_BYTES_MAX)
    (packets,) = struct.unpack_from("=I", ring.area, ring.at(last) + 12)
    return 0 if packets else 60


def _send(fd: int, ring: Ring, head: int, entry: Message) -> bool:
    version = entry.version
    header = 48 if version == 2 else 32
    size = 74  # with room for what VNET_HDR wants ahead of a packet
    for index in range(head):
        at = ring.at(index)
        ring.area[at + header : at + header + size] = bytes(size)
        if version == 2:
            struct.pack_into("=IIIIIIHH", ring.area, at, 0, 0, 0, 0, size, 0, header, header)
        else:
            struct.pack_into("=IIHH", ring.area, at + (8 if version == 0 else 4), size, 0, header, header)
        ring.put(index, TP_STATUS_SEND_REQUEST)
    name = _address(_network(_ETHERTYPE))
    deadline = time.monotonic() + _SOON_S
    call("sendto", fd, None, 0, 0, name, len(name))
    while any(ring.get(index) for index in range(head)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
