"""--remap-address: the rules alone, and whole trees that come up at other addresses."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torpor
from kit import Target, Targets, run_criu, run_torpor
from kit.host import wait_until
from kit.network import own_network
from torpor.errors import UsageError
from torpor.linux.inet_diag import text, unmapped
from torpor.resources.inet_remap import Remap, Rule, Socket, move

# ---------------------------------------------------------------------- rules

FOURS = st.binary(min_size=4, max_size=4).filter(any)
SIXES = st.binary(min_size=16, max_size=16).filter(lambda a: any(a) and a[:12] not in (bytes(10) + b"\xff\xff", bytes(12)))
PORTS = st.integers(1, 0xFFFF)
MAPPED = bytes(10) + b"\xff\xff"


def written(address: bytes | None, port: int | None) -> str:
    host = "*" if address is None else text(address)
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@st.composite
def sides(draw: st.DrawFn) -> tuple[bytes | None, int | None, bytes | None, int | None]:
    """(address, port, new address, new port) of a rule that makes sense."""
    kind = draw(st.sampled_from([FOURS, SIXES]))
    address, port = draw(st.none() | kind), draw(PORTS)
    if address is None:
        return None, port, None, draw(PORTS)
    port = draw(st.sampled_from([None, port]))
    new_port = draw(st.none() | PORTS) if port is not None else None
    return address, port, draw(kind if new_port is None else st.none() | kind), new_port


@given(sides())
def test_a_rule_is_read_as_it_was_written(sides: tuple[bytes | None, int | None, bytes | None, int | None]) -> None:
    address, port, new_address, new_port = sides
    new = f":{new_port}" if new_address is None else written(new_address, new_port)
    rule = Rule(f"{written(address, port)}={new}")
    assert (rule.address, rule.port, rule.new_address, rule.new_port) == sides


@given(sides(), FOURS | SIXES, PORTS)
def test_what_is_not_named_stays(
    sides: tuple[bytes | None, int | None, bytes | None, int | None], other: bytes, other_port: int
) -> None:
    address, port, new_address, new_port = sides
    new = f":{new_port}" if new_address is None else written(new_address, new_port)
    remap = Remap([f"{written(address, port)}={new}"])
    hit_port = other_port if port is None else port
    here = address if address is not None else other
    assert remap.apply((here, hit_port)) == (
        here if new_address is None else new_address,
        hit_port if new_port is None else new_port,
    )
    if address is not None and other != address:
        assert remap.apply((other, hit_port)) == (other, hit_port)
    if port is not None and other_port != port:
        assert remap.apply((here, other_port)) == (here, other_port)
        assert remap.apply((here, None)) == (here, None)  # a raw socket has no port


@given(FOURS, FOURS, PORTS)
def test_ipv4_in_ipv6_sockets_stays_in_them(old: bytes, new: bytes, port: int) -> None:
    remap = Remap([f"{text(old)}={text(new)}"])
    assert remap.apply((MAPPED + old, port)) == (MAPPED + new, port)
    mapped = Remap([f"{text(MAPPED + old)}={text(new)}"])
    assert mapped.apply((old, port)) == (new, port)


def test_address_and_port_may_come_from_different_rules_and_the_first_wins() -> None:
    remap = Remap(["10.0.0.1:80=:8080", "10.0.0.1=10.0.0.2", ":80=:9", "10.0.0.1=10.0.0.3", "10.0.0.2=10.0.0.4"])
    one = socket.inet_aton("10.0.0.1")
    assert remap.apply((one, 80)) == (socket.inet_aton("10.0.0.2"), 8080)
    assert remap.apply((one, 81)) == (socket.inet_aton("10.0.0.2"), 81)
    assert remap.apply((socket.inet_aton("1.2.3.4"), 80)) == (socket.inet_aton("1.2.3.4"), 9)
    assert remap.unused() == ["10.0.0.2=10.0.0.4"]


@pytest.mark.parametrize(
    "rule",
    [
        "", "=", "10.0.0.1", "10.0.0.1=", "=10.0.0.1", "*=10.0.0.1", "10.0.0.1=*", "10.0.0.1=fd00::1", "fd00::1=10.0.0.1",
        "10.0.0=10.0.0.1", "10.0.0.1:0=10.0.0.2:1", "10.0.0.1:65536=:1", "10.0.0.1:=:1", ":x=:1", ":80=10.0.0.1:80",
        "10.0.0.1=10.0.0.2:80", "[fd00::1=fd00::2", "[fd00::1]80=:1", "[fd00::1]:=:1", "fe80::1%eth0=fe80::2",
        "10.0.0.1=0.0.0.0", "fd00::1=::", ":+80=:1", ":\u0662=:1", "localhost=10.0.0.1",
    ],
)  # fmt: skip
def test_rules_that_make_no_sense(rule: str) -> None:
    with pytest.raises(UsageError, match="--remap-address"):
        Rule(rule)


@given(st.text(max_size=30))
def test_any_text_is_a_rule_or_a_usage_error(rule: str) -> None:
    try:
        Rule(rule)
    except UsageError:
        pass


ENDS = st.tuples(st.sampled_from([b"\x7f\0\0\1", b"\x0a\0\0\1", b"\x0a\0\0\2", MAPPED + b"\x7f\0\0\1", bytes(15) + b"\1"]),
                 st.integers(78, 82))  # fmt: skip
RULES = st.lists(
    st.sampled_from([":80=:8080", "*:79=:8079", "127.0.0.1=127.0.0.9", "10.0.0.1=10.0.0.3", "10.0.0.2:81=10.0.0.4:8081", "::1=fd00::1"]),
    unique=True,
)  # fmt: skip


@given(st.lists(st.tuples(ENDS, ENDS), max_size=6, unique=True), RULES)
def test_both_ends_of_a_pair_agree_on_where_they_are(pairs: list[tuple[tuple[bytes, int], ...]], rules: list[str]) -> None:
    sockets = []
    for here, there in pairs:
        sockets += [Socket(len(sockets), 6, here, there, connection=True), Socket(len(sockets) + 1, 6, there, here, connection=True)]
    move(sockets, Remap(rules))
    for one, other in zip(sockets[::2], sockets[1::2], strict=True):
        assert one.paired
        assert not one.severed
        assert (one.new_local, one.new_peer) == (other.new_peer, other.new_local)


@given(ENDS, ENDS, RULES)
def test_a_connection_to_the_outside_is_severed_if_and_only_if_it_moves(
    here: tuple[bytes, int], there: tuple[bytes, int], rules: list[str]
) -> None:
    one = Socket(1, 6, here, there, connection=True)
    remap = Remap(rules)
    move([one], remap)
    if (unmapped(here[0]), here[1]) == (unmapped(there[0]), there[1]):
        return  # it is connected to itself
    assert one.severed == (one.new_local != here or one.new_peer != there)
    if all(rule[0] in ":*" and not rule.startswith("::") for rule in rules):
        assert one.new_peer == there, "a port alone means ports of the tree"


# ---------------------------------------------------------------------- whole trees

HEAD = """
import os, struct
from socket import *
errors = []
def same(what, a, b):
    if a != b: errors.append(f"{what}: {a!r} is not {b!r}")
