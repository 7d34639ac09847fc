"""Datagrams that wait in sockets of UDP, through the whole engine, in a network of the test's own."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import Library, Targets, run_criu
from kit.files import slurp_text
from kit.network import own_network
from torpor.errors import ImageError
from torpor.images import schema as pb
from torpor.resources import udp_queue

HEAD = """
import os, struct, sys
from socket import *
def drain(s):
    found = []
    s.setblocking(False)
    while True:
        try: data, control, flags, sender = s.recvmsg(1 << 17, 4096)
        except BlockingIOError: return found
        found.append((data, sorted(control), flags, sender))
def look(what, a, b):
    if a != b: errors.append(f"{what}: {str(a)[:300]} is not {str(b)[:300]}")
errors = []
"""
TAIL = """
done(not errors, "; ".join(errors)[:3000])
"""


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        subprocess.run("ip addr add 10.9.8.7/32 dev lo; ip -6 addr add fd00::7/128 dev lo nodad", shell=True, check=True)
        yield


@pytest.fixture
def trip(start: Targets, library: Library, images: str) -> object:
    def go(first: str, second: str, *, between: str = "", dumps: int = 1) -> None:
        target = start.python(f"{HEAD}{first}\nready()\nwait_told('go')\n{second}{TAIL}")
        target.pids()
        for number in range(dumps - 1):
            os.mkdir(f"{images}/{number}")
            library.dump(target.pid, f"{images}/{number}", leave_running=True)
        library.dump(target.pid, images)
        target.wait_gone()
        if between:
            subprocess.run(between, shell=True, check=True)
        library.restore(images)
        target.go(timeout=30)

    return go


FOUR = """
one, two, three, own = (socket(AF_INET, SOCK_DGRAM) for _ in range(4))
one.bind(("0.0.0.0", 5000)); two.bind(("127.0.0.2", 5001)); three.bind(("127.0.0.1", 5003))
for option in (8, 12, 13): one.setsockopt(SOL_IP, option, 1)  # PKTINFO, RECVTTL, RECVTOS
one.setsockopt(SOL_SOCKET, SO_RCVBUF, 400000)
outside, near = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
outside.bind(("10.9.8.7", 6000)); near.bind(("127.0.0.1", 6001))
outside.setsockopt(SOL_IP, IP_TTL, 33); outside.setsockopt(SOL_IP, IP_TOS, 0x48)
sent = [b"first", b"", b"x" * 60000, bytes(range(256)), b"", b"odd"]
for data in sent:
    for to in (("127.0.0.1", 5000), ("10.9.8.7", 5000)):
        outside.sendto(data, to); near.sendto(data, to)
    near.sendto(data, ("127.0.0.2", 5001))
near.sendto(b"before it is connected", ("127.0.0.1", 5003))
three.connect(("10.9.8.7", 6000))
outside.sendto(b"after", ("127.0.0.1", 5003))
three.shutdown(SHUT_WR)
outside.close()
lo = 1
expect = []
for data in sent:
    for to in ("127.0.0.1", "10.9.8.7"):
        for source, ttl, tos in ((("10.9.8.7", 6000), 33, 0x48), (("127.0.0.1", 6001), 64, 0)):
            info = struct.pack("=i4s4s", lo, inet_aton(to), inet_aton(to))
            expect.append((data, sorted([(0, 8, info), (0, 2, struct.pack("=i", ttl)), (0, 1, bytes([tos]))]), 0, source))
before = [[s.getsockopt(0, o) for o in (8, 12, 13)] + [s.getsockopt(1, o) for o in (8, 42)] for s in (one, two, three)]
"""
FOUR_AFTER = """
after = [[s.getsockopt(0, o) for o in (8, 12, 13)] + [s.getsockopt(1, o) for o in (8, 42)] for s in (one, two, three)]
look("options", after, before)
near.sendto(b"later", ("127.0.0.1", 5000))
found = drain(one)
look("later", [one[0] for one in found[len(expect):]], [b"later"])
look("how many", len(found), len(expect) + 1)
for got, wanted in zip(found, expect): look("one", got, wanted)
look("two", [(a, d) for a, _, _, d in drain(two)], [(data, ("127.0.0.1", 6001)) for data in sent])
look("three", [(a, d) for a, _, _, d in drain(three)], [(b"before it is connected", ("127.0.0.1", 6001)), (b"after", ("10.9.8.7", 6000))])
look("names", [s.getsockname() for s in (one, two, three)], [("0.0.0.0", 5000), ("127.0.0.2", 5001), ("127.0.0.1", 5003)])
look("peer", three.getpeername(), ("10.9.8.7", 6000))
try: three.send(b""); errors.append("it sends")
except BrokenPipeError: pass
try: socket(AF_INET, SOCK_DGRAM).bind(("127.0.0.1", 5000)); errors.append("it is not bound")
except OSError: pass
"""


def test_senders_bounds_and_what_came_with_them(trip: object) -> None:
    trip(FOUR, FOUR_AFTER)  # type: ignore[operator]


def test_a_second_dump_finds_what_the_first_did(trip: object) -> None:
    first = """
