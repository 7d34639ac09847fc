"""What is kept of a network namespace: messages as ip(8) saves them, settings, rules, and the lock of all of it."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.files import slurp_text
from kit.network import own_network
from torpor.errors import ImageError, TaskGone, TorporError, Unsupported
from torpor.images import schema as pb
from torpor.linux import netns, rtnetlink
from torpor.resources import net_link, net_namespace, net_others, net_rules, net_sysctls, network_lock


@pytest.fixture
def alone() -> Iterator[None]:
    with own_network():
        yield


def shown(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


@given(st.lists(st.binary(max_size=40)), st.integers(0, 0xFFFF))
def test_messages_come_back(bodies: list[bytes], kind: int) -> None:
    assert rtnetlink.unframed(rtnetlink.framed(kind, bodies)) == [(kind, body) for body in bodies]


@given(st.binary(max_size=100))
def test_messages_of_any_content_are_bounded(data: bytes) -> None:
    try:
        found = rtnetlink.unframed(data)
    except ValueError:
        return
    assert sum(16 + len(body) for _, body in found) <= len(data)


@pytest.mark.skipif(not shutil.which("ip"), reason="there is no ip")
@pytest.mark.parametrize(
    ("command", "magic", "kind", "bodies"),
    [
        ("address", net_link.ADDRESS_MAGIC, rtnetlink.RTM_NEWADDR, net_link._addresses),
        ("rule", net_link.RULE_MAGIC, rtnetlink.RTM_NEWRULE, lambda: net_link._rules(2)),
    ],
)
def test_as_ip_saves_it(alone: None, command: str, magic: int, kind: int, bodies: object) -> None:
    ours = struct.pack("=I", magic) + rtnetlink.framed(kind, bodies())  # type: ignore[operator]
    theirs = subprocess.run(["ip", command, "save"], stdout=subprocess.PIPE, check=True).stdout
    assert ours[:4] == theirs[:4]
    assert rtnetlink.unframed(ours[4:]) == rtnetlink.unframed(theirs[4:])


def connects(timeout: float) -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.settimeout(timeout)
        try:
            client.connect(server.getsockname())
        except TimeoutError:
            return False
        return True


@pytest.mark.parametrize("method", [network_lock.NFTABLES, network_lock.IPTABLES])
def test_everything_is_held_back(alone: None, monkeypatch: pytest.MonkeyPatch, method: int) -> None:
    program = "nft" if method == network_lock.NFTABLES else "iptables-restore"
    if network_lock.find_program(program) is None:
        pytest.skip(f"there is no {program}")
    if program != "nft":
        find = network_lock.find_program
        monkeypatch.setattr(network_lock, "find_program", lambda one: None if one == "nft" else find(one))
    assert connects(5)
    seen: list[network_lock.Lock] = []
    lock = network_lock.lock_all("iptables", before=seen.append)
    assert seen == [lock] and lock.method == method
    assert not connects(0.3)
    network_lock.lift(lock.method, lock.run_id, whole=True)
    assert connects(5)
    lock = network_lock.lock_all("iptables")
    lock.lift()
    assert connects(5)


def test_nothing_is_held_back_if_that_is_wanted(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_lock.lock_all("skip").method == network_lock.SKIP
    assert connects(5)
    monkeypatch.setattr(network_lock, "find_program", lambda one: None)
    with pytest.raises(Unsupported, match="no program `nft`") as error:
        network_lock.lock_all("nftables")
    assert "--network-lock skip" in error.value.hint


@pytest.mark.skipif(not shutil.which("nft"), reason="there is no nft")
def test_rules_without_a_program_are_refused(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net_rules.check()
    subprocess.run(["nft", "add table inet kit"], check=True)
    subprocess.run(["nft", "add table inet CRIU-1234"], check=True)
    assert net_rules.tables() == [("inet", "kit")]
    net_rules.check()
    monkeypatch.setattr(net_rules, "find_program", lambda one: None)
    with pytest.raises(Unsupported, match="rules of nftables") as error:
        net_rules.check()
    assert error.value.hint == "install nftables"


def test_settings_are_those_that_differ(alone: None) -> None:
    fresh = net_namespace.Fresh()
    assert fresh.links >= {"lo"}
    place = "/proc/sys/net/ipv4/ip_default_ttl"
    with open(place, "w") as file:
        file.write("77")
    entry = pb.netns_entry()
    net_sysctls.dump(entry, fresh.settings)
    assert ("ipv4/ip_default_ttl", "77") in [(one.path, one.value) for one in entry.more]
    assert len(entry.def_conf4) == len(net_sysctls.CONF4) == 30
    assert len(entry.all_conf6) == len(net_sysctls.CONF6) == 42
    with netns.Visit(netns.make()) as visit:
        assert visit.elsewhere
        net_sysctls.restore(entry, None, "netns-9.img", weak=False)
        assert slurp_text(place) == "77\n"
        with visit.away():
            assert slurp_text(place) == "77\n"
    entry.more.add(path="ipv4/no_such_setting", value="1")
    net_sysctls.restore(entry, None, "netns-9.img", weak=True)
    with pytest.raises(Unsupported, match=r"net.ipv4.no_such_setting.*|this kernel has no such setting"):
        net_sysctls.restore(entry, None, "netns-9.img", weak=False)


@pytest.mark.parametrize("path", ["/etc/passwd", "../vm/overcommit_memory", "ipv4//x", "", "ipv4/../../vm/x"])
def test_settings_lie_below_their_folder(alone: None, path: str) -> None:
    entry = pb.netns_entry()
    entry.more.add(path=path, value="1")
    with pytest.raises(ImageError, match="is no setting"):
        net_sysctls.restore(entry, None, "netns-9.img", weak=True)


def test_other_interfaces_are_refused_while_they_are_in_use(alone: None) -> None:
    subprocess.run(["ip", "link", "add", "kit0", "type", "veth", "peer", "name", "kit1"], check=True)
    with pytest.raises(Unsupported, match=r"kit[01] \(veth\)") as error:
        net_link.refuse_others(set, "do this")
    assert error.value.hint == "do this"
    net_link.refuse_others(lambda: {"kit0", "kit1"}, "")
    subprocess.run(["ip", "link", "set", "kit0", "up"], check=True)
    with pytest.raises(Unsupported, match="kit0"):
        net_link.refuse_others(lambda: {"kit0", "kit1"}, "")


def make_set() -> bool:
    """An empty set of addresses, as ipset(8) makes it; False where the kernel knows none."""
    words = b"".join(
        rtnetlink.attribute(kind, content)
        for kind, content in ((1, b"\6"), (2, b"kit\0"), (3, b"hash:ip\0"), (4, b"\0"), (5, b"\2"), (7 | 0x8000, b""))
    )
    try:
        rtnetlink.ask(6 << 8 | 2, bytes(4) + words, protocol=rtnetlink.NETLINK_NETFILTER, flags=rtnetlink.NLM_F_CREATE)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("ip xfrm state add src 1.2.3.4 dst 5.6.7.8 proto esp spi 1 mode transport enc ecb(cipher_null) ''", "IPsec (state)"),
        ("ip xfrm policy add src 10.0.0.0/8 dst 11.0.0.0/8 dir out", "IPsec (policy)"),
        ("tc qdisc add dev lo clsact", "queueing disciplines (clsact)"),
        ("ip nexthop add id 5 blackhole", "nexthops"),
        ("ipset create kit hash:ip", "sets of addresses (kit)"),
    ],
)
def test_what_is_not_made_again_is_named(alone: None, command: str, named: str) -> None:
    net_others.check("do this")
    done = make_set() if "ipset" in command else not subprocess.run(shlex.split(command), check=False).returncode
    if not done:
        pytest.skip("this kernel has none")
    with pytest.raises(Unsupported) as error:
        net_others.check("do this")
    assert named in str(error.value) and error.value.hint == "do this"


def test_a_visit_ends_where_it_began(alone: None) -> None:
    before = shown("readlink", "/proc/self/ns/net")
    fd = netns.make()
    with netns.Visit(fd) as visit:
        assert shown("readlink", "/proc/self/ns/net") == f"net:[{visit.inode}]\n" != before
        with visit.away():
            assert shown("readlink", "/proc/self/ns/net") == before
    assert shown("readlink", "/proc/self/ns/net") == before
    with netns.Visit(netns.own()) as visit:
        assert not visit.elsewhere
    with pytest.raises(TaskGone, match="task 4194303 is gone"):
        netns.of(4194303)
    wrong = os.open("/proc/self/ns/uts", 0)
    with pytest.raises((TorporError, OSError)):
        netns.Visit(wrong)
    assert shown("readlink", "/proc/self/ns/net") == before
