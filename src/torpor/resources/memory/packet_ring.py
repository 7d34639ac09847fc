"""Rings of packet sockets that are mapped. Their frames are empty after a restore.

Image: vma_entry with SOCKET; ``shmid`` is the id of the socket's entry. Kernel: net/packet/af_packet.c, packet_mmap()
"""

from __future__ import annotations

from ...errors import Unsupported
from ...proc import maps
from ..base import MAP_FIXED, VMA_REGULAR, VMA_SOCKET, MappingResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext


class PacketRing(MappingResource):
    """A mapping of the rings of a packet socket."""

    KINDS = (maps.SOCKET,)
    STATUS = VMA_SOCKET
    PRIVATE_PAGES = False

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        file_id = ctx.memo.get(("packet socket", mapping.vma.inode))
        if file_id is None:
            raise Unsupported(
                f"mapping {mapping.vma.start:x}-{mapping.vma.end:x}: of a packet socket that nobody has open",
                hint="close it before the dump",
            )
        entry.status = VMA_REGULAR | VMA_SOCKET
        entry.shmid = file_id

    def inheritable(self, entry: Message, ctx: BuildContext) -> bool:
        return False

    def prepare(self, entry: Message, ctx: BuildContext) -> None:
        ctx.build(entry.shmid)

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        fd = ctx.build(entry.shmid)
        program.call(
            "mmap", entry.start, entry.end - entry.start, prot, entry.flags | MAP_FIXED, fd, entry.pgoff
        )


RESOURCE = PacketRing()
