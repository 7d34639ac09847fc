"""Options of IPv4, IPv6, TCP and UDP, and multicast groups, that can be read back.

Image: ip_opts_entry, tcp_opts_entry and ``v6only`` for those that CRIU has; the others go to ``more`` of the
inet_sk_entry where they are not as in a new socket of that kind, groups to ``groups``.
Kernel: net/ipv4/ip_sockglue.c, net/ipv6/ipv6_sockglue.c, net/ipv4/tcp.c, net/ipv4/igmp.c, net/ipv6/mcast.c
"""

from __future__ import annotations

import _socket  # what `socket` adds to it costs 5 ms to import and is not needed here
import errno
import os
import struct

from ..errors import KernelError, Unsupported
from ..images import schema as pb
from ..linux import sockets
from ..linux.call import buffer, call
from ..linux.inet_diag import AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..images.schema import Message
    from .asked import Asked
    from .sockopts import Put

SOCK_STREAM, SOCK_DGRAM, SOCK_RAW = 1, 2, 3
IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_UDPLITE, IPPROTO_RAW = 1, 58, 136, 255
SOL_IP, SOL_TCP, SOL_UDP, SOL_IPV6, SOL_ICMPV6, SOL_UDPLITE, SOL_RAW = 0, 6, 17, 41, 58, 136, 255
# include/uapi/linux/in.h, in6.h, tcp.h
IP_TOS, IP_TTL, IP_HDRINCL, IP_ROUTER_ALERT, IP_PKTINFO, IP_FREEBIND, IP_NODEFRAG = 1, 2, 3, 5, 8, 15, 22
IP_MULTICAST_IF, IPV6_ROUTER_ALERT = 32, 22
IPV6_FLOWLABEL_MGR, _RENEW, _EXCL = 32, 2, 1
IPV6_JOIN_ANYCAST, IPV6_LEAVE_ANYCAST = 27, 28
IPV6_CHECKSUM, IPV6_V6ONLY, IPV6_HDRINCL, IPV6_RECVPKTINFO, IPV6_FREEBIND = 7, 26, 36, 49, 78
TCP_MAXSEG, TCP_NODELAY, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT = 2, 1, 3, 4, 5, 6
TCP_WINDOW_CLAMP, TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, TCP_ULP = 10, 23, 30, 31
UDP_CORK = 1
ICMP_FILTER = 1
MCAST_JOIN_GROUP, MCAST_MSFILTER = 42, 48

#: Those for ``more``: level → {option: bytes}. IP: OPTIONS, RECVOPTS, RETOPTS, MTU_DISCOVER, RECVERR, RECVTTL,
#: RECVTOS, PASSSEC, TRANSPARENT, MINTTL, RECVORIGDSTADDR, CHECKSUM, BIND_ADDRESS_NO_PORT, RECVFRAGSIZE,
#: RECVERR_RFC4884, MULTICAST_IF, TTL, LOOP, ALL, UNICAST_IF, LOCAL_PORT_RANGE.
_IP = {4: 40, 6: 4, 7: 4, 10: 4, 11: 4, 12: 4, 13: 4, 18: 4, 19: 4, 20: 4, 21: 4, 23: 4, 24: 4, 25: 4,
       26: 4, 32: 4, 33: 4, 34: 4, 49: 4, 50: 4, 51: 4}  # fmt: skip
#: 2292PKTINFO, HOPOPTS, DSTOPTS, RTHDR, HOPLIMIT, FLOWINFO, UNICAST_HOPS, MULTICAST_IF, HOPS, LOOP, MTU_DISCOVER,
#: RECVERR, MULTICAST_ALL, ROUTER_ALERT_ISOLATE, RECVERR_RFC4884, FLOWINFO_SEND, RECVHOPLIMIT, RECVHOPOPTS, HOPOPTS,
#: RTHDRDSTOPTS, RECVRTHDR, RTHDR, RECVDSTOPTS, DSTOPTS, RECVPATHMTU, DONTFRAG, RECVTCLASS, TCLASS, AUTOFLOWLABEL,
#: ADDR_PREFERENCES, MINHOPCOUNT, ORIGDSTADDR, TRANSPARENT, UNICAST_IF, RECVFRAGSIZE.
_IPV6 = {2: 4, 3: 4, 4: 4, 5: 4, 8: 4, 11: 4, 16: 4, 17: 4, 18: 4, 19: 4, 23: 4, 25: 4, 29: 4, 30: 4, 31: 4, 33: 4,
         51: 4, 53: 4, 54: 512, 55: 512, 56: 4, 57: 512, 58: 4, 59: 512, 60: 4, 62: 4, 66: 4, 67: 4, 70: 4, 72: 4,
         73: 4, 74: 4, 75: 4, 76: 4, 77: 4}  # fmt: skip
