"""Sockets between a virtual machine and its host, as far as one kernel can show them."""

from __future__ import annotations

import socket

import pytest

from kit import Library, Targets
from kit.file_bench import Bench
from kit.host import host_state
from torpor.errors import Unsupported

PROGRAM = """
from socket import *
import select
fresh, bound, server = (socket(AF_VSOCK, SOCK_STREAM) for _ in range(3))
try: packets = socket(AF_VSOCK, SOCK_SEQPACKET)
except OSError: packets = socket(AF_VSOCK, SOCK_STREAM)  # this kernel, or its transport, has none
bound.bind((VMADDR_CID_ANY, 70001)); packets.bind((VMADDR_CID_ANY, 70003))
server.bind((VMADDR_CID_ANY, 70002)); server.listen(5); server.setblocking(False)
server.setsockopt(40, 2, 1 << 20); server.setsockopt(40, 0, 1 << 19)
def look(s): return s.getsockname(), s.type, s.getsockopt(SOL_SOCKET, SO_ACCEPTCONN), [s.getsockopt(40, o) for o in (0, 1, 2)], s.getblocking()
before = [look(s) for s in (fresh, bound, server, packets)]
ready(); wait_told("go")
after = [look(s) for s in (fresh, bound, server, packets)]
try: server.accept(); refused = False
except BlockingIOError: refused = True
try: socket(AF_VSOCK, SOCK_STREAM).bind((VMADDR_CID_ANY, 70002)); refused = False
except OSError: pass
done(after == before and refused, f"{before} {after} {refused}")
"""


@pytest.fixture(autouse=True)
def vsock() -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        pytest.skip(f"no AF_VSOCK here: {error}")


def test_new_bound_and_listening_ones(start: Targets, library: Library, images: str) -> None:
    target = start.python(PROGRAM)
    library.dump(target.pid, images)
    target.wait_gone()
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as other:
        other.bind((socket.VMADDR_CID_ANY, 70002))
        before = host_state(images)
        with pytest.raises(Unsupported, match="port 70002 is in use") as caught:
            library.restore(images)
        assert caught.value.hint
        assert host_state(images) == before
    library.restore(images)
    target.go()


def test_one_that_connects_is_refused() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as one, Bench() as bench:
        one.setblocking(False)
        try:
            one.connect((99, 70009))
        except BlockingIOError:
            pass
        except OSError as error:
            pytest.skip(f"there is no other side: {error}")
        with pytest.raises(Unsupported, match="the other kernel cannot be made to wait"):
            bench.check(one.fileno())
