"""The packet filter of a network namespace: the rules of nftables and of the older iptables, and tracked connections.

Images: nftables-ID, iptables-ID, ip6tables-ID (what the programs print), netns-ct-ID (the kernel's messages about
tracked connections). Rules are read and set by the programs that everybody sets them with; whether there are any the
kernel is asked. Kernel: net/netfilter/nf_tables_api.c, nf_conntrack_netlink.c, net/ipv4/netfilter/ip_tables.c
"""

from __future__ import annotations

import errno
import os
import struct

from .. import log
from ..errors import ImageError, KernelError, TorporError, Unsupported, doing
from ..linux import rtnetlink
from ..linux.rtnetlink import NETLINK_NETFILTER, attribute, find, framed, unframed
from ..linux.sock_diag import NLM_F_DUMP, attributes
from .network_lock import TABLE_PREFIX, find_program, run_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.store import ImageReader, ImageWriter

# include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h, nfnetlink_conntrack.h, nf_conntrack_common.h
GET_TABLES, CT_NEW, CT_GET = 10 << 8 | 1, 1 << 8, 1 << 8 | 1
NFTA_TABLE_NAME = 1
CTA_STATUS, CTA_PROTOINFO, CTA_TIMEOUT = 3, 4, 7
CTA_PROTOINFO_TCP, TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY, BE_LIBERAL = 1, 4, 5, 8
TRANSLATED = 0x10 | 0x20  # IPS_SRC_NAT, IPS_DST_NAT
_ANY_FAMILY = bytes(4)  # struct nfgenmsg
_HEAD_BYTES = 4
_KIND = 0x3FFF  # of an attribute, without its flags
#: The families of nf_tables (NFPROTO_*) as nft(8) calls them.
FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
#: Image, where the kernel lists the tables in use, and the programs that save and restore them.
LEGACY = (
    ("iptables", "ip_tables_names", ("iptables-legacy", "iptables")),
    ("ip6tables", "ip6_tables_names", ("ip6tables-legacy", "ip6tables")),
)


def tables() -> list[tuple[str, str]]:
    """The tables of nftables here, (family, name), but for locks of ours or of CRIU's."""
    try:
        replies = rtnetlink.ask(GET_TABLES, _ANY_FAMILY, flags=NLM_F_DUMP, protocol=NETLINK_NETFILTER)
    except KernelError as error:
        if error.errno != errno.EINVAL:  # the kernel has no nftables
            raise
        return []
    found = []
    for reply in replies:
        name = (find(reply, _HEAD_BYTES, NFTA_TABLE_NAME) or b"").rstrip(b"\0").decode(errors="replace")
        if not name.startswith(TABLE_PREFIX):
            found.append((FAMILIES.get(reply[0], str(reply[0])), name))
    return found


def _legacy_in_use(names: str) -> bool:
    try:
        with open(f"/proc/thread-self/net/{names}", encoding="ascii") as file:
            return bool(file.read().strip())
    except OSError:
        return False  # the kernel has no iptables


def _legacy_program(programs: tuple[str, ...], ending: str) -> str:
    """The path of the program for tables that are no nftables. Raises Unsupported."""
    for one in programs:
        path = find_program(one + ending)
        if path is not None and "nft" not in os.path.basename(os.path.realpath(path)):
            return path
    raise Unsupported(f"there are rules of iptables, and no program {programs[0]}{ending}", hint="install iptables")


def check() -> None:
    """Raise Unsupported where there are rules that cannot be read here."""
    for _, names, programs in LEGACY:
        if _legacy_in_use(names):
            _legacy_program(programs, "-save")
    if tables() and find_program("nft") is None:
        raise Unsupported("there are rules of nftables, and no program `nft`", hint="install nftables")


# ---------------------------------------------------------------------- dump


def dump(images: ImageWriter, number: int) -> None:
    """Write the rules of the calling thread's network namespace."""
    for image, names, programs in LEGACY:
        if _legacy_in_use(names):
            images.write(f"{image}-{number}", _output([_legacy_program(programs, "-save")]))
    found = tables()
    if not found:
        return
    program = find_program("nft")
    if program is None:
        raise Unsupported("there are rules of nftables, and no program `nft`", hint="install nftables")
    text = b"".join(_output([program, "list", "table", *table]) for table in found)
    for line in text.decode(errors="replace").splitlines():
        if "xt match" in line or "xt target" in line:
            raise Unsupported(
                f"a rule of iptables-nft that nft cannot write down: `{line.strip()}`",
                hint="write the rule with nft, or with iptables-legacy",
            )
    images.write(f"nftables-{number}", text)


