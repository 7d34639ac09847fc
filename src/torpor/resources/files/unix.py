"""Unix sockets: stream, datagram and seqpacket.

Image: file_entry.usk (unix_sk_entry), one for each description; what waits in its queue is in sk-queues.
A peer that no task of the tree has gets an entry with the flag EXTERN. Kernel: net/unix/af_unix.c,
net/unix/diag.c. How they are made again is in unix_build.py.
"""

from __future__ import annotations

import os
import select
import stat
import struct

from ...errors import TaskGone, Unsupported
from ...images import schema as pb
from ...linux import sockets
from ...linux.sock_diag import CLOSE, ESTABLISHED, LISTEN, UnixSocket, unix_sockets
from ...linux.sockets import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET
from ...proc import status as proc_status
from ...proc.read import read
from .. import sockopts, unix_build, unix_names, unix_queue
from ..base import FileResource, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

#: unix_sk_entry.uflags
EXTERN = 1
_NOBODY = 0xFFFFFFFF
_SHUT_READING = 1


class Unix(FileResource):
    """A unix socket. Its peer must be in the tree too, or be declared external."""

    FD_TYPE, FIELD = 5, "usk"
    MODES = (stat.S_IFSOCK,)
    PRIORITY = 20

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("socket:[") and sockets.family(source.borrow()) == sockets.AF_UNIX

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        sock = _find(source, ctx)
        _check_alone(source, sock, ctx)
        if sock.peer and not _held_by(ctx, sock.peer):
            _check_external(sock, ctx)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        sock, fd = _find(source, ctx), source.borrow()
        _check_alone(source, sock, ctx)
        entry = pb.unix_sk_entry(
            id=source.id,
            ino=sock.ino,
            type=sock.type,
            state=sock.state,
            flags=source.flags,
            uflags=0,
            backlog=sock.queue[1],
            peer=sock.peer or 0,
            fown=ctx.fown(source),
            opts=sockopts.dump(fd),
            name=sock.name,
            ns_id=ctx.memo.get(("net namespace",), 2),
        )
        _dump_name(entry, sock, fd, ctx)
        _dump_relations(entry, sock, source, ctx)
        if sock.shutdown:
            entry.shutdown = sock.shutdown
        dumped = ctx.memo.setdefault(("unix dumped",), {})
        if not dumped:
            ctx.memo.setdefault("after_files", []).append(lambda: _finish(ctx))
        dumped[sock.ino] = sock
        _dump_outside(sock, ctx)
        if sock.state == ESTABLISHED or sock.type == SOCK_DGRAM:
            ended = bool(sock.shutdown & _SHUT_READING)
            unix_queue.dump(source, sock.type, ended, ctx)
        return entry

    def check_restore(self, entries: list[Message], ctx: BuildContext) -> None:
        if ctx.options.remap_address:
            from .. import unix_remap

            unix_remap.apply(entries, ctx)

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        made: dict[int, int] = ctx.once(("unix sockets",), lambda: unix_build.make_all(ctx, Unix.FD_TYPE))
        return os.dup(made[entry.id])


# ---------------------------------------------------------------------- dump


def _sockets(ctx: DumpContext) -> dict[int, UnixSocket]:
    """All sockets of the network namespace by inode; asked for once the tree stands still, and before."""
    key = ("unix sockets", bool(ctx.tasks))
    if key not in ctx.memo:
        ctx.memo[key] = unix_sockets()
    found: dict[int, UnixSocket] = ctx.memo[key]
    return found


def _find(source: SourceFile, ctx: DumpContext) -> UnixSocket:
    found = _sockets(ctx).get(source.stat.st_ino)
    if found is None:
        raise unsupported(source, "it belongs to another network namespace")
    return found


def _check_alone(source: SourceFile, sock: UnixSocket, ctx: DumpContext) -> None:
    """Raise Unsupported for what does not depend on other sockets of the tree."""
    if sock.type not in (SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET) or sock.state not in (
        ESTABLISHED,
        CLOSE,
        LISTEN,
    ):
        raise unsupported(source, f"a unix socket of type {sock.type} in state {sock.state}")
    if sock.state == LISTEN and 0 in sock.pending:
        raise unsupported(
            source,
            "a client has connected and is gone again before it was accepted; "
            "what it sent cannot be read without accepting it",
            hint="dump when the program has accepted it",
        )
    if _is_pending(sock, ctx) and sock.queue[1]:
        raise unsupported(
            source,
            "it has sent data on a connection that is not accepted yet; "
            "the data cannot be read without accepting it",
            hint="dump when the connection is accepted",
        )
    if sock.type == SOCK_STREAM and sock.state == ESTABLISHED and unix_queue.has_urgent(source.borrow()):
        raise unsupported(source, "urgent data (MSG_OOB) waits in it")


