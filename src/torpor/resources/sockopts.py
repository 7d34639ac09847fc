"""The options of sockets of all families that can be read back (SOL_SOCKET).

Image: sk_opts_entry. CRIU's fields hold those that it knows; the others, where they are not as in a
new socket of that kind, are in ``more``. Kernel: net/core/sock.c, sk_getsockopt()
"""

from __future__ import annotations

import errno
import os
import struct

from ..errors import Unsupported
from ..images import schema as pb
from ..linux.call import address_of, buffer, call
from ..linux.sockets import SO_DOMAIN, SO_PROTOCOL, SO_TYPE, SOL_SOCKET, Plain, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import TypeAlias

    from ..images.schema import Message
    from .asked import Asked

    #: level, option, value
    Put: TypeAlias = tuple[int, int, bytes]

# include/uapi/asm-generic/socket.h
SO_REUSEADDR, SO_DONTROUTE, SO_BROADCAST, SO_SNDBUF, SO_RCVBUF, SO_KEEPALIVE = 2, 5, 6, 7, 8, 9
SO_OOBINLINE, SO_NO_CHECK, SO_PRIORITY, SO_LINGER, SO_REUSEPORT, SO_PASSCRED = 10, 11, 12, 13, 15, 16
SO_RCVLOWAT, SO_RCVTIMEO, SO_SNDTIMEO, SO_BINDTODEVICE, SO_ATTACH_FILTER = 18, 20, 21, 25, 26
SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_PASSSEC, SO_MARK, SO_BUF_LOCK = 32, 33, 34, 36, 72
SO_PEEK_OFF, SO_LOCK_FILTER, SO_INCOMING_CPU, SO_RESERVE_MEM = 42, 44, 49, 73

AF_UNIX, AF_NETLINK = 1, 16
IFNAMSIZ = 16
#: Field of sk_opts_entry → option, of those that are plain numbers.
_NUMBERS = {
    "reuseaddr": SO_REUSEADDR,
    "so_reuseport": SO_REUSEPORT,
    "so_priority": SO_PRIORITY,
    "so_rcvlowat": SO_RCVLOWAT,
    "so_mark": SO_MARK,
    "so_passcred": SO_PASSCRED,
    "so_passsec": SO_PASSSEC,
    "so_dontroute": SO_DONTROUTE,
    "so_no_check": SO_NO_CHECK,
    "so_broadcast": SO_BROADCAST,
    "so_keepalive": SO_KEEPALIVE,
    "so_oobinline": SO_OOBINLINE,
}
_PASSED = ("so_passcred", "so_passsec")  # only where messages carry them
_ANY_CPU = b"\xff\xff\xff\xff"
_UNSET_IF_ZERO = ("so_mark",)  # needs CAP_NET_ADMIN to be set
#: Further ones: SO_DEBUG, SO_TIMESTAMP and TIMESTAMPNS (both forms), TIMESTAMPING (both), RXQ_OVFL,
#: WIFI_STATUS, NOFCS, SELECT_ERR_QUEUE, BUSY_POLL, MAX_PACING_RATE, ZEROCOPY, TXTIME, PREFER_BUSY_POLL,
#: BUSY_POLL_BUDGET, RESERVE_MEM, TXREHASH, RCVMARK, PASSPIDFD, RCVPRIORITY, PASSRIGHTS. Option → bytes.
_MORE = {
    1: 4, 29: 4, 35: 4, 63: 4, 64: 4, 37: 8, 65: 8, 40: 4, 41: 4, 43: 4, 45: 4, 46: 4, 47: 8, 60: 4,
    61: 8, 69: 4, 70: 4, 73: 4, 74: 4, 75: 4, 76: 4, 82: 4, 83: 4,
}  # fmt: skip
#: Kernels without an option, and families that have none such, say so with these.
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL)

_defaults: dict[tuple[int, int, int], dict[int, bytes]] = {}


# ---------------------------------------------------------------------- dump


