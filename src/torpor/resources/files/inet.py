"""Sockets of IPv4 and IPv6: TCP in all states, UDP, UDP-Lite, raw, and those for ping.

Image: file_entry.isk (inet_sk_entry); what is in flight of a connection is in tcp-stream-INODE, see tcp.py.
Kernel: net/ipv4/af_inet.c, net/ipv6/af_inet6.c, net/ipv4/inet_connection_sock.c (bind conflicts)
"""

from __future__ import annotations

import errno
import os
import stat

from ...errors import ImageError, KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux import inet_diag, sockets
from ...linux.call import call
from ...linux.inet_diag import AF_INET, AF_INET6, CLOSE, ESTABLISHED, IPPROTO_TCP, IPPROTO_UDP, LISTEN
from .. import inet_dump, inet_options, sockopts, tcp
from ..base import FileResource
from ..fown import set_flags
from ..inet_options import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_UDPLITE, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

SHUT_RD, SHUT_RDWR = 0, 2
IP_BIND_ADDRESS_NO_PORT = 24
PROTOCOLS = {
    IPPROTO_TCP: "TCP", IPPROTO_UDP: "UDP", IPPROTO_UDPLITE: "UDP-Lite", IPPROTO_ICMP: "ICMP",
    IPPROTO_ICMPV6: "ICMPv6",
}  # fmt: skip


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

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        given = ctx.inherited.get(f"socket:[{entry.ino}]")
        if given is not None:
            return os.dup(given)
        made: dict[int, int] = ctx.once(("inet",), lambda: _make_all(ctx))
        return made.pop(entry.id)


# ---------------------------------------------------------------------- restore


