"""What is read from sockets of IPv4 and IPv6 for files/inet.py; connections all at once, packets being held back."""

from __future__ import annotations

import errno
import os
import time

from .. import log
from ..errors import KernelError, TorporError, Unsupported, doing
from ..images import schema as pb
from ..linux import inet_diag, sockets
from ..linux.call import call
from ..linux.inet_diag import AF_INET6, CLOSE, ESTABLISHED, IPPROTO_TCP, IPPROTO_UDP, LISTEN
from . import inet_options, network_lock, sockopts, tcp, tcp_read, udp_queue
from .asked import Alike
from .base import unsupported
from .inet_options import (
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_UDPLITE,
    SOCK_DGRAM,
    SOCK_RAW,
    SOCK_STREAM,
)
from .tcp_guard import Guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..images.schema import Message
    from .asked import Asked
    from .base import DumpContext, SourceFile
    from .tcp_read import Saved

IPPROTO_MPTCP = 262
SUPPORTED = {
    SOCK_STREAM: (IPPROTO_TCP,),
    SOCK_DGRAM: (IPPROTO_UDP, IPPROTO_UDPLITE, IPPROTO_ICMP, IPPROTO_ICMPV6),
}
_READ, _WRITE, _BOTH = 1, 2, 3
_TRIES = 64
_SETTING_S = 0.5
_LEAVES_S = 0.05


class Kind:
    """Family, type and protocol of a socket."""

    __slots__ = ("family", "protocol", "type")

    def __init__(self, fd: int) -> None:
        with sockets.Plain(fd) as sock:
            self.family, self.type, self.protocol = (
                sock.getsockopt(sockets.SOL_SOCKET, what)
                for what in (sockets.SO_DOMAIN, sockets.SO_TYPE, sockets.SO_PROTOCOL)
            )

    @property
    def tcp(self) -> bool:
        """Is it TCP?"""
        return bool(self.type == SOCK_STREAM)


def check(source: SourceFile, ctx: DumpContext) -> Kind:
    """Raise Unsupported for what never can be dumped, or not with these options; else tells what kind it is."""
    fd = source.borrow()
    kind = Kind(fd)
    if kind.type != SOCK_RAW and kind.protocol not in SUPPORTED.get(kind.type, ()):
        hint = (
            "with Go, run the program with GODEBUG=multipathtcp=0" if kind.protocol == IPPROTO_MPTCP else ""
        )
        name = {IPPROTO_MPTCP: "MPTCP", 132: "SCTP", 33: "DCCP"}.get(
            kind.protocol, f"protocol {kind.protocol}"
        )
        raise unsupported(source, f"sockets of {name} are not supported", hint=hint)
    if kind.family == AF_INET6 and inet_options.flow_label(fd) is not None:
        raise unsupported(
            source, "a flow label that was asked for (IPV6_FLOWLABEL_MGR)",
            hint="the kernel keeps it for a while after its last use, for nobody else: give it back before the dump",
        )  # fmt: skip
    if kind.type == SOCK_DGRAM and kind.protocol in (IPPROTO_UDP, IPPROTO_UDPLITE):
        if _unsent(fd):
            raise unsupported(
                source, "a datagram that is not complete yet (UDP_CORK, MSG_MORE), or not sent",
                hint="dump it when it has sent the datagram",
            )  # fmt: skip
    elif kind.tcp:
        _check_state(source, ctx, tcp.info(fd).state)
    return kind


def _unsent(fd: int) -> bool:
    """Does a socket of UDP hold bytes that do not leave it? What is sent waits in queues of interfaces for a moment."""
    deadline = time.monotonic() + _LEAVES_S
    while sockets.unsent(fd):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False


def _check_state(source: SourceFile, ctx: DumpContext, state: int) -> None:
    if state in tcp.CONNECTED:
        if not ctx.options.tcp_established and not ctx.options.tcp_close:
            raise unsupported(
                source, "an established TCP connection", hint="use --tcp-established, or --tcp-close"
            )
    elif state not in (CLOSE, LISTEN):
        raise unsupported(source, f"a TCP connection in state {state}", hint="wait until it is established")


def dump(source: SourceFile, ctx: DumpContext) -> Message:
    """The inet_sk_entry of a socket; that of a connection is followed by its tcp-stream image."""
    kind = check(source, ctx)
    fd = source.borrow()
    entry = pb.inet_sk_entry(
        id=source.id, ino=source.stat.st_ino, family=kind.family, type=kind.type, proto=kind.protocol,
        flags=source.flags, fown=ctx.fown(source), backlog=0, state=CLOSE,
    )  # fmt: skip
    if source.stat.st_uid or source.stat.st_gid:
        entry.uid, entry.gid = source.stat.st_uid, source.stat.st_gid
    _addresses(fd, entry, ctx)
    if not kind.tcp:
        _others(source, entry, kind, ctx)
        return entry
    state = tcp.info(fd).state
    if state == LISTEN:
        _options(fd, entry, connected=False)
        _listener(source, fd, entry, ctx)
    elif entry.dst_port:
        _connection(source, fd, entry, ctx, state)
    else:
        _options(fd, entry, connected=False)
        if _poll(fd) & _READ:
            entry.shutdown = _READ
    return entry


