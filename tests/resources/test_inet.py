"""Sockets of IPv4 and IPv6 through the whole engine, in a network of the test's own."""



from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torpor
from kit import Library, Target, Targets, diff, host_state
from kit.faults import for_every_call
from kit.host import descendants, reap, wait_until
from kit.network import own_network
from torpor.errors import TorporError, Unsupported
from torpor.images import schema as pb
from torpor.linux import inet_diag
from torpor.resources import inet_place, network_lock, tcp, tcp_build

HEAD = """
import os, struct, sys, time
from socket import *
def state(s): return s.getsockopt(IPPROTO_TCP, 11, 104)[0]
def options(s):
    found = {}
    connected = s.type == SOCK_STREAM and state(s) not in (7, 10)
    for level in (0, 1, 6, 17, 41):
        for option in range(1, 110):
            # MTU, pending error, peer's credentials, queue lengths, clocks, cookies and what counts as time goes by
            if (level, option) in ((0, 14), (0, 33), (41, 24), (41, 61), (1, 4), (1, 28), (1, 31), (1, 49), (1, 55), (1, 56), (1, 57), (1, 59), (1, 77),
                                   (6, 11), (6, 24), (6, 26), (6, 12), (6, 10), (6, 35)): continue
            if connected and (level, option) in ((6, 2), (41, 17), (41, 18), (41, 26)): continue
            try: found[level, option] = s.getsockopt(level, option, 256)
            except OSError: pass
    return found
def drain(s):
    s.settimeout(5)
    data = b""
    while True:
        try: piece = s.recv(1 << 20)
        except TimeoutError: return data + b"TIMEOUT"
        if not piece: return data
        data += piece
errors = []
def same(what, a, b):
    if a != b: errors.append(f"{what}: {a!r} is not {b!r}")
def same_options(what, before, after):
    for key in before.keys() | after.keys(): same(f"{what} {key}", after.get(key), before.get(key))
"""
TAIL = """
done(not errors, "; ".join(errors)[:2000])
"""
ESTABLISHED = {"tcp_established": True}


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


class Trip:
    """A program in two halves; between them it is dumped and restored."""

    def __init__(self, start: Targets, library: Library, images: str, first: str, second: str) -> None:
        self.target = start.python(HEAD + first + "\nready()\nwait_told('go')\n" + second + TAIL)
        self.target.pids()
        self.library, self.images = library, images

    def dump(self, **options: object) -> None:
        self.library.dump(self.target.pid, self.images, **options)
        self.target.wait_gone()

    def restore(self, **options: object) -> None:
        self.library.restore(self.images, **options)

    def whole(self, **options: object) -> Target:
        self.dump(**options)
        self.restore(**options)
        self.target.go()
        return self.target


@pytest.fixture
def trip(start: Targets, library: Library, images: str) -> Callable[[str, str], Trip]:
    return lambda first, second: Trip(start, library, images, first, second)


def tables() -> list[str]:
    """The nftables tables of this network, as nft(8) shows them."""
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def nft(script: str) -> None:
    subprocess.run(["nft", script], check=True)


def listener(family: int = socket.AF_INET, host: str = "127.0.0.1") -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.bind((host, 0))
    made.listen(8)
    return made


# ---------------------------------------------------------------------- plain sockets


def test_options_of_all_kinds(trip: Callable[[str, str], Trip]) -> None:
    trip(
        """
socks = {}
def add(name, family, kind, proto=0):
    socks[name] = socket(family, kind, proto); return socks[name]
for n, family in (("4", AF_INET), ("6", AF_INET6)):
    host = "127.0.0.1" if n == "4" else "::1"
    add("plain tcp" + n, family, SOCK_STREAM); add("plain udp" + n, family, SOCK_DGRAM)
    s = add("tcp" + n, family, SOCK_STREAM)
    s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); s.bind((host, 0)); s.listen(17)
    for option, value in ((1, 1), (4, 77), (5, 11), (6, 4), (7, 3), (8, 20), (9, 3), (13, b"reno"), (18, 1234), (23, 5),
                          (25, 4096), (2, 1000), (10, 30000)): s.setsockopt(IPPROTO_TCP, option, value)
    s = add("udp" + n, family, SOCK_DGRAM); s.bind((host, 0)); s.connect((host, 9))
    s.setsockopt(SOL_SOCKET, SO_BROADCAST, 1); s.setsockopt(SOL_SOCKET, SO_RCVBUF, 20000)
    s.setsockopt(17, 103, 700); s.setsockopt(17, 104, 1)
    s = add("raw" + n, family, SOCK_RAW, IPPROTO_ICMP if n == "4" else IPPROTO_ICMPV6)
    s.setsockopt(255 if n == "4" else 58, 1, struct.pack("I", 0x55) if n == "4" else bytes(range(32)))
    add("udplite" + n, family, SOCK_DGRAM, 136).setsockopt(136, 10, 20)
    wild = add("wild" + n, family, SOCK_STREAM)
    if n == "6": wild.setsockopt(41, 26, 1)
    wild.bind(("", 7654)); wild.listen(1)
four, six = socks["udp4"], socks["udp6"]
for option, value in ((1, 0x20), (2, 9), (8, 1), (10, 1), (11, 1), (12, 1), (13, 1), (15, 1), (20, 1), (21, 3), (24, 1), (33, 7), (34, 0),
                      (49, 0), (4, b"\\x94\\x04\\0\\0")): four.setsockopt(0, option, value)
for option, value in ((16, 9), (18, 5), (19, 0), (23, 2), (25, 1), (29, 0), (49, 1), (51, 1), (62, 1), (66, 1), (67, 33), (70, 0),
                      (73, 4), (78, 1)): six.setsockopt(41, option, value)
names = {n: (s.getsockname(), s.type, s.proto, os.fstat(s.fileno()).st_uid) for n, s in socks.items()}
before = {n: options(s) for n, s in socks.items()}
backlogs = lambda: {n: s.getsockopt(6, 11, 104)[28:32] for n, s in socks.items() if s.type == SOCK_STREAM and state(s) == 10}
many = backlogs()
filters = socks["raw4"].getsockopt(255, 1, 4), socks["raw6"].getsockopt(58, 1, 32), socks["udplite4"].getsockopt(136, 10)
""",
        """
for n, s in socks.items():
    same_options(n, before[n], options(s))
    same(n, (s.getsockname(), s.type, s.proto, os.fstat(s.fileno()).st_uid), names[n])
same("peer", four.getpeername(), ("127.0.0.1", 9))
same("backlogs", backlogs(), many); same("two backlogs", many["tcp4"][0], 17)
same("filters", (socks["raw4"].getsockopt(255, 1, 4), socks["raw6"].getsockopt(58, 1, 32), socks["udplite4"].getsockopt(136, 10)), filters)
client = create_connection(socks["tcp4"].getsockname())
server, _ = socks["tcp4"].accept(); client.send(b"hi"); same("accept", server.recv(9), b"hi")
""",
    ).whole()


