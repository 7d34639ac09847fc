"""Packet sockets through the whole engine, in a network of the test's own."""



from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.network import own_network, set_up
from torpor.errors import Unsupported
from torpor.linux import packet_diag

PROGRAM = """
import ctypes, errno, mmap, os, struct, subprocess, time
from socket import *
SOL = 263
def options(s):
    found = {}
    for level, last in ((1, 83), (SOL, 25)):
        for option in range(1, last):
            if (level, option) in ((SOL, 6), (SOL, 21), (1, 4), (1, 49), (1, 56), (1, 57), (1, 28), (1, 77)): continue
            try: found[level, option] = s.getsockopt(level, option, 64)
            except OSError: pass
    return found
plain = socket(AF_PACKET, SOCK_RAW, htons(3)); plain.setsockopt(SOL, 8, 1); plain.setsockopt(SOL, 9, 1); plain.setsockopt(SOL, 20, 1)
bound = socket(AF_PACKET, SOCK_DGRAM, 0); bound.bind(("lo", 0x88b5)); bound.setsockopt(SOL, 7, 3); bound.setsockopt(SOL, 23, 1)
all_packets = struct.pack("iHH8s", if_nametoindex("lo"), 1, 0, b"")
for _ in range(2): bound.setsockopt(SOL, 1, all_packets)
bound.setsockopt(SOL, 1, struct.pack("iHH8s", if_nametoindex("lo"), 0, 6, bytes((1, 0, 0x5e, 1, 2, 3))))
ring = socket(AF_PACKET, SOCK_RAW, 0); ring.setsockopt(SOL, 10, 1); ring.setsockopt(SOL, 12, 16)
ring.setsockopt(SOL, 5, struct.pack("IIII", 4096, 4, 2048, 8)); ring.bind(("lo", 0x88b6))
area = mmap.mmap(ring.fileno(), 4 * 4096)
fans = [socket(AF_PACKET, SOCK_RAW, htons(0x88b7)) for _ in range(2)]
for f in fans: f.bind(("lo", 0x88b7)); f.setsockopt(SOL, 18, struct.pack("I", 1 << 16 | 77))
old = socket(AF_INET, 10, htons(3))
all_ = plain, bound, ring, *fans, old
names = lambda: [(s.getsockname(), s.type, s.proto) for s in all_]
plain.setblocking(False)
try:
    while True: plain.recv(9999)
except BlockingIOError: pass
before = [options(s) for s in all_], names()
ready(); wait_told("go")
after = [options(s) for s in all_], names()
bound.setsockopt(SOL, 2, all_packets)  # once of the two times that it has asked for them
still = b"promiscuity 1" in subprocess.run(["ip", "-d", "link", "show", "lo"], capture_output=True).stdout
out = socket(AF_PACKET, SOCK_RAW, 0); out.bind(("lo", 0))
out.send(bytes(12) + b"\\x88\\xb6" + b"into the ring")
for _ in range(500):
    if struct.unpack_from("Q", area, 0)[0] & 1: break
    time.sleep(.01)
got = area[:2048]
out.send(bytes(12) + b"\\x88\\xb5" + b"to the bound one"); bound.settimeout(5); word = bound.recv(99)
done(still and after == before and b"into the ring" in got and word == b"to the bound one", f"{before}\\n{after}\\n{got[:100]!r} {word!r}")
"""


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


def shown() -> list[str]:
    """The packet sockets as ss(8) sees them, but for inode numbers and who holds them."""
    text = subprocess.run(["ss", "-0ane"], capture_output=True, text=True, check=True).stdout
    return sorted(" ".join(word for word in line.split() if not word.startswith(("ino:", "sk:"))) for line in text.splitlines())


def test_rings_memberships_fanout_and_options(start: Targets, library: Library, images: str) -> None:
    target = start.python(PROGRAM)
    before = shown()
    with open("/proc/net/dev_mcast") as file:
        members = file.read()
    library.dump(target.pid, images)
    target.wait_gone()
    assert shown() != before
    library.restore(images)
    assert sorted(set(shown()) ^ set(before)) == []
    with open("/proc/net/dev_mcast") as file:
        assert file.read() == members
    target.go()


