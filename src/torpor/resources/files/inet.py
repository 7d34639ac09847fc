"""Sockets of IPv4 and IPv6: TCP in all states, UDP and UDP-Lite with the datagrams that wait, raw, and those
for ping.

Image: file_entry.isk (inet_sk_entry); what is in flight of a connection is in tcp-stream-INODE, see tcp.py,
datagrams in sk-queues, see udp_queue.py.
Kernel: net/ipv4/af_inet.c, net/ipv6/af_inet6.c, net/ipv4/inet_connection_sock.c (bind conflicts)
"""

from __future__ import annotations

import errno
import os
import stat

from ... import log
from ...errors import ImageError, KernelError, TorporError, Unsupported, doing
from ...images import schema as pb
from ...linux import inet_diag, sockets
from ...linux.call import call
from ...linux.inet_diag import AF_INET, AF_INET6, CLOSE, ESTABLISHED, IPPROTO_TCP, IPPROTO_UDP, LISTEN
from ...remote.many import Many
from .. import inet_dump, inet_options, inet_place, sockopts, tcp, tcp_build, udp_queue
from ..base import FileResource, patiently
from ..fown import set_flags
from ..inet_options import IPPROTO_UDPLITE, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, put
from ..inet_place import describe, is_bound, is_connection, is_tcp, names, overlap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile
    from ..network_lock import Quad

SHUT_RD, SHUT_RDWR = 0, 2
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75


class Inet(FileResource):
    """A socket of IPv4 or IPv6."""

    FD_TYPE, FIELD = 4, "isk"
    MODES = (stat.S_IFSOCK,)
    PRIORITY = 30

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("socket:[") and sockets.family(source.borrow()) in (AF_INET, AF_INET6)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        inet_dump.check(source, ctx)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        return inet_dump.dump(source, ctx)

    def check_restore(self, entries: list[Message], ctx: BuildContext) -> None:
        entries = [entry for entry in entries if f"socket:[{entry.ino}]" not in ctx.inherited]
        for entry in entries:
            _check_entry(entry)
        closed = inet_place.move(entries, ctx)
        left = [entry for entry in entries if entry.id not in closed]
        refuse_conflicts(left)
        # CRIU does not say which IPv6 addresses nobody had: of those, and of its alone, none has to be here.
        inventory = ctx.images.read_one("inventory") if ctx.images.has("inventory") else pb.inventory_entry()
        alike = inventory.HasField("torpor")
        moved = inet_place.moved(ctx)
        refuse_missing([
            entry for entry in left
            if alike or entry.family == AF_INET or is_connection(entry) or entry.id in moved
        ])  # fmt: skip

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        given = ctx.inherited.get(f"socket:[{entry.ino}]")
        if given is not None:
            return os.dup(given)
        made: dict[int, int] = ctx.once(("inet",), lambda: _make_all(ctx))
        return made.pop(entry.id)


# ---------------------------------------------------------------------- restore