def test_a_port_that_is_shared_and_who_may_share_it_later(trip: Callable[[str, str], Trip]) -> None:
    trip(
        """
together = [socket(AF_INET, SOCK_STREAM) for _ in range(3)]
for s in together: s.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1); s.bind(("127.0.0.1", 6001)); s.listen(4)
alone = socket(AF_INET, SOCK_STREAM); alone.bind(("127.0.0.1", 6002)); alone.listen(4)
client = create_connection(alone.getsockname()); server, _ = alone.accept()
first = socket(AF_INET, SOCK_DGRAM); first.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); first.bind(("", 6003))
second = socket(AF_INET, SOCK_DGRAM); second.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); second.bind(("", 6003))
first.setsockopt(SOL_SOCKET, SO_REUSEADDR, 0)
orphan = socket(AF_INET, SOCK_STREAM); orphan.bind(("127.0.0.1", 6004)); orphan.listen(1)
far = create_connection(orphan.getsockname()); near, _ = orphan.accept(); orphan.close()
flags = lambda: [(s.getsockopt(SOL_SOCKET, SO_REUSEADDR), s.getsockopt(SOL_SOCKET, SO_REUSEPORT)) for s in (*together, alone, client, server, first, second)]
before = flags()
""",
        """
same("flags", flags(), before)
for port in (6002,):
    other = socket(AF_INET, SOCK_STREAM); other.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    try: other.bind(("127.0.0.1", port)); other.listen(1); errors.append("the port is free")
    except OSError as error: same("errno", error.errno, 98)
client.send(b"x"); same("data", server.recv(4), b"x"); near.send(b"y"); same("data", far.recv(4), b"y")
""",
    ).whole(**ESTABLISHED)


def test_multicast_groups_with_and_without_sources(trip: Callable[[str, str], Trip]) -> None:
    trip(
        """
lo = if_nametoindex("lo")
s = socket(AF_INET, SOCK_DGRAM); s.bind(("", 6010))
s.setsockopt(0, 35, struct.pack("4s4sI", inet_aton("239.1.2.3"), bytes(4), lo))
s.setsockopt(0, 39, struct.pack("4s4s4s", inet_aton("232.1.1.1"), inet_aton("127.0.0.1"), inet_aton("127.0.0.9")))
six = socket(AF_INET6, SOCK_DGRAM); six.setsockopt(41, 20, inet_pton(AF_INET6, "ff05::77") + struct.pack("I", lo))
none = socket(AF_INET, SOCK_DGRAM)
def listed():
    igmp = open("/proc/net/igmp").read(), open("/proc/net/igmp6").read()
    return "030201EF" in igmp[0], "010101E8" in igmp[0], "77 " in igmp[1] or "0077" in igmp[1], open("/proc/net/mcfilter").read().splitlines()[1:]
before = listed()
""",
        """
same("groups", listed(), before); same("joined", before[:3], (True, True, True))
out = socket(AF_INET, SOCK_DGRAM); out.setsockopt(0, 32, inet_aton("127.0.0.1"))
out.sendto(b"all", ("239.1.2.3", 6010)); s.settimeout(5); same("data", s.recv(10), b"all")
try: none.setsockopt(0, 36, struct.pack("4s4sI", inet_aton("239.1.2.3"), bytes(4), lo)); errors.append("it had joined")
except OSError: pass
""",
    ).whole()


def test_anycast_addresses(trip: Callable[[str, str], Trip]) -> None:
    """Joined once, twice, and not at all, though others have it; the kernel lists them without saying who."""
    subprocess.run(["ip", "address", "add", "fd00:88::1/64", "dev", "lo", "nodad"], check=True)
    trip(
        """
lo = if_nametoindex("lo")
def request(last): return inet_pton(AF_INET6, "fd00:88::" + last) + struct.pack("I", lo)
socks = [socket(AF_INET6, SOCK_DGRAM) for _ in range(3)]
for s, last in ((socks[0], "a1"), (socks[0], "a2"), (socks[1], "a2")): s.setsockopt(41, 27, request(last))
def listed(): return sorted(line.split()[1:] for line in open("/proc/net/anycast6"))
before = listed()
""",
        """
same("listed", listed(), before); same("both", len(before), 2)
def leaves(s, last):
    try: s.setsockopt(41, 28, request(last)); return True
    except OSError: return False
same("members", [[leaves(s, last) for last in ("a1", "a2")] for s in socks], [[True, True], [False, True], [False, False]])
same("gone", listed(), [])
""",
    ).whole()


