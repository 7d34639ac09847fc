"""What a network namespace of its own has of interfaces, addresses, routes and routing rules.

Images: netdev-ID (net_device_entry); ifaddr-ID, route-ID, route6-ID, rule-ID, which are the kernel's messages as
`ip address save` and its like write them. Of interfaces only the loopback can be made again: all others lead to
somewhere outside. Kernel: net/core/rtnetlink.c, fib_rules.c
"""

from __future__ import annotations

import errno
import os
import struct

from ..errors import ImageError, KernelError, Unsupported, doing
from ..images import schema as pb
from ..linux import rtnetlink
from ..linux.rtnetlink import attribute, find, framed, unframed
from ..linux.sock_diag import NLM_F_DUMP
from .net_rules import read_raw
from .tun_link import IFLA_IFNAME, IFLA_LINKINFO, IFLA_MTU, Link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..images.schema import Message
    from ..images.store import ImageReader, ImageWriter

LOOPBACK = "lo"
AF_INET, AF_INET6 = 2, 10
IFF_UP = 0x1
#: What of the flags of the loopback can be set: UP, PROMISC, ALLMULTI, MULTICAST
_SETTABLE = 0x1 | 0x100 | 0x200 | 0x1000
_IFINFO = struct.Struct("=BxHiII")
_ADDRESS_BYTES, _ROUTE_BYTES, _RULE_BYTES = 8, 12, 12  # struct ifaddrmsg, rtmsg, fib_rule_hdr
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTPROT_KERNEL, _RTM_F_CLONED, _RTNH_DEAD = 2, 0x200, 0x1 | 0x10
_INFO_KIND = 1
#: At the start of what ip(8) saves (iproute2: ip/ipaddress.c, iproute.c, iprule.c).
ADDRESS_MAGIC, ROUTE_MAGIC, RULE_MAGIC = 0x47361222, 0x45311224, 0x71706986


def refuse_others(fresh: Callable[[], set[str]], hint: str) -> None:
    """Raise Unsupported for an interface in the calling thread's namespace that is not the loopback.

    ``fresh`` tells the names of those that any new namespace has (tunl0, …); they may be there as long as they are
    down.
    """
    others = [link for link in links() if name_of(link) != LOOPBACK]
    known = fresh() if others else set()
    for link in others:
        if name_of(link) not in known or link.flags & IFF_UP:
            kind = find(link.seen.get(IFLA_LINKINFO, b""), 0, _INFO_KIND) or b""
            shown = kind.rstrip(b"\0").decode(errors="replace") or "a device"
            raise Unsupported(
                f"its network namespace has the interface {name_of(link)} ({shown}), which cannot be made again",
                hint=hint,
            )


def links() -> list[Link]:
    """All interfaces of the calling thread's network namespace."""
    return [Link(reply) for reply in rtnetlink.ask(rtnetlink.RTM_GETLINK, bytes(_IFINFO.size), flags=NLM_F_DUMP)]


def name_of(link: Link) -> str:
    """The name of an interface."""
    return os.fsdecode(link.seen[IFLA_IFNAME].rstrip(b"\0"))


def _loopback() -> Link:
    return next(link for link in links() if name_of(link) == LOOPBACK)


# ---------------------------------------------------------------------- dump


def dump(images: ImageWriter, number: int, entry: Message) -> Message:
    """Write addresses, routes and rules; rules of IPv6 go into ``entry`` (netns_entry).

    Returns the net_device_entry of the loopback, which is still to be written.
    """
    link = _loopback()
    device = pb.net_device_entry(
        type=pb.nd_type.LOOPBACK, ifindex=link.index, flags=link.flags, name=LOOPBACK,
        mtu=int.from_bytes(link.seen[IFLA_MTU], "little"),
    )  # fmt: skip
    _save(images, f"ifaddr-{number}", ADDRESS_MAGIC, rtnetlink.RTM_NEWADDR, _addresses())
    for image, family in (("route", AF_INET), ("route6", AF_INET6)):
        _save(images, f"{image}-{number}", ROUTE_MAGIC, rtnetlink.RTM_NEWROUTE, _routes(family))
    _save(images, f"rule-{number}", RULE_MAGIC, rtnetlink.RTM_NEWRULE, _rules(AF_INET))
    entry.rules6.extend(_rules(AF_INET6))
    return device


def _save(images: ImageWriter, name: str, magic: int, kind: int, bodies: list[bytes]) -> None:
    images.write(name, struct.pack("=I", magic) + framed(kind, bodies))


def _addresses() -> list[bytes]:
    return rtnetlink.ask(rtnetlink.RTM_GETADDR, bytes(_ADDRESS_BYTES), flags=NLM_F_DUMP)


def _routes(family: int) -> list[bytes]:
    """The routes that somebody has set; those of the kernel's own come with addresses."""
    request = bytes((family,)) + bytes(_ROUTE_BYTES - 1)
    try:
        replies = rtnetlink.ask(rtnetlink.RTM_GETROUTE, request, flags=NLM_F_DUMP)
    except KernelError as error:
        return _none_of(family, error)
    return [
        reply for reply in replies
        if reply[0] == family and reply[5] != _RTPROT_KERNEL
        and not int.from_bytes(reply[8:12], "little") & _RTM_F_CLONED
    ]  # fmt: skip