#: SYNCNT, LINGER2, DEFER_ACCEPT, CONGESTION, THIN_LINEAR_TIMEOUTS, USER_TIMEOUT, FASTOPEN, NOTSENT_LOWAT,
#: SAVE_SYN, FASTOPEN_KEY, FASTOPEN_NO_COOKIE, INQ, TX_DELAY, RTO_MAX_MS, RTO_MIN_US, DELACK_MAX_US.
_TCP = {7: 4, 8: 4, 9: 4, 13: 16, 16: 4, 18: 4, TCP_FASTOPEN: 4, 25: 4, 27: 4, 33: 32, 34: 4, 36: 4,
        37: 4, 44: 4, 45: 4, 46: 4}  # fmt: skip
#: These follow the peer as soon as there is one, or have done what they are for.
_TCP_ALONE = {TCP_MAXSEG: 4, TCP_WINDOW_CLAMP: 4, TCP_FASTOPEN_CONNECT: 4}
#: CORK, ENCAP, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO; of UDP-Lite SEND_CSCOV and RECV_CSCOV, too.
_UDP = {UDP_CORK: 4, 100: 4, 101: 4, 102: 4, 103: 4, 104: 4}
_UDPLITE = _UDP | {10: 4, 11: 4}
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
_SOURCES_MAX = 1024
#: What every machine is a member of: all hosts, all nodes, all nodes of the interface.
_ALWAYS = ("010000E0", "ff020000000000000000000000000001", "ff010000000000000000000000000001")

_defaults: dict[tuple[int, int, int], list[tuple[int, int, int, bytes]]] = {}


def plain(fd: int) -> _socket.socket:
    """Python's own methods for a descriptor, for options only: what it would ask the kernel about it is not needed.

    The caller must detach() it.
    """
    return _socket.socket(0, 0, 0, fd)


def get(fd: int, level: int, option: int, size: int) -> bytes | None:
    """An option's value, at most ``size`` bytes; None where the socket has no such option."""
    sock = plain(fd)
    try:
        return _get(sock, level, option, size)
    finally:
        sock.detach()


def number(fd: int, level: int, option: int) -> int:
    """An option's value, 0 where the socket has no such option."""
    value = get(fd, level, option, 4)
    return int.from_bytes(value, "little") if value else 0


def _get(sock: _socket.socket | Asked, level: int, option: int, size: int) -> bytes | None:
    try:
        return sock.getsockopt(level, option, size)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return None


def _number(sock: _socket.socket | Asked, level: int, option: int) -> int:
    value = _get(sock, level, option, 4)
    return int.from_bytes(value, "little") if value else 0


def put(fd: int, level: int, option: int, value: int | bytes) -> None:
    """setsockopt(2)"""
    sock = _socket.socket(0, 0, 0, fd)
    try:
        sock.setsockopt(level, option, value)
    finally:
        sock.detach()


# ---------------------------------------------------------------------- dump


def dump(fd: int, entry: Message, *, connected: bool) -> None:
    """Fill in the options of an inet_sk_entry whose family, type and protocol are set.

    ``connected``: as far as TCP goes. Raises Unsupported when the protocol was replaced by another (TLS).
    """
    sock = plain(fd)
    try:
        read(sock, entry, connected=connected)
    finally:
        sock.detach()
    if entry.family == AF_INET6:
        for request in anycast(fd):
            entry.more.add(level=SOL_IPV6, name=IPV6_JOIN_ANYCAST, value=request)
    if not _is_tcp(entry):
        entry.groups.extend(memberships(fd, entry.family))
        if entry.family == AF_INET6 and entry.type != SOCK_RAW:  # it may have joined some of IPv4, too
            entry.groups.extend(memberships(fd, AF_INET))


def read(sock: _socket.socket | Asked, entry: Message, *, connected: bool) -> None:
    """As :func:`dump`, without multicast groups."""
    _dump_ip(sock, entry)
    if _is_tcp(entry):
        _dump_tcp(sock, entry.tcp_opts)
    for level, option, size, usual in _usual(entry):
        if connected and level == SOL_TCP and option in _TCP_ALONE:
            continue
        value = sock.getsockopt(level, option, size)
        if value != usual:
            entry.more.add(level=level, name=option, value=value)
    if entry.family == AF_INET6:
        entry.v6only = bool(_number(sock, SOL_IPV6, IPV6_V6ONLY))


