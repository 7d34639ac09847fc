"""The messages of CRIU's images and RPC, made at run time from ``schema.binpb``.

Use it as a module of classes, with CRIU's own names::

    from torpor.images import schema as pb

    entry = pb.eventfd_file_entry(id=1, flags=os.O_RDWR, counter=3)
    pb.fd_types.EVENTFD, pb.fd_types.Name(6), pb.core_entry.X86_64

A name that is no message is an enum: ``pb.fd_types.REG`` is a plain int. The classes live in a
descriptor pool of their own, so that another user of protobuf in this process, pycriu for one,
may hold messages with the same names.

Fields numbered 1000 and up are Torpor's; CRIU skips them.
"""

from __future__ import annotations

import _thread
import os

from ..errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Message: TypeAlias = Any  # made at run time: there is nothing static to say about one

_lock = _thread.RLock()  # two pools would make classes that refuse each other
_pool: Any = None
_make_class: Any = None
_decode_error: type[Exception] = ValueError
_encode_error: type[Exception] = ValueError


def _files(serialized: bytes) -> list[bytes]:
    """Split a FileDescriptorSet (repeated FileDescriptorProto file = 1) into its files.

    By hand: the class for it is in google.protobuf.descriptor_pb2, which takes 20 ms to import.
    """
    files, at = [], 0
    while at < len(serialized):
        assert serialized[at] == 0x0A, "schema.binpb is not a FileDescriptorSet"
        size, shift, at = 0, 0, at + 1
        while True:
            byte = serialized[at]
            size |= (byte & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if byte < 0x80:
                break
        files.append(serialized[at : at + size])
        at += size
    return files


def _upb_runtime() -> tuple[Any, Any]:
    """A pool and a class maker from protobuf's C core, without its Python layers.

    google.protobuf.descriptor_pool imports the pure Python implementation along with itself,
    20 ms that nobody uses. What is touched here has been the same in protobuf 4 to 7; wherever it
    is different, :func:`_public_runtime` serves.
    """
    from google._upb import _message as upb
    from google.protobuf.message import Message as Base

    def make_class(descriptor: Any) -> Any:
        made = getattr(descriptor, "_concrete_class", None)
        if made is None:
            # Registers itself with the descriptor, hence a message may contain its own kind.
            members = {"DESCRIPTOR": descriptor, "__module__": __name__}
            made = upb.MessageMeta(descriptor.name, (Base,), members)
            for field in descriptor.fields:
                if field.message_type is not None:
                    make_class(field.message_type)
        return made

    return upb.DescriptorPool(), make_class


def _public_runtime() -> tuple[Any, Any]:
    """The same by protobuf's documented interface."""
    from google.protobuf import descriptor_pool, message_factory

    return descriptor_pool.DescriptorPool(), message_factory.GetMessageClass


def _load(runtime: Any) -> tuple[Any, Any]:
    pool, make_class = runtime()
    with open(os.path.join(os.path.dirname(__file__), "schema.binpb"), "rb") as file:
        for serialized in _files(file.read()):
            pool.AddSerializedFile(serialized)
    probe = make_class(pool.FindMessageTypeByName("pagemap_head"))
    assert probe(pages_id=1).SerializeToString() == b"\x08\x01", "protobuf runtime misbehaves"
    return pool, make_class


def _start() -> None:
    global _pool, _make_class, _decode_error, _encode_error
    with _lock:
        if _pool is not None:
            return
        pure = os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "upb") != "upb"
        try:
            pool, make_class = _load(_public_runtime if pure else _upb_runtime)
        except (ImportError, AttributeError, TypeError):
            pool, make_class = _load(_public_runtime)
        from google.protobuf.message import DecodeError, EncodeError

        _decode_error, _encode_error = DecodeError, EncodeError
        _make_class, _pool = make_class, pool


