"""What is read from sockets of IPv4 and IPv6 for files/inet.py; connections all at once, packets being held back."""

from __future__ import annotations

import errno
import os
import time

from .. import log
from ..errors import KernelError, Unsupported, doing
from ..images import schema as pb
from ..linux import inet_diag, sockets
from ..linux.call import buffer, call
from ..linux.inet_diag import AF_INET6, CLOSE, ESTABLISHED, IPPROTO_TCP, IPPROTO_UDP, LISTEN
from ..linux.kernel import pidfd_getfd
from ..proc.read import numbers
from . import inet_options, network_lock, sockopts, tcp
from .base import unsupported
from .inet_options import (
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_UDPLITE,
    SOCK_DGRAM,
    SOCK_RAW,
    SOCK_STREAM,
    number,
)
from .tcp_guard import Guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from .base import DumpContext, SourceFile

IPPROTO_MPTCP = 262
SUPPORTED = {
    SOCK_STREAM: (IPPROTO_TCP,),
    SOCK_DGRAM: (IPPROTO_UDP, IPPROTO_UDPLITE, IPPROTO_ICMP, IPPROTO_ICMPV6),
}
_READ, _WRITE, _BOTH = 1, 2, 3
_TRIES = 64
_SETTING_S = 0.5


class Kind:
    """Family, type and protocol of a socket."""

    __slots__ = ("family", "protocol", "type")

    def __init__(self, fd: int) -> None:
        with sockets.Socket(fd) as sock:
            self.family, self.type, self.protocol = (
                sock.getsockopt(sockets.SOL_SOCKET, what)
                for what in (sockets.SO_DOMAIN, sockets.SO_TYPE, sockets.SO_PROTOCOL)
            )

    @property
    def tcp(self) -> bool:
        """Is it TCP?"""
        return bool(self.type == SOCK_STREAM)


def check(source: SourceFile, ctx: DumpContext) -> None:
    """Raise Unsupported for what never can be dumped, or not with these options."""
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
    if kind.type == SOCK_DGRAM and kind.protocol in (IPPROTO_UDP, IPPROTO_UDPLITE):
        if number(fd, kind.protocol, inet_options.UDP_CORK):
            raise unsupported(
                source, "a UDP socket that is corked (UDP_CORK)", hint="dump it when it has sent the datagram"
            )
    elif kind.tcp:
        _check_state(source, ctx, tcp.Info(fd).state)


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
    check(source, ctx)
    fd = source.borrow()
    kind = Kind(fd)
    entry = pb.inet_sk_entry(
        id=source.id, ino=source.stat.st_ino, family=kind.family, type=kind.type, proto=kind.protocol,
        flags=source.flags, fown=ctx.fown(source), backlog=0, state=CLOSE,
    )  # fmt: skip
    if source.stat.st_uid or source.stat.st_gid:
        entry.uid, entry.gid = source.stat.st_uid, source.stat.st_gid
    _addresses(fd, entry, ctx)
    if not kind.tcp:
        _others(fd, entry, kind, ctx)
        return entry
    state = tcp.Info(fd).state
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
    local, peer = _local(fd, size), tcp.peer_name(fd, size)
    for name, words, field in ((local, entry.src_addr, "src_port"), (peer, entry.dst_addr, "dst_port")):
        address, port = tcp.address_of_sockaddr(name or bytes((entry.family,)) + bytes(size - 1))
        words.extend(int.from_bytes(address[at : at + 4], "little") for at in range(0, len(address), 4))
        setattr(entry, field, port)
    if any(entry.src_addr) and (entry.src_port or entry.type == SOCK_RAW) and _is_alien(local, ctx):
        entry.alien = True
    scopes = [int.from_bytes(name[24:28], "little") for name in (local, peer) if len(name) == 28]
    scope = next((one for one in scopes if one), 0)
    if scope:
        from _socket import if_indextoname

        entry.ifname = if_indextoname(scope)


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


def _local(fd: int, size: int) -> bytes:
    area, length = buffer(size), buffer(4)
    length.raw = size.to_bytes(4, "little")
    call("getsockname", fd, area, length)
    return area.raw


def _listener(source: SourceFile, fd: int, entry: Message, ctx: DumpContext) -> None:
    info = tcp.Info(fd)
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


def _others(fd: int, entry: Message, kind: Kind, ctx: DumpContext) -> None:
    _options(fd, entry, connected=False)
    if kind.type == SOCK_RAW:
        if any(entry.dst_addr):
            entry.state = ESTABLISHED
        return
    if entry.dst_port:
        entry.state = ESTABLISHED
    waiting = _waiting(fd)
    if waiting:
        log.warning(
            f"the datagram of {waiting} bytes that waits in socket {entry.ino}, and others, are dropped"
        )
    if kind.protocol in (IPPROTO_UDP, IPPROTO_UDPLITE):
        shown = _diag(ctx, kind.protocol).get(entry.ino)
        _shut(entry, shown.shutdown if shown else _poll(fd))


def _shut(entry: Message, how: int) -> None:
    if how:  # CRIU has no use for a field that says NONE
        entry.shutdown = how


def _waiting(fd: int) -> int:
    import fcntl

    try:
        return int.from_bytes(fcntl.ioctl(fd, tcp.SIOCINQ, bytes(4)), "little")
    except OSError as error:
        if error.errno != errno.ENOTTY:  # those for ping have no such request
            raise
        return 0


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

    __slots__ = ("entry", "fd", "saved", "sizes")

    def __init__(self, fd: int, entry: Message) -> None:
        self.fd = fd
        #: Its options, which repair mode changes.
        self.entry = entry
        self.saved: tuple[Message, bytes, bytes, int] | None = None
        self.sizes: tuple[int, ...] = ()