class _Maker:
    """Makes all sockets, those that others depend on first: listeners before what they have accepted."""

    def __init__(self, ctx: BuildContext) -> None:
        self.ctx = ctx
        inventory = ctx.images.read_one("inventory") if ctx.images.has("inventory") else None
        self.inventory = inventory or pb.inventory_entry()
        self.closed = inet_place.closed(ctx)
        #: What a network lock of the dump may hold back.
        self.locked: list[Quad] = []
        self.connections: list[tcp_build.Connection] = []
        #: Those that share a port for as long as it takes to bind another, and all by their port.
        self.shared: list[Message] = []
        self.by_port: dict[tuple[int, int], list[tuple[int, Message]]] = {}

    def make(self, entry: Message) -> int:
        fd = sockets.socket(entry.family, entry.type, entry.proto)
        try:
            if entry.HasField("uid"):
                os.fchown(fd, entry.uid, entry.gid)  # with others of the same user it may share a port
            self._plain(fd, entry)
            set_flags(fd, entry.flags)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _plain(self, fd: int, entry: Message) -> None:
        if entry.proto in (IPPROTO_UDP, IPPROTO_UDPLITE) and entry.type == SOCK_DGRAM:
            udp_queue.restore(fd, entry, self.ctx)
        self._options(fd, entry)
        if is_tcp(entry):
            inet_options.restore_tcp(fd, entry.tcp_opts)
        local, peer = names(entry)
        if is_bound(entry):
            self._bind(fd, entry, local)
            self.by_port.setdefault((entry.proto, entry.src_port), []).append((fd, entry))
        if entry.state == LISTEN:
            if not is_tcp(entry):
                raise ImageError("files.img", f"file {entry.id}: state", "only TCP listens")
            self._listen(fd, entry)
        elif entry.dst_port or (any(entry.dst_addr) and (entry.type == SOCK_RAW or _has_peer(entry))):
            _connect(fd, peer)
        if entry.HasField("shutdown") and entry.shutdown:
            _shutdown(fd, entry.shutdown - 1)

    def _options(self, fd: int, entry: Message) -> None:
        if entry.opts.HasField("so_bound_dev"):
            inet_options.interface(0, os.fsdecode(pb.get_bytes(entry.opts.so_bound_dev)))
        sockopts.restore(fd, entry.opts)
        inet_options.restore(fd, entry)

    def _bind(self, fd: int, entry: Message, name: bytes) -> None:
        if entry.alien or (entry.family == AF_INET6 and not self.inventory.HasField("torpor")):
            with _Freely(fd, entry):  # CRIU does not say, and does so for all
                self._bind_here(fd, entry, name)
        else:
            self._bind_here(fd, entry, name)

    def _bind_here(self, fd: int, entry: Message, name: bytes) -> None:
        try:
            call("bind", fd, name, len(name))
        except KernelError as error:
            if error.errno == errno.EADDRINUSE:
                self._share(fd, entry)
            elif error.errno == errno.EADDRNOTAVAIL:
                if not _is_tentative(entry, name):
                    raise _missing(name) from None
                with _Freely(fd, entry):
                    call("bind", fd, name, len(name))
                return
            else:
                raise
        else:
            return
        try:
            call("bind", fd, name, len(name))
        except KernelError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise _taken(name) from None

    def _listen(self, fd: int, entry: Message) -> None:
        try:
            sockets.listen(fd, entry.backlog)
        except KernelError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            self._share(fd, entry)
            try:
                sockets.listen(fd, entry.backlog)
            except KernelError:
                raise _taken(names(entry)[0]) from None

    def _share(self, fd: int, entry: Message) -> None:
        """Let it have the port together with other sockets of the tree. Once it was bound before they were
        there, or before either forbade it."""
        for one, other in [(fd, entry), *self.by_port.get((entry.proto, entry.src_port), ())]:
            for option in (sockopts.SO_REUSEADDR, sockopts.SO_REUSEPORT):
                put(one, sockets.SOL_SOCKET, option, 1)
            self.shared.append(other)

    def finish(self) -> None:
        """All sockets are made: those that had to share for it get their own options back."""
        for entry in self.shared:
            fd = self.ctx.built.get(entry.id)
            if fd is not None:
                put(fd, sockets.SOL_SOCKET, sockopts.SO_REUSEADDR, int(entry.opts.reuseaddr))
                put(fd, sockets.SOL_SOCKET, sockopts.SO_REUSEPORT, int(entry.opts.so_reuseport))

    # ---- connections

    def make_connections(self, entries: list[Message], made: dict[int, int]) -> None:
        """Make the sockets of connections, into ``made``: all at once, for there may be thousands."""
        many = Many()
        kind = sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC
        block = many.calls("socket", [entry.family for entry in entries], kind, [entry.proto for entry in entries])
        try:
            many.run()
        finally:
            made.update((entry.id, fd) for entry, fd in zip(entries, block.results, strict=False))
        for entry in entries:
            with doing(lambda entry=entry: describe(entry)):  # type: ignore[misc]
                self._connection(made[entry.id], entry)
        tcp_build.build(self.connections, _explain)

    def _connection(self, fd: int, entry: Message) -> None:
        if entry.HasField("uid"):
            os.fchown(fd, entry.uid, entry.gid)
        if entry.state != CLOSE:
            self.locked.append(inet_place.quad_in_images(entry, self.ctx))
        if entry.id in self.closed:
            sockopts.restore(fd, entry.opts)
            inet_options.restore(fd, entry)
            inet_options.restore_tcp(fd, entry.tcp_opts)
            _shutdown(fd, SHUT_RDWR)
            set_flags(fd, entry.flags)
            return
        if entry.state != CLOSE and not self.ctx.options.tcp_established:
            raise Unsupported("an established TCP connection", hint="use --tcp-established, or --tcp-close")
        if entry.opts.HasField("so_bound_dev"):
            device = os.fsdecode(pb.get_bytes(entry.opts.so_bound_dev))
            inet_options.interface(0, device)
            put(fd, sockets.SOL_SOCKET, sockopts.SO_BINDTODEVICE, os.fsencode(device) + b"\0")
        if entry.opts.so_mark:
            put(fd, sockets.SOL_SOCKET, sockopts.SO_MARK, entry.opts.so_mark)
        stream, data = self.ctx.images.read_first(f"tcp-stream-{entry.ino:x}")
        parts = data[: stream.inq_len], data[stream.inq_len :]
        self.connections.append(tcp_build.Connection(fd, entry, *names(entry), stream, *parts))

    def release(self) -> None:
        """The tasks are about to run: let packets through, and the connections send."""
        from ..network_lock import lift

        try:
            lock = lift(self.inventory.network_lock_method, self.inventory.dump_criu_run_id, self.locked)
            if lock is not None:
                self.ctx.on_failure.add("network lock", lock.set)
        except TorporError as error:
            if self.connections:
                raise
            log.warning(f"of connections that are closed: {error}")
        held = []
        for one in self.connections:
            fd = self.ctx.built.get(one.entry.id)
            if fd is not None:  # else nobody holds it
                one.fd = fd
                held.append(one)
        # Their peers must not hear of an end if this comes to nothing.
        self.ctx.on_failure.add("connections that were let go", lambda: tcp_build.take_back(held))
        tcp_build.release(held, _explain)
        for one in held:
            if one.entry.state == ESTABLISHED and one.entry.shutdown == pb.sk_shutdown.READ:
                _shutdown(one.fd, SHUT_RD)