s, t = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
s.bind(("127.0.0.1", 5000)); t.bind(("127.0.0.1", 6000))
for data in (b"", b"one", b"two", b"three"): t.sendto(data, ("127.0.0.1", 5000))
"""
    trip(first, 'look("all", [a for a, *_ in drain(s)], [b"", b"one", b"two", b"three"])\n', dumps=3)  # type: ignore[operator]


def test_a_sender_that_is_not_of_this_machine_any_more(trip: object) -> None:
    first = """
s, t = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
s.bind(("127.0.0.1", 5000)); t.bind(("10.9.8.7", 6000)); t.sendto(b"from afar", ("127.0.0.1", 5000)); t.close()
"""
    second = 'look("all", [(a, d) for a, _, _, d in drain(s)], [(b"from afar", ("10.9.8.7", 6000))])\n'
    trip(first, second, between="ip addr del 10.9.8.7/32 dev lo; ip rule add from all blackhole pref 100")  # type: ignore[operator]


SIX = """
one, both, four = socket(AF_INET6, SOCK_DGRAM), socket(AF_INET6, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
one.bind(("::1", 5000)); both.bind(("::", 5001))
for option in (49, 51, 66): both.setsockopt(41, option, 1)  # RECVPKTINFO, HOPLIMIT, TCLASS
t = socket(AF_INET6, SOCK_DGRAM); t.bind(("fd00::7", 6000)); t.setsockopt(41, 16, 77); t.setsockopt(41, 67, 0x20)
four.bind(("10.9.8.7", 6001))
for data in (b"", b"abc", b"y" * 65000):
    t.sendto(data, ("::1", 5000)); t.sendto(data, ("fd00::7", 5001)); four.sendto(data, ("127.0.0.1", 5001))
i = lambda n: struct.pack("=i", n)
info = lambda a, n: inet_pton(AF_INET6, a) + i(n)
expect = []
for data in (b"", b"abc", b"y" * 65000):
    expect.append((data, sorted([(41, 50, info("fd00::7", 1)), (41, 52, i(77)), (41, 67, i(0x20))]), 0, ("fd00::7", 6000, 0, 0)))
    expect.append((data, sorted([(41, 50, info("::ffff:127.0.0.1", 1))]), 0, ("::ffff:10.9.8.7", 6001, 0, 0)))
"""
SIX_AFTER = """
look("one", [(a, d) for a, _, _, d in drain(one)], [(data, ("fd00::7", 6000, 0, 0)) for data in (b"", b"abc", b"y" * 65000)])
found = drain(both)
look("how many", len(found), len(expect))
for got, wanted in zip(found, expect): look("both", got, wanted)
look("names", [s.getsockname() for s in (one, both)], [("::1", 5000, 0, 0), ("::", 5001, 0, 0)])
look("six only", [s.getsockopt(41, 26) for s in (one, both)], [1, 0])
"""


def test_ipv6_and_ipv4_in_it(trip: object) -> None:
    trip(SIX, SIX_AFTER)  # type: ignore[operator]


def test_a_link_local_sender_keeps_its_interface(trip: object) -> None:
    up = "ip tuntap add far mode tap; ip link set far up; ip addr add fe80::5/64 dev far nodad; ip addr add fe80::6/64 dev far nodad"
    subprocess.run(up, shell=True, check=True)
    first = """
d = if_nametoindex("far")
s, t = socket(AF_INET6, SOCK_DGRAM), socket(AF_INET6, SOCK_DGRAM)
s.bind(("::", 5000)); t.bind(("fe80::6", 6000, 0, d)); t.sendto(b"near", ("fe80::5", 5000, 0, d))
"""
    trip(first, 'look("all", [(a, d) for a, _, _, d in drain(s)], [(b"near", ("fe80::6", 6000, 0, d))])\n')  # type: ignore[operator]


def test_sockets_that_share_a_port_keep_their_own(trip: object) -> None:
    first = """
some = [socket(AF_INET, SOCK_DGRAM) for _ in range(4)]
for s in some: s.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1); s.bind(("127.0.0.1", 5000))
for n in range(40): t = socket(AF_INET, SOCK_DGRAM); t.sendto(b"%d" % n, ("127.0.0.1", 5000)); t.close()
def heads(s):
    return [a for a, *_ in drain(s)]
