"""Images as JSON and back, in the form of CRIU's ``crit``.

``{"magic": "CORE", "entries": [{…}]}``: a message becomes an object with CRIU's field names, an
enum its name, bytes base64 in lines of 76, the payload behind a message the entry's ``extra``.
With ``pretty``, addresses are hexadecimal, flags named, devices major:minor and IP addresses
written as usual; both forms can be encoded again.

Two things are ours, because nothing may be lost between decoding and encoding: strings that are not
UTF-8 are written with surrogates, and fields that the schema does not know as ``unknown_fields``.
"""

from __future__ import annotations

import base64
import binascii
import json
import os

from .. import limits
from ..errors import ImageError
from . import magic, payload, store
from . import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Json = dict[str, Any]

_UNKNOWN = "unknown_fields"

# How --pretty shows integers; by message, fields separated by blanks.
_HEX = {
    "fanotify_file_entry": "flags faflags evflags",
    "fanotify_mark_entry": "mflags mask ignored_mask",
    "inet_sk_entry": "flags",
    "inotify_file_entry": "flags",
    "inotify_wd_entry": "mask ignored_mask",
    "mm_entry": (
        "mm_start_code mm_end_code mm_start_data mm_end_data mm_start_stack mm_start_brk mm_brk"
        " mm_arg_start mm_arg_end mm_env_start mm_env_end"
    ),
    "mnt_entry": "flags sb_flags",
    "net_device_entry": "flags",
    "netlink_sk_entry": "flags",
    "packet_sock_entry": "flags",
    "pagemap_entry": "vaddr",
    "pipe_entry": "flags",
    "sa_entry": "sigaction flags restorer mask mask_extended",
    "signalfd_entry": "flags sigmask",
    "task_core_entry": "blk_sigset blk_sigset_extended membarrier_registration_mask",
    "tcp_stream_entry": "opt_mask",
    # For the registers it holds for everything inside.
    "thread_info_aarch64": "clear_tid_addr gpregs",
    "thread_info_arm": "clear_tid_addr gpregs",
    "thread_info_loongarch64": "clear_tid_addr gpregs fpregs",
    "thread_info_mips": "clear_tid_addr gpregs fpregs",
    "thread_info_ppc64": "clear_tid_addr gpregs",
    "thread_info_riscv64": "clear_tid_addr gpregs",
    "thread_info_s390": "clear_tid_addr gpregs fpregs vxrs_low vxrs_high gs_cb gs_bc ri_cb",
    "thread_info_x86": "clear_tid_addr gpregs",
    "timerfd_entry": "flags settime_flags",
    "tty_file_entry": "flags",
    "tun_link_entry": "flags",
    "unix_sk_entry": "flags uflags",
    "user_x86_cet_entry": "cet ssp",
    "vma_entry": "start end madv fdflags",
}
# st_dev as the kernel keeps it (20 bits of minor number), and as stat(2) tells it.
_DEVICES = {
    "fanotify_mark_entry": "s_dev",
    "ghost_file_entry": "dev",
    "inotify_wd_entry": "s_dev",
    "mnt_entry": "root_dev",
}
_STAT_DEVICES = {"ghost_file_entry": "rdev", "irmap_cache_entry": "dev"}
_ADDRESSES = {
    "inet_sk_entry": "src_addr dst_addr",
    "sit_entry": "local remote rd_prefix relay_prefix",
}
_OPEN_FLAGS = {
    "O_WRONLY": 0o1,
    "O_RDWR": 0o2,
    "O_CREAT": 0o100,
    "O_EXCL": 0o200,
    "O_NOCTTY": 0o400,
    "O_TRUNC": 0o1000,
    "O_APPEND": 0o2000,
    "O_NONBLOCK": 0o4000,
    "O_DSYNC": 0o10000,
    "FASYNC": 0o20000,
    "O_DIRECT": 0o40000,
    "O_LARGEFILE": 0o100000,
    "O_DIRECTORY": 0o200000,
    "O_NOFOLLOW": 0o400000,
    "O_NOATIME": 0o1000000,
    "O_CLOEXEC": 0o2000000,
}
VMA_STATUS = {
    "VMA_AREA_REGULAR": 1 << 0,
    "VMA_AREA_STACK": 1 << 1,
    "VMA_AREA_VSYSCALL": 1 << 2,
    "VMA_AREA_VDSO": 1 << 3,
    "VMA_AREA_HEAP": 1 << 5,
    "VMA_FILE_PRIVATE": 1 << 6,
    "VMA_FILE_SHARED": 1 << 7,
    "VMA_ANON_SHARED": 1 << 8,
    "VMA_ANON_PRIVATE": 1 << 9,
    "VMA_AREA_SYSVIPC": 1 << 10,
    "VMA_AREA_SOCKET": 1 << 11,
    "VMA_AREA_VVAR": 1 << 12,
    "VMA_AREA_AIORING": 1 << 13,
    "VMA_AREA_MEMFD": 1 << 14,
    "VMA_AREA_SHSTK": 1 << 15,
    "VMA_AREA_UPROBES": 1 << 17,
    "VMA_UNSUPP": 1 << 31,
}
_FLAGS = {
    ("bpfmap_file_entry", "flags"): _OPEN_FLAGS,
    ("memfd_file_entry", "flags"): _OPEN_FLAGS,
    ("reg_file_entry", "flags"): _OPEN_FLAGS,
    ("memfd_inode_entry", "seals"): {
        "F_SEAL_SEAL": 1,
        "F_SEAL_SHRINK": 2,
        "F_SEAL_GROW": 4,
        "F_SEAL_WRITE": 8,
        "F_SEAL_FUTURE_WRITE": 16,
    },
    ("pagemap_entry", "flags"): {"PE_PARENT": 1, "PE_LAZY": 2, "PE_PRESENT": 4},
    ("vma_entry", "prot"): {"PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4},
    ("vma_entry", "flags"): {
        "MAP_SHARED": 1,
        "MAP_PRIVATE": 2,
        "MAP_DROPPABLE": 8,
        "MAP_ANON": 0x20,
        "MAP_GROWSDOWN": 0x100,
    },
    ("vma_entry", "status"): VMA_STATUS,
}
TASK_STATES = {1: "Alive", 3: "Zombie", 6: "Stopped"}
_FAMILIES = {1: "UNIX", 2: "INET", 10: "INET6", 16: "NETLINK", 17: "PACKET"}
_SOCKET_TYPES = {1: "STREAM", 2: "DGRAM", 3: "RAW", 5: "SEQPACKET", 10: "PACKET"}
TCP_STATES = dict(
    enumerate(
        "ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE CLOSE_WAIT LAST_ACK"
        " LISTEN".split(),
        1,
    )
)
_NAMES = {
    ("task_core_entry", "task_state"): TASK_STATES,
    ("inet_sk_entry", "family"): _FAMILIES,
    ("inet_sk_entry", "type"): _SOCKET_TYPES,
    ("inet_sk_entry", "proto"): {0: "IP", 6: "TCP", 17: "UDP", 136: "UDPLITE"},
    ("inet_sk_entry", "state"): TCP_STATES,
    ("unix_sk_entry", "type"): _SOCKET_TYPES,
    ("unix_sk_entry", "state"): TCP_STATES,
}

# Field types of descriptor.proto.
_BOOL, _STRING, _MESSAGE, _BYTES, _ENUM = 8, 9, 11, 12, 14


def load(fd: int, file: str, *, pretty: bool = False, payloads: bool = True) -> Json:
    """The image in the open file ``fd`` as a dict ready for :func:`to_json`.

    ``file`` names it in errors (ImageError). Without ``payloads`` only their sizes are told.
    """
    image = store.read_magic(fd, file)
    entries = []
    for index, span in enumerate(store.scan(fd, image, file)):
        entry = decode_message(span.message, pretty=pretty)
        if image.payload:
            extra = _extra(fd, file, image, span, index, payloads=payloads)
            if extra is not None:
                entry["extra"] = extra
        entries.append(entry)
    return {"magic": image.magic, "entries": entries}


def info(fd: int, file: str) -> Json:
    """Kind and number of entries of the image in the open file ``fd``."""
    image = store.read_magic(fd, file)
    count = sum(1 for _ in store.scan(fd, image, file))
    return {"magic": image.magic, "count": count - (image.form == magic.HEADED)}


def to_json(loaded: Json, *, pretty: bool = False) -> str:
    """The text that crit prints, without the newline at the end."""
    return json.dumps(loaded, indent=4 if pretty else None)


def from_json(text: str | bytes, file: str) -> bytes:
    """The image file that the JSON ``text`` describes; ImageError if it describes none."""
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(file, "", f"no JSON: {error}") from None
    return dump(loaded, file)


def dump(loaded: Any, file: str) -> bytes:
    """The image file that ``loaded`` (as from :func:`load`) describes; ImageError if none."""
    name = loaded.get("magic") if isinstance(loaded, dict) else None
    image = magic.by_magic(name) if isinstance(name, str) else None
    if image is None:
        raise ImageError(file, "magic", f"{name!r} is unknown")
    entries = loaded.get("entries")
    if not isinstance(entries, list):
        raise ImageError(file, "entries", "not a list")
    parts = [magic.head(image)]
    for index, entry in enumerate(entries):
        field = f"entry {index}"
        try:
            parts += _dump_entry(image, index, entry, file, field)
        except ImageError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ImageError(file, field, str(error)) from None
        except RecursionError:
            raise ImageError(file, field, "nested too deeply") from None
    return b"".join(parts)


def _dump_entry(image: Any, index: int, entry: Json, file: str, field: str) -> list[bytes]:
    kind = pb.message_class(image.message)
    if image.form == magic.HEADED and index == 0:
        kind = pb.pagemap_head
    elif image.magic == "GHOST_FILE" and index > 0:
        kind = pb.ghost_chunk_entry
    message = encode_message(kind, entry)
    body = pb.encode(message, file, field)
    extra = entry.get("extra")
    content = _content(image, message, extra) if image.payload and extra else b""
    zeros = bytes(payload.padding(image.magic, len(content)))
    return [len(body).to_bytes(4, "little"), body, content, zeros]


# --------------------------------------------------------------------------------------- messages


def decode_message(message: Any, *, pretty: bool = False, hexadecimal: bool = False) -> Json:
    """``message`` as a dict of its set fields, in order of their numbers."""
    shown: Json = {}
    kind = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        repeated = _is_repeated(field)
        address = repeated and field.name in _ADDRESSES.get(kind, "").split()
        if pretty and address and len(value) in (1, 4):
            shown[field.name] = [ip_address(value)]
            continue
        show = _printer(kind, field, pretty=pretty, hexadecimal=hexadecimal)
        shown[field.name] = [show(one) for one in value] if repeated else show(value)
    if unknown := _unknown(message):
        shown[_UNKNOWN] = _base64(unknown)
    return shown


def _is_repeated(field: Any) -> bool:
    # .label is deprecated since protobuf 6.31, .is_repeated is not there before.
    repeated = getattr(field, "is_repeated", None)
    return bool(field.label == 3) if repeated is None else bool(repeated)


def _printer(
    kind: str, field: Any, *, pretty: bool, hexadecimal: bool
) -> Callable[[Any], Any]:
    """What turns one value of the field into JSON."""
    name = field.name
    inside = hexadecimal or name in _HEX.get(kind, "").split()
    if field.type == _MESSAGE:
        return lambda value: decode_message(value, pretty=pretty, hexadecimal=inside)
    if field.type == _BYTES:
        return quoted_printable if (kind, name) == ("unix_sk_entry", "name") else _base64
    if field.type == _ENUM:
        numbers = field.enum_type.values_by_number
        return lambda value: numbers[value].name
    if field.type == _STRING:
        return lambda value: pb.get_bytes(value).decode(errors="surrogateescape")
    if field.type == _BOOL or not pretty:
        return lambda value: value
    return _pretty_number(kind, name, inside)


def _pretty_number(kind: str, name: str, hexadecimal: bool) -> Callable[[Any], Any]:
    if hexadecimal:
        return hex
    if name in _DEVICES.get(kind, "").split():
        return lambda value: f"{value >> 20}:{value & 0xFFFFF}"
    if name in _STAT_DEVICES.get(kind, "").split():
        return lambda value: f"{os.major(value)}:{os.minor(value)}"
    if (bits := _FLAGS.get((kind, name))) is not None:
        return lambda value: flag_names(value, bits)
    if (names := _NAMES.get((kind, name))) is not None:
        return lambda value: names.get(value, value)
    return lambda value: value


def flag_names(value: int, bits: dict[str, int]) -> str:
    """The names of the bits of ``value``, joined by `` | ``; bits without a name in hexadecimal."""
    found = [name for name, bit in bits.items() if value & bit]
    rest = value & ~sum(bits.values())
    return " | ".join([*found, hex(rest)] if rest else found)


def _unknown(message: Any) -> bytes:
    """The fields that the schema does not know, as they are on the wire."""
    rest = type(message)()
    rest.CopyFrom(message)
    for field, _ in message.ListFields():
        rest.ClearField(field.name)
    data: bytes = rest.SerializePartialToString()
    return data


def encode_message(kind: Any, shown: Json) -> Any:
    """The message of class ``kind`` that ``shown`` describes. Names that are no fields are ignored,
    as crit does; what else is wrong raises ValueError, TypeError or KeyError."""
    message = kind()
    if not isinstance(shown, dict):
        raise TypeError(f"{kind.DESCRIPTOR.name} should be an object")
    for field in message.DESCRIPTOR.fields:
        if field.name in shown:
            try:
                _set(message, field, shown[field.name])
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{field.name}: {error}") from None
    if _UNKNOWN in shown:
        message.MergeFromString(_from_base64(shown[_UNKNOWN]))
    return message


def _set(message: Any, field: Any, value: Any) -> None:
    kind, name = message.DESCRIPTOR.name, field.name
    if field.type == _MESSAGE:
        made = pb.message_class(field.message_type.full_name)
        if _is_repeated(field):
            getattr(message, name).extend([encode_message(made, one) for one in value])
        else:
            getattr(message, name).CopyFrom(encode_message(made, value))
            getattr(message, name).SetInParent()
        return
    if not _is_repeated(field):
        if field.type == _STRING:
            pb.put_bytes(message, name, value.encode(errors="surrogateescape"))
        else:
            setattr(message, name, _parse(kind, field, value))
    elif value and isinstance(value[0], str) and name in _ADDRESSES.get(kind, "").split():
        getattr(message, name).extend(_address_words(value[0]))
    elif field.type == _STRING:
        for one in value:
            pb.add_bytes(message, name, one.encode(errors="surrogateescape"))
    else:
        getattr(message, name).extend([_parse(kind, field, one) for one in value])


def _parse(kind: str, field: Any, value: Any) -> Any:
    name = field.name
    if field.type == _BYTES:
        quoted = (kind, name) == ("unix_sk_entry", "name")
        return _unquoted(value) if quoted else _from_base64(value)
    if field.type == _ENUM:
        if isinstance(value, int):
            return value
        return field.enum_type.values_by_name[value].number
    if field.type == _BOOL or not isinstance(value, str):
        return value
    if name in _DEVICES.get(kind, "").split():
        major, minor = value.split(":")
        return int(major) << 20 | int(minor)
    if name in _STAT_DEVICES.get(kind, "").split():
        major, minor = value.split(":")
        return os.makedev(int(major), int(minor))
    if (bits := _FLAGS.get((kind, name))) is not None:
        return sum(bits[word] if word in bits else int(word, 0) for word in _words(value))
    for number, word in _NAMES.get((kind, name), {}).items():
        if word == value:
            return number
    return int(value, 0)


def _words(value: str) -> Iterator[str]:
    return (word.strip() for word in value.split("|") if word.strip())


# ----------------------------------------------------------------------------------- binary values


def _base64(value: bytes) -> str:
    return base64.encodebytes(value).decode()


def _from_base64(value: str) -> bytes:
    return base64.decodebytes(value.encode())


def quoted_printable(value: bytes) -> str:
    """Quoted-printable, as crit writes the names of Unix sockets."""
    quoted = binascii.b2a_qp(value)
    if binascii.a2b_qp(quoted) != value:
        quoted = binascii.b2a_qp(value, istext=False)  # line ends in a name: all of it in codes
    return quoted.decode()


def _unquoted(value: str) -> bytes:
    return binascii.a2b_qp(value)


def ip_address(words: Any) -> str:
    """An IP address from one or four words of 32 bits that are in network order."""
    import ipaddress

    packed = b"".join(word.to_bytes(4, "little") for word in words)
    return str(ipaddress.ip_address(packed))


def _address_words(text: str) -> list[int]:
    import ipaddress

    packed = ipaddress.ip_address(text).packed
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]


