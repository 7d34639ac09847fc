"""Netlink sockets through the whole engine, in a network of the test's own."""



from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.network import own_network
from torpor.errors import Unsupported

PROGRAM = """
import os, struct, subprocess
from socket import *
def groups(s): return s.getsockopt(270, 9, 256).rstrip(b"\\0")
def look(s): return s.getsockname(), s.getsockopt(SOL_SOCKET, SO_TYPE), s.proto, groups(s), [s.getsockopt(270, o) for o in (3, 4, 5, 8, 10, 11, 12)], s.getpeername()
route = socket(AF_NETLINK, SOCK_RAW, 0); route.bind((0, 1)); route.setsockopt(270, 1, 36)
for option in (3, 4, 5, 11, 12): route.setsockopt(270, option, 1)
chosen = socket(AF_NETLINK, SOCK_DGRAM, 0); chosen.bind((7777, 0)); chosen.setsockopt(SOL_SOCKET, SO_RCVBUF, 30000)
peer = socket(AF_NETLINK, SOCK_DGRAM, 2); peer.bind((8888, 0)); peer.connect((7777, 0))
free = socket(AF_NETLINK, SOCK_RAW, 16)
group = socket(AF_NETLINK, SOCK_RAW, 2); group.connect((0, 4))
all_ = route, chosen, peer, free, group
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


EVENTS = """
import errno, select, time
from socket import *
watch, quiet = socket(AF_NETLINK, SOCK_RAW, 0), socket(AF_NETLINK, SOCK_DGRAM, 0)
uevents = socket(AF_NETLINK, SOCK_RAW, 15); uevents.bind((0, 1))
for s in (watch, quiet): s.bind((0, 0x11)); s.setsockopt(SOL_SOCKET, SO_RCVBUF, 50000)
quiet.setsockopt(270, 5, 1)
look = lambda s: (s.getsockname(), s.getsockopt(SOL_SOCKET, SO_RCVBUF), s.getsockopt(SOL_SOCKET, 72))
before = [look(s) for s in (watch, quiet, uevents)]
tell("listens"); wait_told("happened"); time.sleep(0.1)
ready(); wait_told("go")
errors = []
def take(s):
    found = []
    s.setblocking(False)
    while True:
        try: found.append(s.recv(99999)[4:6] if s.proto == 0 else s.recv(9999).split(b"@")[0])
        except BlockingIOError: return found
        except OSError as error: found.append(errno.errorcode[error.errno])
after = [look(s) for s in (watch, quiet, uevents)]
if after != before: errors.append(f"{after} is not {before}")
polled = select.poll(); polled.register(watch, 0)
if [e for _, e in polled.poll(0)] != [8]: errors.append("no POLLERR")
found = take(watch), take(quiet), take(uevents)
if found != (["ENOBUFS"], [], ["ENOBUFS"]): errors.append(f"first {found}")
tell("more"); wait_told("done"); time.sleep(0.1)
found = take(watch), take(quiet), take(uevents)
if not (found[0] and found[0] == found[1] and found[0][0] == b"\\x11\\0"): errors.append(f"then {found}")
done(not errors, str(errors))
"""


def test_events_that_wait_are_lost_and_the_program_is_told(start: Targets, library: Library, images: str) -> None:
    """As if there had been too many of them; nobody else hears of it."""
    target = start.python(EVENTS, wait=False)
    target.wait_file("listens")
    subprocess.run(["ip", "tuntap", "add", "kit0", "mode", "tap"], check=True)
    target.tell("happened")
    target.wait_ready()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as witness:
        witness.bind((0, 0x11))
        library.dump(target.pid, images)
        target.wait_gone()
        library.restore(images)
        witness.setblocking(False)
        with pytest.raises(BlockingIOError):
            witness.recv(9999)
    target.tell("go")
    target.wait_file("more")
    subprocess.run(["ip", "link", "del", "kit0"], check=True)
    target.tell("done")
    target.go()


def test_a_second_dump_still_knows_that_events_were_lost(start: Targets, library: Library, images: str) -> None:
    target = start.python(
        """
from socket import *
import errno
s = socket(AF_NETLINK, SOCK_RAW, 0); s.bind((0, 1)); s.setblocking(False)
tell("listens"); wait_told("happened"); ready(); wait_told("go")
try: s.recv(9999); done(False)
except OSError as error: done(error.errno == errno.ENOBUFS, str(error))
""",
        wait=False,
    )
    target.wait_file("listens")
    subprocess.run(["ip", "tuntap", "add", "kit0", "mode", "tap"], check=True)
    target.tell("happened")
    target.wait_ready()
    for name in ("first", "second"):
        os.mkdir(f"{images}/{name}")
        library.dump(target.pid, f"{images}/{name}")
        target.wait_gone()
        library.restore(f"{images}/{name}")
    target.go()
