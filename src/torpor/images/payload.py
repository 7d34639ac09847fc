"""What follows a message in some images: bytes out of pipes, queues, shared memory, files.

Only the message says how long it is. Some payloads are padded with zeros to whole words; the
padding is no part of what is handed in and out here.
"""

from __future__ import annotations

from .. import limits
from ..errors import ImageError
from . import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    #: ``read(offset, size)`` gives exactly that many bytes of the file or raises ImageError.
    Read = Callable[[int, int], bytes]

#: Zeros fill these up to a multiple of so many bytes.
PADDING = {"IPCNS_SHM": 4, "IPCNS_SEM": 8}


def padding(magic: str, size: int) -> int:
    """How many zeros follow a payload of ``size`` bytes in an image of that kind."""
    return -size % PADDING.get(magic, 1)


def size_of(magic: str, message: Any, *, first: bool, rest: int, image: str, field: str) -> int:
    """Length in bytes of the payload behind ``message`` in an image of the kind ``magic``.

    ``first``: is it the first message of the image; ``rest``: bytes of the file behind it, which
    is the length of a ghost file that is not in chunks. Queues of messages are not told this way:
    see :func:`queue_size`.
    """
    if magic in ("PIPES_DATA", "FIFO_DATA"):
        size: int = message.bytes
    elif magic == "SK_QUEUES":
        size = message.length
    elif magic == "TCP_STREAM":
        size = message.inq_len + message.outq_len
    elif magic == "BPFMAP_DATA":
        size = message.keys_bytes + message.values_bytes
    elif magic == "IPCNS_SHM":
        size = 0 if message.in_pagemaps else message.size
    elif magic == "IPCNS_SEM":
        if message.nsems > limits.SEMAPHORES_MAX:
            raise ImageError(image, field, f"{message.nsems} semaphores in one set")
        size = 2 * message.nsems
    elif magic == "GHOST_FILE":
        size = message.len if not first else 0 if message.chunks else rest
    else:
        size = 0
    if size > rest:
        raise ImageError(image, field, f"{size} bytes should follow, {rest} do")
    return size


def queue_size(read: Read, at: int, count: int, image: str, field: str) -> int:
    """Length of ``count`` messages of a System V queue that begin at ``at``, frames included."""
    start = at
    for index in range(count):
        place = f"{field}: message {index}"
        size = int.from_bytes(read(at, 4), "little")
        if size > limits.MESSAGE_BYTES_MAX:
            raise ImageError(image, place, f"{size} bytes long")
        entry = pb.decode("ipc_msg", read(at + 4, size), image, place)
        at += 4 + size
        stored = entry.msize + -entry.msize % 8
        read(at + stored, 0)
        at += stored
    return at - start


def split_queue(payload: bytes, image: str, field: str) -> list[tuple[int, bytes]]:
    """The messages in the payload of an ipc_msg_entry, as (type, text)."""
    return [(entry.mtype, text) for entry, text in queue_messages(payload, image, field)]


def queue_messages(payload: bytes, image: str, field: str) -> list[tuple[Any, bytes]]:
    """As :func:`split_queue`, with the ipc_msg itself instead of its type."""
    messages: list[tuple[Any, bytes]] = []
    at = 0
    while at < len(payload):
        place = f"{field}: message {len(messages)}"
        size = int.from_bytes(payload[at : at + 4], "little")
        entry = pb.decode("ipc_msg", payload[at + 4 : at + 4 + size], image, place)
        at += 4 + size
        text = payload[at : at + entry.msize]
        if len(text) < entry.msize:
            raise ImageError(image, place, "truncated")
        messages.append((entry, text))
        at += entry.msize + -entry.msize % 8
    return messages


def join_queue(messages: list[tuple[int, bytes]]) -> bytes:
    """The payload for an ipc_msg_entry whose queue holds ``messages``, (type, text) each."""
    parts = []
    for kind, text in messages:
        entry = pb.encode(pb.ipc_msg(mtype=kind, msize=len(text)), "ipcns-msg", "message")
        parts += [len(entry).to_bytes(4, "little"), entry, text, bytes(-len(text) % 8)]
    return b"".join(parts)