def _make_all(ctx: BuildContext) -> dict[int, int]:
    """Make all sockets of the images: file id → descriptor."""
    entries = [
        entry
        for resource, entry in ctx.files.values()
        if resource.FD_TYPE == Inet.FD_TYPE and f"socket:[{entry.ino}]" not in ctx.inherited
    ]
    maker = _Maker(ctx)
    made: dict[int, int] = {}

    def forget() -> None:
        for fd in made.values():
            os.close(fd)
        made.clear()

    ctx.undo.add("sockets that nobody took", forget)
    # Listeners come first, for connections may take a port that is in use, and connections last.
    for entry in sorted(entries, key=lambda entry: entry.state != LISTEN):
        if not is_connection(entry):
            with doing(lambda entry=entry: describe(entry)):  # type: ignore[misc]
                made[entry.id] = maker.make(entry)
    connections = [entry for entry in entries if is_connection(entry)]
    if connections:
        maker.make_connections(connections, made)
    if maker.shared:
        ctx.memo.setdefault("after_build", []).append(maker.finish)
    if maker.connections or maker.locked:
        ctx.memo.setdefault("after_restore", []).append(maker.release)
    return made


def _check_entry(entry: Message) -> None:
    size = 1 if entry.family == AF_INET else 4
    if entry.family not in (AF_INET, AF_INET6):
        raise ImageError("files.img", f"file {entry.id}: family", f"{entry.family} is neither IPv4 nor IPv6")
    if entry.type not in (SOCK_STREAM, SOCK_DGRAM, SOCK_RAW):
        raise ImageError("files.img", f"file {entry.id}: type", f"{entry.type} is not known")
    if len(entry.src_addr) < size or len(entry.dst_addr) < size:
        raise ImageError("files.img", f"file {entry.id}: address", "is too short")
    if entry.src_port > 0xFFFF or entry.dst_port > 0xFFFF:
        raise ImageError("files.img", f"file {entry.id}: port", "is more than 65535")


