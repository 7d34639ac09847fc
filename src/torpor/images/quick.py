"""Decoding a whole image at once, in a tight loop: images of pages have hundreds of thousands of small
messages.
"""

from __future__ import annotations

from .. import limits
from . import magic
from . import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BYTES_MAX = 1 << 26  # images up to this size are read at once


def messages(data: bytes, at: int, image: Any) -> list[Any] | None:
    """All messages of an image without payloads, from ``at`` on.

    None where there are payloads, or where anything is amiss: the careful way is to say what, and
    where.
    """
    size = len(data)
    if image.payload or image.magic == "GHOST_FILE" or size > limits.IMAGE_BYTES_MAX:
        return None
    found: list[Any] = []
    parse = pb.message_class(image.message).FromString
    head = pb.pagemap_head.FromString if image.form == magic.HEADED else None
    number = int.from_bytes
    try:
        while at < size:
            start = at + 4
            at = start + number(data[at:start], "little")
            if at > size or at - start > limits.MESSAGE_BYTES_MAX:
                return None
            message = head(data[start:at]) if head else parse(data[start:at])
            head = None
            if not message.IsInitialized():
                return None
            found.append(message)
    except Exception:  # whatever a decoder raises: the same bytes are looked at again
        return None
    return None if head or len(found) > limits.IMAGE_ENTRIES_MAX else found
