"""Where a socket of the images is: its names, and what --remap-address makes of them.

A moved socket's entry (inet_sk_entry) is changed before anything is made of it, so that the rest need not know.
"""

from __future__ import annotations

import struct

from .. import log
from ..errors import Blockers, TorporError, Unsupported
from ..linux.inet_diag import AF_INET, CLOSE, IPPROTO_TCP, IPPROTO_UDP, LISTEN, SYN_SENT, unmapped
from . import inet_options, inet_remap, tcp
from .inet_options import IP_MULTICAST_IF, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_UDPLITE, SOCK_RAW, SOCK_STREAM, SOL_IP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from .base import BuildContext
    from .network_lock import Quad

IP_BIND_ADDRESS_NO_PORT = 24
_FOUR = struct.Struct("<H2sI8x")  # struct sockaddr_in
PROTOCOLS = {
    IPPROTO_TCP: "TCP", IPPROTO_UDP: "UDP", IPPROTO_UDPLITE: "UDP-Lite", IPPROTO_ICMP: "ICMP",
    IPPROTO_ICMPV6: "ICMPv6",
}  # fmt: skip


def is_tcp(entry: Message) -> bool:
    """Is it TCP?"""
    return bool(entry.type == SOCK_STREAM and entry.proto in (0, IPPROTO_TCP))


def is_connection(entry: Message) -> bool:
    """Is, or was, it a TCP connection?"""
    return bool(is_tcp(entry) and entry.dst_port and entry.state != LISTEN)


def names(entry: Message) -> tuple[bytes, bytes]:
    """struct sockaddr of both ends."""
    family = entry.family
    if family == AF_INET:
        return (
            _FOUR.pack(family, entry.src_port.to_bytes(2, "big"), entry.src_addr[0]),
            _FOUR.pack(family, entry.dst_port.to_bytes(2, "big"), entry.dst_addr[0]),
        )
    scope = inet_options.interface(0, entry.ifname) if entry.ifname else 0
    here, there = struct.pack("<4I", *entry.src_addr[:4]), struct.pack("<4I", *entry.dst_addr[:4])
    return tcp.sockaddr(family, here, entry.src_port, scope), tcp.sockaddr(family, there, entry.dst_port, scope)


def describe(entry: Message) -> str:
    """The socket as people would name it."""
    local = names(entry)[0]
    what = "raw socket" if entry.type == SOCK_RAW else f"{PROTOCOLS.get(entry.proto, entry.proto)} socket"
    return f"{what} {tcp.shown(local)}" if entry.src_port else what


def is_bound(entry: Message) -> bool:
    """Has it an address or port of its own, not one that came with a connection?"""
    addressed = any(entry.src_addr)
    if entry.type == SOCK_RAW:
        return addressed
    later = any((one.level, one.name) == (0, IP_BIND_ADDRESS_NO_PORT) for one in entry.more)
    return bool(entry.src_port or (addressed and later))


def overlap(a: bytes, b: bytes, a_six_only: bool, b_six_only: bool) -> bool:
    """Would two sockets bound to these addresses get the same packets?"""
    a, b = unmapped(a), unmapped(b)
    if len(a) == len(b):
        return a == b or not any(a) or not any(b)
    six, six_only = (a, a_six_only) if len(a) == 16 else (b, b_six_only)
    return not any(six) and not six_only


def closed(ctx: BuildContext) -> set[int]:
    """The ids of the connections that come up closed."""
    found: set[int] = ctx.memo.get(("inet place", "closed"), set())
    return found


def moved(ctx: BuildContext) -> dict[int, Quad]:
    """File id → both ends as the images have them, of the sockets that come up elsewhere."""
    found: dict[int, Quad] = ctx.memo.setdefault(("inet place", "moved"), {})
    return found


def quad_in_images(entry: Message, ctx: BuildContext) -> Quad:
    """(our address, our port, the peer's address, the peer's port) as they were at the dump."""
    return moved(ctx).get(entry.id) or _quad(entry)


def _quad(entry: Message) -> Quad:
    local, peer = map(tcp.address_of_sockaddr, names(entry))
    return (*local, *peer)


def move(entries: list[Message], ctx: BuildContext) -> set[int]:
    """Do what --remap-address says to the entries, and settle which connections come up closed; their ids.

    Raises UsageError for rules that make no sense, Unsupported when a connection cannot go on or two sockets of the
    tree would meet.
    """
    options = ctx.options
    remap = inet_remap.Remap(rule for rule in options.remap_address if rule[:1] not in ("/", "@"))
    inventory = ctx.images.read_one("inventory") if ctx.images.has("inventory") else None
    # With both options and other addresses: what can go on does, the others are closed.
    choosy = remap and options.tcp_established
    everything = (inventory is not None and inventory.tcp_close) or (options.tcp_close and not choosy)
    found: set[int] = ctx.memo.setdefault(("inet place", "closed"), set())
    if everything:
        found.update(entry.id for entry in entries if is_connection(entry))
    if remap:
        _move(entries, remap, found, ctx)
    return found