class _Freely:
    """Within it, a socket may be bound to an address that the machine does not have."""

    def __init__(self, fd: int, entry: Message) -> None:
        self.fd = fd
        six = entry.family == AF_INET6
        self.level = inet_options.SOL_IPV6 if six else inet_options.SOL_IP
        self.option = inet_options.IPV6_FREEBIND if six else inet_options.IP_FREEBIND
        self.before = int(entry.ip_opts.freebind)

    def __enter__(self) -> None:
        put(self.fd, self.level, self.option, 1)

    def __exit__(self, *_: object) -> None:
        put(self.fd, self.level, self.option, self.before)


def _is_tentative(entry: Message, name: bytes) -> bool:
    """Is it an IPv6 address that is ours, but not yet found to be nobody else's?"""
    return entry.family == AF_INET6 and tcp.address_of_sockaddr(name)[0].hex() in _own_six()


def _own_six() -> set[str]:
    try:
        with open("/proc/thread-self/net/if_inet6", encoding="ascii") as file:
            return {line.split()[0] for line in file}
    except FileNotFoundError:
        return set()


def _connect(fd: int, name: bytes) -> None:
    try:
        call("connect", fd, name, len(name))
    except KernelError as error:
        raise _why(error, b"", name) from None


def _has_peer(entry: Message) -> bool:
    """Is it a datagram socket that is connected? The port of its peer may be 0."""
    return bool(entry.type == SOCK_DGRAM and entry.state == ESTABLISHED)


def _shutdown(fd: int, how: int) -> None:
    try:
        sockets.shutdown(fd, how)
    except KernelError as error:
        if error.errno != errno.ENOTCONN:  # what is not connected is shut down all the same
            raise


# ---------------------------------------------------------------------- what may stand in the way


def refuse_missing(entries: list[Message]) -> None:
    """Raise Unsupported when this machine has not an address that the images need. Nothing was made yet."""
    tried: set[bytes] = set()
    for entry in entries:
        if not (is_bound(entry) or is_connection(entry)) or _may_be_missing(entry):
            continue
        name = names(entry)[0]
        anywhere = name[:2] + bytes(2) + name[4:]  # whatever the port
        if anywhere in tried:
            continue
        tried.add(anywhere)
        probe = sockets.socket(entry.family, SOCK_DGRAM)
        try:
            call("bind", probe, anywhere, len(name))
        except KernelError as error:
            if error.errno == errno.EADDRNOTAVAIL and not _is_tentative(entry, name):
                with doing(describe(entry)):
                    raise _missing(name) from None
        finally:
            os.close(probe)


def _may_be_missing(entry: Message) -> bool:
    transparent = ((0, IP_TRANSPARENT), (inet_options.SOL_IPV6, IPV6_TRANSPARENT))
    return bool(
        entry.alien
        or entry.ip_opts.freebind
        or any((one.level, one.name) in transparent and any(one.value) for one in entry.more)
    )


def refuse_conflicts(entries: list[Message]) -> None:
    """Raise Unsupported when somebody has a port or a connection that the images need. Nothing was made yet.

    Ports that the socket would have shared (SO_REUSEPORT, SO_REUSEADDR of UDP) are left to bind(2).
    """
    patiently(lambda: _refuse_conflicts(entries))


