"""BPF maps by bpf(2): what one is, its content, making one. Kernel: kernel/bpf/syscall.c, include/uapi/linux/bpf.h"""

from __future__ import annotations

import errno
import struct

from ..errors import KernelError
from .call import address_of, buffer, call, try_call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CREATE, LOOKUP, UPDATE, NEXT_KEY, INFO_BY_FD = 0, 1, 2, 4, 15
BTF_LOAD, BTF_FD_BY_ID, FD_BY_ID, FREEZE, LOOKUP_BATCH = 18, 19, 14, 22, 24
F_RDONLY, F_WRONLY = 1 << 3, 1 << 4
_INFO = struct.Struct("=6I16sIIQQIIIIQ")
_CREATE = struct.Struct("=7I16sIIIIIQ4x")
_BATCH = struct.Struct("=QQQQIIQQ")
_KEY_VALUE = struct.Struct("=IxxxxQQQ")
_BTF_INFO = struct.Struct("=QIIQII")
_AT_ONCE = 4096
ENOTSUPP = 524


class Map:
    """What the kernel says of a map: ``name`` is bytes; ``btf``, ``btf_key``, ``btf_value`` are ids of its types."""

    __slots__ = (
        "btf",
        "btf_key",
        "btf_value",
        "extra",
        "flags",
        "id",
        "ifindex",
        "kernel_type",
        "key_size",
        "max_entries",
        "name",
        "type",
        "value_size",
    )  # fmt: skip

    def __init__(self, fd: int) -> None:
        area = _info(fd, _INFO.size)
        (
            self.type, self.id, self.key_size, self.value_size, self.max_entries, self.flags, name, self.ifindex,
            self.kernel_type, _, _, self.btf, self.btf_key, self.btf_value, _, self.extra,
        ) = _INFO.unpack(area)  # fmt: skip
        self.name: bytes = name.rstrip(b"\0")


def _info(fd: int, size: int, content: bytes = b"") -> bytes:
    area = buffer(size)
    area.raw = content.ljust(size, b"\0")
    call("bpf", INFO_BY_FD, struct.pack("=IIQ", fd, size, address_of(area)), 16)
    return area.raw


def btf_bytes(number: int) -> bytes:
    """The BTF object with this id, as it was loaded. Raises KernelError."""
    import os

    fd = call("bpf", BTF_FD_BY_ID, struct.pack("=II", number, 0), 8)
    try:
        size = _BTF_INFO.unpack(_info(fd, _BTF_INFO.size))[1]
        data = buffer(max(size, 1))
        _info(fd, _BTF_INFO.size, _BTF_INFO.pack(address_of(data), size, 0, 0, 0, 0))
        return data.raw[:size]
    finally:
        os.close(fd)


def load_btf(data: bytes) -> int:
    """A descriptor of a BTF object. Raises KernelError."""
    area = buffer(len(data))
    area.raw = data
    return call("bpf", BTF_LOAD, struct.pack("=QQIIII", address_of(area), 0, len(data), 0, 0, 0), 32)


def create(
    kind: int, key_size: int, value_size: int, max_entries: int, flags: int, name: bytes, *,
    ifindex: int = 0, extra: int = 0, btf: tuple[int, int, int] = (0, 0, 0),
) -> int:  # fmt: skip
    """Make a map; ``btf`` is a descriptor and the ids of the types of key and value. Raises KernelError."""
    attr = _CREATE.pack(kind, key_size, value_size, max_entries, flags, 0, 0, name, ifindex, *btf, 0, extra)
    return call("bpf", CREATE, attr, len(attr))


def by_id(number: int, flags: int = 0) -> int:
    """A descriptor of the map with this id, an open file description of its own. Raises KernelError."""
    return call("bpf", FD_BY_ID, struct.pack("=III", number, 0, flags), 12)


def freeze(fd: int) -> None:
    """From now on no call of bpf(2) changes the map. Raises KernelError."""
    call("bpf", FREEZE, struct.pack("=I", fd), 4)


def read(fd: int, key_size: int, value_size: int) -> tuple[bytes, bytes, int]:
    """(keys, values, count) of all that is in a map; ``value_size`` is that of what a lookup gives.

    Raises KernelError.
    """
    keys, values, count = [], [], 0
    for some_keys, some_values, some in _batches(fd, key_size, value_size):
        keys.append(some_keys)
        values.append(some_values)
        count += some
    return b"".join(keys), b"".join(values), count


def _batches(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes, int]]:
    at_once = _AT_ONCE
    token, started = buffer(max(key_size, 8)), False
    while True:
        keys, values, following = buffer(at_once * key_size), buffer(at_once * value_size), buffer(max(key_size, 8))
        attr = bytearray(
            _BATCH.pack(
                address_of(token) if started else 0, address_of(following), address_of(keys), address_of(values),
                at_once, fd, 0, 0,
            )
        )  # fmt: skip
        error = -try_call("bpf", LOOKUP_BATCH, address_of(attr), len(attr))
        count = _BATCH.unpack(attr)[4]
        if error == errno.ENOSPC:  # one bucket of the table has more
            at_once *= 4
            continue
        if error in (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP) and not started:
            yield from _one_by_one(fd, key_size, value_size)
            return
        if error > 0 and error != errno.ENOENT:
            raise KernelError("bpf(BPF_MAP_LOOKUP_BATCH)", error)
        if count:
            yield keys.raw[: count * key_size], values.raw[: count * value_size], count
        if error == errno.ENOENT:
            return
        token, started = following, True


def _one_by_one(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes, int]]:
    """For kinds of maps, and kernels (before v5.6), without batches."""
    key, following, value = buffer(key_size), buffer(key_size), buffer(value_size)
    first = True
    while True:
        attr = _KEY_VALUE.pack(fd, 0 if first else address_of(key), address_of(following), 0)
        error = -try_call("bpf", NEXT_KEY, attr, len(attr))
        if error == errno.ENOENT:
            return
        if error > 0:
            raise KernelError("bpf(BPF_MAP_GET_NEXT_KEY)", error)
        key, following, first = following, key, False
        attr = _KEY_VALUE.pack(fd, address_of(key), address_of(value), 0)
        error = -try_call("bpf", LOOKUP, attr, len(attr))
        if error == errno.ENOENT:
            continue
        if error > 0:
            raise KernelError("bpf(BPF_MAP_LOOKUP_ELEM)", error)
        yield key.raw, value.raw, 1


def write(fd: int, key_size: int, value_size: int, keys: bytes, values: bytes, count: int) -> None:
    """Put what read() gave into a map. Raises KernelError."""
    key, value = buffer(key_size), buffer(value_size)
    attr = _KEY_VALUE.pack(fd, address_of(key), address_of(value), 0)
    for index in range(count):
        key.raw = keys[index * key_size : (index + 1) * key_size]
        value.raw = values[index * value_size : (index + 1) * value_size]
        call("bpf", UPDATE, attr, len(attr))
