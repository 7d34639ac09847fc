"""What else a network namespace may have, and what is not made again: it is named, for it would be missed.

IPsec, sets of addresses (ipset), queueing disciplines with their filters (tc) and nexthops have their own programs, and
nobody's images. Kernel: net/xfrm/xfrm_user.c, net/netfilter/ipset/ip_set_core.c, net/sched/sch_api.c,
net/ipv4/nexthop.c, net/netfilter/nf_conntrack_netlink.c
"""

from __future__ import annotations

import errno

from .. import log
from ..errors import KernelError, Unsupported
from ..linux import rtnetlink
from ..linux.rtnetlink import NETLINK_NETFILTER, NETLINK_ROUTE, attribute, find
from ..linux.sock_diag import NLM_F_DUMP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sized

NETLINK_XFRM = 6
# include/uapi/linux/xfrm.h, rtnetlink.h, netfilter/ipset/ip_set.h, netfilter/nfnetlink_conntrack.h
XFRM_MSG_GETSA, XFRM_MSG_GETPOLICY, RTM_GETQDISC, RTM_GETNEXTHOP = 0x12, 0x15, 38, 106
IPSET_LIST, EXPECTATIONS_GET = 6 << 8 | 7, 2 << 8 | 1
IPSET_ATTR_PROTOCOL, IPSET_ATTR_SETNAME, IPSET_PROTOCOL = 1, 2, 6
TCA_KIND = 1
_FAMILY_BYTES, _QUEUE_BYTES, _NEXTHOP_BYTES = 4, 20, 8  # struct nfgenmsg, tcmsg, nhmsg
#: What interfaces have by themselves here: the loopback sends at once, others are not in use.
_USUAL_QUEUES = ("noqueue", "noop")
#: Kernels without a part say so with these.
_UNKNOWN = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)


def check(hint: str) -> None:
    """Raise Unsupported for what the calling thread's network namespace has of it. Nothing is changed."""
    for kind, what in ((XFRM_MSG_GETSA, "state"), (XFRM_MSG_GETPOLICY, "policy")):
        _refuse(_ask(kind, b"", NETLINK_XFRM), f"IPsec ({what})", f"ip xfrm {what}", hint)
    names, kinds = sets(), queues()
    _refuse(names, f"sets of addresses ({', '.join(names)})", "ipset list", hint)
    _refuse(kinds, f"queueing disciplines ({', '.join(kinds)})", "tc qdisc", hint)
    _refuse(_ask(RTM_GETNEXTHOP, bytes(_NEXTHOP_BYTES)), "nexthops", "ip nexthop", hint)


def sets() -> list[str]:
    """The names of the sets of addresses."""
    request = bytes(_FAMILY_BYTES) + attribute(IPSET_ATTR_PROTOCOL, bytes((IPSET_PROTOCOL,)))
    replies = _ask(IPSET_LIST, request, NETLINK_NETFILTER)
    found = [find(reply, _FAMILY_BYTES, IPSET_ATTR_SETNAME) or b"" for reply in replies]
    return [name.rstrip(b"\0").decode(errors="replace") for name in found]


def queues() -> list[str]:
    """The kinds of queueing disciplines that somebody has set."""
    found = []
    for reply in _ask(RTM_GETQDISC, bytes(_QUEUE_BYTES)):
        kind = (find(reply, _QUEUE_BYTES, TCA_KIND) or b"").rstrip(b"\0").decode(errors="replace")
        if kind not in _USUAL_QUEUES:
            found.append(kind)
    return found


def warn_of_expectations() -> None:
    """Connections that are expected (of FTP and the like) end by themselves within minutes, and are left out."""
    count = len(_ask(EXPECTATIONS_GET, bytes(_FAMILY_BYTES), NETLINK_NETFILTER))
    if count:
        log.warning(f"{count} connections that are expected (`conntrack -L expect`) are left out")


def _ask(kind: int, body: bytes, protocol: int = NETLINK_ROUTE) -> list[bytes]:
    try:
        return rtnetlink.ask(kind, body, flags=NLM_F_DUMP, protocol=protocol)
    except KernelError as error:
        if error.errno not in _UNKNOWN:
            raise
        return []


def _refuse(found: Sized, what: str, command: str, hint: str) -> None:
    if found:
        raise Unsupported(f"its network namespace has {what}, which cannot be made again: see `{command}`", hint=hint)