def server(host, port, family=AF_INET):
    s = socket(family, SOCK_STREAM); s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); s.bind((host, port)); s.listen(4); return s
"""
TAIL = "\ndone(not errors, '; '.join(errors)[:2000])\n"
ESTABLISHED = {"tcp_established": True}


@pytest.fixture(autouse=True)
def network(request: pytest.FixtureRequest) -> Iterator[None]:
    if "program" not in request.fixturenames:
        yield
        return
    with own_network():
        for address in ("10.77.0.1/32", "10.77.0.2/32"):
            ip("address", "add", address, "dev", "lo")
        with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
            file.write("0 0")
        for address in ("fd77::1/128", "fd77::2/128"):
            ip("address", "add", address, "dev", "lo", "nodad")
        yield


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def program(start: Targets) -> Callable[[str, str], Target]:
    return lambda first, second: start.python(HEAD + first + "\nready()\nwait_told('go')\n" + second + TAIL)


def moved(target: Target, images: str, *rules: str, dump: dict[str, object] | None = None, **options: object) -> None:
    torpor.dump(target.pid, images, **(dump or {}))
    target.wait_gone()
    torpor.restore(images, remap_address=list(rules), **options)


def test_sockets_of_all_kinds_come_up_at_the_new_address(program: Callable[[str, str], Target], images: str) -> None:
    target = program(
        """
tcp = server("10.77.0.1", 7000)
udp = socket(AF_INET, SOCK_DGRAM); udp.bind(("10.77.0.1", 7001)); udp.connect(("127.0.0.1", 9))
free = socket(AF_INET, SOCK_DGRAM); free.bind(("", 7002))
raw = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP); raw.bind(("10.77.0.1", 0))
mapped = server("::ffff:10.77.0.1", 7003, AF_INET6)
six = server("fd77::1", 7004, AF_INET6)
far = socket(AF_INET6, SOCK_DGRAM); far.connect(("fd77::1", 9))
ping = socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP); ping.bind(("10.77.0.1", 7777))
multicast = socket(AF_INET, SOCK_DGRAM); multicast.setsockopt(0, IP_MULTICAST_IF, inet_aton("10.77.0.1"))
""",
        """
