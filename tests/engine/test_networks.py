"""Network namespaces of a tree's own: made anew, joined again, left to the caller, and held back meanwhile."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets, Verbs, run_torpor, wait_until
from kit.apart import child_apart
from kit.files import slurp
from kit.network import own_network
from kit.verbs import SOURCES
from torpor.errors import ImageError, TorporError, Unsupported

from .conftest import Survives

PORT = 8080
MARK = 0xC114
MARK_RULE = "table inet CRIU-"


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [one for one in programs if shutil.which(one) is None]
    return pytest.mark.skipif(bool(missing), reason=f"there is no {', '.join(missing)}")


def net(pid: int | str = "self") -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


@pytest.fixture(autouse=True)
def stays_at_home() -> Iterator[None]:
    """Whatever happens, this thread ends up in the network namespace that it was in."""
    before = net("thread-self")
    yield
    assert net("thread-self") == before


# ---------------------------------------------------------------------- made anew

OWN = """
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/socket.h>

static char before[1 << 16], after[1 << 16];

static void must(const char *command)
{
	if (system(command))
		fail("%s", command);
}

static void put(const char *path, const char *value)
{
	int fd = MUST(open(path, O_WRONLY));

	MUST(write(fd, value, strlen(value)));
	MUST(close(fd));
}

static void look(char *into)
{
	FILE *all = popen(
		"exec 2>&1; ip -o address; ip -o link; ip route show table all; ip -6 route show table all; ip rule; "
		"ip -6 rule; nft -s list ruleset; iptables-legacy-save | sed 's/^#.*//; s/\\\\[.*//'; "
		"cd /proc/sys/net && grep -r . ipv4/ip_default_ttl ipv4/ip_local_port_range ipv4/ip_forward ipv4/tcp_rmem "
		"ipv4/conf unix core/somaxconn ipv6/conf/all ipv6/conf/default ipv4/ping_group_range "
		"netfilter/nf_conntrack_tcp_timeout_established 2>/dev/null | sort", "r");
	size_t size = fread(into, 1, sizeof(before) - 1, all);

	CHECK(size > 5000);
	pclose(all);
}

static void exchange(int from, int to)
{
	struct timeval patience = {5, 0};
	char got[6] = "";

	MUST(setsockopt(to, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)));
	MUST(write(from, "hello", 5));
	CHECK_EQ(recv(to, got, 5, MSG_WAITALL), 5);
	CHECK(strcmp(got, "hello") == 0);
}