def _move(entries: list[Message], remap: inet_remap.Remap, closed_ids: set[int], ctx: BuildContext) -> None:
    by_id = {entry.id: entry for entry in entries}
    sockets = [_socket(entry) for entry in entries]
    inet_remap.move(sockets, remap)
    troubles: list[TorporError] = []
    for one in sockets:
        entry = by_id[one.key]
        _move_multicast(entry, remap)
        if not one.moved:
            continue
        what, old, was = _what(entry), _quad(entry), _ends(entry)
        _put(entry, one)
        if entry.id not in closed_ids and one.severed:
            if not ctx.options.tcp_close:
                troubles.append(_severed(was, _ends(entry)))
                continue
            closed_ids.add(entry.id)
        moved(ctx)[entry.id] = old
        new = "closed" if entry.id in closed_ids else _ends(entry)
        ctx.notes.append(f"{what} {was} comes up {'' if new == 'closed' else 'as '}{new}")
    if troubles:
        raise troubles[0] if len(troubles) == 1 else Blockers(troubles)
    for note in ctx.notes:
        log.info(note)
    for rule in remap.unused():
        log.warning(f"--remap-address {rule}: no socket is concerned")
    _refuse_meetings(entries, ctx)


def _socket(entry: Message) -> inet_remap.Socket:
    here, port, there, peer_port = _quad(entry)
    raw = entry.type == SOCK_RAW
    portless = raw or entry.proto in (IPPROTO_ICMP, IPPROTO_ICMPV6)  # a protocol, or the identifier of a ping
    local = (here, None if portless else port) if is_bound(entry) or is_connection(entry) else None
    peer = (there, None if portless else peer_port) if peer_port or (raw and any(there)) else None
    lives = is_connection(entry) and entry.state not in (CLOSE, SYN_SENT)
    return inet_remap.Socket(entry.id, entry.proto, local, peer, connection=lives)


def _put(entry: Message, one: inet_remap.Socket) -> None:
    """Let the entry have the new ends of its socket."""
    for end, words, field in (
        (one.new_local, entry.src_addr, "src_port"),
        (one.new_peer, entry.dst_addr, "dst_port"),
    ):
        if end is not None:
            address, port = end
            words[:] = [int.from_bytes(address[at : at + 4], "little") for at in range(0, len(address), 4)]
            if port is not None:
                setattr(entry, field, port)
    if one.local != one.new_local:
        entry.alien = False  # that nobody had the old address does not excuse for the new one


def _move_multicast(entry: Message, remap: inet_remap.Remap) -> None:
    """The address that says which interface multicast packets go out by."""
    for option in entry.more:
        if (option.level, option.name) == (SOL_IP, IP_MULTICAST_IF) and len(option.value) == 4 and any(option.value):
            option.value = remap.apply((option.value, None))[0]


def _what(entry: Message) -> str:
    if is_connection(entry):
        return "TCP connection"
    if entry.type == SOCK_RAW:
        return "raw socket"
    return f"{PROTOCOLS.get(entry.proto, entry.proto)} socket"


def _ends(entry: Message) -> str:
    local, peer = names(entry)
    far = bool(entry.dst_port or (entry.type == SOCK_RAW and any(entry.dst_addr)))
    return f"{tcp.shown(local)} - {tcp.shown(peer)}" if far else tcp.shown(local)


def _severed(was: str, new: str) -> Unsupported:
    return Unsupported(
        f"TCP connection {was} cannot go on as {new}: its other end is outside of the tree, and would not know",
        hint="--tcp-close closes it; together with --tcp-established only those that cannot go on",
    )


def _refuse_meetings(entries: list[Message], ctx: BuildContext) -> None:
    """Raise Unsupported when two sockets that were apart would have the same port of the same address."""
    bound = [entry for entry in entries if not is_connection(entry) and entry.type != SOCK_RAW and is_bound(entry)]
    for entry in bound:
        if entry.id not in moved(ctx) or not entry.src_port:
            continue
        for other in bound:
            if other is entry or (other.proto, other.src_port) != (entry.proto, entry.src_port):
                continue
            if is_tcp(entry) and LISTEN not in (entry.state, other.state):
                continue
            now, before = ([_local(one, ctx, old) for one in (entry, other)] for old in (False, True))
            if _meet(now, entry, other) and not _meet(before, entry, other):
                raise Unsupported(
                    f"--remap-address puts two sockets at {tcp.shown(names(entry)[0])}: another of the tree is at "
                    f"{tcp.shown(names(other)[0])}"
                )


def _local(entry: Message, ctx: BuildContext, before: bool) -> tuple[bytes, int]:
    here, port, _, _ = quad_in_images(entry, ctx) if before else _quad(entry)
    return here, port


def _meet(ends: list[tuple[bytes, int]], one: Message, other: Message) -> bool:
    (a, port), (b, other_port) = ends
    return port == other_port and overlap(a, b, one.v6only, other.v6only)
