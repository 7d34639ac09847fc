"""--remap-address OLD=NEW: sockets of IPv4 and IPv6 that come up at another address or port than they had.

OLD is ADDRESS, ADDRESS:PORT or :PORT (also *:PORT), NEW says what takes its place; an IPv6 address with a port stands
in brackets. A rule looks at what the snapshot has, never at what another rule has made of it. Of all rules that match,
the first that names a new address gives the address, the first that names a new port gives the port. An IPv4 address
also stands for its form in IPv6 sockets (::ffff:…).

A port without an address means ports of the tree: at the far end of a socket it is changed only if the tree has that
end too. An address is changed at either end.

Pure: addresses are bytes (4 or 16), an end is (address, port).
"""

from __future__ import annotations

from _socket import inet_pton

from ..errors import UsageError
from ..linux.inet_diag import AF_INET, AF_INET6, text, unmapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    #: (address, port); the port is None where there is none, as of raw sockets.
    End = tuple[bytes, int | None]

_MAPPED = bytes(10) + b"\xff\xff"


class Rule:
    """One OLD=NEW. None: any, or as it was."""

    __slots__ = ("address", "new_address", "new_port", "port", "text")

    def __init__(self, rule: str) -> None:
        """Read it. Raises UsageError that says what is wrong with it."""
        self.text = rule
        old, equals, new = rule.partition("=")
        try:
            if not equals:
                raise ValueError("it is not of the form OLD=NEW")
            self.address, self.port = _end(old)
            self.new_address, self.new_port = _end(new)
            self._check()
        except ValueError as error:
            raise UsageError(f"--remap-address {rule}: {error}") from None

    def _check(self) -> None:
        if self.new_port is not None and self.port is None:
            raise ValueError("with a new port for every port of OLD; name the old one, too")
        if self.new_address is None:
            return
        if self.address is None:
            raise ValueError("with a new address for every address; name the old one, too")
        if len(self.address) != len(self.new_address):
            raise ValueError("an IPv4 address cannot become an IPv6 one, or the reverse")
        if any(self.address) and not any(self.new_address):
            raise ValueError(f"{text(self.new_address)} is no address of a machine")

    def matches(self, address: bytes, port: int | None, *, inside: bool) -> bool:
        """Does it concern this end? ``address`` is not mapped; ``inside``: it is one of the tree."""
        if self.address is None:
            return inside and self.port == port
        return self.address == address and self.port in (None, port)


def _end(word: str) -> tuple[bytes | None, int | None]:
    """ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT, :PORT or *:PORT"""
    if word.startswith("["):
        host, bracket, rest = word[1:].partition("]")
        if not bracket or (rest and rest[0] != ":") or rest == ":":
            raise ValueError(f"`{word}` is not of the form [ADDRESS]:PORT")
        return _address(host), _port(rest[1:]) if rest else None
    if word.count(":") > 1:
        return _address(word), None
    host, colon, port = word.partition(":")
    if not colon and host in ("", "*"):
        raise ValueError(f"`{word}` is neither an address nor a port")
    return (None if host in ("", "*") else _address(host)), _port(port) if colon else None


def _address(word: str) -> bytes:
    try:
        return unmapped(inet_pton(AF_INET6 if ":" in word else AF_INET, word))
    except OSError:
        raise ValueError(f"`{word}` is not an IP address") from None


def _port(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 6 and 0 < int(word) < 1 << 16):
        raise ValueError(f"`{word}` is not a port, which is between 1 and 65535")
    return int(word)


class Remap:
    """All rules of a restore."""

    def __init__(self, rules: Iterable[str]) -> None:
        """Raises UsageError for a rule that makes no sense."""
        self.rules = [Rule(rule) for rule in rules]
        #: Those that have matched something.
        self.used: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.rules)

    def apply(self, end: End, *, inside: bool = True) -> End:
        """What becomes of an end. ``inside``: it is one of the tree's own."""
        address, port = end
        plain = unmapped(address)
        new_address: bytes | None = None
        new_port: int | None = None
        for rule in self.rules:
            if rule.matches(plain, port, inside=inside):
                self.used.add(rule.text)
                new_address = rule.new_address if new_address is None else new_address
                new_port = rule.new_port if new_port is None else new_port
        if new_address is not None:
            address = new_address if len(plain) == len(address) else _MAPPED + new_address
        return address, port if new_port is None else new_port

    def unused(self) -> list[str]:
        """The rules that have matched nothing."""
        return [rule.text for rule in self.rules if rule.text not in self.used]


class Socket:
    """A socket as far as its addresses go, as it was and as it will be.

    ``connection``: of TCP, and neither end may change without the other knowing. ``local`` and ``peer`` are None where
    there is none.
    """

    __slots__ = ("connection", "key", "local", "new_local", "new_peer", "paired", "peer", "protocol")

    def __init__(self, key: int, protocol: int, local: End | None, peer: End | None, *, connection: bool) -> None:
        self.key = key
        self.protocol = protocol
        self.local, self.peer = local, peer
        self.new_local, self.new_peer = local, peer
        self.connection = connection
        #: Is the other end of the connection in the tree?
        self.paired = False

    @property
    def moved(self) -> bool:
        """Does it come up elsewhere, or connected to elsewhere?"""
        return (self.local, self.peer) != (self.new_local, self.new_peer)

    @property
    def severed(self) -> bool:
        """Is it a connection that cannot go on, for nobody tells its other end?"""
        return self.connection and self.moved and not self.paired


def move(sockets: list[Socket], remap: Remap) -> None:
    """Fill in ``new_local``, ``new_peer`` and ``paired`` of all sockets of a tree."""
    ends = {
        (one.protocol, _plain(one.local), _plain(one.peer))
        for one in sockets
        if one.connection and one.local and one.peer
    }
    bound = {(one.protocol, *_plain(one.local)) for one in sockets if not one.connection and one.local}
    for one in sockets:
        if one.local is not None:
            one.new_local = remap.apply(one.local)
        if one.peer is None:
            continue
        if one.connection and one.local is not None:
            inside = one.paired = (one.protocol, _plain(one.peer), _plain(one.local)) in ends
        else:
            inside = _is_bound_by_tree(one, bound)
        one.new_peer = remap.apply(one.peer, inside=inside)


def _plain(end: End) -> End:
    return unmapped(end[0]), end[1]


def _is_bound_by_tree(one: Socket, bound: set[tuple[int, bytes, int | None]]) -> bool:
    """Is what the socket is connected to one that the tree has? An unconnected socket gets it, by its address or by
    any.
    """
    assert one.peer is not None
    address, port = _plain(one.peer)
    if (one.protocol, address, port) in bound:
        return True
    local = one.local is not None and _plain(one.local)[0] == address
    if not local and not is_loopback(address):
        return False
    return any((one.protocol, anywhere, port) in bound for anywhere in (bytes(4), bytes(16)))


def is_loopback(address: bytes) -> bool:
    """Does it lead to this machine whichever that is?"""
    return address[0] == 127 if len(address) == 4 else address == bytes(15) + b"\1"