def _options(fd: int, entry: Message, *, connected: bool) -> None:
    entry.opts.CopyFrom(sockopts.dump(fd))
    inet_options.dump(fd, entry, connected=connected)


def _addresses(fd: int, entry: Message, ctx: DumpContext) -> None:
    size = 28 if entry.family == AF_INET6 else 16
    local, peer = sockets.own_name(fd, size), tcp.peer_name(fd, size)
    for name, words, field in ((local, entry.src_addr, "src_port"), (peer, entry.dst_addr, "dst_port")):
        address, port = tcp.address_of_sockaddr(name or bytes((entry.family,)) + bytes(size - 1))
        words.extend(int.from_bytes(address[at : at + 4], "little") for at in range(0, len(address), 4))
        setattr(entry, field, port)
    if entry.type == SOCK_RAW and not peer:
        entry.dst_addr[:] = _raw_peer(entry) or entry.dst_addr
    if any(entry.src_addr) and (entry.src_port or entry.type == SOCK_RAW) and _is_alien(local, ctx):
        entry.alien = True
    scopes = [int.from_bytes(name[24:28], "little") for name in (local, peer) if len(name) == 28]
    scope = next((one for one in scopes if one), 0)
    if scope:
        from _socket import if_indextoname

        entry.ifname = if_indextoname(scope)


def _raw_peer(entry: Message) -> list[int]:
    """The words of the address that a raw socket is connected to: getpeername(2) tells it only together with a port."""
    name = "raw6" if entry.family == AF_INET6 else "raw"
    with open(f"/proc/thread-self/net/{name}", encoding="ascii") as file:
        for line in file:
            words = line.split()  # sl, local and remote address:port, state, queues, …, inode
            if words[9:] and words[9] == str(entry.ino):
                shown = words[2].partition(":")[0]
                return [int(shown[at : at + 8], 16) for at in range(0, len(shown), 8)]
    return []


def _is_alien(name: bytes, ctx: DumpContext) -> bool:
    """Is this an address that nobody could have now without IP_FREEBIND or a like option?"""
    address = tcp.address_of_sockaddr(name)[0]
    key = ("alien", address)
    if key not in ctx.memo:
        probe = sockets.socket(name[0], SOCK_DGRAM)
        try:
            call("bind", probe, name[:2] + bytes(2) + name[4:], len(name))
            ctx.memo[key] = False
        except KernelError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            ctx.memo[key] = True
        finally:
            os.close(probe)
    return bool(ctx.memo[key])


def _listener(source: SourceFile, fd: int, entry: Message, ctx: DumpContext) -> None:
    info = tcp.info(fd)
    if info.pending:
        if not ctx.options.skip_in_flight:
            raise unsupported(
                source,
                f"{info.pending} connections wait to be accepted",
                hint="use --skip-in-flight to leave them out: their clients will see a reset",
            )
        log.warning(f"fd {source.fd}: {info.pending} connections that wait to be accepted are left out")
    entry.state, entry.backlog = LISTEN, info.backlog
    if _poll(fd) & _READ:
        entry.shutdown = _READ


def _others(source: SourceFile, entry: Message, kind: Kind, ctx: DumpContext) -> None:
    fd = source.borrow()
    _options(fd, entry, connected=False)
    if _has_error(fd):
        log.warning(f"fd {source.fd} ({source.link}): errors that wait to be read are dropped (SO_ERROR, MSG_ERRQUEUE)")
    udp = kind.type == SOCK_DGRAM and kind.protocol in (IPPROTO_UDP, IPPROTO_UDPLITE)
    if not udp and sockets.peek(fd, 1) is not None:
        log.warning(f"fd {source.fd} ({source.link}): packets that wait to be read are dropped")
    if kind.type == SOCK_RAW:
        if any(entry.dst_addr):
            entry.state = ESTABLISHED
        return
    if entry.dst_port:
        entry.state = ESTABLISHED
    if udp:
        udp_queue.dump(source, ctx)
        shown = _diag(ctx, kind.protocol).get(entry.ino)
        if shown and shown.state == ESTABLISHED and not entry.dst_port:  # getpeername(2) knows of no port 0
            there = shown.destination[0]
            entry.dst_addr[:] = [int.from_bytes(there[at : at + 4], "little") for at in range(0, len(there), 4)]
            entry.state = ESTABLISHED
        _shut(entry, shown.shutdown if shown else _poll(fd))


