"""Images made up: strategies for messages of every kind, and a set with one of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from torpor.images import magic, payload
from torpor.images import schema as pb
from torpor.images.store import ImageWriter

# Field types of descriptor.proto: what may stand in them.
NUMBERS = {
    3: (-(2**63), 2**63 - 1),
    4: (0, 2**64 - 1),
    5: (-(2**31), 2**31 - 1),
    6: (0, 2**64 - 1),
    7: (0, 2**32 - 1),
    13: (0, 2**32 - 1),
    17: (-(2**31), 2**31 - 1),
    18: (-(2**63), 2**63 - 1),
}
BOOL, STRING, MESSAGE, BYTES, ENUM = 8, 9, 11, 12, 14
OPTIONAL, REQUIRED, REPEATED = 1, 2, 3

TEXTS = st.one_of(st.text(max_size=8).map(str.encode), st.binary(max_size=8))


def label_of(field: Any) -> int:
    if hasattr(field, "is_repeated"):
        return REPEATED if field.is_repeated else REQUIRED if field.is_required else OPTIONAL
    return int(field.label)


def values(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.type == MESSAGE:
        return messages(field.message_type.full_name, depth - 1)
    if field.type == ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.type == BOOL:
        return st.booleans()
    if field.type == STRING:
        return TEXTS
    if field.type == BYTES:
        return st.binary(max_size=8)
    return st.integers(*NUMBERS[field.type])


@st.composite
def messages(draw: st.DrawFn, name: str, depth: int = 4) -> Any:
    """Any message called ``name`` with all it requires; deeper than ``depth``, nothing else."""
    message = pb.message_class(name)()
    for field in message.DESCRIPTOR.fields:
        label = label_of(field)
        if label == REQUIRED:
            fill(message, field, draw(values(field, depth)))
        elif depth > 0 and draw(st.booleans()):
            count = draw(st.integers(0, 3)) if label == REPEATED else 1
            for _ in range(count):
                fill(message, field, draw(values(field, depth)), repeated=label == REPEATED)
    return message


def fill(message: Any, field: Any, value: Any, *, repeated: bool = False) -> None:
    name = field.name
    if field.type == MESSAGE:
        target = getattr(message, name).add() if repeated else getattr(message, name)
        target.CopyFrom(value)
        if not repeated:
            target.SetInParent()
    elif field.type == STRING:
        (pb.add_bytes if repeated else pb.put_bytes)(message, name, value)
    elif repeated:
        getattr(message, name).append(value)
    else:
        setattr(message, name, value)


def pipe_data(message: Any, content: bytes) -> bytes:
    message.bytes = len(content)
    return content


def queued(message: Any, content: bytes) -> bytes:
    message.length = len(content)
    return content


def stream(message: Any, content: bytes) -> bytes:
    message.inq_len = len(content) // 3
    message.outq_len = len(content) - message.inq_len
    return content


def map_data(message: Any, content: bytes) -> bytes:
    message.keys_bytes = len(content) // 2
    message.values_bytes = len(content) - message.keys_bytes
    return content


def shared_memory(message: Any, content: bytes) -> bytes:
    message.size = len(content)
    if message.in_pagemaps:
        return b""
    return content


def semaphores(message: Any, content: bytes) -> bytes:
    message.nsems = len(content) // 2
    return content[: 2 * message.nsems]


def message_queue(message: Any, content: bytes) -> bytes:
    message.qnum = len(content) % 4
    return payload.join_queue([(number, content) for number in range(message.qnum)])


def ghost(message: Any, content: bytes) -> bytes:
    if message.DESCRIPTOR.name == "ghost_chunk_entry":
        message.len = len(content)
        return content
    return b"" if message.chunks else content


#: magic → makes the message announce a payload, and gives the payload
ANNOUNCE: dict[str, Callable[[Any, bytes], bytes]] = {
    "PIPES_DATA": pipe_data,
    "FIFO_DATA": pipe_data,
    "SK_QUEUES": queued,
    "TCP_STREAM": stream,
    "BPFMAP_DATA": map_data,
    "IPCNS_SHM": shared_memory,
    "IPCNS_SEM": semaphores,
    "IPCNS_MSG": message_queue,
    "GHOST_FILE": ghost,
}

IDS = {"": "", "u": "-42", "x": "-2a", "s": "-dump"}

#: every image with messages that a set may have, by name
NAMES = sorted(
    image.stem + IDS[image.id] for image in magic.IMAGES.values() if image.form != magic.RAW
)


@st.composite
def entries(draw: st.DrawFn, name: str) -> list[tuple[Any, bytes]]:
    """The messages of an image called ``name`` with their payloads."""
    image = magic.kind_of(name)
    count = 1 if image.form == magic.ONE else draw(st.integers(0, 4))
    if image.form == magic.HEADED:
        head = [(draw(messages("pagemap_head")), b"")]
        return head + [(draw(messages(image.message)), b"") for _ in range(count)]
    if image.magic == "GHOST_FILE":
        return draw(ghost_files())
    found = []
    for _ in range(count):
        message, content = draw(messages(image.message)), b""
        if image.payload:
            content = ANNOUNCE[image.magic](message, draw(st.binary(max_size=40)))
        found.append((message, content))
    return found


@st.composite
def ghost_files(draw: st.DrawFn) -> list[tuple[Any, bytes]]:
    message = draw(messages("ghost_file_entry"))
    found = [(message, ghost(message, draw(st.binary(max_size=40))))]
    if message.chunks:
        for chunk in draw(st.lists(messages("ghost_chunk_entry"), max_size=3)):
            found.append((chunk, ghost(chunk, draw(st.binary(max_size=40)))))
    return found


def write_image(folder: str, name: str, what: list[tuple[Any, bytes]]) -> bytes:
    """Write an image of these entries; its bytes."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        with ImageWriter(directory) as writer:
            writer.create(name)
            for message, content in what:
                writer.append(name, message, content)
            writer.commit()
    finally:
        os.close(directory)
    with open(os.path.join(folder, magic.file_name(name)), "rb") as file:
        return file.read()


def least(name: str) -> Any:
    """A message called ``name`` with nothing but what it requires: zeros."""
    message = pb.message_class(name)()
    for field in message.DESCRIPTOR.fields:
        if label_of(field) == REQUIRED:
            empty = {STRING: b"", BYTES: b"", BOOL: False}
            if field.type == MESSAGE:
                fill(message, field, least(field.message_type.full_name))
            elif field.type == ENUM:
                fill(message, field, field.enum_type.values[0].number)
            else:
                fill(message, field, empty.get(field.type, 0))
    return message