import select
before = [select.select([s], [], [], 0)[0] != [] for s in some]
first = [s.recv(9, MSG_PEEK | MSG_DONTWAIT) if r else None for s, r in zip(some, before)]
"""
    second = """
look("first of each", [s.recv(9, MSG_PEEK | MSG_DONTWAIT) if r else None for s, r in zip(some, before)], first)
all_ = [heads(s) for s in some]
look("all", sorted(int(one) for some_ in all_ for one in some_), list(range(40)))
look("in order", [list(map(int, one)) for one in all_], [sorted(map(int, one)) for one in all_])
"""
    trip(first, second)  # type: ignore[operator]


def test_a_firewall_that_is_in_the_way_costs_the_datagrams_only(trip: object) -> None:
    first = """
s, t = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
s.bind(("127.0.0.1", 5000)); t.bind(("127.0.0.1", 6000)); t.sendto(b"lost", ("127.0.0.1", 5000))
"""
    second = """
look("all", drain(s), [])
look("name", s.getsockname(), ("127.0.0.1", 5000))
"""
    down = "ip link set lo down"
    trip(first, second, between=down)  # type: ignore[operator]


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_udp_lite_and_a_receiver_that_joins_datagrams(trip: object, family: str) -> None:
    here = "127.0.0.1" if family == "AF_INET" else "::1"
    first = f"""
try: lite = [socket({family}, SOCK_DGRAM, 136) for _ in range(2)]
except OSError: lite = []  # gone from newer kernels
for n, one in enumerate(lite): one.bind(("{here}", 5000 + n))
for data in (b"", b"abc", b"defg"): lite and lite[1].sendto(data, ("{here}", 5000))
s, t = socket({family}, SOCK_DGRAM), socket({family}, SOCK_DGRAM)
s.bind(("{here}", 7000)); t.bind(("{here}", 7001))
s.setsockopt(17, 104, 1); t.setsockopt(17, 103, 100)  # UDP_GRO, UDP_SEGMENT
t.sendto(b"z" * 450, ("{here}", 7000))
"""
    second = f"""
if lite: look("lite", [(a, d[:2]) for a, _, _, d in drain(lite[0])], [(x, ("{here}", 5001)) for x in (b"", b"abc", b"defg")])
got = drain(s)
look("joined", b"".join(a for a, *_ in got), b"z" * 450)
look("from", set(d[:2] for _, _, _, d in got), set([("{here}", 7001)]))
whole = [a for a, c, *_ in got if len(a) > 100 and [x for x in c if x[:2] == (17, 104)] != [(17, 104, struct.pack("=i", 100))]]
look("as large as they were sent", whole, [])
look("gro", s.getsockopt(17, 104), 1)
"""
    trip(first, second)  # type: ignore[operator]


def test_where_the_program_looks_next(trip: object) -> None:
    """SO_PEEK_OFF, which a dump needs itself, also when the program lives on."""
    first = """
s, t = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
s.bind(("127.0.0.1", 5000))
for data in (b"0123", b"4567"): t.sendto(data, ("127.0.0.1", 5000))
s.setsockopt(SOL_SOCKET, 42, 0); look("first", s.recv(4, MSG_PEEK), b"0123")
"""
    trip(first, 'look("next", s.recv(9, MSG_PEEK), b"4567"); look("all", [x[0] for x in drain(s)], [b"0123", b"4567"])', dumps=2)  # type: ignore[operator]


def test_a_corked_socket_that_holds_nothing(trip: object) -> None:
    first = """
s, t = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
t.bind(("127.0.0.1", 5000)); s.connect(("127.0.0.1", 5000))
s.setsockopt(17, 1, 1); s.send(b"sent, "); s.send(b"whole"); s.setsockopt(17, 1, 0); s.setsockopt(17, 1, 1)
"""
    second = """
