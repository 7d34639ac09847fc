"""Sockets between a virtual machine and its host (AF_VSOCK): new ones, bound ones and those that listen.

The other end of a connection is in another kernel, which nobody can ask to wait: connections are refused.

Image: file_entry.vsock, of Torpor's own. Kernel: net/vmw_vsock/af_vsock.c, include/uapi/linux/vm_sockets.h
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct

from ...errors import KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux import sockets
from ...linux.call import call
from .. import sockopts
from ..base import FileResource, unsupported
from ..fown import set_flags
from ..inet_options import get, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

AF_VSOCK = 40
SOCK_STREAM, SOCK_SEQPACKET = 1, 5
SO_ACCEPTCONN, SO_ERROR = 30, 4
PORT_ANY = 0xFFFFFFFF
_NAME = struct.Struct("=HHIIB3x")  # struct sockaddr_vm: family, reserved, port, cid, flags
#: SO_VM_SOCKETS_BUFFER_MAX_SIZE, MIN_SIZE, SIZE (in this order: each bounds the next), CONNECT_TIMEOUT
_OPTIONS = ((2, 8), (1, 8), (0, 8), (8, 16))
_BACKLOG = 4096  # the kernel does not tell it: as many as may be
_UNCONNECTED = (errno.ENOTCONN, errno.EINVAL)


class Vsock(FileResource):
    """A socket that has no peer."""

    FD_TYPE, FIELD = 1009, "vsock"
    MODES = (stat.S_IFSOCK,)
    PRIORITY = 60

    def claims(self, source: SourceFile) -> bool:
        return source.link.startswith("socket:[") and sockets.family(source.borrow()) == AF_VSOCK

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        fd = source.borrow()
        kind = _number(fd, sockets.SO_TYPE)
        if kind not in (SOCK_STREAM, SOCK_SEQPACKET):
            raise unsupported(source, "datagrams between a virtual machine and its host", hint="close it first")
        if _number(fd, SO_ACCEPTCONN):
            if _polls(fd, select.POLLIN):
                raise unsupported(
                    source, "connections of a virtual machine or its host wait to be accepted", hint="try again later"
                )
        elif _is_connected(fd) or not _polls(fd, select.POLLOUT):  # it is connecting: nothing else tells
            raise unsupported(
                source,
                "a connection between a virtual machine and its host: the other kernel cannot be made to wait",
                hint="close it before the dump and connect again after the restore",
            )

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        self.check(source, ctx)
        fd = source.borrow()
        _, _, port, cid, _ = _NAME.unpack(sockets.own_name(fd, _NAME.size))
        entry = pb.vsock_entry(
            id=source.id, ino=source.stat.st_ino, type=_number(fd, sockets.SO_TYPE), flags=source.flags, cid=cid,
            port=port, listening=bool(_number(fd, SO_ACCEPTCONN)), fown=ctx.fown(source), opts=sockopts.dump(fd),
        )  # fmt: skip
        for option, size in _OPTIONS:
            value = get(fd, AF_VSOCK, option, size)
            if value:
                entry.more.add(level=AF_VSOCK, name=option, value=value)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        given = ctx.inherited.get(f"socket:[{entry.ino}]")
        if given is not None:
            return os.dup(given)
        with doing(f"vsock {entry.cid:#x}:{entry.port}"):
            fd = sockets.socket(AF_VSOCK, entry.type)
            try:
                _fill(fd, entry)
            except BaseException:
                os.close(fd)
                raise
        return fd


def _number(fd: int, option: int) -> int:
    with sockets.Socket(fd) as sock:
        return sock.getsockopt(sockets.SOL_SOCKET, option)


def _is_connected(fd: int) -> bool:
    try:
        sockets.peer_name(fd, _NAME.size)
    except KernelError as error:
        if error.errno not in _UNCONNECTED:
            raise
        return False
    return True


def _polls(fd: int, events: int) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return any(seen & events for _, seen in poll.poll(0))


# ---------------------------------------------------------------------- restore


def _fill(fd: int, entry: Message) -> None:
    sockopts.restore(fd, entry.opts)
    for one in entry.more:
        put(fd, one.level, one.name, one.value)
    if entry.port != PORT_ANY:
        name = _NAME.pack(AF_VSOCK, 0, entry.port, entry.cid, 0)
        try:
            call("bind", fd, name, len(name))
        except KernelError as error:
            if error.errno == errno.EADDRINUSE:
                raise Unsupported(
                    f"port {entry.port} is in use by another process", hint="end it; `ss --vsock -anp` shows who it is"
                ) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise Unsupported(
                    f"this machine has another number (CID) than {entry.cid}", hint="restore it in the same guest"
                ) from None
            raise
    if entry.listening:
        sockets.listen(fd, _BACKLOG)
    set_flags(fd, entry.flags)


RESOURCE = Vsock()