def dump(fd: int) -> Message:
    """The sk_opts_entry of a socket. Raises Unsupported when it has a filter that cannot be read."""
    with Plain(fd) as sock:
        entry = read(sock)
        cpu = _get(sock, SO_INCOMING_CPU, 4)
    read_own(fd, entry)
    if cpu not in (None, _ANY_CPU):  # not among those of connections, where packets change it
        entry.more.add(level=SOL_SOCKET, name=SO_INCOMING_CPU, value=cpu)
    return entry


def read_own(fd: int, entry: Message) -> None:
    """Add what differs from socket to socket: sizes of buffers, which the kernel changes by itself, and the filter."""
    entry.so_sndbuf, entry.so_rcvbuf = buffer_sizes(fd)
    entry.so_filter.extend(read_filter(fd))


def buffer_sizes(fd: int) -> tuple[int, int]:
    """Bytes of a socket's buffers, to send and to receive."""
    with Plain(fd) as sock:
        return sock.getsockopt(SOL_SOCKET, SO_SNDBUF), sock.getsockopt(SOL_SOCKET, SO_RCVBUF)


def read(sock: _socket.socket | Asked) -> Message:
    """The sk_opts_entry of a socket, which is not complete without :func:`read_own`."""
    entry = pb.sk_opts_entry()
    get = sock.getsockopt
    passes = get(SOL_SOCKET, SO_DOMAIN) in (AF_UNIX, AF_NETLINK)
    for field, option in _NUMBERS.items():
        if field in _PASSED and not passes:
            continue
        value = get(SOL_SOCKET, option)
        if value or field not in _UNSET_IF_ZERO:
            setattr(entry, field, value)
    times = struct.unpack(
        "=qqqq", get(SOL_SOCKET, SO_SNDTIMEO, 16) + get(SOL_SOCKET, SO_RCVTIMEO, 16)
    )
    entry.so_snd_tmo_sec, entry.so_snd_tmo_usec = times[:2]
    entry.so_rcv_tmo_sec, entry.so_rcv_tmo_usec = times[2:]
    on, seconds = struct.unpack("=ii", get(SOL_SOCKET, SO_LINGER, 8))
    if on:
        entry.so_linger = seconds & 0xFFFFFFFF
    locked = _get(sock, SO_BUF_LOCK, 4)
    if locked is not None:
        entry.so_buf_lock = int.from_bytes(locked, "little")
    device = get(SOL_SOCKET, SO_BINDTODEVICE, IFNAMSIZ).rstrip(b"\0")
    if device:
        pb.put_bytes(entry, "so_bound_dev", device)
    usual = _usual(sock)
    for option, value_ in usual.items():
        now = _get(sock, option, len(value_))
        if now is not None and now != value_:
            entry.more.add(level=SOL_SOCKET, name=option, value=now)
    return entry


def _get(sock: _socket.socket | Asked, option: int, size: int) -> bytes | None:
    try:
        return sock.getsockopt(SOL_SOCKET, option, size)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return None


def _usual(sock: _socket.socket | Asked) -> dict[int, bytes]:
    """Option → value in a new socket of the same kind, of the options that go to ``more``."""
    one, two, three = (sock.getsockopt(SOL_SOCKET, what) for what in (SO_DOMAIN, SO_TYPE, SO_PROTOCOL))
    key = one, two, three
    if key not in _defaults:
        found = {}
        fresh = socket(*key)
        try:
            with Plain(fresh) as new:
                for option, size in (*_MORE.items(), (SO_PEEK_OFF, 4), (SO_LOCK_FILTER, 4)):
                    value = _get(new, option, size)
                    if value is not None:
                        found[option] = value
        finally:
            os.close(fresh)
        _defaults[key] = found
    return _defaults[key]


def read_filter(fd: int) -> list[int]:
    """The classic BPF program that was attached, an instruction a word, as CRIU packs them."""
    size = buffer(4)
    try:
        call("getsockopt", fd, SOL_SOCKET, SO_ATTACH_FILTER, None, size)
        count = int.from_bytes(size.raw, "little")
        if not count:
            return []
        program = buffer(8 * count)
        call("getsockopt", fd, SOL_SOCKET, SO_ATTACH_FILTER, program, size)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise Unsupported(
                "a BPF program is attached to it (SO_ATTACH_BPF), which cannot be read back"
            ) from None
        raise
    return [
        code << 48 | jt << 40 | jf << 32 | k for code, jt, jf, k in struct.iter_unpack("=HBBI", program.raw)
    ]