def __getattr__(name: str) -> Any:
    """The message class or enum of that name; made on first use, then an ordinary attribute."""
    if name.startswith("_"):
        raise AttributeError(name)
    if name == "Message":
        return object  # for run-time uses of the annotation
    _start()
    with _lock:
        made: Any
        try:
            made = _make_class(_pool.FindMessageTypeByName(name))
        except KeyError:
            try:
                described = _pool.FindEnumTypeByName(name)
            except KeyError:
                raise AttributeError(f"no message or enum `{name}` in the images' schema") from None
            from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

            made = EnumTypeWrapper(described)
        globals()[name] = made
    return made


def message_class(name: str) -> Any:
    """The message class called ``name``; KeyError where there is none."""
    made = globals().get(name)
    if made is None:
        try:
            made = __getattr__(name)
        except AttributeError:
            raise KeyError(name) from None
    return made


def list_class(name: str) -> Any:
    """The class of a message that has nothing but any number of messages called ``name`` in its field ``all``, whose
    number is 1: parsing many in one go takes half the time.
    """
    key = f"torpor list of {name}"
    made = globals().get(key)
    if made is None:
        described = message_class(name).DESCRIPTOR
        with _lock:
            list_name = f"torpor_list_of_{name}"
            # FieldDescriptorProto: name, number 1, repeated, of messages, their type; in a DescriptorProto, in a file.
            field = _part(1, b"all") + b"\x18\x01\x20\x03\x28\x0b" + _part(6, b"." + described.full_name.encode())
            message = _part(1, list_name.encode()) + _part(2, field)
            file = _part(1, f"{list_name}.proto".encode()) + _part(3, described.file.name.encode()) + _part(4, message)
            if key not in globals():
                _pool.AddSerializedFile(file)
                globals()[key] = _make_class(_pool.FindMessageTypeByName(list_name))
        made = globals()[key]
    return made


def part_head(number: int, length: int) -> bytes:
    """What stands before the ``length`` bytes of a field on the wire; its number is below 16."""
    head = [number << 3 | 2]
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes((*head, length))


def _part(number: int, content: bytes) -> bytes:
    return part_head(number, len(content)) + content


def decode(kind: Any, data: bytes | memoryview, image: str, field: str = "") -> Message:
    """The message of class ``kind`` (or of that name) that ``data`` holds.

    ``image`` is the file it came from and ``field`` the place in it, for the error: ImageError
    where the bytes are no such message or lack a required field.
    """
    if isinstance(kind, str):
        kind = message_class(kind)
    message = kind()
    try:
        message.ParseFromString(data)
    except _decode_error:
        why = f"{len(data)} bytes are no valid {kind.DESCRIPTOR.name}"
        raise ImageError(image, field, why) from None
    if not message.IsInitialized():
        raise ImageError(image, field, _missing(message))
    return message


def encode(message: Message, image: str, field: str = "") -> bytes:
    """The bytes of ``message``; ImageError where a required field is not set."""
    try:
        data: bytes = message.SerializeToString()
    except _encode_error:
        raise ImageError(image, field, _missing(message)) from None
    return data


def _missing(message: Message) -> str:
    names = message.FindInitializationErrors()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{message.DESCRIPTOR.name} lacks {', '.join(names[:3])}{more}"


def put_bytes(message: Message, field: str, value: bytes) -> None:
    """Set the string field ``field``, whatever the bytes: paths and names need not be UTF-8."""
    try:
        setattr(message, field, value.decode())
    except UnicodeDecodeError:
        _merge(message, field, value)


def add_bytes(message: Message, field: str, value: bytes) -> None:
    """As :func:`put_bytes`, for one more value of a repeated field."""
    try:
        getattr(message, field).append(value.decode())
    except UnicodeDecodeError:
        _merge(message, field, value)


def get_bytes(value: str | bytes) -> bytes:
    """The bytes of a string field's value, which protobuf gives as str if it is UTF-8."""
    return value.encode() if isinstance(value, str) else value


def _merge(message: Message, field: str, value: bytes) -> None:
    # proto2 does not check strings on the wire, only the setters do: so take the wire.
    header = message.DESCRIPTOR.fields_by_name[field].number << 3 | 2
    message.MergeFromString(_varint(header) + _varint(len(value)) + value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
