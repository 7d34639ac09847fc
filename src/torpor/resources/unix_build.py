"""Making unix sockets again: all of them at once, because who is connected to whom decides how each is made.

1. Bound and listening ones, connections between two ends, and their names, as the descriptions are asked for.
2. When all files are there (some are in flight): queues are filled, datagram sockets connected, clients
   that are not accepted yet connected, options set, directions shut down.

Kernel: net/unix/af_unix.c
"""

from __future__ import annotations

import os
from functools import partial

from ..errors import ImageError, KernelError, Unsupported, doing
from ..images import schema as pb
from ..linux import sockets
from ..linux.sock_diag import ESTABLISHED, LISTEN
from ..linux.sockets import SOCK_DGRAM
from . import sockopts, unix_names, unix_queue
from .apart import Identity, apart
from .fown import set_flags
from .unix_names import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..images.schema import Message
    from .base import BuildContext

EXTERN = 1
_TYPES = (sockets.SOCK_STREAM, sockets.SOCK_DGRAM, sockets.SOCK_SEQPACKET)
_AT_ONCE = 500  # of a task's socketpairs
_MANY = 4096


def make_all(ctx: BuildContext, fd_type: int) -> dict[int, int]:
    """Make every unix socket of the images: file id → descriptor, which is the context's.

    What remains to be done is left to ``after_build``.
    """
    builder = _Builder(ctx, [entry for kind, entry in ctx.files.values() if fd_type == kind.FD_TYPE])
    builder.make()
    ctx.memo.setdefault("after_build", []).append(builder.finish)
    return {entry.id: builder.fds[entry.ino] for entry in builder.entries.values()}


class _Connection:
    """A stream or seqpacket connection: the end that connects, the end that is accepted. None: that end is closed."""

    __slots__ = ("client", "server")

    def __init__(self, client: Message | None, server: Message | None) -> None:
        self.client = client
        self.server = server

    @property
    def some(self) -> Message:
        """An end that is there."""
        one = self.server or self.client
        assert one is not None
        return one