def _refuse_conflicts(entries: list[Message]) -> None:
    for protocol in (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_UDPLITE):
        wanted = [one for one in entries if one.type != SOCK_RAW and one.proto == protocol and one.src_port]
        if not wanted:
            continue
        by_port: dict[int, list[inet_diag.InetSocket]] = {}
        for found in inet_diag.sockets(protocol, ports={entry.src_port for entry in wanted}):
            by_port.setdefault(found.source[1], []).append(found)
        for entry in wanted:
            for other in by_port.get(entry.src_port, ()):
                if is_connection(entry):
                    if entry.state != CLOSE and _same_connection(entry, other):
                        local, peer = names(entry)
                        raise _exists(local, peer)
                elif _excludes(entry, other):
                    with doing(describe(entry)):
                        raise _taken(names(entry)[0])


def _same_connection(entry: Message, other: inet_diag.InetSocket) -> bool:
    local, peer = map(tcp.address_of_sockaddr, names(entry))
    if other.state in (LISTEN, inet_diag.TIME_WAIT):
        return False
    pairs = (local, other.source), (peer, other.destination)
    return all(
        inet_diag.unmapped(a) == inet_diag.unmapped(b) and port == other_port
        for (a, port), (b, other_port) in pairs
    )


def _excludes(entry: Message, other: inet_diag.InetSocket) -> bool:
    if entry.proto == IPPROTO_TCP:
        if entry.opts.so_reuseport or entry.state != LISTEN or other.state != LISTEN:
            return False
    elif entry.opts.so_reuseport or entry.opts.reuseaddr:
        return False
    if other.device and not entry.opts.HasField("so_bound_dev"):
        return False
    if entry.opts.HasField("so_bound_dev"):
        device = inet_options.interface(0, os.fsdecode(pb.get_bytes(entry.opts.so_bound_dev)))
        if other.device not in (0, device):
            return False
    here = tcp.address_of_sockaddr(names(entry)[0])[0]
    return overlap(here, other.source[0], entry.v6only, other.v6only)


def _taken(name: bytes) -> Unsupported:
    port = tcp.address_of_sockaddr(name)[1]
    states = {one.state for one in inet_diag.sockets(IPPROTO_TCP, states=inet_diag.ALL_STATES, ports={port})}
    if states == {inet_diag.TIME_WAIT}:
        return Unsupported(
            f"{tcp.shown(name)} is not free yet: connections that have ended wait there (TIME_WAIT)",
            hint="try again in a minute, or restore into a network namespace; SO_REUSEADDR saves a server from that",
        )
    return Unsupported(
        f"{tcp.shown(name)} is in use by another process", hint="end it; `ss -anp` shows who it is"
    )


def _missing(name: bytes) -> Unsupported:
    address = inet_diag.text(tcp.address_of_sockaddr(name)[0])
    return Unsupported(
        f"this machine has no address {address}", hint=f"add it first: ip address add {address}/… dev …"
    )


def _exists(local: bytes, peer: bytes) -> Unsupported:
    return Unsupported(
        f"TCP connection {tcp.shown(local)} - {tcp.shown(peer)} exists already",
        hint="end the process that has it, or use --tcp-close",
    )


def _explain(one: tcp_build.Connection, error: KernelError) -> Exception:
    """An error of a connection that says which one it is, and what is missing."""
    try:
        with doing(f"TCP connection {tcp.shown(one.local)} - {tcp.shown(one.peer)}"):
            raise _why(error, one.local, one.peer)
    except TorporError as explained:
        return explained


def _why(error: KernelError, local: bytes, peer: bytes) -> Exception:
    """An error of bind(2) or connect(2) that says what is missing."""
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return Unsupported(f"there is no route to {tcp.shown(peer)}", hint="set up the network first")
    if local and error.call == "bind" and error.errno == errno.EADDRNOTAVAIL:
        return _missing(local)
    if local and error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
        return _exists(local, peer)
    return error


RESOURCE = Inet()