def _is_tcp(entry: Message) -> bool:
    return bool(entry.type == SOCK_STREAM and entry.proto in (0, IPPROTO_TCP))


def _dump_ip(sock: _socket.socket | Asked, entry: Message) -> None:
    options, six = entry.ip_opts, entry.family == AF_INET6
    options.SetInParent()
    level = SOL_IPV6 if six else SOL_IP
    for field, option in (
        ("freebind", IPV6_FREEBIND if six else IP_FREEBIND),
        ("pktinfo", IPV6_RECVPKTINFO if six else IP_PKTINFO),
        *(() if six else (("tos", IP_TOS), ("ttl", IP_TTL))),
    ):
        value = _number(sock, level, option)
        if value:
            setattr(options, field, value)
    if entry.type == SOCK_RAW:
        raw = options.raw
        raw.SetInParent()
        heads = bool(_number(sock, level, IPV6_HDRINCL if six else IP_HDRINCL))
        if heads or entry.proto == IPPROTO_RAW:  # which begins with it
            raw.hdrincl = heads
        if not six and _number(sock, SOL_IP, IP_NODEFRAG):
            raw.nodefrag = True
        kept = _get(sock, SOL_ICMPV6 if six else SOL_RAW, ICMP_FILTER, 32 if six else 4)
        if kept and entry.proto == (IPPROTO_ICMPV6 if six else IPPROTO_ICMP):
            raw.icmpv_filter.extend(struct.unpack(f"={len(kept) // 4}I", kept))


def _dump_tcp(sock: _socket.socket | Asked, options: Message) -> None:
    options.SetInParent()
    ulp = _get(sock, SOL_TCP, TCP_ULP, 16)
    if ulp and ulp.rstrip(b"\0"):
        name = ulp.rstrip(b"\0").decode(errors="replace")
        raise Unsupported(
            f"the kernel speaks `{name}` on this connection (TCP_ULP), with keys that cannot be read back",
            hint="let the program do this itself, or use --tcp-close",
        )
    for field, option in TCP_FIELDS.items():
        value = _number(sock, SOL_TCP, option)
        if value:
            setattr(options, field, value)


TCP_FIELDS = {
    "nodelay": TCP_NODELAY, "cork": TCP_CORK, "keepcnt": TCP_KEEPCNT, "keepidle": TCP_KEEPIDLE,
    "keepintvl": TCP_KEEPINTVL,
}  # fmt: skip


def _tables(entry: Message) -> Iterator[tuple[int, dict[int, int]]]:
    raw = entry.type == SOCK_RAW
    if entry.family == AF_INET6:
        yield SOL_IPV6, _IPV6
        if raw:
            yield SOL_IPV6, {IPV6_ROUTER_ALERT: 4}
            yield SOL_RAW, {IPV6_CHECKSUM: 4}  # at the level of IPv6 it cannot be set for ICMPv6
        else:
            yield SOL_IP, _IP | {IP_TOS: 4, IP_TTL: 4, IP_PKTINFO: 4, IP_FREEBIND: 4}  # for the IPv4 side of it
    else:
        yield SOL_IP, _IP | {IP_ROUTER_ALERT: 4} if raw else _IP
    if raw:
        return
    if _is_tcp(entry):
        yield SOL_TCP, _TCP | _TCP_ALONE
    elif entry.proto in (0, IPPROTO_UDP):
        yield SOL_UDP, _UDP
    elif entry.proto == IPPROTO_UDPLITE:
        yield SOL_UDPLITE, _UDPLITE


_MULTICAST = {SOL_IP: (32, 33), SOL_IPV6: (17, 18)}  # IF, and TTL or HOPS: they cannot be set for a stream


def _usual(entry: Message) -> list[tuple[int, int, int, bytes]]:
    """(level, option, size, value in a new socket of the same kind) of the options that go to ``more``."""
    key = entry.family, entry.type, entry.proto
    if key not in _defaults:
        fresh = sockets.socket(*key)
        try:
            found = []
            for level, table in _tables(entry):
                for option, size in table.items():
                    if entry.type == SOCK_STREAM and option in _MULTICAST.get(level, ()):
                        continue
                    value = get(fresh, level, option, size)
                    if value is not None:
                        found.append((level, option, size, value))
        finally:
            os.close(fresh)
        _defaults[key] = found
    return _defaults[key]