int main(void)
{
	struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(80), .sin_addr.s_addr = inet_addr("10.9.8.7")};
	int listener, near, far, mine;

	MUST(unshare(CLONE_NEWNET));
	must("ip link set lo mtu 5000 up && ip address add 10.9.8.7/24 dev lo && ip address del 127.0.0.1/8 dev lo");
	must("ip -6 address add fd00::7/128 dev lo && ip route add 10.1.0.0/16 dev lo && ip route add blackhole 10.2.0.0/16");
	must("ip rule add from 10.9.8.7 table 77 priority 500 && ip route add 10.3.0.0/16 dev lo table 77");
	must("ip -6 rule add from fd00::7 table 78 priority 600 && ip -6 route add unreachable fd01::/64");
	put("/proc/sys/net/ipv4/ip_default_ttl", "33");
	put("/proc/sys/net/ipv4/ip_local_port_range", "20000 20100");
	put("/proc/sys/net/ipv4/ip_forward", "1");
	put("/proc/sys/net/ipv4/conf/default/rp_filter", "1");
	put("/proc/sys/net/ipv4/conf/lo/accept_local", "1");
	put("/proc/sys/net/core/somaxconn", "77");
	put("/proc/sys/net/unix/max_dgram_qlen", "33");
	put("/proc/sys/net/ipv4/ping_group_range", "5 6");
	must("nft add table ip kit && nft 'add chain ip kit input { type filter hook input priority 0; policy drop; }' && "
	     "nft add rule ip kit input ct state new,established ct mark set 77 accept");
	must("iptables-legacy -w -A OUTPUT -p udp --dport 9 -j DROP");
	put("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established", "4321");
	listener = MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(bind(listener, (struct sockaddr *)&place, sizeof(place)));
	MUST(listen(listener, 5));
	near = MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(connect(near, (struct sockaddr *)&place, sizeof(place)));
	far = MUST(accept(listener, NULL, NULL));
	exchange(near, far);
	/* From now on a packet passes only if its connection is known, and as the one that it is. */
	must("nft flush chain ip kit input && nft add rule ip kit input ct state established ct mark 77 counter accept");
	exchange(far, near);
	mine = MUST(open("/proc/self/ns/net", O_RDONLY));
	look(before);
	ready();
	wait_told("go");
	look(after);
	for (char *a = before, *b = after; *a || *b; a++, b++)
		if (*a != *b)
			fail("%.300s\\nis now\\n%.300s", a - (a - before < 60 ? a - before : 60), b);
	exchange(near, far);
	exchange(far, near);
	MUST(setns(mine, CLONE_NEWNET));
	look(after);
	CHECK(strcmp(before, after) == 0);
	pass();
}
"""


@needs("ip", "nft", "iptables-legacy")
def test_a_network_of_its_own_with_rules_and_connections(survives: Survives) -> None:
    """Packets pass only in connections that the kernel tracks: that it does must be restored, too."""
    survives(OWN, options={"tcp_established": True}, ignore=("*/namespaces/net", "*/fds/*", "*/fd/*"))


# ---------------------------------------------------------------------- joined, or the caller's

SERVER = """
#include <netinet/in.h>
#include <sys/socket.h>

int main(void)
{
	struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(8080), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int listener = MUST(socket(AF_INET, SOCK_STREAM, 0)), taken, on = 1;

	MUST(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)));
	MUST(bind(listener, (struct sockaddr *)&place, sizeof(place)));
	MUST(listen(listener, 5));
	ready();
	while (!told("go")) {
		struct pollfd poll_fd = {.fd = listener, .events = POLLIN};

		if (poll(&poll_fd, 1, 20) == 1) {
			taken = MUST(accept(listener, NULL, NULL));
			MUST(write(taken, "served", 6));
			MUST(close(taken));
		}
	}
	pass();
}
"""


def answer(timeout: float = 5.0) -> bytes | None:
    """What the server says to a client in our network namespace; None if packets get lost."""
    with socket.socket() as client:
        client.settimeout(timeout)
        try:
            client.connect(("127.0.0.1", PORT))
            return client.recv(100)
        except TimeoutError:
            return None


def tables() -> str:
    done = subprocess.run(["nft", "list", "ruleset"], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


class Elsewhere:
    """A network namespace that stays: as a file, and to be entered."""

    def __init__(self) -> None:
        with own_network():
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.inode = os.fstat(self.fd).st_ino
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        self._libc = ctypes.CDLL(None, use_errno=True)

    def enter(self) -> None:
        """For good; also in a child without our descriptors."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._into(fd)
        os.close(fd)

    def _into(self, fd: int) -> None:
        assert self._libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())

    def __enter__(self) -> None:
        self._back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._into(self.fd)

    def __exit__(self, *_: object) -> None:
        self._into(self._back)
        os.close(self._back)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    made = Elsewhere()
    yield made
    os.close(made.fd)


@pytest.fixture
def server(start: Targets, elsewhere: Elsewhere) -> Target:
    return start.c(SERVER, setup=elsewhere.enter).wait_ready()


