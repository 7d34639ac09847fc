"""The network interface behind /dev/net/tun: what it is like, its addresses and routes.

One that is not persistent goes with its last descriptor, and what was set up on it goes with it. So it is made again
with its name, its number and all that rtnetlink tells. One that is there still is left as it is.

Image: tun_state in tunfile_entry. Kernel: drivers/net/tun.c, net/core/rtnetlink.c
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..errors import ImageError, KernelError, Unsupported
from ..images import schema as pb
from ..linux import rtnetlink
from ..linux.rtnetlink import attribute, find
from ..linux.sock_diag import NLM_F_DUMP, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message

DEVICE = "/dev/net/tun"
# include/uapi/linux/if_tun.h
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP, TUNSETOFFLOAD = (
    0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE, 0x400454D0,
)  # fmt: skip
TUNGETVNETHDRSZ, TUNSETVNETHDRSZ, TUNSETIFINDEX = 0x800454D7, 0x400454D8, 0x400454DA
TUNSETLINK, TUNSETCARRIER = 0x400454CD, 0x400454E2
TUNGETVNETLE, TUNSETVNETLE, TUNGETVNETBE, TUNSETVNETBE = 0x800454DD, 0x400454DC, 0x800454DF, 0x400454DE
IFF_TUN, IFF_TAP, IFF_MULTI_QUEUE, IFF_PERSIST, IFF_NO_PI, IFF_VNET_HDR = 1, 2, 0x100, 0x800, 0x1000, 0x4000
#: IFF_NAPI, IFF_NAPI_FRAGS: rtnetlink does not tell of them
NAPI_FLAGS = 0x10 | 0x20
# include/uapi/linux/if_link.h; IFLA_INFO_DATA of a tun has IFLA_TUN_*
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 10, 13, 18, 20
IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, GEN_MODE_NONE, AF_INET6 = 26, 8, 1, 10
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_CARRIER = 1, 2, 33
OWNER, GROUP, TYPE, PI, VNET_HDR, PERSIST, MULTI_QUEUE = range(1, 8)
#: What of the flags of an interface can be set: UP, DEBUG, NOARP, PROMISC, ALLMULTI, MULTICAST, DYNAMIC
_SETTABLE = 0x1 | 0x4 | 0x80 | 0x100 | 0x200 | 0x1000 | 0x8000
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg
_ADDRESS_BYTES, _ROUTE_BYTES = 8, 12  # struct ifaddrmsg, rtmsg
_RTPROT_KERNEL, _CLONED, _DEAD = 2, 0x200, 0x1 | 0x10
_USUAL_TYPES = {IFF_TUN: 0xFFFE, IFF_TAP: 1}  # ARPHRD_NONE, ARPHRD_ETHER
_UNICAST, _LOCAL_TABLE, _MULTIPATH, IFNAMSIZ = 1, 255, 9, 16
#: Feature of an interface (its bit in ETHTOOL_GFEATURES) → TUN_F_*: HW_CSUM, TSO, TSO_ECN, TSO6, GSO_UDP_L4
_OFFLOADS = {3: 0x1, 16: 0x2, 18: 0x8, 20: 0x4, 33: 0x60}
SIOCETHTOOL, ETHTOOL_GFEATURES = 0x8946, 0x3A


def possible() -> bool:
    """Is there a /dev/net/tun whose interfaces can be given their numbers? None is made."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFINDEX, struct.pack("=I", 1 << 20))
    finally:
        os.close(fd)
    return True


class Link:
    """An interface as rtnetlink shows it; ``data`` is that of a tun (IFLA_TUN_*), None for another kind."""

    __slots__ = ("data", "flags", "index", "seen", "type")

    def __init__(self, reply: bytes) -> None:
        _, self.type, self.index, self.flags, _ = _IFINFO.unpack_from(reply)
        self.seen = dict(attributes(reply, _IFINFO.size))
        info = dict(attributes(self.seen.get(IFLA_LINKINFO, b""), 0))
        self.data: dict[int, bytes] | None = None
        if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0") == b"tun":
            self.data = dict(attributes(info.get(IFLA_INFO_DATA, b""), 0))

    @property
    def address_mode(self) -> int:
        """How it gets a link-local address (IN6_ADDR_GEN_MODE_*); -1 where there is no IPv6."""
        six = dict(attributes(dict(attributes(self.seen.get(IFLA_AF_SPEC, b""), 0)).get(AF_INET6, b""), 0))
        mode = six.get(IFLA_INET6_ADDR_GEN_MODE)
        return mode[0] if mode else -1

    @property
    def tun_flags(self) -> int:
        """What TUNSETIFF was told."""
        data = self.data or {}
        flags = data[TYPE][0] if TYPE in data else IFF_TUN
        for kind, flag in ((VNET_HDR, IFF_VNET_HDR), (PERSIST, IFF_PERSIST), (MULTI_QUEUE, IFF_MULTI_QUEUE)):
            if any(data.get(kind, b"")):
                flags |= flag
        return flags if any(data.get(PI, b"")) else flags | IFF_NO_PI