class _Maker:
    """Makes all sockets, those that others depend on first: listeners before what they have accepted."""

    def __init__(self, ctx: BuildContext, entries: list[Message]) -> None:
        self.ctx = ctx
        self.entries = entries
        inventory = ctx.images.read_one("inventory") if ctx.images.has("inventory") else None
        self.inventory = inventory or pb.inventory_entry()
        self.close = ctx.options.tcp_close or self.inventory.tcp_close
        self.connections: list[tcp.Connection] = []
        #: Sockets that could be bound only when others were let share with them, and what they had.
        self.shared: list[tuple[int, Message]] = []

    def make(self, entry: Message) -> int:
        fd = sockets.socket(entry.family, entry.type, entry.proto)
        try:
            if entry.HasField("uid"):
                os.fchown(fd, entry.uid, entry.gid)  # with others of the same user it may share a port
            if is_connection(entry):
                self._connection(fd, entry)
            else:
                self._plain(fd, entry)
            set_flags(fd, entry.flags)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _plain(self, fd: int, entry: Message) -> None:
        self._options(fd, entry)
        if _is_tcp(entry):
            inet_options.restore_tcp(fd, entry.tcp_opts)
        local, peer = names(entry)
        if _is_bound(entry):
            self._bind(fd, entry, local)
        if entry.state == LISTEN:
            if not _is_tcp(entry):
                raise ImageError("files.img", f"file {entry.id}: state", "only TCP listens")
            self._listen(fd, entry)
        elif entry.dst_port or (entry.type == SOCK_RAW and any(entry.dst_addr)):
            _connect(fd, peer)
        if entry.HasField("shutdown") and entry.shutdown:
            _shutdown(fd, entry.shutdown - 1)

    def _options(self, fd: int, entry: Message) -> None:
        if entry.opts.HasField("so_bound_dev"):
            inet_options.interface(0, os.fsdecode(pb.get_bytes(entry.opts.so_bound_dev)))
        sockopts.restore(fd, entry.opts)
        inet_options.restore(fd, entry)

    def _bind(self, fd: int, entry: Message, name: bytes) -> None:
        try:
            call("bind", fd, name, len(name))
        except KernelError as error:
            if error.errno == errno.EADDRINUSE:
                self._share(fd, entry)
            elif error.errno == errno.EADDRNOTAVAIL:
                with _freely(fd, entry, name):
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
        """Let it have the port together with another socket of the tree. It had been bound before that one
        was there, or before either forbade it."""
        for option in (sockopts.SO_REUSEADDR, sockopts.SO_REUSEPORT):
            put(fd, sockets.SOL_SOCKET, option, 1)
        for other_fd, _ in self.shared:
            if other_fd == fd:
                return
        self.shared.append((fd, entry))

    def finish(self, made: dict[int, int]) -> None:
        """All sockets are made: those that had to share for it get their own options back."""
        for fd, entry in self.shared:
            put(fd, sockets.SOL_SOCKET, sockopts.SO_REUSEADDR, int(entry.opts.reuseaddr))
            put(fd, sockets.SOL_SOCKET, sockopts.SO_REUSEPORT, int(entry.opts.so_reuseport))

    # ---- connections

    def _connection(self, fd: int, entry: Message) -> None:
        if self.close:
            sockopts.restore(fd, entry.opts)
            inet_options.restore(fd, entry)
            inet_options.restore_tcp(fd, entry.tcp_opts)
            _shutdown(fd, SHUT_RDWR)
            return
        if entry.state != CLOSE and not self.ctx.options.tcp_established:
            raise Unsupported("an established TCP connection", hint="use --tcp-established, or --tcp-close")
        if entry.opts.HasField("so_bound_dev"):
            device = os.fsdecode(pb.get_bytes(entry.opts.so_bound_dev))
            inet_options.interface(0, device)
            put(fd, sockets.SOL_SOCKET, sockopts.SO_BINDTODEVICE, os.fsencode(device) + b"\0")
        if entry.opts.so_mark:
            put(fd, sockets.SOL_SOCKET, sockopts.SO_MARK, entry.opts.so_mark)
        inet_options.restore(fd, entry)
        stream, to_read, to_send = self._stream(entry)
        local, peer = names(entry)
        try:
            made = tcp.Connection(fd, entry, local, peer, stream, to_read, to_send)
        except KernelError as error:
            raise _why(error, local, peer) from None
        self.connections.append(made)

    def _stream(self, entry: Message) -> tuple[Message, bytes, bytes]:
        image = f"tcp-stream-{entry.ino:x}"
        for stream, data in self.ctx.images.iter_with_payload(image, required=True):
            return stream, data[: stream.inq_len], data[stream.inq_len :]
        raise ImageError(f"{image}.img", "", "is empty")

    def release(self, made: dict[int, int]) -> None:
        """The tasks are about to run: let packets through, and the connections send."""
        if self.close:
            return
        from ..network_lock import lift

        method = self.inventory.network_lock_method
        quads = [one.quad for one in self.connections if one.entry.state != CLOSE]
        if quads:
            lift(method, self.inventory.dump_criu_run_id, quads)
        for one in self.connections:
            with doing(f"TCP connection {tcp.shown(one.local)} - {tcp.shown(one.peer)}"):
                one.release()
                if one.entry.state == ESTABLISHED and one.entry.shutdown == pb.sk_shutdown.READ:
                    _shutdown(one.fd, SHUT_RD)
                set_flags(one.fd, one.entry.flags)


def _make_all(ctx: BuildContext) -> dict[int, int]:
    """Make all sockets of the images: file id → descriptor."""
    entries = [
        entry
        for resource, entry in ctx.files.values()
        if resource.FD_TYPE == Inet.FD_TYPE and f"socket:[{entry.ino}]" not in ctx.inherited
    ]
    for entry in entries:
        _check_entry(entry)
    maker = _Maker(ctx, entries)
    refuse_conflicts(entries, closing=maker.close)
    made: dict[int, int] = {}

    def forget() -> None:
        for fd in made.values():
            os.close(fd)
        made.clear()

    ctx.undo.add("sockets that nobody took", forget)
    for entry in sorted(entries, key=_rank):
        with doing(describe(entry)):
            # Ours for good: what a task holds are duplicates.
            made[entry.id] = ctx.keep(maker.make(entry))
            _renumber(maker, entry, made[entry.id])
    given = dict(made)
    ctx.memo.setdefault("after_build", []).append(lambda: maker.finish(given))
    if maker.connections:
        ctx.memo.setdefault("after_restore", []).append(lambda: maker.release(given))
    return made