same("tcp", tcp.getsockname(), ("10.77.0.2", 7000))
same("udp", (udp.getsockname(), udp.getpeername()), (("10.77.0.2", 7001), ("127.0.0.1", 9)))
same("free", free.getsockname(), ("0.0.0.0", 7002))
same("raw", raw.getsockname()[0], "10.77.0.2")
same("ping", ping.getsockname(), ("10.77.0.2", 7777))
same("mapped", mapped.getsockname()[:2], ("::ffff:10.77.0.2", 7003))
same("six", six.getsockname()[:2], ("fd77::2", 7004))
same("far", (far.getsockname()[0], far.getpeername()[:2]), ("fd77::2", ("fd77::2", 9)))
same("multicast", multicast.getsockopt(0, IP_MULTICAST_IF, 4), inet_aton("10.77.0.2"))
c = create_connection(("10.77.0.2", 7000)); c.send(b"x"); same("accept", tcp.accept()[0].recv(1), b"x")
c = create_connection(("10.77.0.2", 7003)); c.send(b"x"); same("accept", mapped.accept()[0].recv(1), b"x")
""",
    )
    moved(target, images, "10.77.0.1=10.77.0.2", "fd77::1=fd77::2", ":7777=:1", ":1=:2")
    shown = subprocess.run(["ss", "-anH"], capture_output=True, text=True, check=True).stdout
    assert "10.77.0.1:" not in shown
    assert "fd77::1]:" not in shown
    target.go()


PAIR = """
keep = server("{host}", 80, {family})
a = create_connection(("{reach}", 80)); b, _ = keep.accept()
a.send(b"to b"); b.send(b"to a"); port = a.getsockname()[1]
"""
PAIR_GOES_ON = """
same("listener", keep.getsockname()[:2], ("{new_host}", 8080))
same("a", (a.getsockname()[:2], a.getpeername()[:2]), (("{new}", port), ("{new}", 8080)))
same("b", (b.getsockname()[:2], b.getpeername()[:2]), (("{new_b}", 8080), ("{new_b}", port)))
same("queues", (a.recv(9), b.recv(9)), (b"to a", b"to b"))
a.send(b"1"); same("on", b.recv(1), b"1"); b.send(b"2"); same("back", a.recv(1), b"2"); a.close(); same("end", b.recv(1), b"")
c = create_connection(("{new}", 8080)); c.send(b"x"); same("accept", keep.accept()[0].recv(1), b"x")
"""


@pytest.mark.parametrize(
    ("host", "reach", "family", "rules", "new_host", "new", "new_b"),
    [
        ("0.0.0.0", "127.0.0.1", "AF_INET", [":80=:8080"], "0.0.0.0", "127.0.0.1", "127.0.0.1"),
        ("10.77.0.1", "10.77.0.1", "AF_INET", ["10.77.0.1=10.77.0.2", "*:80=*:8080"], "10.77.0.2", "10.77.0.2", "10.77.0.2"),
        ("::", "10.77.0.1", "AF_INET6", ["10.77.0.1=10.77.0.2", ":80=:8080"], "::", "10.77.0.2", "::ffff:10.77.0.2"),
        ("fd77::1", "fd77::1", "AF_INET6", ["fd77::1=fd77::2", "[fd77::1]:80=:8080"], "fd77::2", "fd77::2", "fd77::2"),
    ],
)  # fmt: skip
def test_connections_within_the_tree_go_on_elsewhere(
    program: Callable[[str, str], Target], images: str, host: str, reach: str, family: str, rules: list[str],
    new_host: str, new: str, new_b: str,
) -> None:  # fmt: skip
    target = program(
        PAIR.format(host=host, reach=reach, family=family), PAIR_GOES_ON.format(new_host=new_host, new=new, new_b=new_b)
    )
    moved(target, images, *rules, dump=ESTABLISHED, **ESTABLISHED)
    target.go()


def listening(host: str) -> socket.socket:
    made = socket.socket()
    made.bind((host, 0))
    made.listen(4)
    return made


def test_a_connection_to_the_outside_is_refused_and_nothing_is_left(
    program: Callable[[str, str], Target], images: str
) -> None:
    with listening("10.77.0.2") as outside:
        target = program(
            f"s = socket(); s.bind(('10.77.0.1', 0)); s.connect({outside.getsockname()}); t = socket(); t.bind(('10.77.0.1', 0)); t.connect({outside.getsockname()})",
            "same('sent', s.send(b'x'), 1); same('name', s.getsockname()[0], '10.77.0.1')",
        )
        peer, _ = outside.accept()
        torpor.dump(target.pid, images, **ESTABLISHED)
        target.wait_gone()
        with pytest.raises(torpor.Blockers, match=r"cannot go on as 10\.77\.0\.2") as caught:
            torpor.restore(images, remap_address=["10.77.0.1=10.77.0.2"], **ESTABLISHED)
        assert len(caught.value.causes) == 2
        assert "--tcp-close" in str(caught.value)
        assert target.state() is None
        # A port alone does not concern the far end, which is not of the tree.
        torpor.restore(images, remap_address=[f":{outside.getsockname()[1]}=:9"], **ESTABLISHED)
        target.tell("go")
        peer.settimeout(20)
        assert peer.recv(1) == b"x"
        target.go()
        peer.close()


def test_closing_what_cannot_go_on_and_nothing_else(program: Callable[[str, str], Target], images: str) -> None:
    with listening("10.77.0.2") as outside, listening("127.0.0.1") as near:
        target = program(
            PAIR.format(host="0.0.0.0", reach="10.77.0.1", family="AF_INET")
            + f"s = socket(); s.bind(('10.77.0.1', 0)); s.connect({outside.getsockname()}); n = create_connection({near.getsockname()})",
            PAIR_GOES_ON.format(new_host="0.0.0.0", new="10.77.0.2", new_b="10.77.0.2")
            + """
