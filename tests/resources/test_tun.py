"""Tunnels (/dev/net/tun) through the whole engine, in a network of the test's own."""

from __future__ import annotations

import difflib
import json
import os
import re
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.host import host_state, wait_until
from kit.network import own_network
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.resources import tun_link

HEAD = """
import fcntl, os, struct, subprocess
TUN, TAP, MULTI, NO_PI, VNET = 1, 2, 0x100, 0x1000, 0x4000
def opened(name=None, flags=0, more=0):
    fd = os.open("/dev/net/tun", os.O_RDWR | more)
    if name: fcntl.ioctl(fd, 0x400454ca, struct.pack("16sH22x", name.encode(), flags))
    return fd
def iff(fd):
    try: return fcntl.ioctl(fd, 0x800454d2, bytes(40))[:18]
    except OSError as error: return error.errno
def asked(fd, request): return fcntl.ioctl(fd, request, bytes(4))
errors = []
def look(what, a, b):
    if a != b: errors.append(f"{what}: {a!r} is not {b!r}")
"""
TAIL = """
done(not errors, "; ".join(errors))
"""


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("no /dev/net/tun")
    with own_network():
        yield


def shell(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def seen() -> list[str]:
    """All of the interfaces, their addresses and routes, as ip(8) tells; lifetimes and what follows history apart.

    Whether an interface is UP or its state UNKNOWN depends on whether it has ever been without carrier, and
    nobody but the kernel can say of an address that it made it up (stable-privacy).
    """
    links = re.sub(r"qdisc \S+ state \S+", "", shell("ip -d link"))
    addresses = re.sub(r"valid_lft.*| stable-privacy|qdisc \S+ state \S+", "", shell("ip addr"))
    routes = {*shell("ip route show table all").splitlines(), *shell("ip -6 route show table all").splitlines()}
    return [*links.splitlines(), *addresses.splitlines(), *sorted(routes)]


def returned(before: list[str]) -> None:
    """Require that all becomes as it was: the kernel goes on working on an interface that has come up."""
    deadline = time.monotonic() + 5
    while seen() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(difflib.unified_diff(before, seen(), lineterm="", n=0))


def settled() -> list[str]:
    """As seen(), when addresses have been found to be nobody else's."""
    wait_until("addresses are there", lambda: "tentative" not in shell("ip addr"))
    return seen()


TUNNEL = """
import array, socket
def feature(command):  # ETHTOOL_GTXCSUM, ETHTOOL_GTSO
    value = array.array("I", [command, 0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8946, struct.pack("16sQ16x", b"kit0", value.buffer_info()[0]))
    return value[1]
fd = opened("kit%d", TUN | NO_PI | MULTI | VNET, os.O_NONBLOCK)
second, third = opened("kit0", TUN | NO_PI | MULTI | VNET), opened("kit0", TUN | NO_PI | MULTI | VNET)
fcntl.ioctl(third, 0x400454d9, struct.pack("16xH22x", 0x400))
bare = opened()
fcntl.ioctl(fd, 0x400454d8, struct.pack("i", 12))
fcntl.ioctl(fd, 0x400454d4, struct.pack("i", 77777))
fcntl.ioctl(fd, 0x400454cc, 1234); fcntl.ioctl(fd, 0x400454ce, 4321)  # TUNSETOWNER, TUNSETGROUP
fcntl.ioctl(fd, 0x400454d0, 7)  # TUNSETOFFLOAD: TUN_F_CSUM, TSO4, TSO6
fcntl.ioctl(fd, 0x400454dc, struct.pack("i", 1))  # TUNSETVNETLE
for command in ("link set kit0 mtu 1400 txqueuelen 77 alias tunnel up", "addr add 10.5.0.1/24 dev kit0", "addr add fd01::1/64 dev kit0",
                "route add 10.6.0.0/16 via 10.5.0.9", "route add 10.7.0.0/16 dev kit0 table 77 metric 5", "route add fd02::/64 via fd01::2"):
    subprocess.run(["ip", *command.split()], check=True)
def state(): return [iff(one) for one in (fd, second, third, bare)], asked(fd, 0x800454d7), asked(fd, 0x800454d3), asked(fd, 0x800454dd), fcntl.fcntl(fd, 3), fcntl.fcntl(bare, 3), [feature(one) for one in (0x16, 0x1e)]
before = state()
look("can do", before[-1], [1, 1])
"""
TUNNEL_AFTER = """
look("state", state(), before)
from socket import *
while True:
    try: os.read(fd, 9999)
    except BlockingIOError: break
os.set_blocking(second, False)
while True:
    try: os.read(second, 9999)
    except BlockingIOError: break
s = socket(AF_INET, SOCK_DGRAM); s.bind(("10.5.0.1", 99)); s.sendto(b"outwards", ("10.6.1.2", 9))
found = b""
for one in (fd, second):
    try: found += os.read(one, 9999)
    except BlockingIOError: pass
look("out", found[-8:], b"outwards")
packet = struct.pack(">BBHHHBBH4s4sHHHH", 0x45, 0, 34, 1, 0, 64, 17, 0, bytes((10, 5, 0, 9)), bytes((10, 5, 0, 1)), 7, 99, 14, 0) + b"inside"
total = sum(int.from_bytes(packet[at:at + 2], "big") for at in range(0, 20, 2))
total = (total & 0xffff) + (total >> 16)
packet = packet[:10] + struct.pack(">H", 0xffff - total) + packet[12:]
os.write(fd, bytes(12) + packet); s.settimeout(5)
look("in", s.recvfrom(99), (b"inside", ("10.5.0.9", 7)))
"""


def test_a_tunnel_with_queues_addresses_and_routes(start: Targets, library: Library, images: str) -> None:
    target = start.python(f"{HEAD}{TUNNEL}\nready(); wait_told('go')\n{TUNNEL_AFTER}{TAIL}")
    before = settled()
    os.mkdir(f"{images}/first")
    library.dump(target.pid, f"{images}/first", leave_running=True)
    assert settled() == before
    library.dump(target.pid, images)
    target.wait_gone()
    assert "kit0" not in shell("ip link")
    library.restore(images)
    returned(before)
    target.go()


TAP = """
fd = opened("kit5", TAP | NO_PI)
subprocess.run("ip link set kit5 address 02:11:22:33:44:55 up; ip addr add 10.5.0.1/24 dev kit5; ip link add br0 type bridge; ip link set br0 up; ip link set kit5 master br0", shell=True, check=True)
before = iff(fd)
"""


def test_a_tap_in_a_bridge(start: Targets, library: Library, images: str) -> None:
    target = start.python(f"{HEAD}{TAP}\nready(); wait_told('go')\nlook('state', iff(fd), before)\n{TAIL}")
    wait_until("it is up", lambda: "LOWER_UP" in shell("ip link show kit5"))
    before = json.loads(shell("ip -j -d link show kit5"))[0]
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    wait_until("it is up", lambda: "LOWER_UP" in shell("ip link show kit5"))
    after = json.loads(shell("ip -j -d link show kit5"))[0]
    for one in (before, after):
        for key in ("operstate", "flags"):
            one.pop(key)
        for key in [key for key in one["linkinfo"]["info_slave_data"] if "timer" in key or "state" in key]:
            one["linkinfo"]["info_slave_data"].pop(key)
    assert after == before
    target.go()


NAPI = """
fd = opened("kit0", TAP | NO_PI | 0x30)  # IFF_NAPI, IFF_NAPI_FRAGS
queues = [opened("kit1", TUN | NO_PI | MULTI | 0x10) for _ in range(2)]
fcntl.ioctl(queues[0], 0x400454cd, 778)  # TUNSETLINK: ARPHRD_IPGRE
subprocess.run("ip link set kit0 up; ip link set kit1 up; ip addr add 10.5.0.1/24 dev kit1", shell=True, check=True)
fcntl.ioctl(fd, 0x400454e2, struct.pack("i", 0))  # TUNSETCARRIER
def state(): return [iff(one) for one in (fd, *queues)]
before = state()
assert all(one[16] & 0x10 for one in before)
"""


def test_carrier_link_type_and_napi(start: Targets, library: Library, images: str) -> None:
    target = start.python(f"{HEAD}{NAPI}\nready(); wait_told('go')\nlook('state', state(), before)\n{TAIL}")
    before = settled()
    assert any("NO-CARRIER" in line and "kit0" in line for line in before)
    assert any("link/gre" in line for line in before)
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    returned(before)
    target.go()


def test_a_persistent_one_is_left_alone_or_made_again(start: Targets, library: Library, images: str) -> None:
    shell("ip tuntap add kit7 mode tun user 1234; ip addr add 10.5.0.1/24 dev kit7; ip link set kit7 up")
    first = 'fd = opened("kit7", TUN | NO_PI); before = iff(fd)'
    target = start.python(f"{HEAD}{first}\nready(); wait_told('go')\nlook('state', iff(fd), before)\n{TAIL}")
    before = settled()
    for name, between in (("stays", "true"), ("goes", "ip link del kit7")):
        os.mkdir(f"{images}/{name}")
        library.dump(target.pid, f"{images}/{name}")
        target.wait_gone()
        shell(between)
        library.restore(f"{images}/{name}")
        returned(before)
    target.go()
    target.wait_gone()
    assert "kit7" in shell("ip link")


@pytest.mark.parametrize(
    ("between", "why"),
    [
        ("ip tuntap add kit0 mode tun", "there is one of this name already"),
        ("ip link add kit0 type bridge", "there is one of this name already"),
        ("ip link add other index {index} type bridge", "the number .* is in use"),
    ],
)
def test_an_interface_that_is_taken(
    start: Targets, library: Library, images: str, between: str, why: str
) -> None:
    target = start.python(f"{HEAD}fd = opened('kit0', TUN | NO_PI)\nready(); wait_told('go'); {TAIL}")
    index = json.loads(shell("ip -j link show kit0"))[0]["ifindex"]
    library.dump(target.pid, images)
    target.wait_gone()
    shell(between.format(index=index))
    network, host = seen(), host_state(images)
    with pytest.raises(Unsupported, match=why) as caught:
        library.restore(images)
    assert caught.value.hint
    assert seen() == network
    assert host_state(images) == host
    shell("ip link del kit0 2>/dev/null; ip link del other 2>/dev/null; true")
    library.restore(images)
    target.go()


def test_what_cannot_be_carried_is_refused(start: Targets, library: Library, images: str) -> None:
    first = """
import ctypes
fd = opened("kit0", TAP | NO_PI)
code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xffffffff))
fcntl.ioctl(fd, 0x401054d5, struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)))
"""
    target = start.python(f"{HEAD}{first}\nready(); wait_told('go'); {TAIL}")
    with pytest.raises(Unsupported, match="TUNATTACHFILTER"):
        library.dump(target.pid, images)
    target.go()


@pytest.mark.parametrize("damage", ["name", "address", "route"])
def test_an_image_that_would_touch_other_interfaces(damage: str) -> None:
    """Only what belongs to the interface itself is set up."""
    entry = pb.tunfile_entry(id=1, netdev="kit0")
    entry.state.CopyFrom(pb.tun_state(flags=1, ifindex=7, up=0, mtu=1500, txqlen=5))
    tun_link.check(entry)
    if damage == "name":
        entry.netdev = "longer than any name is"
    elif damage == "address":
        entry.state.addresses.append(struct.pack("=BBBBI", 2, 8, 0, 0, 1))
    else:
        entry.state.routes.append(struct.pack("=BBBBBBBBIHHI", 2, 0, 0, 0, 254, 3, 0, 1, 0, 8, 4, 1))
    with pytest.raises(ImageError, match=r"files\.img: file 1: "):
        tun_link.check(entry)