# ---------------------------------------------------------------------- restore


def restore(fd: int, entry: Message) -> None:
    """Set the options, those of TCP that make it send or wait excepted (:func:`restore_tcp`).

    It must be done before the socket is bound. Raises KernelError.
    """
    for level, option, value in puts(entry):
        try:
            put(fd, level, option, value)
        except OSError as error:
            assert error.errno is not None
            if not has_already(fd, entry, level, option):
                raise KernelError(f"socket option {level}:{option}", error.errno) from None
    for group in reversed(entry.groups):  # the kernel lists the newest first
        join(fd, group)


def has_already(fd: int, entry: Message, level: int, option: int) -> bool:
    """Has a socket the value of an option that cannot be set, by what another one has done? TCP_MAXSEG follows
    IP_OPTIONS, to where nobody can set it.
    """
    wanted = next((one.value for one in entry.more if (one.level, one.name) == (level, option)), None)
    return wanted is not None and get(fd, level, option, len(wanted)) == wanted


def puts(entry: Message) -> list[Put]:
    """What :func:`restore` sets, but for multicast groups."""
    found: list[Put] = []

    def put(level: int, option: int, value: int | bytes) -> None:
        found.append((level, option, value if isinstance(value, bytes) else struct.pack("=i", value)))

    options, six = entry.ip_opts, entry.family == AF_INET6
    level = SOL_IPV6 if six else SOL_IP
    if entry.v6only:
        put(SOL_IPV6, IPV6_V6ONLY, 1)
    for field, option in (
        ("freebind", IPV6_FREEBIND if six else IP_FREEBIND),
        ("pktinfo", IPV6_RECVPKTINFO if six else IP_PKTINFO),
        ("tos", IP_TOS),
        ("ttl", IP_TTL),
    ):
        if options.HasField(field):
            put(SOL_IP if field in ("tos", "ttl") else level, option, int(getattr(options, field)))
    if options.HasField("raw") and entry.type == SOCK_RAW:
        raw = options.raw
        if raw.icmpv_filter:
            allowed = struct.pack(f"={len(raw.icmpv_filter)}I", *raw.icmpv_filter)
            put(SOL_ICMPV6 if six else SOL_RAW, ICMP_FILTER, allowed)
        if raw.HasField("nodefrag"):
            put(SOL_IP, IP_NODEFRAG, int(raw.nodefrag))
        if raw.HasField("hdrincl"):
            put(level, IPV6_HDRINCL if six else IP_HDRINCL, int(raw.hdrincl))
    found += [(one.level, one.name, one.value) for one in entry.more]
    return found


def restore_tcp(fd: int, options: Message) -> None:
    """Set those options of TCP that CRIU has."""
    for one in tcp_puts(options):
        put(fd, *one)


def tcp_puts(options: Message) -> list[Put]:
    """What :func:`restore_tcp` sets. TCP_CORK comes last: setting the other one sends what is corked."""
    ordered = sorted(TCP_FIELDS.items(), key=lambda item: item[1] == TCP_CORK)
    return [
        (SOL_TCP, option, struct.pack("=i", int(getattr(options, field))))
        for field, option in ordered if options.HasField(field)
    ]  # fmt: skip


# ---------------------------------------------------------------------- flow labels


def flow_label(fd: int) -> int | None:
    """A flow label that a socket of IPv6 has asked for; None if there is none (net/ipv6/ip6_flowlabel.c).

    The kernel lists those of the network; whether the socket has one is told by renewing it for no time at all.
    """
    for line in _lines("/proc/net/ip6_flowlabel"):
        if line.startswith("Label"):
            continue
        label = int(line.split()[0], 16)
        request = struct.pack("=16s4sBB10x", b"", label.to_bytes(4, "big"), _RENEW, _EXCL)
        try:
            put(fd, SOL_IPV6, IPV6_FLOWLABEL_MGR, request)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
            continue
        return label
    return None


# ---------------------------------------------------------------------- multicast


def memberships(fd: int, family: int) -> list[Message]:
    """The multicast groups that a socket has joined, an sk_multicast_entry each.

    The kernel lists only those of each interface; whether the socket is a member is told by its filter.
    """
    found = []
    for index, group in _groups(family):
        answer = _ask_filter(fd, index, group)
        if answer is not None:
            mode, sources = answer
            found.append(
                pb.sk_multicast_entry(
                    ifindex=index, ifname=_name(index), group=group, mode=mode, sources=sources
                )
            )
    return found