def look(name: str) -> Link | None:
    """The interface of this name in our network namespace."""
    request = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, os.fsencode(name) + b"\0")
    try:
        return Link(rtnetlink.ask(rtnetlink.RTM_GETLINK, request)[0])
    except KernelError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):
            raise
        return None


# ---------------------------------------------------------------------- dump


def dump(fd: int, name: str, link: Link, flags: int) -> Message:
    """The tun_state of the interface that the tun file ``fd`` is attached to, ``flags`` as TUNGETIFF tells them."""
    state = pb.tun_state(flags=link.tun_flags | flags & NAPI_FLAGS, ifindex=link.index, up=link.flags & _SETTABLE)
    data, seen = link.data or {}, link.seen
    if OWNER in data:
        state.owner = _number(data[OWNER])
    if GROUP in data:
        state.group = _number(data[GROUP])
    state.vnethdr = _number(fcntl.ioctl(fd, TUNGETVNETHDRSZ, bytes(4)))
    for field, request in (("vnet_le", TUNGETVNETLE), ("vnet_be", TUNGETVNETBE)):
        try:
            if _number(fcntl.ioctl(fd, request, bytes(4))):
                setattr(state, field, True)
        except OSError as error:
            if error.errno != errno.EINVAL:  # not in this kernel
                raise
    state.offload = _offload(name)
    if link.type != _USUAL_TYPES[link.tun_flags & 3]:
        state.link_type = link.type
    if not any(seen.get(IFLA_CARRIER, b"\1")):
        state.no_carrier = True
    state.mtu, state.txqlen = _number(seen[IFLA_MTU]), _number(seen[IFLA_TXQLEN])
    if link.tun_flags & IFF_TAP:
        state.hwaddr = seen.get(IFLA_ADDRESS, b"")
    if link.address_mode >= 0:
        state.address_mode = link.address_mode
    if IFLA_MASTER in seen:
        from _socket import if_indextoname

        state.master = if_indextoname(_number(seen[IFLA_MASTER]))
    if IFLA_IFALIAS in seen:
        state.alias = seen[IFLA_IFALIAS].rstrip(b"\0")
    state.addresses.extend(
        reply
        for reply in rtnetlink.ask(rtnetlink.RTM_GETADDR, bytes(_ADDRESS_BYTES), flags=NLM_F_DUMP)
        if int.from_bytes(reply[4:8], "little") == link.index
    )
    state.routes.extend(
        reply
        for reply in rtnetlink.ask(rtnetlink.RTM_GETROUTE, bytes(_ROUTE_BYTES), flags=NLM_F_DUMP)
        if _is_own_route(reply, link.index)
    )
    return state


