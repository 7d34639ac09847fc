"""Netlink sockets through the whole engine, in a network of the test's own."""



from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.network import own_network
from torpor.errors import Unsupported

PROGRAM = """
import os, struct, subprocess
from socket import *
def groups(s): return s.getsockopt(270, 9, 256).rstrip(b"\\0")
def look(s): return s.getsockname(), s.type, s.proto, groups(s), [s.getsockopt(270, o) for o in (3, 4, 5, 8, 10, 11, 12)], s.getpeername()
route = socket(AF_NETLINK, SOCK_RAW, 0); route.bind((0, 1)); route.setsockopt(270, 1, 36)
for option in (3, 4, 5, 11, 12): route.setsockopt(270, option, 1)
chosen = socket(AF_NETLINK, SOCK_DGRAM, 0); chosen.bind((7777, 0)); chosen.setsockopt(SOL_SOCKET, SO_RCVBUF, 30000)
peer = socket(AF_NETLINK, SOCK_DGRAM, 2); peer.bind((8888, 0)); peer.connect((7777, 0))
free = socket(AF_NETLINK, SOCK_RAW, 16)
all_ = route, chosen, peer, free
before = [look(s) for s in all_]
ready(); wait_told("go")
after = [look(s) for s in all_]
# RTM_GETLINK of interface 1: the kernel answers to the port
chosen.send(struct.pack("=IHHII", 32, 18, 1, 5, 0) + struct.pack("=BxHiII", 0, 0, 1, 0, 0)); chosen.settimeout(5)
answer = chosen.recv(9999)
done(after == before and answer[4:6] == b"\\x10\\0", f"{before} {after} {answer!r}")
"""


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


def test_ports_groups_and_options(start: Targets, library: Library, images: str) -> None:
    target = start.python(PROGRAM)
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    target.go()


def test_a_port_that_is_taken_is_replaced(start: Targets, library: Library, images: str) -> None:
    target = start.python(
        """
from socket import *
s = socket(AF_NETLINK, SOCK_RAW, 0); s.bind((4242, 1))
ready(); wait_told("go")
done(s.getsockname()[0] not in (0, 4242) and s.getsockname()[1] == 1, f"{s.getsockname()}")
"""
    )
    library.dump(target.pid, images)
    target.wait_gone()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as other:
        other.bind((4242, 0))
        library.restore(images)
    target.go()


def test_messages_that_wait_are_refused(start: Targets, library: Library, images: str) -> None:
    target = start.python(
        """
from socket import *
import struct
s = socket(AF_NETLINK, SOCK_RAW, 0); s.bind((0, 0))
s.send(struct.pack("=IHHII", 32, 18, 1, 5, 0) + struct.pack("=BxHiII", 0, 0, 1, 0, 0))
ready(); wait_told("go")
s.settimeout(5); done(len(s.recv(9999)) > 40)
"""
    )
    with pytest.raises(Unsupported, match="netlink messages wait"):
        library.dump(target.pid, images)
    target.go()
