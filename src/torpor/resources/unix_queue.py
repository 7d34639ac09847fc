"""What waits in the queues of sockets: bytes, messages, descriptors and credentials with them.

Image: sk-queues (sk_packet_entry, each followed by its bytes); ``id_for`` is the file id of the socket
that has them to read. Kernel: net/unix/af_unix.c
"""

from __future__ import annotations

import fcntl
import os
import select

from ..errors import ImageError, Unsupported
from ..images import schema as pb
from ..linux import sockets
from ..linux.sockets import SO_ERROR, SO_PEEK_OFF, SOCK_STREAM, SOL_SOCKET, Message, Socket
from .apart import Identity, apart
from .unix_names import RENAMED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from ..images.schema import Message as Entry
    from .base import BuildContext, DumpContext, SourceFile

FIONREAD = 0x541B
_FIRST_BYTES = 1 << 16
_POLLPRI, _POLLERR = 2, 8


# ---------------------------------------------------------------------- dump


def dump(source: SourceFile, kind: int, ended: bool, ctx: DumpContext) -> None:
    """Write all that waits to be read from a socket of type ``kind``; it stays there.

    ``ended``: nothing can be added any more (its reading side is shut down). Descriptors in flight get
    entries of their own.
    """
    fd = source.borrow()
    with Socket(fd) as sock:
        before = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
        try:
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 0)
            found = _peek_all(fd, sock, kind, ended)
        finally:
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)
    for message in found:
        for one in message.fds:
            ctx.adopt(one)
    for message in found:
        _write(message, source, ctx)


def _peek_all(fd: int, sock: _socket.socket, kind: int, ended: bool) -> list[Message]:
    found: list[Message] = []
    at = 0
    size, total = _FIRST_BYTES, 0
    if kind == SOCK_STREAM:
        # All in one: what ends a piece is then the kernel's own boundary, not the end of our buffer.
        size = total = _waiting(fd)
    elif _events(fd, _POLLERR):
        # It would be told to us in place of the first message, and forgotten.
        sock.getsockopt(SOL_SOCKET, SO_ERROR)
    while True:
        if kind == SOCK_STREAM and at >= total:
            return found  # at the end of the bytes an error would be told to us, and forgotten
        message = sockets.peek(fd, size)
        if message is None:
            return found
        while message.cut:
            for one in message.fds:
                os.close(one)
            size *= 4
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)
            message = sockets.peek(fd, size)
            assert message is not None
        if not message.data and (kind == SOCK_STREAM or ended):
            return found
        found += _split(message, fd, sock, at) if kind == SOCK_STREAM else [message]
        at += len(message.data)


def _waiting(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, FIONREAD, bytes(4)), "little")


def _split(message: Message, fd: int, sock: _socket.socket, at: int) -> list[Message]:
    """Bytes ahead of those that descriptors came with: whoever reads only them is not given the descriptors."""
    if not message.fds or len(message.data) == 1:
        return [message]
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)
    ahead = sockets.peek_ahead(fd, len(message.data))
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at + len(message.data))
    if not ahead:
        return [message]
    first = Message(message.data[:ahead])
    first.cred = message.cred
    message.data = message.data[ahead:]
    return [first, message]


def _write(message: Message, source: SourceFile, ctx: DumpContext) -> None:
    entry = pb.sk_packet_entry(id_for=source.id, length=len(message.data))
    if message.fds:
        rights = [ctx.file_id(fd, source) for fd in message.fds]
        entry.scm.add(type=sockets.SCM_RIGHTS, rights=rights)
    if message.sender:
        entry.sender = message.sender
    if message.cred is not None and message.cred[0] > 0:
        pid, entry.cred.uid, entry.cred.gid = message.cred
        entry.cred.pid = ctx.number(pid)
    ctx.images.append("sk-queues", entry, message.data)


# ---------------------------------------------------------------------- restore

#: (sk_packet_entry, its bytes)
Packet = tuple["Entry", bytes]


def packets(ctx: BuildContext, file_id: int) -> list[Packet]:
    """What waits to be read from the socket ``file_id``, in order."""
    found: dict[int, list[Packet]] = ctx.once("socket queues", lambda: _load(ctx))
    return found.get(file_id, [])


def _load(ctx: BuildContext) -> dict[int, list[Packet]]:
    found: dict[int, list[Packet]] = {}
    renamed = ctx.memo.get(RENAMED, {})
    for entry, data in ctx.images.iter_with_payload("sk-queues"):
        if entry.sender in renamed:
            entry.sender = renamed[entry.sender]
        found.setdefault(entry.id_for, []).append((entry, data))
        for scm in entry.scm:
            for file_id in scm.rights:
                ctx.memo.setdefault("in flight", {}).setdefault(file_id, entry.id_for)
    return found


def feed(sender: int, waiting: list[Packet], ctx: BuildContext, to: bytes = b"") -> None:
    """Send packets by the socket ``sender``, so that they wait at its peer (or at the address ``to``)."""
    at = 0
    while at < len(waiting):
        cred = waiting[at][0].cred if waiting[at][0].HasField("cred") else None
        end = at + 1
        while end < len(waiting) and _same(waiting[end][0], cred):
            end += 1
        some = [(data, _files(entry, ctx)) for entry, data in waiting[at:end]]
        if cred is None:
            _send(sender, some, None, to)
        else:
            _send_as(sender, some, cred, to)
        at = end


def _same(entry: Entry, cred: Entry | None) -> bool:
    return bool(entry.cred == cred) if entry.HasField("cred") else cred is None


def _files(entry: Entry, ctx: BuildContext) -> list[int]:
    fds = []
    for scm in entry.scm:
        if scm.type != sockets.SCM_RIGHTS:
            raise ImageError("sk-queues.img", f"packet for {entry.id_for}", f"scm type {scm.type} is not known")
        for file_id in scm.rights:
            if file_id not in ctx.files:
                raise ImageError("sk-queues.img", f"packet for {entry.id_for}", f"no file {file_id}")
            fds.append(ctx.build(file_id))
    return fds


def _send(
    sender: int, some: list[tuple[bytes, list[int]]], cred: tuple[int, int, int] | None, to: bytes
) -> None:
    for data, fds in some:
        view = memoryview(data)
        while True:
            try:
                sent = sockets.send(sender, view, fds, cred, to)
            except BlockingIOError:
                raise Unsupported(
                    f"{len(data)} bytes do not go into the queue of a socket",
                    hint="is /proc/sys/net/unix/max_dgram_qlen lower than it was?",
                ) from None
            view, fds = view[sent:], []
            if not view:
                break


def _send_as(sender: int, some: list[tuple[bytes, list[int]]], cred: Entry, to: bytes) -> None:
    """The kernel takes the number of a process that exists: ours, if nobody else can have it."""

    def action() -> None:
        _send(sender, some, (os.getpid(), cred.uid, cred.gid), to)

    if os.path.exists(f"/proc/{cred.pid}"):
        _send(sender, some, (cred.pid, cred.uid, cred.gid), to)
    else:
        apart(action, Identity(cred.pid))


def room_for(waiting: list[Packet]) -> int:
    """Bytes of a send buffer that will do for these: the kernel counts whole buffers."""
    return sum(len(data) * 2 + 4096 for _, data in waiting)


def has_urgent(fd: int) -> bool:
    """Does a byte sent with MSG_OOB wait, whose place among the others nobody can see?"""
    return _events(fd, _POLLPRI)


def _events(fd: int, wanted: int) -> bool:
    poll = select.poll()
    poll.register(fd, wanted)
    return any(events & wanted for _, events in poll.poll(0))