def _is_own_route(reply: bytes, index: int) -> bool:
    """Is it a route over the interface that somebody has set? The kernel's own come with the addresses."""
    table, protocol, kind = reply[4], reply[5], reply[7]
    flags = int.from_bytes(reply[8:12], "little")
    out = find(reply, _ROUTE_BYTES, rtnetlink.RTA_OIF)
    own = protocol != _RTPROT_KERNEL and kind == _UNICAST and table != _LOCAL_TABLE and not flags & _CLONED
    return own and out is not None and _number(out) == index


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _offload(name: str) -> int:
    """What TUNSETOFFLOAD was told, as the features of the interface show it."""
    from ..linux import sockets
    from ..linux.call import address_of, buffer

    area = buffer(8 + 2 * 16)
    struct.pack_into("=II", area, 0, ETHTOOL_GFEATURES, 2)
    fd = sockets.socket(2, 2)
    try:
        fcntl.ioctl(fd, SIOCETHTOOL, struct.pack("=16sQ16x", os.fsencode(name), address_of(area)))
    except OSError:
        return 0
    finally:
        os.close(fd)
    active = [struct.unpack_from("=4I", area, 8 + 16 * block)[2] for block in range(2)]
    return sum(told for bit, told in _OFFLOADS.items() if active[bit // 32] >> bit % 32 & 1)


# ---------------------------------------------------------------------- restore


def set_iff(fd: int, name: str, flags: int) -> None:
    """Attach a tun file to an interface, which is made if it is not there. Raises KernelError."""
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("=16sH22x", os.fsencode(name), flags & 0xFFFF))
    except OSError as error:
        raise KernelError("ioctl(TUNSETIFF)", error.errno or 0) from None


def check(entry: Message) -> None:
    """Raise ImageError for what no dump writes: nothing but the interface itself is to be touched."""
    place, state = f"file {entry.id}", entry.state
    if not 0 < len(os.fsencode(entry.netdev)) < IFNAMSIZ or "/" in entry.netdev:
        raise ImageError("files.img", f"{place}: netdev", f"`{entry.netdev}` is no name of an interface")
    for address in state.addresses:
        if len(address) < _ADDRESS_BYTES or _number(address[4:8]) != state.ifindex:
            raise ImageError("files.img", f"{place}: addresses", "one is of another interface")
    for route in state.routes:
        own = len(route) >= _ROUTE_BYTES and _is_own_route(route, state.ifindex)
        if not own or find(route, _ROUTE_BYTES, _MULTIPATH):
            raise ImageError("files.img", f"{place}: routes", "one is over another interface")


def make(fd: int, name: str, state: Message) -> None:
    """Make the interface with ``fd`` and set it up; with the descriptor it goes. Raises KernelError."""
    fcntl.ioctl(fd, TUNSETIFINDEX, struct.pack("=I", state.ifindex))
    try:
        set_iff(fd, name, state.flags & ~IFF_PERSIST)
    except KernelError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST):
            raise Unsupported(
                f"the number {state.ifindex} of network interface {name} is in use",
                hint="end the program whose interface has it; `ip link` shows it",
            ) from None
        raise
    for request, value, wanted in (
        (TUNSETOWNER, state.owner, state.HasField("owner")),
        (TUNSETGROUP, state.group, state.HasField("group")),
    ):
        if wanted:
            fcntl.ioctl(fd, request, value)
    if state.flags & IFF_VNET_HDR:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", state.vnethdr))
    for request, wanted in ((TUNSETVNETLE, state.vnet_le), (TUNSETVNETBE, state.vnet_be)):
        if wanted:
            fcntl.ioctl(fd, request, struct.pack("=i", 1))
    if state.offload:
        fcntl.ioctl(fd, TUNSETOFFLOAD, state.offload)
    if state.HasField("link_type"):
        fcntl.ioctl(fd, TUNSETLINK, state.link_type)  # before it is up
    _set_up(state)
    if state.no_carrier:
        fcntl.ioctl(fd, TUNSETCARRIER, struct.pack("=i", 0))


def _set_up(state: Message) -> None:
    request = attribute(IFLA_MTU, struct.pack("=I", state.mtu)) + attribute(
        IFLA_TXQLEN, struct.pack("=I", state.txqlen)
    )
    if state.hwaddr:
        request += attribute(IFLA_ADDRESS, state.hwaddr)
    if state.alias:
        request += attribute(IFLA_IFALIAS, state.alias)
    if state.master:
        request += attribute(IFLA_MASTER, struct.pack("=I", _master(state.master)))
    head = _IFINFO.pack(0, 0, state.ifindex, 0, 0)
    rtnetlink.ask(rtnetlink.RTM_NEWLINK, head + request)
    if state.HasField("address_mode"):
        _set_address_mode(head, GEN_MODE_NONE)  # it has its address already, which may have been made up
    rtnetlink.ask(rtnetlink.RTM_NEWLINK, _IFINFO.pack(0, 0, state.ifindex, state.up, _SETTABLE))
    for address in state.addresses:
        _again(rtnetlink.RTM_NEWADDR, bytes(address))
    for route in state.routes:
        flags = int.from_bytes(route[8:12], "little") & ~_DEAD
        _again(rtnetlink.RTM_NEWROUTE, route[:8] + struct.pack("=I", flags) + route[12:])
    if state.HasField("address_mode"):
        _set_address_mode(head, state.address_mode)


def _set_address_mode(head: bytes, mode: int) -> None:
    six = attribute(AF_INET6, attribute(IFLA_INET6_ADDR_GEN_MODE, bytes((mode,))))
    rtnetlink.ask(rtnetlink.RTM_NEWLINK, head + attribute(IFLA_AF_SPEC, six))


def _again(kind: int, body: bytes) -> None:
    try:
        rtnetlink.ask(kind, body, flags=rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL)
    except KernelError as error:
        if error.errno != errno.EEXIST:  # the kernel gives some by itself: a link-local address, its routes
            raise


def _master(name: str) -> int:
    from _socket import if_nametoindex

    try:
        return if_nametoindex(name)
    except OSError:
        raise Unsupported(
            f"there is no network interface `{name}` for it to belong to", hint=f"make it first: ip link add {name} …"
        ) from None