look("corked", s.getsockopt(17, 1), 1)
s.send(b"in "); s.send(b"two"); look("only the first", drain(t)[0][0], b"sent, whole"); look("held back", drain(t), [])
s.setsockopt(17, 1, 0); look("together", [one[0] for one in drain(t)], [b"in two"])
"""
    trip(first, second)  # type: ignore[operator]


def test_options_of_tunnels_and_segments(trip: object) -> None:
    """UDP_ENCAP (ESP in UDP, and L2TP), UDP_NO_CHECK6_TX and RX, a device, a socket of IPv6 in a group of IPv4."""
    subprocess.run("ip tuntap add far mode tap; ip addr add 10.1.0.2/24 dev far; ip link set far up", shell=True, check=True)
    first = """
four, six, lite = (socket(f, SOCK_DGRAM) for f in (AF_INET, AF_INET6, AF_INET))
four.bind(("127.0.0.1", 5000)); four.setsockopt(17, 100, 2); four.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b"lo")
lite.setsockopt(17, 100, 3); lite.setsockopt(17, 103, 1200); lite.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b"far")
six.bind(("::", 5001)); six.setsockopt(17, 101, 1); six.setsockopt(17, 102, 1)
member = inet_aton("224.1.2.3") + inet_aton("10.1.0.2")
six.setsockopt(0, IP_ADD_MEMBERSHIP, member)
def state():
    return ([s.getsockopt(17, o) for s in (four, six, lite) for o in (100, 101, 102, 103)]
        + [s.getsockopt(SOL_SOCKET, SO_BINDTODEVICE, 16) for s in (four, six, lite)])
before = state()
"""
    second = """
look("options", state(), before)
look("changed at all", [before[i] for i in (0, 5, 6, 8, 11)], [2, 1, 1, 3, 1200])
try: six.setsockopt(0, IP_ADD_MEMBERSHIP, member); errors.append("it has left the group")
except OSError as error: look("in the group", error.errno, 98)
"""
    trip(first, second)  # type: ignore[operator]


def test_errors_that_wait_are_told(start: Targets, images: str) -> None:
    target = start.python(
        HEAD + "s = socket(AF_INET, SOCK_DGRAM); s.setsockopt(0, 11, 1); s.connect(('127.0.0.1', 9)); s.send(b'x')\n"
        "import select; p = select.poll(); p.register(s, 0); p.poll(5000); fd = s.fileno()\n"
        "tell('fd', str(fd)); ready(); wait_told('go'); done(True)"
    )
    result = run_criu("dump", images, "-t", target.pid, "-R").must()
    assert re.search(rf"Warn.*fd {target.read('fd')} .*errors that wait to be read are dropped", result.log), result.log
    target.go()


@given(st.binary(max_size=99))
def test_checksum(data: bytes) -> None:
    """A packet with its checksum in it adds up to nothing."""
    total = 0
    padded = data + bytes(len(data) % 2)
    for at in range(0, len(padded), 2):
        total += int.from_bytes(padded[at : at + 2], "big")
        total = (total & 0xFFFF) + (total >> 16)
    assert udp_queue.checksum(data) % 0xFFFF == (total ^ 0xFFFF) % 0xFFFF


@pytest.mark.parametrize(
    ("sender", "length"), [(b"", 3), (b"\x02\0\0\0", 3), (bytes(28), 3), (b"\x02\0" + bytes(14), 1 << 17)]
)
def test_a_damaged_image_is_named(sender: bytes, length: int) -> None:
    with pytest.raises(ImageError, match=r"sk-queues\.img: packet for 5: "):
        udp_queue._check(pb.sk_packet_entry(id_for=5, length=length, sender=sender))


def test_nothing_leaves_the_machine(start: Targets, library: Library, images: str) -> None:
    """Datagrams that came by broadcast and multicast, and one from where the default route leads."""
    out = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(out, 0x400454CA, struct.pack("16sH22x", b"out", 0x1001))
    subprocess.run(
        "ip addr add 10.1.0.2/24 dev out; ip link set out up; ip route add default dev out", shell=True, check=True
    )
    target = start.python(
        HEAD
        + """