def _accepting(ctx: DumpContext) -> dict[int, UnixSocket]:
    """Inode of a client that is not accepted yet → the socket that it has connected to."""
    key = ("unix accepting", bool(ctx.tasks))
    if key not in ctx.memo:
        ctx.memo[key] = {ino: one for one in _sockets(ctx).values() for ino in one.pending if ino}
    found: dict[int, UnixSocket] = ctx.memo[key]
    return found


def _is_pending(sock: UnixSocket, ctx: DumpContext) -> bool:
    return sock.type != SOCK_DGRAM and sock.state == ESTABLISHED and not sock.peer and sock.ino in _accepting(ctx)


def _dump_name(entry: Message, sock: UnixSocket, fd: int, ctx: DumpContext) -> None:
    if not sock.name:
        return
    entry.accepted = sock.type != SOCK_DGRAM and sock.state == ESTABLISHED and _shares_name(sock, ctx)
    if not unix_names.is_path(sock.name):
        return
    file = unix_names.bound_file(fd)
    if file is None:
        raise Unsupported(f"the file that socket {unix_names.show(sock.name)} is bound to is not shown")
    entry.file_perms.mode = file.stat.st_mode
    entry.file_perms.uid, entry.file_perms.gid = file.stat.st_uid, file.stat.st_gid
    if file.gone:
        entry.deleted = True
    name = unix_names.address(sock.name)
    natural = name
    if not name.startswith(b"/"):
        plain = os.path.normpath(name)
        ending = b"/" + plain
        if not plain.startswith(b"..") and file.path.endswith(ending):
            folder = file.path[: -len(ending)] or b"/"
        else:
            folder = os.path.dirname(file.path)
        pb.put_bytes(entry, "name_dir", folder)
        natural = os.path.normpath(os.path.join(folder, name))
    if not file.gone and file.path != natural and not _is_same(natural, file.stat):
        pb.put_bytes(entry, "path", file.path)


def _is_same(path: bytes, result: os.stat_result) -> bool:
    try:
        here = os.stat(path)
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (result.st_dev, result.st_ino)


def _shares_name(sock: UnixSocket, ctx: DumpContext) -> bool:
    """Has another socket the same address? Then it was not bound to it, but accepted by the one that was."""
    key = ("unix names", bool(ctx.tasks))
    if key not in ctx.memo:
        counts: dict[object, int] = {}
        for one in _sockets(ctx).values():
            if one.name and one.type != SOCK_DGRAM:
                place = one.vfs or (one.type, one.name)
                counts[place] = counts.get(place, 0) + 1
        ctx.memo[key] = counts
    return bool(ctx.memo[key][sock.vfs or (sock.type, sock.name)] > 1)


