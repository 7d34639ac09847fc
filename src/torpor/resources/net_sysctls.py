"""The settings of a network namespace: what there is under /proc/sys/net for who is in it.

Image: netns_entry. CRIU keeps the settings that it knows as arrays, in the order of its lists (criu/net.c of version
4.2); whatever else differs from a new namespace is in ``more``. A namespace sees only what is its own there, and
what it must not change is read-only: kernel/../net/sysctl_net.c.
"""

from __future__ import annotations

import os

from .. import log
from ..errors import ImageError, KernelError, Unsupported, doing
from ..images import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..images.schema import Message

ROOT = "/proc/sys/net"
VALUE_BYTES_MAX = 1 << 16
CONF4 = (
    "accept_local accept_redirects accept_source_route arp_accept arp_announce arp_filter arp_ignore arp_notify "
    "bootp_relay disable_policy disable_xfrm force_igmp_version forwarding igmpv2_unsolicited_report_interval "
    "igmpv3_unsolicited_report_interval log_martians medium_id promote_secondaries proxy_arp proxy_arp_pvlan "
    "route_localnet rp_filter secure_redirects send_redirects shared_media src_valid_mark tag "
    "ignore_routes_with_linkdown drop_gratuitous_arp drop_unicast_in_l2_multicast"
).split()
CONF6 = (
    "accept_dad accept_ra accept_ra_defrtr accept_ra_from_local accept_ra_min_hop_limit accept_ra_mtu accept_ra_pinfo "
    "accept_ra_rt_info_max_plen accept_ra_rtr_pref accept_redirects accept_source_route autoconf dad_transmits "
    "disable_ipv6 drop_unicast_in_l2_multicast drop_unsolicited_na force_mld_version force_tllao forwarding hop_limit "
    "ignore_routes_with_linkdown keep_addr_on_down max_addresses max_desync_factor mldv1_unsolicited_report_interval "
    "mldv2_unsolicited_report_interval mtu ndisc_notify optimistic_dad proxy_ndp regen_max_retry "
    "router_probe_interval router_solicitation_delay router_solicitation_interval router_solicitations stable_secret "
    "suppress_frag_ndisc temp_prefered_lft temp_valid_lft use_oif_addrs_only use_optimistic use_tempaddr"
).split()
_STRINGS = frozenset(("stable_secret", "ping_group_range"))
#: Field of netns_entry → where its settings lie and what they are called.
FIELDS = {
    "all_conf4": ("ipv4/conf/all", CONF4), "def_conf4": ("ipv4/conf/default", CONF4),
    "all_conf6": ("ipv6/conf/all", CONF6), "def_conf6": ("ipv6/conf/default", CONF6),
    "unix_conf": ("unix", ["max_dgram_qlen"]), "ipv4_sysctl": ("ipv4", ["ping_group_range"]),
}  # fmt: skip


def read_all() -> dict[str, str]:
    """All settings of the calling thread's network namespace that can be written: path below ROOT → value."""
    found = {}
    for folder, _, files in os.walk(ROOT):
        for name in files:
            place = os.path.join(folder, name)
            value = _read(place)
            if value is not None and os.stat(place).st_mode & 0o222:
                found[os.path.relpath(place, ROOT)] = value
    return found


def _read(place: str) -> str | None:
    try:
        with open(place, encoding="ascii") as file:
            return file.read(VALUE_BYTES_MAX).rstrip("\n")
    except OSError:  # only to be written, or it has no value so far
        return None


# ---------------------------------------------------------------------- dump


def dump(entry: Message, fresh: dict[str, str]) -> dict[str, str]:
    """Fill in a netns_entry; ``fresh`` are the settings of a new namespace. Returns those of this one."""
    now = read_all()
    for field, (folder, names) in FIELDS.items():
        _put_array(getattr(entry, field), now, folder, names)
    if entry.ipv4_sysctl and entry.ipv4_sysctl[0].sarg == fresh.get("ipv4/ping_group_range"):
        del entry.ipv4_sysctl[:]
    for path, value in sorted(now.items()):
        if fresh.get(path) != value:
            entry.more.add(path=path, value=value)
    return now


def dump_link(entry: Message, now: dict[str, str], name: str) -> None:
    """Fill in the settings of one interface, in a net_device_entry."""
    _put_array(entry.conf4, now, f"ipv4/conf/{name}", CONF4)
    _put_array(entry.conf6, now, f"ipv6/conf/{name}", CONF6)


def _put_array(array: Message, now: dict[str, str], folder: str, names: Iterable[str]) -> None:
    for name in names:
        value = now.get(f"{folder}/{name}")
        one = array.add(type=pb.SysctlType.CTL_STR if name in _STRINGS else pb.SysctlType.CTL_32)
        if value is not None and name in _STRINGS:
            one.sarg = value
        elif value is not None:
            one.iarg = int(value)


# ---------------------------------------------------------------------- restore


def restore(entry: Message, link: Message | None, image: str, *, weak: bool) -> None:
    """Give the calling thread's network namespace the settings of a netns_entry, and of its loopback interface.

    ``weak``: what this kernel does not have is skipped. Raises ImageError, Unsupported, KernelError.
    """
    for path, value in _wanted(entry, link):
        _set(path, value, weak=weak)
    for one in entry.more:
        steps = one.path.split("/")
        if not all(steps) or any(step in (".", "..") or "\0" in step for step in steps):
            raise ImageError(image, "more", f"{one.path!r} is no setting")
        _set(one.path, one.value, weak=weak)


def _wanted(entry: Message, link: Message | None) -> Iterator[tuple[str, str]]:
    """What the arrays say. Settings for all interfaces come first: some of them change the others."""
    arrays = [(getattr(entry, field), folder, names) for field, (folder, names) in FIELDS.items()]
    if link is not None:
        arrays += [(link.conf4, "ipv4/conf/lo", CONF4), (link.conf6, "ipv6/conf/lo", CONF6)]
    for array, folder, names in arrays:
        for name, one in zip(names, array, strict=False):  # older images lack the last ones
            if one.HasField("sarg"):
                yield f"{folder}/{name}", one.sarg
            elif one.HasField("iarg"):
                yield f"{folder}/{name}", str(one.iarg)


def _set(path: str, value: str, *, weak: bool) -> None:
    place = os.path.join(ROOT, path)
    now = _read(place)
    if now is not None and now.split() == value.split():
        return
    with doing(f"net.{path.replace('/', '.')}"):
        try:
            with open(place, "w", encoding="utf-8") as file:
                file.write(value + "\n")
        except FileNotFoundError:
            if not weak:
                raise Unsupported(
                    "this kernel has no such setting", hint="--weak-sysctls restores without it"
                ) from None
            log.warning(f"net.{path.replace('/', '.')}: this kernel has no such setting")
        except OSError as error:
            raise KernelError(f"write {value!r}", error.errno or 0) from None
