"""Connections that are read, thousands at a time, as they are taken down: by columns (remote/many.py) what most of them
are, established with empty queues; the others one by one (tcp.py).
"""

from __future__ import annotations

import struct

from ..linux.inet_diag import ESTABLISHED
from ..remote.many import Many, parts
from . import tcp
from .inet_options import SOL_TCP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..errors import KernelError
    from ..images.schema import Message
    from ..linux.function import Area
    from ..remote.many import Block
    from .tcp import Sizes

    #: tcp_stream_entry, bytes to be read, bytes to be acknowledged or sent, sizes
    Saved = tuple[Message, bytes, bytes, Sizes]

_INFO_BYTES = 104
#: TCP_INFO behind its length, then SIOCINQ, SIOCOUTQ, SIOCOUTQNSD
_SIZES = struct.Struct(f"=I{_INFO_BYTES}s3I")
#: TCP_MAXSEG, TCP_TIMESTAMP, TCP_REPAIR_WINDOW, and TCP_QUEUE_SEQ of either queue, each behind its length
_OTHERS = struct.Struct("=II II I20s II II")
_LENGTHS = _SIZES.pack(_INFO_BYTES, b"", 0, 0, 0)
_TEMPLATE = _LENGTHS + _OTHERS.pack(4, 0, 4, 0, 20, b"", 4, 0, 4, 0) + _LENGTHS
#: Option → bytes
_MAY_BE_MISSING = {tcp.TCP_MAXSEG: 4, tcp.TCP_TIMESTAMP: 4, tcp.TCP_REPAIR_WINDOW: 20}
_NUMBERS = struct.pack("=3i", 0, 1, 2)


class _Reader:
    """Calls that read of many sockets into a block of bytes for each."""

    def __init__(self, fds: Sequence[int], template: bytes) -> None:
        self.fds = fds
        self.many = Many()
        self.area: Area = self.many.area(template * len(fds))
        self.stride = len(template)
        self._numbers = self.many.place(_NUMBERS)

    def at(self, offset: int) -> list[int]:
        """The address of a field for each socket."""
        start = self.area.address + offset
        return list(range(start, start + len(self.fds) * self.stride, self.stride))

    def put(self, option: int, number: int) -> None:
        """Set an option of TCP to 0, 1 or 2."""
        self.many.calls("setsockopt", self.fds, SOL_TCP, option, self._numbers + 4 * number, 4)

    def get(self, option: int, offset: int) -> None:
        """Read an option of TCP to where its length is ahead of it."""
        self.many.calls("getsockopt", self.fds, SOL_TCP, option, self.at(offset + 4), self.at(offset))

    def sizes(self, offset: int) -> None:
        """Read what tcp.sizes() tells."""
        self.get(tcp.TCP_INFO, offset)
        for index, request in enumerate((tcp.SIOCINQ, tcp.SIOCOUTQ, tcp.SIOCOUTQNSD)):
            self.many.calls("ioctl", self.fds, request, self.at(offset + 4 + _INFO_BYTES + 4 * index))


def sizes_of(fds: Sequence[int]) -> list[Sizes]:
    """tcp.sizes() of many connections."""
    sizes: list[Sizes] = []
    for some in parts(fds):
        reader = _Reader(some, _LENGTHS)
        reader.sizes(0)
        reader.many.run()
        sizes += [_sizes(found) for found in _SIZES.iter_unpack(reader.area.content)]
    return sizes


def _sizes(found: tuple[int, bytes, int, int, int]) -> Sizes:
    _, info, received, sending, unsent = found
    return info[0], received, sending, unsent


def take_all(fds: Sequence[int], failed: Callable[[int, KernelError], Exception]) -> list[Saved | None]:
    """Put connections under repair and read them; None for those that have to be read one by one (tcp.save()).

    ``failed(index, error)`` makes of the error of one what is raised. Raises it.
    """
    saved: list[Saved | None] = []
    for some in parts(fds):
        start = len(saved)
        saved += _take(some, lambda row, error, start=start: failed(start + row, error))  # type: ignore[misc]
    return saved


def _take(fds: Sequence[int], failed: Callable[[int, KernelError], Exception]) -> list[Saved | None]:
    reader = _Reader(fds, _TEMPLATE)
    reader.put(tcp.TCP_REPAIR, 1)
    reader.sizes(0)
    at = _SIZES.size
    for option, size in _MAY_BE_MISSING.items():
        reader.get(option, at)
        at += 4 + size
    for queue in (tcp.RECV_QUEUE, tcp.SEND_QUEUE):
        reader.put(tcp.TCP_REPAIR_QUEUE, queue)
        reader.get(tcp.TCP_QUEUE_SEQ, at)
        at += 8
    reader.put(tcp.TCP_REPAIR_QUEUE, tcp.NO_QUEUE)
    reader.sizes(at)
    alone: set[int] = set()

    def tell(block: Block, row: int, error: KernelError) -> None:
        if block.name == "getsockopt" and block.columns[2] in _MAY_BE_MISSING:
            alone.add(row)
        else:
            raise failed(row, error) from None

    reader.many.run(tell)
    content, stride = reader.area.content, reader.stride
    return [
        None if index in alone else _saved(content[index * stride : (index + 1) * stride])
        for index in range(len(fds))
    ]


def _saved(block: bytes) -> Saved | None:
    shown = _sizes(_SIZES.unpack_from(block))
    if shown != (ESTABLISHED, 0, 0, 0) or _sizes(_SIZES.unpack_from(block, _SIZES.size + _OTHERS.size)) != shown:
        return None
    _, mss, _, timestamp, size, window, _, received, _, sent = _OTHERS.unpack_from(block, _SIZES.size)
    entry = tcp.begin_entry(tcp.Info(block[4 : 4 + _INFO_BYTES]), 0, 0, 0, mss, timestamp, window[:size])
    entry.inq_seq, entry.outq_seq = received, sent
    return entry, b"", b"", shown