s = socket(AF_INET, SOCK_DGRAM); s.bind(("0.0.0.0", 5000)); s.setsockopt(SOL_IP, 8, 1)
s.setsockopt(SOL_IP, IP_ADD_MEMBERSHIP, inet_aton("224.1.2.3") + inet_aton("10.1.0.2"))
tell("listens"); wait_told("sent"); ready(); wait_told("go")
look("all", [(a, d) for a, _, _, d in drain(s)], [(b"broad", ("8.8.8.8", 53)), (b"multi", ("8.8.8.8", 53)), (b"plain", ("8.8.8.8", 53))])
"""
        + TAIL,
        wait=False,
    )
    target.wait_file("listens")
    for data, to in ((b"broad", (10, 1, 0, 255)), (b"multi", (224, 1, 2, 3)), (b"plain", (10, 1, 0, 2))):
        packet = udp_queue.Packet(bytes((8, 8, 8, 8)), 53, bytes(to), 5000, {}, data).assemble(17)
        head = packet[:10] + bytes(2) + packet[12:20]
        os.write(out, head[:10] + struct.pack(">H", udp_queue.checksum(head)) + packet[12:])
    target.tell("sent")
    target.wait_ready()
    library.dump(target.pid, images)
    target.wait_gone()
    drained(out)
    library.restore(images)
    assert drained(out) == []
    target.go()
    os.close(out)


def drained(tun: int) -> list[bytes]:
    """The IPv4 packets of UDP that were sent by an interface."""
    found = []
    while True:
        try:
            packet = os.read(tun, 1 << 16)
        except BlockingIOError:
            return found
        if packet[0] >> 4 == 4 and packet[9] == 17:
            found.append(packet)


GROUPS = """
def join(s, level, option, *parts): s.setsockopt(level, option, b"".join(parts))
def v4(a): return struct.pack("=HH4s120x", AF_INET, 0, inet_aton(a))
def v6(a): return struct.pack("=HHI16s104x", AF_INET6, 0, 0, inet_pton(AF_INET6, a))
index = struct.pack("=I4x", if_nametoindex("far"))
four, six = socket(AF_INET, SOCK_DGRAM), socket(AF_INET6, SOCK_DGRAM)
four.bind(("", 5000)); six.bind(("::", 5001))
join(four, 0, 42, index, v4("224.1.1.1"))  # MCAST_JOIN_GROUP
join(four, 0, 46, index, v4("232.1.1.2"), v4("10.1.0.9"))  # MCAST_JOIN_SOURCE_GROUP
join(four, 0, 46, index, v4("232.1.1.2"), v4("10.1.0.8"))
join(four, 0, 42, index, v4("224.1.1.3")); join(four, 0, 43, index, v4("224.1.1.3"), v4("10.1.0.7"))  # MCAST_BLOCK_SOURCE
join(six, 41, 42, index, v6("ff15::1")); join(six, 41, 46, index, v6("ff35::2"), v6("fd00::9"))
four.setsockopt(0, 32, struct.pack("=4s4si", bytes(4), bytes(4), if_nametoindex("far"))); four.setsockopt(0, 33, 9); four.setsockopt(0, 34, 0)
four.setsockopt(SOL_SOCKET, SO_BROADCAST, 1); six.setsockopt(41, 17, if_nametoindex("far")); six.setsockopt(41, 18, 7)
def state(): return [four.getsockopt(0, o) for o in (33, 34, 49)] + [four.getsockopt(SOL_SOCKET, SO_BROADCAST)] + [six.getsockopt(41, o) for o in (17, 18, 19)]
before = state()
"""


def memberships() -> str:
    """What the kernel listens to on the interface, with its filters of senders."""
    files = ("igmp", "mcfilter", "igmp6", "mcfilter6", "dev_mcast")
    text = "".join(slurp_text(f"/proc/net/{name}") for name in files)
    # Timers and counts of what is told to routers come and go.
    return re.sub(r"^(\t+\w+ +\d+ ).*$|(\w{8} )\d+$", r"\1\2", text, flags=re.MULTILINE)


def test_groups_filters_of_senders_and_broadcast(start: Targets, library: Library, images: str) -> None:
    subprocess.run(
        "ip tuntap add far mode tap; ip addr add 10.1.0.2/24 dev far; ip link set far up", shell=True, check=True
    )
    target = start.python(HEAD + GROUPS + "ready(); wait_told('go')\nlook('options', state(), before)\n" + TAIL)
    before = memberships()
    assert "010101E0" in before and "ff15" in before
    library.dump(target.pid, images)
    target.wait_gone()
    assert "010101E0" not in memberships()
    library.restore(images)
    assert sorted(memberships().splitlines()) == sorted(before.splitlines())
    target.go()