def _rules(family: int) -> list[bytes]:
    request = bytes((family,)) + bytes(_RULE_BYTES - 1)
    try:
        replies = rtnetlink.ask(rtnetlink.RTM_GETRULE, request, flags=NLM_F_DUMP)
    except KernelError as error:
        return _none_of(family, error)
    return [reply for reply in replies if reply[0] == family]


def _none_of(family: int, error: KernelError) -> list[bytes]:
    if family == AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
        return []  # a kernel without IPv6
    raise error


# ---------------------------------------------------------------------- restore


def read_loopback(images: ImageReader, number: int) -> Message | None:
    """The net_device_entry of the loopback, if there is one. Raises Unsupported for any other interface in use."""
    found = None
    for device in images.read_all(f"netdev-{number}"):
        if device.type == pb.nd_type.LOOPBACK:
            found = device
        elif device.type != pb.nd_type.SIT or device.flags & IFF_UP:
            raise Unsupported(
                f"the network namespace in the images has the interface {device.name}, which cannot be made yet",
                hint="--join-ns net:FILE restores into a namespace that has been set up",
            )
    return found


def restore(images: ImageReader, number: int, entry: Message, device: Message | None) -> None:
    """Set up the loopback of the calling thread's network namespace, which is new, its addresses, routes and rules."""
    with doing(f"network interface {LOOPBACK}"):
        _restore_link(device)
        name = f"ifaddr-{number}"
        if images.has(name):
            _restore_addresses(_load(images, name, ADDRESS_MAGIC, rtnetlink.RTM_NEWADDR, _ADDRESS_BYTES))
    for name in (f"route-{number}", f"route6-{number}"):
        for index, body in enumerate(_load(images, name, ROUTE_MAGIC, rtnetlink.RTM_NEWROUTE, _ROUTE_BYTES)):
            flags = int.from_bytes(body[8:12], "little") & ~_RTNH_DEAD
            if body[5] == _RTPROT_KERNEL or flags & _RTM_F_CLONED:
                continue
            with doing(f"{name}.img: route {index}"):
                _add(rtnetlink.RTM_NEWROUTE, body[:8] + struct.pack("=I", flags) + body[12:])
    rules = _load(images, f"rule-{number}", RULE_MAGIC, rtnetlink.RTM_NEWRULE, _RULE_BYTES)
    if rules:
        _restore_rules(AF_INET, rules, f"rule-{number}.img")
    if entry.rules6:
        _restore_rules(AF_INET6, [bytes(rule) for rule in entry.rules6], f"netns-{number}.img: rules6")


def _load(images: ImageReader, name: str, magic: int, kind: int, head: int) -> list[bytes]:
    """The bodies of the messages in an image; none if it is not there. Raises ImageError."""
    data = read_raw(images, name)
    if not data:
        return []
    if int.from_bytes(data[:4], "little") != magic:
        raise ImageError(f"{name}.img", "magic", f"it does not begin with {magic:#x}")
    try:
        messages = unframed(data[4:])
    except ValueError as error:
        raise ImageError(f"{name}.img", "", str(error)) from None
    for index, (one, body) in enumerate(messages):
        if one != kind or len(body) < head:
            raise ImageError(f"{name}.img", f"message {index}", f"it is of kind {one}, with {len(body)} bytes")
    return [body for _, body in messages]


def _restore_link(device: Message | None) -> None:
    link = _loopback()
    if device is not None and device.mtu != int.from_bytes(link.seen[IFLA_MTU], "little"):
        request = _IFINFO.pack(0, 0, link.index, 0, 0) + attribute(IFLA_MTU, struct.pack("=I", device.mtu))
        rtnetlink.ask(rtnetlink.RTM_NEWLINK, request)
    wanted = device.flags & _SETTABLE if device is not None else IFF_UP
    rtnetlink.ask(rtnetlink.RTM_NEWLINK, _IFINFO.pack(0, 0, link.index, wanted, _SETTABLE))


def _restore_addresses(wanted: list[bytes]) -> None:
    """Have these and no others: an interface that comes up gets some by itself, which may have been taken away."""
    keys = {_key(body) for body in wanted}
    for body in _addresses():
        if _key(body) not in keys:
            rtnetlink.ask(rtnetlink.RTM_DELADDR, body)
    here = {_key(body) for body in _addresses()}
    for body in wanted:
        if _key(body) not in here:
            _add(rtnetlink.RTM_NEWADDR, body)


def _key(body: bytes) -> tuple[object, ...]:
    """What makes an address this one: family, length of the prefix, interface, the address and the peer's."""
    found = (find(body, _ADDRESS_BYTES, kind) for kind in (_IFA_LOCAL, _IFA_ADDRESS))
    return body[0], body[1], body[4:8], *found


def _restore_rules(family: int, wanted: list[bytes], place: str) -> None:
    """Have these rules and no others. New ones come first: without any, no packet goes anywhere."""
    here = _rules(family)
    for index, body in enumerate(wanted):
        if len(body) < _RULE_BYTES:
            raise ImageError(place, f"rule {index}", f"it has {len(body)} bytes")
        if body not in here and body[0] == family:
            with doing(f"{place}: rule {index}"):
                rtnetlink.ask(
                    rtnetlink.RTM_NEWRULE, body, flags=rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL
                )
    for body in here:
        if body not in wanted:
            rtnetlink.ask(rtnetlink.RTM_DELRULE, body)


def _add(kind: int, body: bytes) -> None:
    try:
        rtnetlink.ask(kind, body, flags=rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL)
    except KernelError as error:
        if error.errno != errno.EEXIST:  # the kernel has added it by itself
            raise