def _groups(family: int) -> Iterator[tuple[int, bytes]]:
    """(index of the interface, group) of what is listened to on this machine, but for what always is."""
    if family == AF_INET:
        index = 0
        for line in _lines("/proc/thread-self/net/igmp"):
            words = line.split()
            if words[0].isdigit():
                index = int(words[0])
            elif words[0] not in _ALWAYS and len(words[0]) == 8:
                yield index, int(words[0], 16).to_bytes(4, "little")
    else:
        for line in _lines("/proc/thread-self/net/igmp6"):
            words = line.split()
            if words[2] not in _ALWAYS:
                yield int(words[0]), bytes.fromhex(words[2])


def anycast(fd: int) -> list[bytes]:
    """The anycast addresses of IPv6 that a socket has joined, a struct ipv6_mreq each (net/ipv6/anycast.c).

    The kernel lists only those of each interface. Whether the socket has one is told by leaving it, after it was seen
    that it can be joined again.
    """
    found = []
    for line in _lines("/proc/thread-self/net/anycast6"):
        words = line.split()  # index, name, address, users
        request = bytes.fromhex(words[2]) + struct.pack("=i", int(words[0]))
        try:
            put(fd, SOL_IPV6, IPV6_JOIN_ANYCAST, request)
        except OSError:
            continue  # the kernel's own (of routers)
        put(fd, SOL_IPV6, IPV6_LEAVE_ANYCAST, request)
        if _leaves_anycast(fd, request):
            put(fd, SOL_IPV6, IPV6_JOIN_ANYCAST, request)
            found.append(request)
    return found


def _leaves_anycast(fd: int, request: bytes) -> bool:
    try:
        put(fd, SOL_IPV6, IPV6_LEAVE_ANYCAST, request)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def _lines(path: str) -> Iterable[str]:
    try:
        with open(path, encoding="ascii") as file:
            return [line for line in file if line[:3] != "Idx"]
    except FileNotFoundError:
        return []  # no such family in this kernel


def _storage(address: bytes) -> bytes:
    """sockaddr_storage of a group or source."""
    if len(address) == 4:
        return struct.pack("=HH4s120x", AF_INET, 0, address)
    return struct.pack("=HHI16sI100x", AF_INET6, 0, 0, address, 0)


def _ask_filter(fd: int, index: int, group: bytes) -> tuple[int, list[bytes]] | None:
    """(mode, sources) by which the socket has joined the group; None if it has not."""
    head = 144  # struct group_filter without its sources
    area = buffer(head + 128 * _SOURCES_MAX)
    size = buffer(4)
    struct.pack_into("=I4x128sII", area, 0, index, _storage(group), 0, _SOURCES_MAX)
    struct.pack_into("=I", size, 0, len(area))
    level = SOL_IP if len(group) == 4 else SOL_IPV6
    try:
        call("getsockopt", fd, level, MCAST_MSFILTER, area, size)
    except KernelError as error:
        if error.errno in (errno.EADDRNOTAVAIL, *_UNKNOWN):
            return None
        raise
    mode, count = struct.unpack_from("=II", area, 136)
    at, width = (4, 4) if len(group) == 4 else (8, 16)
    raw = area.raw
    # MCAST_EXCLUDE is 0, MCAST_INCLUDE 1
    return mode, [raw[head + 128 * i + at : head + 128 * i + at + width] for i in range(count)]


def _name(index: int) -> str:
    from _socket import if_indextoname

    return if_indextoname(index)


def interface(index: int, name: str) -> int:
    """The index that an interface has now, by its name. Raises Unsupported when there is none of that name."""
    from _socket import if_nametoindex

    if not name:
        return index
    try:
        return if_nametoindex(name)
    except OSError:
        raise Unsupported(
            f"there is no network interface `{name}`", hint=f"make it first: ip link add {name} …"
        ) from None


def join(fd: int, entry: Message) -> None:
    """Join a multicast group as an sk_multicast_entry says."""
    level = SOL_IP if len(entry.group) == 4 else SOL_IPV6
    index = interface(entry.ifindex, entry.ifname)
    group = _storage(entry.group)
    put(fd, level, MCAST_JOIN_GROUP, struct.pack("=I4x128s", index, group))
    if entry.mode or entry.sources:
        sources = b"".join(map(_storage, entry.sources))
        head = struct.pack("=I4x128sII", index, group, entry.mode, len(entry.sources))
        put(fd, level, MCAST_MSFILTER, head + sources)