# --------------------------------------------------------------------------------------- payloads


def _extra(fd: int, file: str, image: Any, span: Any, index: int, *, payloads: bool) -> Any:
    """The payload of an entry as JSON; None where the entry has no ``extra``."""
    kind, message = image.magic, span.message
    if kind == "GHOST_FILE" and (not payloads or (index == 0 and message.chunks)):
        return None
    if not payloads:
        return f"... <{_human(span.size)}>"
    if span.size > limits.PAYLOAD_BYTES_MAX:
        raise ImageError(file, f"entry {index}", f"{span.size} bytes follow, too many for JSON")
    content = os.pread(fd, span.size, span.offset)
    if kind == "TCP_STREAM":
        inq, outq = content[: message.inq_len], content[message.inq_len :]
        return {"inq": _base64(inq), "outq": _base64(outq)}
    if kind == "IPCNS_SEM":
        return list(memoryview(content).cast("H"))
    if kind == "IPCNS_MSG":
        extra: list[Any] = []
        for entry, text in payload.queue_messages(content, file, f"entry {index}"):
            extra += (decode_message(entry), _base64(text))
        return extra
    return _base64(content)


def _human(size: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P", "E", "Z"):
        if size < 1024:
            return f"{size:.0f}{unit}B" if size == int(size) else f"{size:.1f}{unit}B"
        size /= 1024
    return f"{size:.1f}YB"


def _content(image: Any, message: Any, extra: Any) -> bytes:
    """The payload that ``extra`` describes; ValueError where it is not as long as announced."""
    kind = image.magic
    if kind == "TCP_STREAM":
        content = _from_base64(extra["inq"]) + _from_base64(extra["outq"])
        announced = message.inq_len + message.outq_len
    elif kind == "IPCNS_SEM":
        content = b"".join(value.to_bytes(2, "little") for value in extra)
        announced = 2 * message.nsems
    elif kind == "IPCNS_MSG":
        return _queue(extra)
    else:
        content = _from_base64(extra)
        announced = len(content)
        if kind != "GHOST_FILE" or message.DESCRIPTOR.name == "ghost_chunk_entry":
            announced = payload.size_of(
                kind, message, first=False, rest=1 << 64, image="JSON", field="extra"
            )
    if len(content) != announced:
        raise ValueError(f"extra has {len(content)} bytes, the message announces {announced}")
    return content


def _queue(extra: list[Any]) -> bytes:
    parts = []
    for at in range(0, len(extra), 2):
        entry = encode_message(pb.ipc_msg, extra[at])
        text = _from_base64(extra[at + 1])
        if len(text) != entry.msize:
            raise ValueError(f"message {at // 2} has {len(text)} bytes, not {entry.msize}")
        body = pb.encode(entry, "JSON", "extra")
        parts += [len(body).to_bytes(4, "little"), body, text, bytes(-len(text) % 8)]
    return b"".join(parts)