def _has_error(fd: int) -> bool:
    """Has something been told about what was sent? It cannot be looked at without taking it (ip_recv_error)."""
    import select

    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _shut(entry: Message, how: int) -> None:
    if how:  # CRIU has no use for a field that says NONE
        entry.shutdown = how


def _diag(ctx: DumpContext, protocol: int) -> dict[int, inet_diag.InetSocket]:
    key = ("inet_diag", protocol)
    if key not in ctx.memo:
        ctx.memo[key] = {one.ino: one for one in inet_diag.sockets(protocol)}
    found: dict[int, inet_diag.InetSocket] = ctx.memo[key]
    return found


def _poll(fd: int) -> int:
    """What is shut down, as far as poll(2) tells: a socket of TCP that is closed is not written to anyway."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    events = dict(poll.poll(0)).get(fd, 0)
    if not events & select.POLLRDHUP:
        return 0
    with sockets.Socket(fd) as sock:
        stream = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_TYPE) == SOCK_STREAM
    return _READ if stream or not events & select.POLLHUP else _BOTH


# ---------------------------------------------------------------------- connections


class _Taken:
    """A connection as it was taken down."""

    __slots__ = ("fd", "options", "saved", "sizes")

    def __init__(self, fd: int, options: Message, sizes: tuple[int, int]) -> None:
        self.fd = fd
        #: An inet_sk_entry with its options, which repair mode changes; others that answer alike have the same one.
        self.options = options
        #: Bytes of its buffers, to send and to receive.
        self.sizes = sizes
        self.saved: Saved | None = None

    def fill(self, entry: Message) -> None:
        """Fill in the options."""
        for field in ("opts", "ip_opts", "tcp_opts"):
            getattr(entry, field).CopyFrom(getattr(self.options, field))
        entry.opts.so_sndbuf, entry.opts.so_rcvbuf = self.sizes
        entry.opts.so_filter.extend(sockopts.read_filter(self.fd))
        entry.v6only = self.options.v6only
        entry.more.extend(self.options.more)


def _connection(source: SourceFile, fd: int, entry: Message, ctx: DumpContext, state: int) -> None:
    if ctx.options.tcp_close:
        _options(fd, entry, connected=True)
        entry.state = state
        return
    if state == CLOSE:
        taken = _read_options(fd, Alike())
        _take(taken)
        _give_back(taken)  # no packet concerns it any more
    else:
        found = _all_connections(ctx).get(entry.ino)
        if found is None:
            raise unsupported(source, "a connection that travels in another socket", hint="try again later")
        taken = found
    assert taken.saved is not None
    stream, to_read, to_send, (entry.state, *_) = taken.saved
    taken.fill(entry)
    _shut(entry, _READ if entry.state == ESTABLISHED and _poll(fd) & _READ else _shut_in(entry.state))
    ctx.images.write_one(f"tcp-stream-{entry.ino:x}", stream, to_read + to_send)


def _shut_in(state: int) -> int:
    came = state in tcp.FIN_CAME
    gone = state in tcp.FIRST_FIN or state in tcp.SECOND_FIN
    return (_READ if came else 0) | (_WRITE if gone else 0)


def _named(holders: Sequence[tuple[Any, int]], index: int, error: TorporError) -> TorporError:
    """An error of one of these (task, descriptor) that says whose it is."""
    try:
        task, fd = holders[index]
        with doing(f"task {task.pid}"), doing(f"fd {fd}"):
            raise error
    except TorporError as named:
        return named


def _read_options(fd: int, alike: Alike) -> _Taken:
    kind = Kind(fd)

    def make(sock: Asked) -> Message:
        made = pb.inet_sk_entry(family=kind.family, type=kind.type, proto=kind.protocol)
        made.opts.CopyFrom(sockopts.read(sock))
        inet_options.read(sock, made, connected=True)
        return made

    options = alike.of(fd, (kind.family, kind.type, kind.protocol), make)
    return _Taken(fd, options, sockopts.buffer_sizes(fd))


def _all_connections(ctx: DumpContext) -> dict[int, _Taken]:
    """All connections of the tree by inode: under repair, and read. The first who asks does it for all.

    Before that their packets are held back, those excepted of which both ends are in the tree: nobody will be
    left to answer for either.
    """
    key = ("inet", "connections")
    if key in ctx.memo:
        found: dict[int, _Taken] = ctx.memo[key]
        return found
    wanted = sum(1 << state for state in tcp.CONNECTED)  # not the thousands that may wait for their time to end
    shown = {one.ino: one for one in inet_diag.sockets(IPPROTO_TCP, states=wanted) if one.state in tcp.CONNECTED}
    holders = {}
    for task in ctx.tasks.values():
        if not task.zombie:
            for fd, link in ctx.descriptors.links(task.pid):
                if not link.startswith("socket:["):
                    continue
                ino = int(link[8:-1])
                if ino in shown and ino not in holders:
                    holders[ino] = task, fd
    quads = {ino: (*shown[ino].source, *shown[ino].destination) for ino in holders}
    known = {_plain(quad) for quad in quads.values()}
    local = {ino for ino, quad in quads.items() if _plain(quad[2:] + quad[:2]) in known}
    taken: dict[int, _Taken] = {}
    alike = Alike()
    for ino, (task, fd) in holders.items():
        own = ctx.borrow(task, fd)
        with doing(f"task {task.pid}"), doing(f"fd {fd}"):
            taken[ino] = _read_options(own, alike)
    held = _Held(taken)
    ctx.undo.add("TCP connections", held.let_go)
    all_held = "network lock" in ctx.memo
    with doing("network lock"):
        held.lock = network_lock.lock(
            [quad for ino, quad in quads.items() if ino not in local],
            "skip" if all_held else ctx.options.network_lock,
            before=lambda lock: _set_guard(held, lock, ctx),
        )
    if not all_held:
        ctx.memo["network lock"] = held.lock
    _take_all(list(taken.values()), list(holders.values()))
    _settle([taken[ino] for ino in local])
    ctx.memo[key] = taken
    return taken


def hold_all(ctx: DumpContext) -> None:
    """Hold back all packets of our network namespace, from now until the restore or until the tasks are let go."""
    held = _Held({})
    ctx.undo.add("network lock", held.let_go)
    with doing("network lock"):
        held.lock = network_lock.lock_all(
            ctx.options.network_lock, before=lambda lock: _set_guard(held, lock, ctx)
        )
    ctx.memo["network lock"] = held.lock


def _plain(quad: tuple[Any, ...]) -> tuple[Any, ...]:
    here, port, there, peer = quad
    return inet_diag.unmapped(here), port, inet_diag.unmapped(there), peer


def _take(one: _Taken) -> None:
    tcp.repair(one.fd, on=True)
    one.saved = tcp.save(one.fd)


def _take_all(connections: Sequence[_Taken], holders: Sequence[tuple[Any, int]]) -> None:
    saved = tcp_read.take_all([one.fd for one in connections], lambda row, error: _named(holders, row, error))
    for row, (one, found) in enumerate(zip(connections, saved, strict=True)):
        try:
            one.saved = found or tcp.save(one.fd)
        except TorporError as error:
            raise _named(holders, row, error) from None


def _settle(pairs: list[_Taken]) -> None:
    """Read again what moved between two ends of the tree after one of them had been read."""
    for _ in range(_TRIES):
        now = tcp_read.sizes_of([one.fd for one in pairs])
        if all(one.saved is not None and one.saved[3] == sizes for one, sizes in zip(pairs, now, strict=True)):
            return
        for one in pairs:
            one.saved = tcp.save(one.fd)
    raise Unsupported("connections within the tree do not come to rest", hint="try again")


def _give_back(one: _Taken) -> None:
    tcp.repair(one.fd, on=False)
    inet_options.put(one.fd, sockets.SOL_SOCKET, sockopts.SO_REUSEADDR, int(one.options.opts.reuseaddr))


class _Held:
    """The connections under repair and the lock, to be let go together."""

    __slots__ = ("lock", "taken")

    def __init__(self, taken: dict[int, _Taken]) -> None:
        self.taken = taken
        self.lock: network_lock.Lock | None = None

    def let_go_for_good(self) -> None:
        """As let_go(), by the guard: a program that sets the lock may still have been under way."""
        self.let_go()
        time.sleep(_SETTING_S)
        if self.lock is not None:
            self.lock.lift()

    def let_go(self) -> None:
        """The tree lives on."""
        try:
            if self.lock is not None:
                self.lock.lift()
        finally:
            for one in self.taken.values():
                if inet_options.number(one.fd, inet_options.SOL_TCP, tcp.TCP_REPAIR):
                    _give_back(one)


def _set_guard(held: _Held, lock: network_lock.Lock, ctx: DumpContext) -> None:
    """From now on somebody lets go in our place should we be killed."""
    held.lock = lock
    pids = [task.pid for task in ctx.tasks.values() if not task.zombie]
    pidfds = [os.pidfd_open(pid) for pid in pids]
    try:
        guard = Guard(pidfds, [one.fd for one in held.taken.values()], held.let_go_for_good)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    ctx.at_end.append(guard.dismiss)