def _output(command: list[str]) -> bytes:
    code, said, error = run_program(command)
    if code:
        raise TorporError(f"{os.path.basename(command[0])}: {error or f'exit status {code}'}")
    return said


def dump_tracked(images: ImageWriter, number: int) -> None:
    """Write the tracked connections. Packets are held back by now, so that none changes any more."""
    found = []
    for reply in _tracked():
        known = {kind & _KIND: content for kind, content in attributes(reply, _HEAD_BYTES)}
        if CTA_TIMEOUT not in known:
            continue  # it is on its way out
        if int.from_bytes(known.get(CTA_STATUS, b""), "big") & TRANSLATED:
            log.warning("a tracked connection whose addresses are translated (NAT) is left out")
            continue
        found.append(reply)
    if found:
        images.write(f"netns-ct-{number}", framed(CT_NEW, found))


def _tracked() -> list[bytes]:
    try:
        return rtnetlink.ask(CT_GET, _ANY_FAMILY, flags=NLM_F_DUMP, protocol=NETLINK_NETFILTER)
    except KernelError as error:
        if error.errno != errno.EINVAL:  # the kernel tracks none, or does not tell
            raise
        return []


# ---------------------------------------------------------------------- restore


def restore(images: ImageReader, number: int) -> None:
    """Set the rules and tracked connections in the calling thread's network namespace, which is new."""
    for image, _, programs in LEGACY:
        text = read_raw(images, f"{image}-{number}")
        if text:
            _check_legacy(text, f"{image}-{number}.img")
            _feed([_legacy_program(programs, "-restore"), "-w"], text)
    text = read_raw(images, f"nftables-{number}")
    if text:
        _check_nft(text, f"nftables-{number}.img")
        program = find_program("nft")
        if program is None:
            raise Unsupported("the snapshot has rules of nftables: there is no program `nft`", hint="install nftables")
        _feed([program, "-f", "-"], text)
    _restore_tracked(images, f"netns-ct-{number}")


def read_raw(images: ImageReader, name: str) -> bytes:
    """The whole of a raw image; b"" if there is none."""
    if not images.has(name):
        return b""
    with open(images.open(name), "rb") as file:
        return file.read()


def _feed(command: list[str], text: bytes) -> None:
    code, _, error = run_program(command, text)
    if code:
        raise TorporError(f"{os.path.basename(command[0])}: {error or f'exit status {code}'}")


def _check_legacy(text: bytes, image: str) -> None:
    """Raise ImageError for what iptables-save does not print."""
    for number, line in enumerate(text.splitlines(), 1):
        if line and line[:1] not in b"#*:-[" and line != b"COMMIT":
            raise ImageError(image, f"line {number}", "iptables-save writes no such line")


def _check_nft(text: bytes, image: str) -> None:
    """Raise ImageError where nft would read other files."""
    for number, line in enumerate(text.splitlines(), 1):
        if any(part.split()[:1] == [b"include"] for part in line.replace(b"{", b";").split(b";")):
            raise ImageError(image, f"line {number}", "nft lists no other files")


def _restore_tracked(images: ImageReader, name: str) -> None:
    try:
        messages = unframed(read_raw(images, name))
    except ValueError as error:
        raise ImageError(f"{name}.img", "", str(error)) from None
    for index, (kind, body) in enumerate(messages):
        if kind != CT_NEW or len(body) < _HEAD_BYTES:
            raise ImageError(f"{name}.img", f"message {index}", f"{kind:#x} is not about a tracked connection")
        with doing(f"tracked connection {index}"):
            try:
                rtnetlink.ask(
                    CT_NEW, body[:_HEAD_BYTES] + _liberal(body[_HEAD_BYTES:]), protocol=NETLINK_NETFILTER,
                    flags=rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL,
                )  # fmt: skip
            except KernelError as error:
                if error.errno != errno.EEXIST:
                    raise


def _liberal(data: bytes, path: tuple[int, ...] = (CTA_PROTOINFO, CTA_PROTOINFO_TCP)) -> bytes:
    """Attributes of a connection which is to be tracked whatever its sequence numbers are: of the windows that had
    been seen the kernel tells nothing, and the next packet would be found invalid.
    """
    found = b""
    for kind, content in attributes(data, 0):
        if path and kind & _KIND == path[0]:
            content = _liberal(content, path[1:])
        elif not path and kind & _KIND in (TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY):
            flags, mask = struct.unpack("=BB", content[:2])
            content = struct.pack("=BB", flags | BE_LIBERAL, mask | BE_LIBERAL)
        found += attribute(kind, content)
    return found