same('closed', s.recv(9), b'')
try: s.send(b'x'); errors.append('sent')
except BrokenPipeError: pass
same('near', n.send(b'n'), 1)
""",
        )
        peer, _ = outside.accept()
        neighbour, _ = near.accept()
        moved(
            target, images, "10.77.0.1=10.77.0.2", ":80=:8080", dump=ESTABLISHED, tcp_established=True, tcp_close=True
        )
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        assert not tables, "the lock of the dump is lifted, of what is closed as well"
        target.tell("go")
        neighbour.settimeout(20)
        assert neighbour.recv(1) == b"n"
        target.go()
        peer.send(b"x")
        peer.settimeout(20)
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        peer.close(), neighbour.close()


def test_tcp_close_alone_closes_all_and_lifts_the_lock(program: Callable[[str, str], Target], images: str) -> None:
    target = program(
        PAIR.format(host="0.0.0.0", reach="10.77.0.1", family="AF_INET"),
        "same('closed', (a.recv(9), b.recv(9)), (b'', b'')); same('name', keep.getsockname(), ('0.0.0.0', 8080))",
    )
    moved(target, images, ":80=:8080", dump=ESTABLISHED, tcp_close=True)
    target.go()


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("10.77.0.1=10.77.0.9", r"no address 10\.77\.0\.9.*ip address add"),
        ("10.77.0.1:7000=:7100", r"10\.77\.0\.1:7100 is in use by another process"),
        ("10.77.0.1:7000=:7001", r"puts two sockets at 10\.77\.0\.1:7001"),
    ],
)
def test_what_stands_in_the_way_is_found_before_anything_is_made(
    program: Callable[[str, str], Target], images: str, monkeypatch: pytest.MonkeyPatch, rule: str, why: str
) -> None:
    from torpor.resources.files import inet

    target = program(
        'one = server("10.77.0.1", 7000); two = server("10.77.0.1", 7001)',
        'same("name", one.getsockname(), ("10.77.0.1", 7000))',
    )
    torpor.dump(target.pid, images)
    target.wait_gone()
    with socket.socket() as other:
        other.bind(("10.77.0.1", 7100))
        other.listen(1)

        def never(*_: object) -> None:
            raise AssertionError("a socket was made")

        with monkeypatch.context() as patched:
            patched.setattr(inet, "_make_all", never)
            with pytest.raises(torpor.Unsupported, match=why):
                torpor.restore(images, remap_address=[rule])
        assert target.state() is None
    torpor.restore(images)
    target.go()


def test_explained_and_as_a_command(program: Callable[[str, str], Target], images: str) -> None:
    target = program('one = server("10.77.0.1", 7000)', 'same("name", one.getsockname(), ("10.77.0.2", 7100))')
    torpor.dump(target.pid, images)
    target.wait_gone()
    rules = ["--remap-address", "10.77.0.1=10.77.0.2", "--remap-address=:7000=:7100", "--remap-address", ":5=:6"]
    done = run_torpor("restore", images, "--explain", *rules).must()
    assert "TCP socket 10.77.0.1:7000 comes up as 10.77.0.2:7100\n" in done.output
    assert target.state() is None
    bad = run_torpor("restore", images, "--remap-address", "10.77.0.1")
    assert bad.status == 1
    assert "--remap-address 10.77.0.1: it is not of the form OLD=NEW" in bad.output
    done = run_criu("restore", images, "-d", *rules).must()
    assert "--remap-address :5=:6: no socket is concerned" in done.log
    wait_until("it is back", target.alive)
    target.go()