def test_an_interface_by_its_name(start: Targets, library: Library, images: str) -> None:
    subprocess.run(["ip", "link", "add", "one", "type", "bridge"], check=True)
    target = start.python(
        """
from socket import *
s = socket(AF_PACKET, SOCK_RAW, 0); s.bind(("one", 0x88b5))
ready(); wait_told("go")
done(s.getsockname()[:2] == ("one", 0x88b5), f"{s.getsockname()}")
"""
    )
    library.dump(target.pid, images)
    target.wait_gone()
    subprocess.run(["ip", "link", "del", "one"], check=True)
    with pytest.raises(Unsupported, match="no network interface `one`"):
        library.restore(images)
    subprocess.run(["ip", "link", "add", "two", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "add", "one", "type", "bridge"], check=True)
    set_up("one")
    library.restore(images)
    target.go()


def test_diag_shows_what_the_socket_says() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as one:
        one.bind(("lo", 0x88B5))
        one.setsockopt(263, 10, 2)
        one.setsockopt(263, 5, struct.pack("=7I", 8192, 2, 2048, 8, 50, 16, 0))
        found = packet_diag.packet_sockets()[os.fstat(one.fileno()).st_ino]
        assert (found.type, found.protocol, found.ifindex, found.version) == (3, 0x88B5, socket.if_nametoindex("lo"), 2)
        assert found.rx_ring == (8192, 2, 2048, 8, 50, 16, 0)
        assert (found.tx_ring, found.fanout) == ((), None)


PLACES = """
import mmap, struct, time
from socket import *
SOL = 263
version = int(sys.argv[1])
ring = socket(AF_PACKET, SOCK_RAW, 0); ring.setsockopt(SOL, 10, version)
if version == 2: ring.setsockopt(SOL, 5, struct.pack("7I", 16384, 4, 2048, 32, 20, 0, 0))
else:
    ring.setsockopt(SOL, 5, struct.pack("4I", 4096, 4, 2048, 8))
    ring.setsockopt(SOL, 13, struct.pack("4I", 4096, 2, 2048, 4))
ring.bind(("lo", 0x88b6))
area = mmap.mmap(ring.fileno(), 65536 if version == 2 else 6 * 4096)
out = socket(AF_PACKET, SOCK_RAW, 0); out.bind(("lo", 0))
step, last, form, at = (16384, 4, "I", 8) if version == 2 else (2048, 8, "QI"[version], 0)
place = sent = 0
def wait(index, base=0, mask=1, wanted=1):
    for _ in range(3000):
        if struct.unpack_from(form, area, base + index * step + at)[0] & mask == wanted: return True
        time.sleep(.002)
    return False
def take(word):
    global place
    out.send(bytes(12) + b"\\x88\\xb6" + word)
    if not wait(place): return f"nothing in {place}"
    got = area[place * step:(place + 1) * step]
    struct.pack_into(form, area, place * step + at, 0)
    place = (place + 1) % last
    return None if word in got else f"{word} is not in {place}"
def put(word):
    global sent
    base = 4 * 4096 + sent * 2048
    frame = bytes(12) + b"\\x88\\xb9" + word
    area[base + 32:base + 32 + len(frame)] = frame
    struct.pack_into("I", area, base + (8 if version == 0 else 4), len(frame))
    struct.pack_into(form, area, base, 1)
    sent = (sent + 1) % 4
    ring.send(b"")
    return None if wait(0, base, -1 & 0xffffffff, 0) else "not sent"
wrong = [take(b"before%d" % n) for n in range(2 if version == 2 else 11)]
seen = socket(AF_PACKET, SOCK_RAW, htons(0x88b9)); seen.settimeout(5)
if version != 2: wrong += [put(b"out%d" % n) for n in range(3)]; [seen.recv(99) for _ in range(3)]
out.send(bytes(12) + b"\\x88\\xb6" + b"never read"); wait(place)
ready(); wait_told("go")
wrong += [take(b"after%d" % n) for n in range(9)]
if version != 2:
    for n in range(5):
        wrong.append(put(b"later%d" % n))
        if b"later%d" % n not in seen.recv(99): wrong.append("another was sent")
done(not any(wrong), f"{wrong}")
"""


@pytest.mark.parametrize("version", [0, 1, 2])
def test_both_sides_of_a_ring_go_on_where_they_were(
    start: Targets, library: Library, images: str, version: int
) -> None:
    target = start.python("import sys\n" + PLACES, str(version))
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    target.go(timeout=60)


def test_without_a_loopback_interface_that_is_up_rings_begin_anew(
    start: Targets, library: Library, images: str
) -> None:
    target = start.python("import sys\n" + PLACES.split("ready();")[0] + "ready(); wait_told('go'); done(True)", "1")
    library.dump(target.pid, images)
    target.wait_gone()
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    library.restore(images)
    target.go()