def _connection(source: SourceFile, fd: int, entry: Message, ctx: DumpContext, state: int) -> None:
    if ctx.options.tcp_close:
        _options(fd, entry, connected=True)
        entry.state = state
        return
    if state == CLOSE:
        taken = _Taken(fd, _options_of(fd, entry))
        _take(taken)
        _give_back(taken)  # no packet concerns it any more
    else:
        found = _all_connections(ctx).get(entry.ino)
        if found is None:
            raise unsupported(source, "a connection that travels in another socket", hint="try again later")
        taken = found
    assert taken.saved is not None
    stream, to_read, to_send, entry.state = taken.saved
    for field in ("opts", "ip_opts", "tcp_opts"):
        getattr(entry, field).CopyFrom(getattr(taken.entry, field))
    entry.v6only = taken.entry.v6only
    entry.more.extend(taken.entry.more)
    _shut(entry, _READ if entry.state == ESTABLISHED and _poll(fd) & _READ else _shut_in(entry.state))
    ctx.images.write_one(f"tcp-stream-{entry.ino:x}", stream, to_read + to_send)


def _shut_in(state: int) -> int:
    came = state in tcp.FIN_CAME
    gone = state in tcp.FIRST_FIN or state in tcp.SECOND_FIN
    return (_READ if came else 0) | (_WRITE if gone else 0)


def _options_of(fd: int, entry: Message) -> Message:
    kept = pb.inet_sk_entry(family=entry.family, type=entry.type, proto=entry.proto)
    _options(fd, kept, connected=True)
    return kept


def _all_connections(ctx: DumpContext) -> dict[int, _Taken]:
    """All connections of the tree by inode: under repair, and read. The first who asks does it for all.

    Before that their packets are held back, those excepted of which both ends are in the tree: nobody will be
    left to answer for either.
    """
    key = ("inet", "connections")
    if key in ctx.memo:
        found: dict[int, _Taken] = ctx.memo[key]
        return found
    shown = {one.ino: one for one in inet_diag.sockets(IPPROTO_TCP) if one.state in tcp.CONNECTED}
    holders = {}
    for task in ctx.tasks.values():
        if not task.zombie:
            for ino, fd in _sockets_of(task.pid):
                if ino in shown and ino not in holders:
                    holders[ino] = task, fd
    quads = {ino: (*shown[ino].source, *shown[ino].destination) for ino in holders}
    known = {_plain(quad) for quad in quads.values()}
    local = {ino for ino, quad in quads.items() if _plain(quad[2:] + quad[:2]) in known}
    taken: dict[int, _Taken] = {}
    for ino, (task, fd) in holders.items():
        own = _borrow(ctx, task.pid, fd)
        kind = Kind(own)
        entry = pb.inet_sk_entry(family=kind.family, type=kind.type, proto=kind.protocol)
        with doing(f"task {task.pid}"), doing(f"fd {fd}"):
            _options(own, entry, connected=True)
        taken[ino] = _Taken(own, entry)
    held = _Held(taken)
    ctx.undo.add("TCP connections", held.let_go)
    with doing("network lock"):
        held.lock = network_lock.lock(
            [quad for ino, quad in quads.items() if ino not in local],
            ctx.options.network_lock,
            before=lambda lock: _set_guard(held, lock, ctx),
        )
    ctx.memo["network lock"] = held.lock
    for ino, (task, fd) in holders.items():
        with doing(f"task {task.pid}"), doing(f"fd {fd}"):
            _take(taken[ino])
    _settle([taken[ino] for ino in local])
    ctx.memo[key] = taken
    return taken


def _borrow(ctx: DumpContext, pid: int, fd: int) -> int:
    """As ``ctx.borrow``, for a task whose turn has not come yet."""
    pidfd = os.pidfd_open(pid)
    try:
        own = pidfd_getfd(pidfd, fd)
    finally:
        os.close(pidfd)
    ctx.adopt(own)
    return own


def _plain(quad: tuple[Any, ...]) -> tuple[Any, ...]:
    here, port, there, peer = quad
    return inet_diag.unmapped(here), port, inet_diag.unmapped(there), peer


def _sockets_of(pid: int) -> list[tuple[int, int]]:
    """(inode, descriptor) of every socket that a task holds."""
    found = []
    for fd in numbers(pid, "fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            continue
        if link.startswith("socket:["):
            found.append((int(link[8:-1]), fd))
    return found


def _take(one: _Taken) -> None:
    tcp.repair(one.fd, on=True)
    _read(one)


def _read(one: _Taken) -> None:
    one.saved = tcp.save(one.fd)
    one.sizes = tcp.sizes(one.fd)


def _settle(pairs: list[_Taken]) -> None:
    """Read again what moved between two ends of the tree after one of them had been read."""
    for _ in range(_TRIES):
        if all(tcp.sizes(one.fd) == one.sizes for one in pairs):
            return
        for one in pairs:
            _read(one)
    raise Unsupported("connections within the tree do not come to rest", hint="try again")


def _give_back(one: _Taken) -> None:
    tcp.repair(one.fd, on=False)
    inet_options.put(one.fd, sockets.SOL_SOCKET, sockopts.SO_REUSEADDR, int(one.entry.opts.reuseaddr))


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