def test_a_peer_at_port_zero(trip: Callable[[str, str], Trip]) -> None:
    """getpeername(2) says that there is none, and yet nobody else is heard."""
    trip(
        """
pairs = []
for family, kind in ((AF_INET, SOCK_DGRAM), (AF_INET6, SOCK_DGRAM)):
    s = socket(family, kind); s.connect(("127.0.0.9" if family == AF_INET else "::1", 0)); pairs.append(s)
def shown(): return [sorted(line.split()[1:4] for line in open(f"/proc/net/{name}") if ":0000 01" in line) for name in ("udp", "udp6")]
before = shown()
""",
        """
same("peers", shown(), before); same("one each", [len(one) for one in before], [1, 1])
other = socket(AF_INET, SOCK_DGRAM); other.sendto(b"stranger", pairs[0].getsockname())
pairs[0].settimeout(.2)
try: errors.append(f"heard {pairs[0].recv(9)}")
except TimeoutError: pass
""",
    ).whole()


def test_names_of_all_kinds(trip: Callable[[str, str], Trip]) -> None:
    """Addresses that nobody has any more, or never had; of one interface; without a port; of raw sockets."""
    for address in ("10.77.0.1/32", "fd00:77::1/128", "fe80::77/64"):
        subprocess.run(["ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else [])], check=True)
    made = trip(
        """
import errno, subprocess
def bound(family, kind, name, *options, proto=0):
    s = socket(family, kind, proto)
    for option in options: s.setsockopt(*option)
    s.bind(name); return s
lo = if_nametoindex("lo")
socks = [
    bound(AF_INET, SOCK_STREAM, ("10.77.0.1", 6901)), bound(AF_INET6, SOCK_DGRAM, ("fd00:77::1", 6902)),
    bound(AF_INET, SOCK_STREAM, ("10.78.0.1", 6903), (0, 15, 1)), bound(AF_INET, SOCK_DGRAM, ("10.78.0.2", 6904), (0, 19, 1)),
    bound(AF_INET6, SOCK_DGRAM, ("fd00:78::1", 6905), (41, 78, 1)), bound(AF_INET6, SOCK_STREAM, ("fd00:78::2", 6906), (41, 75, 1)),
    bound(AF_INET6, SOCK_STREAM, ("fe80::77", 6907, 0, lo)), bound(AF_INET, SOCK_STREAM, ("127.0.0.5", 0), (0, 24, 1)),
    bound(AF_INET, SOCK_RAW, ("127.0.0.6", 0), proto=1), bound(AF_INET6, SOCK_RAW, ("::1", 0), proto=58),
]
raws = [socket(AF_INET, SOCK_RAW, 1), socket(AF_INET6, SOCK_RAW, 58)]
raws[0].connect(("127.0.0.1", 0)); raws[1].connect(("::1", 0))
socks[0].listen(3)
deaf = socket(AF_INET, SOCK_STREAM)
try: deaf.shutdown(SHUT_RD)
except OSError as error: same("shutdown", error.errno, errno.ENOTCONN)
same("deaf", deaf.recv(9), b"")
for address in ("10.77.0.1/32", "fd00:77::1/128"): subprocess.run(["ip", "address", "del", address, "dev", "lo"], check=True)
def peers():
    found = {}
    for table in ("/proc/net/raw", "/proc/net/raw6"):
        for line in open(table): found[line.split()[9]] = line.split()[1:4]
    return [found[str(os.fstat(s.fileno()).st_ino)] for s in raws]
names = lambda: ([s.getsockname() for s in socks], peers())
before = names()
same("names", (before[0][0], before[0][6][1:], before[0][7]), (("10.77.0.1", 6901), (6907, 0, lo), ("127.0.0.5", 0)))
same("peers", [one[1].partition(":")[0][-8:] for one in before[1]], ["0100007F", "01000000"])
""",
        """
same("names", names(), before)
same("deaf", deaf.recv(9), b""); same("listens", state(socks[0]), 10)
same("freely", [s.getsockopt(*option) for s, option in zip(socks, ((0, 15), (41, 78), (0, 15)))], [0, 0, 1])
""",
    )
    made.whole()


# ---------------------------------------------------------------------- connections within the tree


@pytest.mark.parametrize(("family", "host"), [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")])
def test_both_ends_in_the_tree(trip: Callable[[str, str], Trip], family: str, host: str) -> None:
    made = trip(
        f"family, host = {family}, {host!r}"
        + """
server = socket(family, SOCK_STREAM); server.bind((host, 0)); server.listen(9)
def pair():
    client = create_connection(server.getsockname()[:2]); return client, server.accept()[0]
idle, full, cut, both = pair(), pair(), pair(), pair()
idle[0].setsockopt(IPPROTO_TCP, TCP_NODELAY, 1); idle[0].setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
idle[0].setsockopt(IPPROTO_TCP, 4, 33); idle[1].setsockopt(IPPROTO_TCP, 13, b"reno")
idle[0].send(b"unread")
full[0].setblocking(False); sent = 0
block = os.urandom(1 << 16)
try:
    while True: sent += full[0].send(block)
except BlockingIOError: pass
full[1].send(b"the other way")
cut[0].send(b"last words"); cut[0].shutdown(SHUT_WR); cut[1].send(b"still")
both[0].shutdown(SHUT_RDWR); both[1].shutdown(SHUT_RDWR)
time.sleep(.3)
all_ = (*idle, *full, *cut, *both)
states = [state(s) for s in all_]
before = [options(s) for s in idle]
""",
        """
same("states", [state(s) for s in all_], states)
for s, b in zip(idle, before): same_options("idle", b, options(s))
same("unread", idle[1].recv(99), b"unread")
idle[1].send(b"reply"); same("reply", idle[0].recv(9), b"reply")
same("other", full[0].recv(99), b"the other way")
full[0].shutdown(SHUT_WR)
got = drain(full[1])
same("length", len(got), sent); same("content", got == (block * (sent // len(block) + 1))[:sent], True)
same("last", drain(cut[1]), b"last words"); same("still", cut[0].recv(9), b"still")
cut[1].send(b"more"); same("more", cut[0].recv(9), b"more")
same("eof", both[0].recv(9) + both[1].recv(9), b"")
fresh = pair(); fresh[0].send(b"new"); same("new", fresh[1].recv(9), b"new")
""",
    )
    made.dump(**ESTABLISHED)
    assert not tables(), "nobody outside is to be held back"
    made.restore(**ESTABLISHED)
    made.target.go()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_what_both_ends_have_agreed_on(trip: Callable[[str, str], Trip], family: str) -> None:
    """Options and window scales of each end, and the largest segment, as TCP_INFO tells them."""
    trip(
        f"family = {family}"
        + """
host = "127.0.0.1" if family == AF_INET else "::1"
def sysctl(name, value):
    with open(f"/proc/sys/net/ipv4/tcp_{name}", "w") as file: file.write(value)
def pair(room=0, mss=0):
    server = socket(family, SOCK_STREAM)
    if mss: server.setsockopt(6, 2, mss)
    server.bind((host, 0)); server.listen(1)
    client = socket(family, SOCK_STREAM)
    if room: client.setsockopt(SOL_SOCKET, SO_RCVBUF, room)
    client.connect(server.getsockname()[:2])
    return client, server.accept()[0]
def agreed(s):
    told = s.getsockopt(6, 11, 104)
    s.setsockopt(6, 19, 1); most = s.getsockopt(6, 2); s.setsockopt(6, 19, -1)  # TCP_REPAIR: what the peer has said
    # A segment of the loopback interface may be larger than a socket can be told.
    return told[5] & 7, told[6] >> 4, told[6] & 15, min(struct.unpack_from("I", told, 16)[0], 32700), most
def window(s): return struct.unpack_from("I", s.getsockopt(6, 11, 232), 228)[0]  # tcpi_snd_wnd: what the peer takes
pairs = [pair(), pair(room=4000), pair(mss=900)]
for name in ("sack", "timestamps", "window_scaling"):
    sysctl(name, "0"); pairs.append(pair()); sysctl(name, "1")
ends = [s for one in pairs for s in one]
before, windows = [agreed(s) for s in ends], [window(client) for client, _ in pairs]
same("kinds", len(set(before)) >= 6, True)
""",
        """
same("agreed", [agreed(s) for s in ends], before)
for (client, server), before in zip(pairs, windows):
    client.send(b"x"); server.recv(1); time.sleep(.1)
    same("window", window(client) > before // 2, True)
block = os.urandom(300000)
for client, server in pairs:
    client.setblocking(False)
    got = b""; left = block
    server.settimeout(20)
    while len(got) < len(block):
        try: left = left[client.send(left):]
        except BlockingIOError: pass
        got += server.recv(1 << 20)
    same("data", got == block, True)
""",
    ).whole(**ESTABLISHED)


def test_a_port_where_ended_connections_wait(trip: Callable[[str, str], Trip]) -> None:
    """What nobody can help but by waiting is called by its name."""
    made = trip(
        """
server = socket(AF_INET, SOCK_STREAM); server.bind(("127.0.0.1", 6011)); server.listen(9)
client = create_connection(server.getsockname()); end = server.accept()[0]
""",
        "",
    )
    made.dump(**ESTABLISHED)
    made.restore(**ESTABLISHED)
    with socket.create_connection(("127.0.0.1", 6011)):
        os.kill(made.target.pid, signal.SIGKILL)
        made.target.wait_gone()
    wait_until("all have ended", lambda: "6011" not in subprocess.run(
        ["ss", "-Htan", "state", "connected", "exclude", "time-wait"], capture_output=True, text=True, check=True
    ).stdout)  # fmt: skip
    with pytest.raises(Unsupported, match=r"127.0.0.1:6011 is not free yet: .* \(TIME_WAIT\)"):
        made.restore(**ESTABLISHED)


# ---------------------------------------------------------------------- connections to the outside

OUTSIDE = "s = create_connection((HOST, PORT))"


def outside(server: socket.socket, first: str) -> str:
    host, port = server.getsockname()[:2]
    return f"HOST, PORT = {host!r}, {port}\n{OUTSIDE}\n{first}"


@pytest.mark.parametrize("lock", ["iptables", "nftables"])
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_peer_that_goes_on_sending(trip: Callable[[str, str], Trip], lock: str, family: int, host: str) -> None:
    with listener(family, host) as server:
        made = trip(
            outside(server, "s.sendall(b'hello')"),
            "same('later', s.recv(5) + s.recv(5), b'earlylater'[:10]); s.sendall(b'bye'); s.close()",
        )
        peer, _ = server.accept()
        peer.settimeout(20)
        assert peer.recv(5) == b"hello"
        peer.sendall(b"early")
        made.dump(network_lock=lock, **ESTABLISHED)
        assert len(tables()) == 1
        peer.sendall(b"later")  # retransmitted until somebody takes it
        made.restore(**ESTABLISHED)
        assert not tables()
        made.target.tell("go")
        assert peer.recv(9) == b"bye"
        assert peer.recv(9) == b""
        made.target.go()
        peer.close()


FILL = """
def fill(s):
    s.setblocking(False)
    try:
        while True: s.send(b"z" * 65536)
    except BlockingIOError: s.setblocking(True)
"""
#: State → (does the peer shut down first, what the program does before the dump, number of the state)
CLOSING = {
    "close-wait": (True, "", 8),
    "close-wait, unsent": (True, "fill(s)", 8),
    "last-ack": (True, "fill(s); s.shutdown(SHUT_WR)", 9),
    "fin-wait1": (False, "fill(s); s.shutdown(SHUT_WR)", 4),
    "fin-wait2": (False, "s.shutdown(SHUT_WR)", 5),
    "closing": (True, "fill(s); s.shutdown(SHUT_WR)", 11),
}
FIN_WAIT1 = 4


@pytest.mark.parametrize("name", CLOSING)
def test_closing_states(trip: Callable[[str, str], Trip], name: str) -> None:
    theirs, ours, number = CLOSING[name]
    accepted: list[socket.socket] = []

    def serve() -> None:
        peer, _ = server.accept()
        if crossed:  # both have sent their FIN, and neither has got the other's
            wait_until("it is closed", lambda: FIN_WAIT1 in [one.state for one in inet_diag.sockets(6)])
        if theirs:
            peer.sendall(b"tail")
            peer.shutdown(socket.SHUT_WR)
        accepted.append(peer)

    crossed = number == inet_diag.CLOSING
    wait = f"while state(s) != {11 if crossed else 8}: time.sleep(.01)\n" if theirs else ""
    with listener() as server:
        thread = threading.Thread(target=serve)
        thread.start()
        made = trip(
            outside(server, FILL + (f"{ours}\n{wait}" if crossed else wait + ours) + "\ntime.sleep(.3); before = state(s)"),
            f"same('state', (state(s), before), ({number}, {number})); tell('seen'); same('tail', drain(s), b'tail')\n"
            + ("s.sendall(b'answer')\n" if number == 8 else ""),
        )
        thread.join()
        peer = accepted[0]
        peer.settimeout(20)
        made.dump(**ESTABLISHED)
        made.restore(**ESTABLISHED)
        made.target.tell("go")
        made.target.wait_file("seen")
        if not theirs:
            peer.sendall(b"tail")
            peer.shutdown(socket.SHUT_WR)
        data = b""
        while piece := peer.recv(1 << 20):
            data += piece
        filled = data.removesuffix(b"answer")
        assert filled == b"z" * len(filled)
        assert bool(filled) is ("fill" in ours)
        assert data.endswith(b"answer") is (number == 8)
        made.target.go()
        peer.close()


def test_let_go_after_the_dump(trip: Callable[[str, str], Trip]) -> None:
    with listener() as server:
        made = trip(
            outside(server, "s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); before = options(s)"),
            "same_options('s', before, options(s)); same('data', s.recv(9), b'go on'); s.sendall(b'yes')",
        )
        peer, _ = server.accept()
        made.library.dump(made.target.pid, made.images, leave_running=True, **ESTABLISHED)
        assert not tables()
        peer.sendall(b"go on")
        made.target.go()
        assert peer.recv(9) == b"yes"
        peer.close()


def test_let_go_when_the_dump_fails(trip: Callable[[str, str], Trip], monkeypatch: pytest.MonkeyPatch) -> None:
    from torpor.resources import locks

    with listener() as server:
        made = trip(
            outside(server, "s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)"),
            "same('reuse', s.getsockopt(SOL_SOCKET, SO_REUSEADDR), 1); same('data', s.recv(9), b'go on'); s.sendall(b'yes')",
        )
        peer, _ = server.accept()
        seen = []

        def fail(ctx: object) -> None:
            seen.append(tables())
            raise Unsupported("by the test")

        monkeypatch.setattr(locks, "finish", fail)
        with pytest.raises(TorporError, match="by the test"):
            made.library.dump(made.target.pid, made.images, **ESTABLISHED)
        assert len(seen[0]) == 1
        assert not tables()
        peer.sendall(b"go on")
        made.target.go()
        assert peer.recv(9) == b"yes"
        peer.close()


def test_let_go_when_torpor_is_killed(trip: Callable[[str, str], Trip], monkeypatch: pytest.MonkeyPatch) -> None:
    from torpor.resources import locks

    with listener() as server:
        made = trip(
            outside(server, "s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)"),
            "same('reuse', s.getsockopt(SOL_SOCKET, SO_REUSEADDR), 1); same('data', s.recv(9), b'go on'); s.sendall(b'yes')",
        )
        peer, _ = server.accept()

        def die(ctx: object) -> None:
            os.kill(os.getpid(), 9)

        def others() -> set[int]:
            reap(descendants(os.getpid()))
            return set(descendants(os.getpid()))

        monkeypatch.setattr(locks, "finish", die)
        before = others()
        pid = os.fork()
        if pid == 0:
            try:
                made.library.dump(made.target.pid, made.images, **ESTABLISHED)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
        wait_until("the guard has done what it is for", lambda: others() <= before)
        assert not tables(), "the lock is still there"
        peer.sendall(b"go on")
        made.target.go()
        peer.settimeout(20)
        assert peer.recv(9) == b"yes"
        peer.close()


def test_a_restore_that_fails_can_be_tried_again(trip: Callable[[str, str], Trip]) -> None:
    with listener() as server:
        made = trip(
            outside(server, "u = socket(AF_INET, SOCK_DGRAM); u.bind(('127.0.0.1', 6100))"),
            "same('data', s.recv(9), b'go on'); s.sendall(b'yes')",
        )
        peer, _ = server.accept()
        made.dump(**ESTABLISHED)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("", 6100))
            with pytest.raises(Unsupported, match=r"127\.0\.0\.1:6100 is in use"):
                made.restore(**ESTABLISHED)
        assert len(tables()) == 1, "the peer has to wait on"
        peer.sendall(b"go on")
        made.restore(**ESTABLISHED)
        made.target.go()
        assert peer.recv(9) == b"yes"
        peer.close()


def test_closed_on_restore(trip: Callable[[str, str], Trip]) -> None:
    with listener() as server:
        made = trip(
            outside(
                server, "keep = socket(AF_INET, SOCK_STREAM); keep.bind(('', 6200)); keep.listen(2)\n"
                "for level, option, value in ((1, 9, 1), (1, 12, 3), (6, 1, 1), (6, 4, 77), (0, 1, 16), (1, 8, 50000)): s.setsockopt(level, option, value)\n"
                "look = lambda: [s.getsockopt(*one) for one in ((1, 9), (1, 12), (6, 1), (6, 4), (0, 1), (1, 8))]; before = look()",
            ),
            """
same('options', look(), before)
same('eof', s.recv(9), b'')
try: s.send(b'x'); errors.append('sent')
except BrokenPipeError: pass
c = create_connection(('127.0.0.1', 6200)); c.send(b'on'); same('listens', keep.accept()[0].recv(5), b'on')
""",
        )
        peer, _ = server.accept()
        made.whole(tcp_close=True)
        peer.settimeout(5)
        assert peer.recv(5) == b""
        peer.close()


def test_skip_in_flight(trip: Callable[[str, str], Trip]) -> None:
    made = trip(
        "keep = socket(AF_INET, SOCK_STREAM); keep.bind(('127.0.0.1', 6300)); keep.listen(2)",
        "c = create_connection(('127.0.0.1', 6300)); c.send(b'on'); same('it', keep.accept()[0].recv(5), b'on')",
    )
    with socket.create_connection(("127.0.0.1", 6300)):
        with pytest.raises(Unsupported, match=r"1 connections wait to be accepted.*skip-in-flight"):
            made.dump()
        made.whole(skip_in_flight=True)


def test_one_that_is_not_answered_yet_is_answered_later(trip: Callable[[str, str], Trip]) -> None:
    """A connection in the state SYN_SENT: its request is sent again."""
    with listener() as server:
        host, port = server.getsockname()
        nft("add table inet kit; add chain inet kit in { type filter hook input priority -10; }")
        nft(f"add rule inet kit in tcp dport {port} drop")
        made = trip(
            f"s = socket(AF_INET, SOCK_STREAM); s.setblocking(False); s.connect_ex(({host!r}, {port})); same('asks', state(s), 2)\n"
            "name = s.getsockname()",
            "same('asks', (state(s), s.getsockname(), s.getblocking()), (2, name, False)); tell('seen'); wait_told('answered')\n"
            "s.setblocking(True); s.sendall(b'hello'); same('answer', s.recv(9), b'yes')",
        )
        made.dump(**ESTABLISHED)
        made.restore(**ESTABLISHED)
        made.target.tell("go")
        made.target.wait_file("seen")
        nft("delete table inet kit")
        server.settimeout(20)
        peer, _ = server.accept()
        made.target.tell("answered")
        assert peer.recv(9) == b"hello"
        peer.sendall(b"yes")
        made.target.go()
        peer.close()


def test_one_that_does_not_read_any_more(trip: Callable[[str, str], Trip]) -> None:
    with listener() as server:
        made = trip(outside(server, "s.shutdown(SHUT_RD)"), "same('end', s.recv(9), b''); same('state', state(s), 1); s.sendall(b'it writes')")
        peer, _ = server.accept()
        made.whole(**ESTABLISHED)
        assert peer.recv(20) == b"it writes"
        peer.close()


def test_where_only_marked_packets_may_go(trip: Callable[[str, str], Trip]) -> None:
    """A route that is chosen by SO_MARK is needed before the connection is there, not after."""
    for command in (
        "addr add 10.99.1.1/32 dev lo", "rule add pref 100 table local", "rule del pref 0",
        "rule add pref 5 to 10.99.1.1 fwmark 7 table local", "rule add pref 10 to 10.99.1.1 prohibit",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    with listener(host="10.99.1.1") as server:
        made = trip(
            f"s = socket(AF_INET, SOCK_STREAM); s.setsockopt(SOL_SOCKET, SO_MARK, 7); s.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b'lo')\n"
            f"s.bind(('127.0.0.1', 0)); s.connect({server.getsockname()!r}); before = options(s)",
            "same_options('s', before, options(s)); s.sendall(b'marked')",
        )
        peer, _ = server.accept()
        made.whole(**ESTABLISHED)
        assert peer.recv(9) == b"marked"
        peer.close()


def test_a_port_is_shared_among_sockets_of_one_user(trip: Callable[[str, str], Trip]) -> None:
    trip(
        """
def bound(uid, *held):
    os.seteuid(uid)
    try: s = socket(AF_INET, SOCK_DGRAM); s.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1); s.bind(("127.0.0.1", 6700)); return s
    except OSError as error: return error.errno
    finally: os.seteuid(0)
first, second = bound(1000), bound(1000)
same("another user", bound(0), 98)
""",
        """
same("another user", bound(0), 98); same("the same user", type(bound(1000)), socket)
same("owner", [os.fstat(s.fileno()).st_uid for s in (first, second)], [1000, 1000])
""",
    ).whole()


# ---------------------------------------------------------------------- what stands in the way


UDP = "s = socket(AF_INET, SOCK_DGRAM); s.connect((HOST, PORT)); "


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ("s = create_connection((HOST, PORT))", r"established TCP connection.*--tcp-established"),
        (UDP + "s.setsockopt(17, 1, 1); s.send(b'half a')", r"not complete yet \(UDP_CORK"),
        (UDP + "s.send(b'half a', MSG_MORE)", r"not complete yet \(UDP_CORK, MSG_MORE"),
        (
            "s = socket(AF_INET6, SOCK_DGRAM); s.setsockopt(41, 32, inet_pton(AF_INET6, '::1')"
            " + struct.pack('>I', 77) + struct.pack('=BBHHHI', 0, 255, 1, 100, 0, 0))",
            "flow label",
        ),
        ("s = socket(AF_INET, SOCK_STREAM, 262)", r"MPTCP.*GODEBUG"),
    ],
)
def test_refused_before_anything_stops(trip: Callable[[str, str], Trip], first: str, why: str) -> None:
    with listener() as server:
        made = trip(outside(server, first), "pass")
        with pytest.raises(Unsupported, match=why):
            made.dump()
        made.target.go()


def test_an_address_that_is_gone(trip: Callable[[str, str], Trip]) -> None:
    subprocess.run(["ip", "address", "add", "10.77.0.1/32", "dev", "lo"], check=True)
    made = trip(
        "s = socket(AF_INET, SOCK_STREAM); s.bind(('10.77.0.1', 6400)); s.listen(1)",
        "same('name', s.getsockname(), ('10.77.0.1', 6400))",
    )
    made.dump()
    subprocess.run(["ip", "address", "del", "10.77.0.1/32", "dev", "lo"], check=True)
    with pytest.raises(Unsupported, match=r"no address 10\.77\.0\.1.*ip address add"):
        made.restore()
    subprocess.run(["ip", "address", "add", "10.77.0.1/32", "dev", "lo"], check=True)
    made.restore()
    made.target.go()


def test_a_port_of_a_listener_is_taken(trip: Callable[[str, str], Trip]) -> None:
    made = trip(
        "s = socket(AF_INET6, SOCK_STREAM); s.bind(('', 6500)); s.listen(1); uid = os.fstat(s.fileno()).st_uid",
        "pass",
    )
    made.dump()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        # It would share its port with a socket that asks for it, but ours never did.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 6500))
        other.listen(1)
        with pytest.raises(Unsupported, match="6500 is in use by another process"):
            made.restore()
    made.restore()
    made.target.go()


# ---------------------------------------------------------------------- pieces


ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


@given(ADDRESSES, st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF))
def test_sockaddr_is_read_as_it_was_written(address: bytes, port: int, scope: int) -> None:
    family = inet_diag.AF_INET if len(address) == 4 else inet_diag.AF_INET6
    name = tcp.sockaddr(family, address, port, scope)
    assert len(name) == (16 if len(address) == 4 else 28)
    assert tcp.address_of_sockaddr(name) == (address, port)


def test_diag_shows_what_the_sockets_say() -> None:
    with listener() as server, socket.create_connection(server.getsockname()) as client:
        client.shutdown(socket.SHUT_RD)
        shown = {one.ino: one for one in inet_diag.sockets(6)}
        one, other = (shown[os.fstat(each.fileno()).st_ino] for each in (server, client))
        assert one.state == inet_diag.LISTEN
        assert (socket.inet_ntoa(one.source[0]), one.source[1]) == server.getsockname()
        assert one.queues == (1, 8)
        assert (socket.inet_ntoa(other.destination[0]), other.destination[1]) == server.getsockname()
        assert (other.state, other.shutdown) == (inet_diag.ESTABLISHED, 1)
    assert inet_diag.sockets(132) == [], "no module for SCTP here, and no error"


@pytest.mark.parametrize(
    ("a", "b", "six_only", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", False, True),
        ("127.0.0.1", "127.0.0.2", False, False),
        ("0.0.0.0", "127.0.0.2", False, True),
        ("::", "127.0.0.1", False, True),
        ("::", "127.0.0.1", True, False),
        ("::1", "0.0.0.0", False, False),
        ("::ffff:127.0.0.1", "127.0.0.1", False, True),
    ],
)
def test_overlap_is_what_bind_says(a: str, b: str, six_only: bool, expected: bool) -> None:
    def packed(text: str) -> tuple[int, bytes]:
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        return family, socket.inet_pton(family, text)

    (one, here), (two, there) = packed(a), packed(b)
    assert inet_place.overlap(here, there, six_only, False) is expected
    assert inet_place.overlap(there, here, False, six_only) is expected
    with socket.socket(one, socket.SOCK_STREAM) as first, socket.socket(two, socket.SOCK_STREAM) as second:
        if six_only:
            first.setsockopt(41, socket.IPV6_V6ONLY, 1)
        first.bind((a, 6600))
        first.listen(1)
        try:
            second.bind((b, 6600))
            taken = False
        except OSError:
            taken = True
    assert taken is expected


def test_the_lock_holds_both_directions_and_only_its_own() -> None:
    with listener() as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        other = socket.create_connection(server.getsockname())
        its_peer, _ = server.accept()
        quad = (bytes((127, 0, 0, 1)), client.getsockname()[1], bytes((127, 0, 0, 1)), server.getsockname()[1])
        lock = network_lock.lock([quad], "nftables")
        for sender, receiver in ((client, peer), (peer, client)):
            receiver.settimeout(0.3)
            sender.send(b"held")
            with pytest.raises(TimeoutError):
                receiver.recv(9)
        other.send(b"free")
        assert its_peer.recv(9) == b"free"
        lock.lift()
        lock.lift()  # it may be gone already
        for receiver in (peer, client):
            receiver.settimeout(20)
            assert receiver.recv(9) == b"held"
        other.close(), its_peer.close(), peer.close()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_segment_of_ours_is_taken_for_the_peer_s(family: int, host: str) -> None:
    with listener(family, host) as server, socket.create_connection(server.getsockname()[:2]) as client:
        peer, _ = server.accept()
        tcp.repair(client.fileno(), on=True)
        stream = tcp.save(client.fileno())[0]
        tcp.repair(client.fileno(), on=False)
        where = [tcp.sockaddr(family, socket.inet_pton(family, host), s.getsockname()[1]) for s in (server, client)]
        tcp.send_packet(*where, 1 | 16, stream.inq_seq, stream.outq_seq, 1000)
        assert client.recv(9) == b""  # a FIN
        assert struct.unpack("B", client.getsockopt(6, 11, 1)) == (inet_diag.CLOSE_WAIT,)
        peer.close()


def test_the_lock_is_called_as_criu_calls_it() -> None:
    # A buffer of 32 in criu/netfilter.c: what CRIU has set is found only by the name that went in.
    assert network_lock.table("a6fc569d-a6f8-4410-903a-4989a2340ee9") == "inet CRIU-a6fc569d-a6f8-4410-90"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (900, 5000, 6000, 2000, 1000)),
        ({"snd_wl1": 1000 + 2000}, (3000, 5000, 6000, 2000, 1000)),
        ({"snd_wl1": 1000 + 2001}, (1000, 5000, 6000, 2000, 1000)),
        ({"snd_wl1": 0xFFFFFF00}, (0xFFFFFF00, 5000, 6000, 2000, 1000)),
        ({"max_window": 100}, (900, 5000, 5000, 2000, 1000)),
    ],
    ids=["as it was", "at the end", "a segment that was dropped", "before zero", "a window larger than any"],
)
def test_the_kernel_takes_the_windows_of_a_connection(fields: dict[str, int], expected: tuple[int, ...]) -> None:
    """A receiver that runs out of memory drops what it has made room for, and heeds what it says about windows."""
    stream = pb.tcp_stream_entry(
        inq_len=0, inq_seq=1000, outq_len=0, outq_seq=7, opt_mask=0, snd_wscale=0, unsq_len=0, snd_wl1=900,
        snd_wnd=5000, max_window=6000, rcv_wnd=2000, rcv_wup=1000, mss_clamp=1460,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(stream, name, value)
    entry = pb.inet_sk_entry(state=1, family=2)
    one = tcp_build.Connection(-1, entry, bytes(16), bytes(16), stream, b"", b"")
    assert struct.pack("=5I", *expected) in one.values


@pytest.mark.timeout(180)
def test_every_call_of_putting_connections_up_fails_once(
    start: Targets, images: str, trip: Callable[[str, str], Trip]
) -> None:
    """In every state, with and without data: no socket is left, no peer hears of an end, and the next try finds
    everything as it was.
    """
    away = listener()
    made = trip(
        outside(away, "out = s")
        + """
server = socket(AF_INET, SOCK_STREAM); server.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
server.bind(("127.0.0.1", 0)); server.listen(9)
def pair():
    client = create_connection(server.getsockname()); return client, server.accept()[0]
idle, full, cut, both = pair(), pair(), pair(), pair()
idle[0].setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1); full[0].send(b"unread"); cut[0].send(b"last"); cut[0].shutdown(SHUT_WR)
both[0].shutdown(SHUT_RDWR); both[1].shutdown(SHUT_RDWR)
time.sleep(.2)
""",
        """
same("unread", full[1].recv(9), b"unread"); same("last", drain(cut[1]), b"last"); idle[0].send(b"hello")
same("hello", idle[1].recv(9), b"hello")
same("from outside", out.recv(99), b"still there?"); out.send(b"yes")
""",
    )
    peer, _ = away.accept()
    made.dump(**ESTABLISHED)
    peer.send(b"still there?")

    def shown() -> list[str]:
        found = subprocess.run(["ss", "-Hant"], capture_output=True, text=True, check=True).stdout.splitlines()
        return [*sorted(found), *tables()]

    before, sockets_before = host_state(images), shown()
    failed = 0
    for fault, error in for_every_call(lambda: torpor.restore(images, tcp_established=True), number=errno.ENOBUFS):
        if error is None:  # it was tolerated, and the program runs
            made.dump(**ESTABLISHED)
            before, sockets_before = host_state(images), shown()
            continue
        assert isinstance(error, TorporError), (fault.hit, error)
        assert diff(before, host_state(images)) == [], fault.hit
        assert shown() == sockets_before, fault.hit
        failed += 1
    assert failed > 200
    made.target.go()
    peer.settimeout(5)
    assert peer.recv(9) == b"yes" and not tables()
    peer.close()
    away.close()
