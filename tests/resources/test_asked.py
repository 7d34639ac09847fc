"""Sockets that answer alike are read once; what differs in anything that was asked is read anew."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from torpor.images import schema as pb
from torpor.resources import inet_options, sockopts
from torpor.resources.asked import Alike


@pytest.fixture
def sockets() -> Any:
    made = [socket.socket() for _ in range(4)]
    yield made
    for one in made:
        one.close()


def test_only_the_first_of_those_that_are_alike_is_worked_on(sockets: list[socket.socket]) -> None:
    worked: list[object] = []

    def make(sock: Any) -> int:
        worked.append(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            return int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
        return 0

    sockets[1].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for one in sockets[2:]:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 55)
    alike = Alike()
    usual = sockets[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    found = [alike.of(one.fileno(), "tcp", make) for one in sockets * 2]
    assert found == [0, usual, 55, 55] * 2
    assert len(worked) == 3
    assert alike.of(sockets[0].fileno(), "another", make) == 0
    assert len(worked) == 4


def test_an_error_is_an_answer(sockets: list[socket.socket]) -> None:
    def make(sock: Any) -> int:
        try:
            sock.getsockopt(socket.SOL_SOCKET, 9999, 4)
        except OSError as error:
            return error.errno or 0
        return 0

    alike = Alike()
    assert {alike.of(one.fileno(), 0, make) for one in sockets} == {errno.ENOPROTOOPT}
    with pytest.raises(OSError, match="non-socket"), open("/dev/null") as file:
        alike.of(file.fileno(), 1, lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE))


@pytest.mark.parametrize("changed", [None, (socket.SOL_SOCKET, socket.SO_PRIORITY, 3), (socket.IPPROTO_IP, 13, 2)])
def test_the_same_as_without(sockets: list[socket.socket], changed: tuple[int, int, int] | None) -> None:
    if changed:
        sockets[2].setsockopt(*changed)
    alike = Alike()

    def make(sock: Any) -> Any:
        entry = pb.inet_sk_entry(family=socket.AF_INET, type=socket.SOCK_STREAM, proto=0)
        entry.opts.CopyFrom(sockopts.read(sock))
        inet_options.read(sock, entry, connected=False)
        return entry

    for one in sockets:
        found = pb.inet_sk_entry()
        found.CopyFrom(alike.of(one.fileno(), 0, make))
        sockopts.read_own(one.fileno(), found.opts)
        plain = pb.inet_sk_entry(family=socket.AF_INET, type=socket.SOCK_STREAM, proto=0)
        plain.opts.CopyFrom(sockopts.dump(one.fileno()))
        inet_options.dump(one.fileno(), plain, connected=False)
        assert found == plain