@needs("nft")
def test_a_network_is_held_back_until_it_is_joined_again(
    server: Target, elsewhere: Elsewhere, images: str, verbs: Verbs
) -> None:
    with elsewhere:
        assert answer() == b"served"
    running = os.path.join(images, "running")
    os.mkdir(running)
    verbs.dump(server.pid, running, leave_running=True)
    with elsewhere:
        assert answer() == b"served"
        assert verbs.name == "untouched" or not tables()
    if verbs.name == "untouched":
        return
    verbs.dump(server.pid, images)
    server.wait_gone()
    with elsewhere:
        assert answer(0.3) is None, "a reset would tell that nobody is there"
        assert f"meta mark {MARK:#010x} accept" in tables()
    assert MARK_RULE not in tables(), "the host's own network is held back"
    joined = (("net", elsewhere.path, ""),) if verbs.name != "command" else (f"net:{elsewhere.path}",)
    server.pid = verbs.restore(images, join_ns=joined)
    assert net(server.pid) == f"net:[{elsewhere.inode}]"
    with elsewhere:
        assert answer() == b"served"
        assert not tables()
    server.go()


@needs("nft")
@pytest.mark.parametrize("value", [":web", ""])
def test_a_network_that_the_caller_hands_over(server: Target, elsewhere: Elsewhere, images: str, value: str) -> None:
    key = value[1:] or f"net[{elsewhere.inode}]"
    with elsewhere:
        subprocess.run(["ip", "link", "add", "kit0", "type", "veth", "peer", "name", "kit1"], check=True)
    with pytest.raises(Unsupported, match=r"interface kit[01] \(veth\)") as refused:
        torpor.dump(server.pid, images)
    assert f"--external net[{elsewhere.inode}]" in refused.value.hint
    with elsewhere:
        assert answer() == b"served"
    torpor.dump(server.pid, images, external=[f"net[{elsewhere.inode}]{value}"])
    server.wait_gone()
    with pytest.raises(Unsupported, match="none was given") as missing:
        torpor.restore(images)
    assert f"fd[N]:{key}" in missing.value.hint
    with elsewhere:
        assert answer(0.3) is None, "a restore that failed has let packets through"
    server.pid = torpor.restore(images, inherit_fd=[(elsewhere.fd, key)]).pid
    assert net(server.pid) == f"net:[{elsewhere.inode}]"
    with elsewhere:
        assert answer() == b"served"
    server.go()


def test_a_tree_of_the_host_restored_into_another_network(start: Targets, elsewhere: Elsewhere, images: str) -> None:
    target = start.c('int main(void) { ready(); wait_told("go"); pass(); }')
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.pid = torpor.restore(images, join_ns=[("net", elsewhere.path, "")]).pid
    assert net(target.pid) == f"net:[{elsewhere.inode}]"
    target.go()


# ---------------------------------------------------------------------- what goes wrong


def test_what_is_no_network_namespace_cannot_be_joined(server: Target, images: str) -> None:
    torpor.dump(server.pid, images)
    server.wait_gone()
    with pytest.raises(TorporError, match="network namespace"):
        torpor.restore(images, join_ns=[("net", "/proc/self/ns/uts", "")])
    done = run_torpor("restore", "-D", images, "--join-ns", "uts:/proc/self/ns/uts")
    assert done.status != 0 and "not implemented" in done.output


def test_several_networks_in_one_tree_are_refused(start: Targets, images: str) -> None:
    target = start.c(child_apart("CLONE_NEWNET"))
    with pytest.raises(Unsupported, match="not in the network namespace of the root"):
        torpor.dump(target.pid, images)
    assert not os.listdir(images)
    target.go()


STRANGER = """
#include <sys/socket.h>

int main(void)
{
	int home = MUST(open("/proc/self/ns/net", O_RDONLY));

	MUST(unshare(CLONE_NEWNET));
	MUST(socket(KIND, SOCK_DGRAM, 0));
	MUST(setns(home, CLONE_NEWNET));
	ready();
	wait_told("go");
	pass();
}
"""


@pytest.mark.parametrize("kind", ["AF_INET", "AF_UNIX", "AF_NETLINK"])
def test_sockets_of_another_network_are_refused(start: Targets, images: str, kind: str) -> None:
    """Made again they would be where the program is."""
    target = start.c(STRANGER.replace("KIND", kind))
    with pytest.raises(Unsupported, match="a socket of another network namespace") as error:
        torpor.dump(target.pid, images)
    assert error.value.hint
    assert not os.listdir(images)
    target.go()


