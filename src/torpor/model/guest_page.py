"""The page that a program which knows of snapshots shares with Torpor: its layout, as docs/guest-protocol.md has it.

Bytes in, values out; nothing here touches the kernel. The page is written by both sides and trusted by neither:
whatever is read from it is checked by :func:`parse`.
"""

from __future__ import annotations

import struct

#: The memfd is called so; its descriptor stays open in the program.
NAME = b"torpor-guest"
LINK = "/memfd:torpor-guest (deleted)"
#: What stands in, in a woken program, for a generation file that it had open or mapped.
FILE_NAME = b"torpor-generation"
PAGE_BYTES = 4096
VERSION = 1
MAGIC = b"torpor guest\0\0\0\0"
ID_BYTES = 16

IDLE, PREPARE, READY, REFUSED, RESUMED, ABANDONED, RESTORED = range(7)
STATES = ("idle", "prepare", "ready", "refused", "resumed", "abandoned", "restored")

# Offsets. The first word is what AWS-LC (crypto/ube/vm_ube_detect.c) reads from /dev/sysgenid.
AT_GENERATION, AT_VERSION, AT_MAGIC, AT_ID, AT_STATE, AT_SIGNAL, AT_EVENTFD = 0, 4, 8, 24, 40, 44, 48
AT_PID, AT_TID, AT_LIMIT_MS, AT_POINT, AT_ARGUMENT_SIZE, AT_TEXT_SIZE = 52, 56, 60, 64, 68, 72
AT_TEXT, AT_ARGUMENT = 128, 1024
TEXT_BYTES = AT_ARGUMENT - AT_TEXT
ARGUMENT_BYTES = PAGE_BYTES - AT_ARGUMENT
HEAD = struct.Struct("<II16s16sIIiiiIIII")
WORD = struct.Struct("<I")


class Page:
    """What a page says. ``pid`` and ``tid`` are numbers in the program's own pid namespace."""

    __slots__ = ("argument", "eventfd", "generation", "id", "pid", "point", "signal", "state", "text", "tid")

    def __init__(self) -> None:
        self.generation = 1
        self.id = bytes(ID_BYTES)
        self.state = IDLE
        self.signal = 0
        self.eventfd = -1
        self.pid = 0
        self.tid = 0
        self.point = 0
        self.text = ""
        self.argument = b""


def is_page(content: bytes) -> bool:
    """Are these the first bytes of such a page?"""
    return content[AT_MAGIC : AT_MAGIC + len(MAGIC)] == MAGIC


def parse(content: bytes) -> Page:
    """Read a page. Raises ValueError for what cannot be."""
    if len(content) < PAGE_BYTES or not is_page(content):
        raise ValueError(f"{len(content)} bytes that do not begin as a guest page")
    page = Page()
    (
        page.generation, version, _, page.id, page.state, page.signal, page.eventfd, page.pid, page.tid, _,
        page.point, argument_size, text_size,
    ) = HEAD.unpack_from(content)  # fmt: skip
    if version != VERSION:
        raise ValueError(f"version {version}, {VERSION} is known")
    for name, value, limit in (
        ("state", page.state, len(STATES) - 1), ("signal", page.signal, 64), ("text", text_size, TEXT_BYTES),
        ("argument", argument_size, ARGUMENT_BYTES), ("pid", page.pid, 1 << 22), ("tid", page.tid, 1 << 22),
    ):  # fmt: skip
        if not 0 <= value <= limit:
            raise ValueError(f"{name}: {value} is not in 0 … {limit}")
    page.text = _printable(content[AT_TEXT : AT_TEXT + text_size])
    page.argument = content[AT_ARGUMENT : AT_ARGUMENT + argument_size]
    return page


def _printable(text: bytes) -> str:
    """What the program wrote, without anything that could steer a terminal or make more than one line."""
    shown = text.decode(errors="replace").replace("\n", " ")
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def build(page: Page) -> bytes:
    """The page as bytes."""
    text = page.text.encode()[:TEXT_BYTES]
    head = HEAD.pack(
        page.generation, VERSION, MAGIC, page.id, page.state, page.signal, page.eventfd, page.pid, page.tid, 0,
        page.point, len(page.argument), len(text),
    )  # fmt: skip
    assert len(page.argument) <= ARGUMENT_BYTES
    return head.ljust(AT_TEXT, b"\0") + text.ljust(TEXT_BYTES, b"\0") + page.argument.ljust(ARGUMENT_BYTES, b"\0")


def renewed(content: bytes, new_id: bytes, argument: bytes = b"") -> bytes:
    """The page as a woken program is to find it: the counter moved on, another id, the argument of this copy.

    What the program keeps in the bytes that this version does not know stays as it is. The counter goes past 0,
    which readers take for "not known". Raises ValueError for what is no page.
    """
    page = parse(content)
    assert len(new_id) == ID_BYTES and len(argument) <= ARGUMENT_BYTES
    fresh = bytearray(content)
    WORD.pack_into(fresh, AT_GENERATION, following(page.generation))
    fresh[AT_ID : AT_ID + ID_BYTES] = new_id
    WORD.pack_into(fresh, AT_STATE, RESTORED)
    WORD.pack_into(fresh, AT_TEXT_SIZE, 0)
    fresh[AT_TEXT : AT_TEXT + TEXT_BYTES] = bytes(TEXT_BYTES)
    WORD.pack_into(fresh, AT_ARGUMENT_SIZE, len(argument))
    fresh[AT_ARGUMENT : AT_ARGUMENT + ARGUMENT_BYTES] = argument.ljust(ARGUMENT_BYTES, b"\0")
    return bytes(fresh)


def following(generation: int) -> int:
    """The counter after this one."""
    return generation % 0xFFFFFFFF + 1