# ---------------------------------------------------------------------- restore


def restore(fd: int, entry: Message) -> None:
    """Give a socket these options. Those that it has already are left alone, for not all can be set."""
    attach_filter(fd, list(entry.so_filter))
    with Plain(fd) as sock:
        get, put = sock.getsockopt, sock.setsockopt
        for size, option, force in (
            (entry.so_sndbuf, SO_SNDBUF, SO_SNDBUFFORCE),
            (entry.so_rcvbuf, SO_RCVBUF, SO_RCVBUFFORCE),
        ):
            if size and get(SOL_SOCKET, option) != size:
                put(SOL_SOCKET, force, size // 2)  # the kernel doubles it
        for one in changes(fd, entry):
            try:
                put(*one)
            except OSError as error:
                if not is_no_loss(one[1], error):
                    raise


def is_no_loss(option: int, error: OSError) -> bool:
    """Is it memory that cannot be set aside (SO_RESERVE_MEM) where the maker of the socket is in no control group of
    memory? The program gets it all the same.
    """
    return option == SO_RESERVE_MEM and error.errno == errno.EOPNOTSUPP


def changes(fd: int, entry: Message) -> list[Put]:
    """What is to be set for a socket to have these options, but for its filter and the sizes of its buffers, which come
    before.
    """
    found: list[Put] = []
    with Plain(fd) as sock:
        get = sock.getsockopt
        if entry.HasField("so_buf_lock") and _get(sock, SO_BUF_LOCK, 4) is not None:
            found.append((SOL_SOCKET, SO_BUF_LOCK, struct.pack("=I", entry.so_buf_lock)))
        for field, option in _NUMBERS.items():
            if not entry.HasField(field):
                continue
            value = int(getattr(entry, field))
            if get(SOL_SOCKET, option) != value:
                found.append((SOL_SOCKET, option, struct.pack("=I", value & 0xFFFFFFFF)))
        for option, seconds, micros in (
            (SO_SNDTIMEO, entry.so_snd_tmo_sec, entry.so_snd_tmo_usec),
            (SO_RCVTIMEO, entry.so_rcv_tmo_sec, entry.so_rcv_tmo_usec),
        ):
            wanted = struct.pack("=QQ", seconds, micros)
            if get(SOL_SOCKET, option, 16) != wanted:
                found.append((SOL_SOCKET, option, wanted))
    if entry.HasField("so_linger"):
        found.append((SOL_SOCKET, SO_LINGER, struct.pack("=iI", 1, entry.so_linger)))
    if entry.HasField("so_bound_dev"):
        found.append((SOL_SOCKET, SO_BINDTODEVICE, pb.get_bytes(entry.so_bound_dev) + b"\0"))
    found += [(one.level, one.name, one.value) for one in entry.more]
    return found


def but_for_sizes(entry: Message) -> bytes:
    """The options but for the sizes of the buffers, to compare them."""
    kept = pb.sk_opts_entry()
    kept.CopyFrom(entry)
    kept.so_sndbuf = kept.so_rcvbuf = 0
    serialized: bytes = kept.SerializeToString(deterministic=True)
    return serialized


def attach_filter(fd: int, words: list[int]) -> None:
    """SO_ATTACH_FILTER with a classic BPF program in the form of the images; none if there are no words."""
    if not words:
        return
    program = buffer(8 * len(words))
    for index, word in enumerate(words):
        parts = word >> 48, word >> 40 & 0xFF, word >> 32 & 0xFF, word & 0xFFFFFFFF
        struct.pack_into("=HBBI", program, 8 * index, *parts)
    call("setsockopt", fd, SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(words), address_of(program)), 16)


def need_room(fd: int, size: int) -> None:
    """Let at least ``size`` bytes wait to be read by the peer; options are restored afterwards."""
    with Plain(fd) as sock:
        if sock.getsockopt(SOL_SOCKET, SO_SNDBUF) < size:
            sock.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, min(size, (1 << 30) - 1))