class _Builder:
    def __init__(self, ctx: BuildContext, entries: Iterable[Message]) -> None:
        self.ctx = ctx
        #: inode → entry, of those that are made and of those that are outside.
        self.entries: dict[int, Message] = {}
        self.outside: dict[int, Message] = {}
        self.fds: dict[int, int] = {}
        #: inode → descriptor of the bound file, -1 for an abstract name.
        self.anchors: dict[int, int] = {}
        #: inode of a socket whose peer is gone → descriptor that can still send to it, closed in the end.
        self.closing: dict[int, int] = {}
        #: inodes of datagram sockets that are connected, of those that were given by the caller.
        self.connected: set[int] = set()
        self.given: set[int] = set()
        for entry in entries:
            if entry.type not in _TYPES:
                raise ImageError("files.img", f"file {entry.id}: usk.type", f"{entry.type} is not known")
            if len(entry.name) > sockets.SUN_PATH_MAX + 1:
                raise ImageError("files.img", f"file {entry.id}: usk.name", "it is too long")
            where = self.outside if entry.uflags & EXTERN else self.entries
            if entry.ino in where:
                raise ImageError("files.img", f"file {entry.id}: usk.ino", f"{entry.ino} is there twice")
            where[entry.ino] = entry

    # ------------------------------------------------------------------------------ first part

    def make(self) -> None:
        """Make all descriptions."""
        self._take_given()
        connections, listeners, others, datagrams = self._sort()
        for entry in listeners:
            self._new(entry)
        self._make_pairs([one for one in connections if not self._server_name(one)])
        self._listen(listeners, [one for one in connections if self._server_name(one)])
        for entry in others:
            self._new(entry)
        self._make_datagrams(datagrams)
        for entry in self._made():
            set_flags(self.fds[entry.ino], entry.flags)

    def _made(self) -> list[Message]:
        return [entry for entry in self.entries.values() if entry.ino not in self.given]

    def _keep(self, entry: Message, fd: int) -> int:
        self.fds[entry.ino] = self.ctx.keep(fd)
        return self.fds[entry.ino]

    def _take_given(self) -> None:
        for entry in self.entries.values():
            fd = self.ctx.inherited.get(f"socket:[{entry.ino}]")
            if fd is not None:
                self._keep(entry, os.dup(fd))
                self.given.add(entry.ino)

    def _new(self, entry: Message) -> None:
        """A socket of its own, with its name."""
        self._keep(entry, sockets.socket(sockets.AF_UNIX, entry.type))
        self._name(entry)

    def _name(self, entry: Message) -> None:
        if entry.name:
            self.anchors[entry.ino] = unix_names.bind(self.fds[entry.ino], entry, self.ctx)

    def _peer(self, entry: Message) -> Message | None:
        return self.entries.get(entry.peer) if entry.peer else None

    def _sort(self) -> tuple[list[_Connection], list[Message], list[Message], list[Message]]:
        """Connections, listening sockets, other stream sockets, datagram sockets."""
        connections: list[_Connection] = []
        listeners, others, datagrams = [], [], []
        for entry in self._made():
            peer = self._peer(entry)
            if entry.type == SOCK_DGRAM:
                datagrams.append(entry)
            elif entry.state == LISTEN:
                listeners.append(entry)
            elif entry.state != ESTABLISHED:
                others.append(entry)
            elif peer is not None and peer.state == LISTEN and peer.ino not in self.given:
                others.append(entry)  # not accepted yet
            elif peer is not None and peer.peer == entry.ino:
                if peer.ino in self.given:
                    raise Unsupported(f"socket:[{entry.ino}] is connected to socket:[{peer.ino}], which was given")
                if entry.ino < peer.ino:
                    connections.append(self._roles(entry, peer))
            elif entry.peer == 0:
                connections.append(_Connection(None, entry) if entry.name else _Connection(entry, None))
            elif entry.peer in self.outside:
                self._check_outside(entry)
                others.append(entry)
            else:
                raise ImageError("files.img", f"file {entry.id}: usk.peer", f"there is no socket {entry.peer}")
        return connections, listeners, others, datagrams

    def _roles(self, one: Message, two: Message) -> _Connection:
        """Who of two has connected and who was accepted: that one has the name of the socket that accepted it."""
        if not one.accepted and (two.accepted or self._is_like_listener(two) or not one.name):
            return _Connection(one, two)
        return _Connection(two, one)

    def _is_like_listener(self, entry: Message) -> bool:
        return bool(entry.name) and any(
            other.state == LISTEN and _place(other) == _place(entry) for other in self.entries.values()
        )

    def _check_outside(self, entry: Message) -> None:
        name = self.outside[entry.peer].name
        if not self.ctx.options.ext_unix_sk or not name:
            hint = "" if not name else "--ext-unix-sk to have it connected to that name, or "
            raise Unsupported(
                f"socket:[{entry.ino}] was connected to a socket of another process ({show(name)})",
                hint=f"{hint}--inherit-fd fd[N]:socket:[{entry.ino}]",
            )

    # ------------------------------------------------------------------------------ connections

    @staticmethod
    def _server_name(connection: _Connection) -> bytes:
        return bytes(connection.server.name) if connection.server else b""

    def _make_pairs(self, connections: list[_Connection]) -> None:
        """Those that nobody has accepted under a name: socketpair(2), by who made them before."""
        by_maker: dict[object, tuple[Identity | None, list[_Connection]]] = {}
        for one in connections:
            who = _identity(one.some)
            by_maker.setdefault((who and who.key, one.some.type), (who, []))[1].append(one)
        for who, some in by_maker.values():
            for at in range(0, len(some), _AT_ONCE):
                part = some[at : at + _AT_ONCE]
                kind = part[0].some.type
                pairs = _as(who, partial(_socketpairs, kind, len(part)))
                for one, (first, second) in zip(part, pairs, strict=True):
                    self._place_ends(one, first, second)
        for one in connections:
            for end in (one.client, one.server):
                if end is not None:
                    self._name(end)

    def _place_ends(self, connection: _Connection, client: int, server: int) -> None:
        for end, other, fd in (
            (connection.client, connection.server, client),
            (connection.server, connection.client, server),
        ):
            if end is not None:
                self._keep(end, fd)
            else:
                assert other is not None
                self.closing[other.ino] = self.ctx.keep(fd)

    def _listen(self, listeners: list[Message], connections: list[_Connection]) -> None:
        """Put sockets into the listening state and have those connections accepted that go by their names."""
        groups: dict[object, list[_Connection]] = {}
        for one in connections:
            assert one.server is not None
            groups.setdefault(_place(one.server), []).append(one)
        last: dict[object, tuple[Identity | None, list[Message]]] = {}
        for entry in listeners:
            for part in groups.pop(_place(entry), ()):
                self._accept(self.fds[entry.ino], self.anchors.get(entry.ino, -1), entry.name, part)
            who = _identity(entry)
            last.setdefault(who and who.key, (who, []))[1].append(entry)
        for who, some in last.values():
            pairs = [(self.fds[entry.ino], max(entry.backlog, 0)) for entry in some]
            _as(who, partial(_listen_all, pairs))
        for some_more in groups.values():
            self._accept_by_stand_in(some_more)

    def _accept_by_stand_in(self, connections: list[_Connection]) -> None:
        """Their listening socket is closed: another one has its name for as long as it takes."""
        server = connections[0].server
        assert server is not None
        with doing(f"socket {show(server.name)}"):
            fd = sockets.socket(sockets.AF_UNIX, server.type)
            try:
                try:
                    anchor = unix_names.bind(fd, server, self.ctx)
                except Unsupported:
                    if unix_names.is_path(server.name):
                        raise
                    # Somebody else has the abstract name by now: they do without.
                    self._make_unnamed(connections)
                    return
                for one in connections:
                    self._accept(fd, anchor, server.name, one)
            finally:
                os.close(fd)

    def _make_unnamed(self, connections: list[_Connection]) -> None:
        for one in connections:
            kind = one.some.type
            first, second = _as(_identity(one.some), partial(sockets.socketpair, kind))
            self._place_ends(one, first, second)
            if one.client is not None:
                self._name(one.client)

    def _accept(self, listener: int, anchor: int, name: bytes, connection: _Connection) -> None:
        """One connection through a bound socket, each side seeing the other as it did."""
        client, server = connection.client, connection.server
        assert server is not None
        _as(_identity(client), lambda: sockets.listen(listener, _MANY))
        if client is not None:
            self._new(client)
            fd = self.fds[client.ino]
        else:
            fd = self.closing[server.ino] = self.ctx.keep(sockets.socket(sockets.AF_UNIX, server.type))
        _as(_identity(server), lambda: sockets.connect(fd, _reach(anchor, name)))
        self._keep(server, sockets.accept(listener))

    # ------------------------------------------------------------------------------ datagram sockets

    def _make_datagrams(self, datagrams: list[Message]) -> None:
        targets = {entry.peer: entry for entry in datagrams if entry.peer and entry.peer != entry.ino}
        paired: set[int] = set()
        for entry in datagrams:
            peer = self._peer(entry)
            # Nobody can connect to a socket without a name: the two were made together.
            if peer is None or peer.type != SOCK_DGRAM or peer is entry:
                continue
            if {entry.ino, peer.ino} & (paired | self.given):
                continue
            if not peer.name or (not entry.name and peer.peer == entry.ino):
                self._pair(entry, peer)
                paired |= {entry.ino, peer.ino}
        for entry in datagrams:
            if entry.ino in paired:
                continue
            # One without a name and without a peer can have got what waits there only from a lost partner.
            feeds = not entry.name and entry.ino not in targets and unix_queue.packets(self.ctx, entry.id)
            if entry.peer_gone or (feeds and not entry.peer):
                first, second = _as(_identity(entry), lambda: sockets.socketpair(SOCK_DGRAM))
                self._keep(entry, first)
                self.closing[entry.ino] = self.ctx.keep(second)
                if not entry.peer_gone:
                    sockets.disconnect(self.fds[entry.ino])
                self.connected.add(entry.ino)
                self._name(entry)
            else:
                self._new(entry)

    def _pair(self, entry: Message, peer: Message) -> None:
        first, second = _as(_identity(entry), lambda: sockets.socketpair(SOCK_DGRAM))
        self._keep(entry, first)
        self._keep(peer, second)
        self.connected.add(entry.ino)
        for one in (entry, peer):
            self._name(one)
        if peer.peer == entry.ino:
            self.connected.add(peer.ino)

    # ------------------------------------------------------------------------------ second part

    def finish(self) -> None:
        """Everything that has to wait until all files are there."""
        for entry in self._made():
            with doing(f"socket:[{entry.ino}] ({show(entry.name)})"):
                if entry.type != SOCK_DGRAM and entry.state != LISTEN:
                    self._finish_stream(entry)
                elif entry.type == SOCK_DGRAM:
                    self._finish_datagram(entry, set())
        for entry in self._made():
            if entry.state == LISTEN:
                with doing(f"socket:[{entry.ino}] ({show(entry.name)})"):
                    self._connect_pending(entry)
        for entry in self._made():
            with doing(f"socket:[{entry.ino}] ({show(entry.name)})"):
                self._finish_one(entry)

    def _finish_stream(self, entry: Message) -> None:
        waiting = unix_queue.packets(self.ctx, entry.id)
        fd = self.fds[entry.ino]
        if entry.peer in self.outside:
            sockets.connect(fd, unix_names.address(self.outside[entry.peer].name))
        sender = self.closing.get(entry.ino, self.fds.get(entry.peer, -1))
        if waiting:
            if sender < 0:
                raise ImageError("sk-queues.img", f"id_for {entry.id}", "it has no peer that can have sent this")
            self._feed(sender, waiting)
        if entry.error and entry.ino in self.closing:
            sockets.send(fd, b"\0")  # closed with something unread: the connection is reset

    def _feed(self, sender: int, waiting: list[unix_queue.Packet], to: bytes = b"") -> None:
        sockopts.need_room(sender, unix_queue.room_for(waiting))
        unix_queue.feed(sender, waiting, self.ctx, to)

    def _finish_datagram(self, entry: Message, below: set[int]) -> None:
        """Fill its queue and connect it: after those that send to it, for it will take from its peer alone then."""
        key = ("unix datagram", entry.ino)
        if key in self.ctx.memo or entry.ino in below:
            return
        below = below | {entry.ino}
        for other in self._made():
            if other.type == SOCK_DGRAM and other.peer == entry.ino and entry.peer != other.ino:
                self._finish_datagram(other, below)
        self.ctx.memo[key] = True
        waiting = list(unix_queue.packets(self.ctx, entry.id))
        fd, peer = self.fds[entry.ino], self._peer(entry)
        if entry.ino in self.connected:
            sender = self.closing.get(entry.ino, self.fds.get(entry.peer, -1))
            self._feed(sender, waiting)
            self._move_on(entry)
            return
        mine = unix_names.address(peer.name) if peer is not None and peer is not entry else b""
        while waiting and (not mine or waiting[0][0].sender != mine or entry.peer in self.outside):
            self._feed_from_anybody(entry, waiting.pop(0))
        if peer is not None:
            with doing(f"connect to {show(peer.name)}"):
                sockets.connect(fd, _reach(self.anchors.get(peer.ino, -1), peer.name))
        elif entry.peer in self.outside:
            self._check_outside(entry)
            sockets.connect(fd, unix_names.address(self.outside[entry.peer].name))
        if waiting:
            assert peer is not None
            # Whoever is its peer may send more than the usual number of messages.
            self._feed(self.fds[peer.ino], waiting, _reach(self.anchors.get(entry.ino, -1), entry.name))

    def _move_on(self, entry: Message) -> None:
        """A socket that was made as one of a pair has found another peer since, or none."""
        other = self._peer(entry)
        if other is None or other.peer == entry.ino or other.ino in self.connected:
            return
        fd = self.fds[other.ino]
        waiting = unix_queue.packets(self.ctx, other.id)
        next_peer = self._peer(other)
        if next_peer is not None:
            sockets.connect(fd, _reach(self.anchors.get(next_peer.ino, -1), next_peer.name))
        else:
            sockets.disconnect(fd)
        self.connected.add(other.ino)
        self.ctx.memo["unix datagram", other.ino] = True
        self._feed(self.fds[entry.ino], waiting)

    def _feed_from_anybody(self, entry: Message, packet: unix_queue.Packet) -> None:
        """A message to a socket with a name, from the socket that has sent it, or one that has its name for now."""
        to = _reach(self.anchors.get(entry.ino, -1), entry.name)
        if not entry.name:
            raise ImageError("sk-queues.img", f"id_for {entry.id}", "nobody can send to it, it has no name")
        name = bytes(packet[0].sender)
        for other in self._made() if name else ():
            if other.type == SOCK_DGRAM and unix_names.address(other.name) == name and not other.deleted:
                self._feed(self.fds[other.ino], [packet], to)
                return
        sender = sockets.socket(sockets.AF_UNIX, SOCK_DGRAM)
        try:
            if name:
                stand_in = pb.unix_sk_entry(name=name, deleted=True, name_dir="/")
                try:
                    unix_names.bind(sender, stand_in, self.ctx)
                except Unsupported:
                    pass  # an abstract name that is taken: the message comes without one
            self._feed(sender, [packet], to)
        finally:
            os.close(sender)

    def _connect_pending(self, listener: Message) -> None:
        """Clients that are to be accepted, in their order."""
        clients = {one.ino: one for one in self._made() if one.peer == listener.ino and one.type != SOCK_DGRAM}
        known = [ino for ino in listener.pending if ino in clients]
        order = [*known, *(ino for ino in clients if ino not in known)]
        fd = self.fds[listener.ino]
        if len(order) > listener.backlog + 1:
            _as(_identity(listener), lambda: sockets.listen(fd, _MANY))
        to = _reach(self.anchors.get(listener.ino, -1), listener.name)
        for ino in order:
            client = self.fds[ino]
            _as(_identity(clients[ino]), partial(sockets.connect, client, to))
        if len(order) > listener.backlog + 1:
            _as(_identity(listener), lambda: sockets.listen(fd, listener.backlog))

    def _finish_one(self, entry: Message) -> None:
        fd = self.fds[entry.ino]
        sockopts.restore(fd, entry.opts)
        closing = self.closing.pop(entry.ino, -1)
        if closing >= 0:
            self.ctx.kept.remove(closing)
            os.close(closing)
        if entry.shutdown and not (closing >= 0 and entry.type != SOCK_DGRAM):
            try:
                sockets.shutdown(fd, entry.shutdown - 1)
            except KernelError as error:
                raise KernelError("shutdown", error.errno or 0) from None


def _socketpairs(kind: int, count: int) -> list[tuple[int, int]]:
    return [sockets.socketpair(kind) for _ in range(count)]


def _listen_all(some: list[tuple[int, int]]) -> None:
    for fd, backlog in some:
        sockets.listen(fd, backlog)


def _place(entry: Message) -> tuple[object, ...]:
    """Equal for sockets that have the same address for the same reason."""
    return (
        entry.type, bytes(entry.name), pb.get_bytes(entry.name_dir), entry.deleted, pb.get_bytes(entry.path),
    )  # fmt: skip


def _reach(anchor: int, name: bytes) -> bytes:
    """The address of a socket that was bound here: its file may have been removed."""
    return b"/proc/self/fd/%d" % anchor if anchor >= 0 else unix_names.address(name)


def _identity(entry: Message | None) -> Identity | None:
    """Whom the holder of this socket sees at the other end, if the images tell."""
    if entry is None or not entry.HasField("peer_cred"):
        return None
    cred = entry.peer_cred
    return Identity(cred.pid, cred.uid, cred.gid, tuple(cred.groups))


def _as(who: Identity | None, action: Callable[[], Any]) -> Any:
    """Do it as somebody: in a child, unless we do not know as whom."""
    return apart(action, who) if who is not None else action()
