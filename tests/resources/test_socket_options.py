"""Every option of sockets that can be read and set, each on a socket of its own: nobody has to keep a list of them.

The program tries values until one changes what it reads, and looks again after the restore.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.network import own_network

PROGRAM = """
import os, resource, struct, sys
from socket import *
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
# SO_ERROR, PEERCRED, PEERNAME, PEERSEC, PEERGROUPS, MEMINFO, COOKIE, NAPI_ID … are told, not set; these do something:
# SO_DETACH_FILTER, SO_DETACH_REUSEPORT_BPF; IPV6_ADDRFORM; what iptables asks by; TCP_QUICKACK, REPAIR and its like,
# TIMESTAMP, REPAIR_WINDOW, ULP; PACKET_FANOUT, RX_RING, TX_RING, FANOUT_DATA.
NOT = {SOL_SOCKET: {27, 68}, 0: set(range(64, 70)), 41: {1, 64, 65, 68, 69}, 6: {12, 19, 20, 21, 22, 24, 29, 31},
       263: {5, 13, 18, 22}}
VALUES = [struct.pack("i", n) for n in (1, 0, 2, 3, 5, 9, 12, 20, 77, 500, 1000, 4096, 30000, 300000)]
VALUES += [b"lo\\0", b"reno\\0", bytes((148, 4, 0, 0)), inet_aton("127.0.0.1"), bytes(range(16)), bytes(range(32)), struct.pack("iI", 11, 1)]
VALUES += [struct.pack("ll", 3, 250000), struct.pack("ii", 1, 77), struct.pack("Q", 100000), struct.pack("HH", 30000, 40000)]
KINDS = {
    "tcp4": (AF_INET, SOCK_STREAM, 0), "tcp6": (AF_INET6, SOCK_STREAM, 0), "udp4": (AF_INET, SOCK_DGRAM, 0),
    "udp6": (AF_INET6, SOCK_DGRAM, 0), "udplite4": (AF_INET, SOCK_DGRAM, 136), "udplite6": (AF_INET6, SOCK_DGRAM, 136),
    "raw4": (AF_INET, SOCK_RAW, 1), "raw6": (AF_INET6, SOCK_RAW, 58), "any4": (AF_INET, SOCK_RAW, 255),
    "any6": (AF_INET6, SOCK_RAW, 255), "ping4": (AF_INET, SOCK_DGRAM, 1), "ping6": (AF_INET6, SOCK_DGRAM, 58),
    "stream": (AF_UNIX, SOCK_STREAM, 0), "datagram": (AF_UNIX, SOCK_DGRAM, 0), "packets": (AF_UNIX, SOCK_SEQPACKET, 0),
    "netlink": (AF_NETLINK, SOCK_RAW, 0), "packet": (AF_PACKET, SOCK_RAW, 0), "vsock": (AF_VSOCK, SOCK_STREAM, 0),
}
LEVELS = {AF_INET: (0, 6, 17, 136, 255), AF_INET6: (0, 6, 17, 41, 58, 136, 255), AF_UNIX: (), AF_NETLINK: (270,), AF_PACKET: (263,), AF_VSOCK: (40,)}
def get(s, level, option):
    try: return s.getsockopt(level, option, 256)
    except OSError: return None
def changed(kind, level, option):
    for value in VALUES:
        s = socket(*kind)
        before = get(s, level, option)
        if before is None: return None
        try: s.setsockopt(level, option, value)
        except OSError: continue
        if get(s, level, option) not in (before, None): return s
kept = {}
for name in sys.argv[1].split():
    kind = KINDS[name]
    try: socket(*kind).close()
    except OSError: continue
    for level in (SOL_SOCKET, *LEVELS[kind[0]]):
        for option in range(0 if level == 40 else 1, 120):
            if option in NOT.get(level, ()): continue
            s = changed(kind, level, option)
            if s is not None: kept[name, level, option] = s
before = {key: get(s, *key[1:]) for key, s in kept.items()}
tell("kept", repr(sorted(before)))
ready(); wait_told("go")
wrong = {key: (before[key], get(s, *key[1:])) for key, s in kept.items() if get(s, *key[1:]) != before[key]}
done(not wrong, f"{len(wrong)} of {len(kept)}: {wrong}"[:3000])
"""
#: Some that must be among them: a program that finds nothing would find nothing wrong.
SURE = {
    "tcp4 tcp6": [("tcp4", 6, 13), ("tcp4", 6, 23), ("tcp6", 41, 67), ("tcp6", 1, 36), ("tcp4", 1, 25)],
    "udp4 udp6": [("udp4", 0, 33), ("udp6", 41, 18), ("udp4", 17, 103), ("udp6", 1, 61)],
    "udplite4 udplite6 ping4 ping6": [("udplite4", 136, 10)],
    "raw4 raw6 any4 any6": [("raw4", 255, 1), ("raw6", 58, 1), ("raw4", 0, 3), ("raw6", 41, 36)],
    "stream datagram packets": [("stream", 1, 16), ("datagram", 1, 42)],
    "netlink packet vsock": [("netlink", 270, 3), ("packet", 263, 8), ("packet", 263, 15)],
}


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


@pytest.mark.parametrize("kinds", SURE)
def test_every_option_that_can_be_set_comes_back(start: Targets, library: Library, images: str, kinds: str) -> None:
    target = start.python(PROGRAM, kinds)
    kept = target.read("kept")
    assert all(repr(one) in kept for one in SURE[kinds]), kept
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    target.go()