SCRIPT = """#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
nft list ruleset > "$0.rules"; touch "$0.held"
kill -KILL $PPID
"""


@needs("nft", "nsenter")
def test_a_dump_that_is_killed_lets_packets_through(server: Target, elsewhere: Elsewhere, images: str) -> None:
    """All is written and held back when it dies; nothing of it may stay."""
    script = os.path.join(images, "action")
    with open(script, "w") as file:
        file.write(SCRIPT.replace("nft list", f"nsenter --net={elsewhere.path} nft list"))
    os.chmod(script, 0o755)
    argv = [sys.executable, "-m", "torpor", "dump", str(server.pid), "-D", images, "--action-script", script]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": SOURCES}, check=False)
    assert done.returncode == -signal.SIGKILL and os.path.exists(f"{script}.held")
    assert MARK_RULE in slurp(f"{script}.rules").decode(), "it was not held back when the dump was killed"
    with elsewhere:
        wait_until("the lock is lifted", lambda: not tables())
        assert answer() == b"served"
    server.go()


def change(images: str, name: str, content: bytes) -> None:
    with open(os.path.join(images, name), "wb") as file:
        file.write(content)


HEAD = struct.pack("=I", 0x47361222)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("ifaddr-9.img", b"abcd", "does not begin"),
        ("ifaddr-9.img", HEAD + struct.pack("=IHHII", 400, 20, 2, 0, 0) + bytes(8), "400 bytes"),
        ("ifaddr-9.img", HEAD + struct.pack("=IHHII", 24, 16, 2, 0, 0) + bytes(8), "kind 16"),
        ("ifaddr-9.img", HEAD + bytes(7), "cut off"),
        ("nftables-9.img", b'table ip a {\n}\ninclude "/etc/passwd"\n', "line 3"),
        ("nftables-9.img", b'table ip a { include "/etc/passwd" }', "line 1"),
        ("iptables-9.img", b"*filter\n--modprobe=/bin/sh\nreboot\n", "line 3"),
        ("netns-ct-9.img", HEAD, "cut off"),
        ("netns-ct-9.img", struct.pack("=IHHII", 24, 20, 2, 0, 0) + bytes(8), "no.* about a tracked connection"),
    ],
)
def test_bad_images(server: Target, images: str, name: str, content: bytes, what: str) -> None:
    torpor.dump(server.pid, images)
    server.wait_gone()
    change(images, name, content)
    with pytest.raises(ImageError, match=what) as error:
        torpor.restore(images)
    assert name in str(error.value)
    assert not server.alive()


@needs("nft")
def test_rules_that_cannot_be_set_are_told(server: Target, images: str) -> None:
    torpor.dump(server.pid, images)
    server.wait_gone()
    change(images, "nftables-9.img", b"table ip a {\n nonsense\n}\n")
    with pytest.raises(TorporError, match=r"network namespace: nft: .*syntax error"):
        torpor.restore(images)
    assert not server.alive()


def test_settings_outside_of_the_network_are_refused(server: Target, images: str) -> None:
    from torpor.images import schema as pb
    from torpor.images.store import ImageReader

    torpor.dump(server.pid, images)
    server.wait_gone()
    folder = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        entry = ImageReader(folder).read_one("netns-9")
        entry.more.add(path="../kernel/hostname", value="mine")
        encoded = pb.encode(entry, "", "")
        magic = slurp(os.path.join(images, "netns-9.img"))[:8]
        change(images, "netns-9.img", magic + struct.pack("<I", len(encoded)) + encoded)
    finally:
        os.close(folder)
    with pytest.raises(ImageError, match="is no setting"):
        torpor.restore(images)
    assert os.uname().nodename != "mine"


def test_a_template_says_that_it_makes_no_networks(server: Target, images: str) -> None:
    torpor.dump(server.pid, images)
    server.wait_gone()
    with pytest.raises(Unsupported, match="network namespace of its own"):
        torpor.template(images)