def _dump_relations(entry: Message, sock: UnixSocket, source: SourceFile, ctx: DumpContext) -> None:
    """Who is at the other end, or waits there."""
    if _is_pending(sock, ctx):
        listener = _accepting(ctx)[sock.ino]
        entry.peer = listener.ino
        _dump_connecting(entry.peer_cred, source, ctx)
        return
    fd = source.borrow()
    _dump_peer_cred(entry, fd, ctx)
    if sock.state == LISTEN:
        entry.pending.extend(sock.pending)
    elif sock.type == SOCK_DGRAM:
        if sock.peer == 0:
            entry.peer_gone = True
    elif sock.state == ESTABLISHED and not sock.peer:
        poll = select.poll()
        poll.register(fd, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            entry.error = 104  # ECONNRESET is the only one that there is


def _dump_peer_cred(entry: Message, fd: int, ctx: DumpContext) -> None:
    with sockets.Socket(fd) as sock:
        pid, uid, gid = struct.unpack("=iII", sock.getsockopt(SOL_SOCKET, sockets.SO_PEERCRED, 12))
        if uid == _NOBODY:
            return
        try:
            groups = sock.getsockopt(SOL_SOCKET, sockets.SO_PEERGROUPS, 1024)
        except OSError:
            groups = b""  # more of them than that
    entry.peer_cred.pid, entry.peer_cred.uid, entry.peer_cred.gid = ctx.number(pid), uid, gid
    entry.peer_cred.groups.extend(struct.unpack(f"={len(groups) // 4}I", groups))


def _dump_connecting(cred: Message, source: SourceFile, ctx: DumpContext) -> None:
    """Whom the one who accepts will see: the task that has connected, which is one that holds the socket."""
    status = proc_status.parse(read(source.holder, "status"))
    cred.pid, cred.uid, cred.gid = ctx.number(source.holder), status.Uid[1], status.Gid[1]
    cred.groups.extend(status.Groups)


# ---------------------------------------------------------------------- sockets outside of the tree


def _held_by(ctx: DumpContext, ino: int) -> bool:
    """May a task of the tree hold the socket? Asked before anything stands still."""
    key = ("unix held",)
    if key not in ctx.memo:
        ctx.memo[key] = _held(ctx.memo.get("pids", ()), ctx)
    held: set[int] | None = ctx.memo[key]
    return held is None or ino in held or ino in _accepting(ctx)


def _held(pids: Iterable[int], ctx: DumpContext) -> set[int] | None:
    """Inodes of all sockets that the processes have open; None if others are in flight and nobody knows."""
    found: set[int] = set()
    for pid in pids:
        try:
            for fd, link in ctx.descriptors.links(pid):
                if not link.startswith("socket:["):
                    continue
                found.add(int(link[8:-1]))
                info = read(pid, f"fdinfo/{fd}")
                if b"scm_fds:" in info and b"scm_fds:\t0\n" not in info and b"scm_fds: 0\n" not in info:
                    return None
        except (OSError, TaskGone):
            continue
    return found or None


def _dump_outside(sock: UnixSocket, ctx: DumpContext) -> None:
    """Write an entry for the peer of a socket if no task has it. CRIU wants it before that of the socket."""
    written: set[int] = ctx.memo.setdefault(("unix outside",), set())
    if sock.ino in written:
        raise Unsupported(f"socket:[{sock.ino}] is in flight, and was taken for one of a process outside of the tree")
    peer = sock.peer or 0
    if not peer or sock.state == LISTEN or peer in written or peer in ctx.memo["unix dumped",]:
        return
    key = ("unix held", "frozen")
    if key not in ctx.memo:
        ctx.memo[key] = _held((task.pid for task in ctx.tasks.values() if not task.zombie), ctx)
    held: set[int] | None = ctx.memo[key]
    if held is None or peer in held or peer in _accepting(ctx):
        return  # then it is known in the end
    _check_external(sock, ctx)
    written.add(peer)
    _write_external(peer, ctx)


def _finish(ctx: DumpContext) -> None:
    """All files are dumped: what is connected to others must be allowed to be, and they get an entry each."""
    dumped: dict[int, UnixSocket] = ctx.memo["unix dumped",]
    written: set[int] = ctx.memo["unix outside",]
    for sock in dumped.values():
        if sock.state == LISTEN:
            missing = [ino for ino in sock.pending if ino not in dumped]
            if missing:
                raise Unsupported(
                    f"socket {unix_names.show(sock.name)}: a process outside of the tree has connected to it and is "
                    "not accepted yet",
                    hint="dump when the program has accepted it, or dump both",
                )
            continue
        peer = _accepting(ctx)[sock.ino].ino if _is_pending(sock, ctx) else sock.peer or 0
        if not peer or peer in dumped:
            continue
        _check_external(sock, ctx)
        if peer not in written:
            written.add(peer)
            _write_external(peer, ctx)


def _check_external(sock: UnixSocket, ctx: DumpContext) -> None:
    """May this socket's peer be outside of the tree?"""
    if ctx.options.external_value(f"unix[{sock.ino}]") is not None:
        return
    peer = _sockets(ctx).get(sock.peer or 0)
    name = peer.name if peer else b""
    what = f"socket:[{sock.ino}] is connected to a socket of a process outside of the tree ({unix_names.show(name)})"
    if sock.type != SOCK_DGRAM:
        raise Unsupported(
            what,
            hint=f"close it before the dump, or --external unix[{sock.ino}] and, at restore, "
            f"--inherit-fd fd[N]:socket:[{sock.ino}]",
        )
    if not name:
        raise Unsupported(
            what,
            hint=f"--external unix[{sock.ino}] and, at restore, --inherit-fd fd[N]:socket:[{sock.ino}]",
        )
    if not ctx.options.ext_unix_sk:
        raise Unsupported(what, hint="--ext-unix-sk, at dump and restore, to have it connected to that name again")


def _write_external(ino: int, ctx: DumpContext) -> None:
    peer = _sockets(ctx).get(ino)
    whole = pb.file_entry(type=Unix.FD_TYPE, id=ctx.new_id("file"))
    entry = whole.usk
    entry.id, entry.ino, entry.type, entry.state = whole.id, ino, SOCK_DGRAM, LISTEN
    entry.flags = entry.backlog = entry.peer = 0
    entry.uflags, entry.name = EXTERN, peer.name if peer else b""
    entry.fown.CopyFrom(pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0))
    for field in ("so_sndbuf", "so_rcvbuf", "so_snd_tmo_sec", "so_snd_tmo_usec", "so_rcv_tmo_sec", "so_rcv_tmo_usec"):
        setattr(entry.opts, field, 0)
    ctx.images.append("files", whole)


RESOURCE = Unix()
