"""Decoding or encoding a whole image at once, in a tight loop: images of pages have hundreds of thousands of small
messages.
"""

from __future__ import annotations

from .. import limits
from . import magic
from . import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MANY_BYTES = 1 << 12  # above this, all messages are parsed in one go
BYTES_MAX = 1 << 26  # images up to this size are read at once


def messages(data: bytes, at: int, image: Any) -> list[Any] | None:
    """All messages of an image without payloads, from ``at`` on.

    None where there are payloads, or where anything is amiss: the careful way is to say what, and
    where.
    """
    if image.payload or image.magic == "GHOST_FILE" or len(data) > limits.IMAGE_BYTES_MAX:
        return None
    bodies = _bodies(data, at)
    if bodies is None or len(bodies) > limits.IMAGE_ENTRIES_MAX:
        return None
    found: list[Any] = []
    try:
        if image.form == magic.HEADED:
            found.append(pb.pagemap_head.FromString(bodies.pop(0)))
        if len(data) > MANY_BYTES:
            parts = [part for body in bodies for part in (_head(len(body)), body)]
            whole = pb.list_class(image.message).FromString(b"".join(parts))
            found += whole.all
            checked = [*found[:1], whole]
        else:
            found += map(pb.message_class(image.message).FromString, bodies)
            checked = found
    except Exception:  # whatever a decoder raises: the same bytes are looked at again
        return None
    return found if all(message.IsInitialized() for message in checked) else None


def _bodies(data: bytes, at: int) -> list[bytes] | None:
    """The bytes of each message, from ``at`` on; None where they are cut short or too long."""
    found: list[bytes] = []
    size, number = len(data), int.from_bytes
    while at < size:
        start = at + 4
        at = start + number(data[at:start], "little")
        if at > size or at - start > limits.MESSAGE_BYTES_MAX:
            return None
        found.append(data[start:at])
    return found


def _head(length: int) -> bytes:
    """What stands before a part of this length."""
    return _heads[length] if length < len(_heads) else pb.part_head(1, length)


_heads = [pb.part_head(1, length) for length in range(256)]


def framed(found: list[Any], image: str) -> list[bytes]:
    """The messages of ``image`` (a file's name) as ImageWriter.append_framed() takes them. Raises ImageError."""
    bodies = [pb.encode(message, image) for message in found]
    return [len(body).to_bytes(4, "little") + body for body in bodies]
