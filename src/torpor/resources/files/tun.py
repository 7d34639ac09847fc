"""/dev/net/tun: a network interface whose packets a program reads and writes.

Image: file_entry.tunf (tunfile_entry), and file_entry.reg of the same id for the device's file; what CRIU keeps of the
interface with the network namespace is in ``state`` (tun_link.py). Packets that nobody has read yet are lost, as on
any network. Kernel: drivers/net/tun.c
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct

from ... import log
from ...errors import KernelError, Unsupported, doing
from ...images import schema as pb
from .. import fown, tun_link
from ..base import FileResource, unsupported
from ..tun_link import DEVICE, IFF_PERSIST, TUNSETPERSIST
from . import regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

NUMBER = (10, 200)
TUNGETIFF, TUNGETSNDBUF, TUNSETSNDBUF, TUNSETQUEUE = 0x800454D2, 0x800454D3, 0x400454D4, 0x400454D9
TUNGETFILTER, TUNGETDEVNETNS = 0x801054DB, 0x54E3
IFF_DETACH_QUEUE = 0x400
_HINT = "close it before the dump"


class Tun(FileResource):
    """A descriptor of an interface, or of none yet."""

    FD_TYPE, FIELD = 15, "tunf"
    MODES = (stat.S_IFCHR,)
    PRIORITY = 20

    def claims(self, source: SourceFile) -> bool:
        device = source.stat.st_rdev
        return (os.major(device), os.minor(device)) == NUMBER and not source.flags & os.O_PATH

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        regular.RESOURCE.check(source, ctx)
        name, _ = _attached(source.borrow())
        if name:
            _link(source, name)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        fd = source.borrow()
        ctx.images.append("files", pb.file_entry(type=1, id=source.id, reg=regular.RESOURCE.dump(source, ctx)))
        entry = pb.tunfile_entry(id=source.id)
        name, flags = _attached(fd)
        if not name:
            return entry
        entry.netdev = name
        if flags & IFF_DETACH_QUEUE:
            entry.detached = True
        elif _has_packets(fd):
            log.warning(f"fd {source.fd} ({source.link}): packets of {name} that wait to be read are lost")
        entry.state.CopyFrom(tun_link.dump(fd, name, _link(source, name), flags))
        entry.sndbuf = int.from_bytes(fcntl.ioctl(fd, TUNGETSNDBUF, bytes(4)), "little")
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        flags = entry.file.flags if entry.HasField("file") else os.O_RDWR
        if not entry.netdev:
            return _open(flags)
        tun_link.check(entry)
        with doing(f"network interface {entry.netdev}"):
            fd = _open(flags)
            try:
                _attach(fd, entry, ctx)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        if entry.HasField("file"):
            fown.emit(entry.file.fown, fd, program, entry.file.flags)


def _attached(fd: int) -> tuple[str, int]:
    """(name, flags) of the interface; the name is empty if there is none."""
    try:
        reply = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
    except OSError as error:
        if error.errno != errno.EBADFD:
            raise KernelError("ioctl(TUNGETIFF)", error.errno or 0) from None
        return "", 0
    return os.fsdecode(reply[:16].rstrip(b"\0")), int.from_bytes(reply[16:18], "little")


def _link(source: SourceFile, name: str) -> tun_link.Link:
    """What rtnetlink says of the interface. Raises Unsupported for what cannot be carried."""
    fd = source.borrow()
    try:
        there = fcntl.ioctl(fd, TUNGETDEVNETNS, 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise KernelError("ioctl(TUNGETDEVNETNS)", error.errno or 0) from None
    else:
        elsewhere = os.fstat(there).st_ino != os.stat("/proc/thread-self/ns/net").st_ino
        os.close(there)
        if elsewhere:
            raise unsupported(source, f"network interface {name} is in another network namespace", hint=_HINT)
    link = tun_link.look(name)
    if link is None or link.data is None:
        raise unsupported(source, f"network interface {name} is not to be seen by rtnetlink", hint=_HINT)
    try:
        length = int.from_bytes(fcntl.ioctl(fd, TUNGETFILTER, bytes(16))[:2], "little")
    except OSError:
        length = 0  # only a tap has one
    if length:
        raise unsupported(source, f"{name} has a filter (TUNATTACHFILTER), which cannot be read back", hint=_HINT)
    return link


def _has_packets(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


# ---------------------------------------------------------------------- restore


def _open(flags: int) -> int:
    try:
        return os.open(DEVICE, flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open {DEVICE}", error.errno or 0) from None


def _attach(fd: int, entry: Message, ctx: BuildContext) -> None:
    name = entry.netdev
    known = ("tun", name)
    if known not in ctx.memo:
        ctx.memo[known] = _first(fd, entry, ctx)
    else:
        tun_link.set_iff(fd, name, ctx.memo[known])
    if entry.HasField("sndbuf") and not entry.detached:  # it is set for all queues that are attached
        fcntl.ioctl(fd, TUNSETSNDBUF, struct.pack("=i", entry.sndbuf))
    if entry.detached:
        fcntl.ioctl(fd, TUNSETQUEUE, struct.pack("=16xH22x", IFF_DETACH_QUEUE))
    if entry.HasField("file"):
        fown.set_flags(fd, entry.file.flags)


def _first(fd: int, entry: Message, ctx: BuildContext) -> int:
    """Attach the first descriptor to the interface, which is made again if it is gone; the flags for the others."""
    name, state = entry.netdev, entry.state
    there = tun_link.look(name)
    if there is None:
        if not entry.HasField("state"):
            raise Unsupported("it is not there", hint=f"make it first: ip tuntap add {name} mode …")
        tun_link.make(fd, name, state)
        if state.flags & IFF_PERSIST:
            fcntl.ioctl(fd, TUNSETPERSIST, 1)
            ctx.on_failure.add(f"network interface {name}", lambda: _forget(name, state.flags))
        return int(state.flags)
    stays = not entry.HasField("state") or state.flags & IFF_PERSIST
    if there.data is None or not stays:
        hint = f"remove it first: ip link delete {name}"
        if ctx.options.own_pids:
            hint += "; copies need a network namespace each (torpor clone --net new)"
        raise Unsupported("there is one of this name already", hint=hint)
    flags = there.tun_flags | int(state.flags) & tun_link.NAPI_FLAGS  # attaching sets those anew
    if entry.HasField("state") and (flags ^ state.flags) & 0x5103:
        raise Unsupported(
            f"there is one of this name, but of another kind (flags {flags:#x}, not {state.flags:#x})",
            hint=f"remove it first: ip link delete {name}",
        )
    try:
        tun_link.set_iff(fd, name, flags)
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        raise Unsupported("another program uses it", hint="end that program first") from None
    return flags


def _forget(name: str, flags: int) -> None:
    fd = _open(os.O_RDWR)
    try:
        tun_link.set_iff(fd, name, flags)
        fcntl.ioctl(fd, TUNSETPERSIST, 0)
    finally:
        os.close(fd)


RESOURCE = Tun()
