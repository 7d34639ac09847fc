"""Holding back the packets of connections while nobody answers for them.

From the moment when a connection is dumped until it is there again its packets must be dropped, in both
directions: a kernel that knows no such connection answers with a reset. The lock is a table of nftables that
is called as CRIU calls its own, so that either can lift what the other has set; where there is no ``nft``,
rules of iptables, again those of CRIU. Our own packets carry a mark that is let through.
"""

from __future__ import annotations

import os

from .. import log
from ..errors import TorporError, Unsupported
from ..linux.inet_diag import text, unmapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MARK = 0xC114
#: inventory_entry.network_lock_method
IPTABLES, NFTABLES, SKIP = 0, 1, 2
#: Of the names of our tables and of CRIU's.
TABLE_PREFIX = "CRIU-"
#: (our address, our port, the peer's address, the peer's port)
Quad = tuple[bytes, int, bytes, int]


class Lock:
    """A lock that was set; ``method`` and ``run_id`` are what the inventory says about it.

    It is for the connections ``quads``, or, ``whole``, for everything in a network namespace.
    """

    __slots__ = ("method", "quads", "run_id", "whole")

    def __init__(self, method: int, run_id: str, quads: Sequence[Quad] = (), *, whole: bool = False) -> None:
        self.method = method
        self.run_id = run_id
        self.quads = quads
        self.whole = whole

    def set(self) -> None:
        """Hold the packets of the connections back. Raises TorporError."""
        if self.method == NFTABLES:
            _nft(_script(table(self.run_id), self.quads))
        elif self.method == IPTABLES:
            _iptables("-I", self.quads)

    def lift(self) -> bool:
        """Let the packets through again. Was it there? Raises TorporError when that fails."""
        if self.method == NFTABLES:
            return _nft(f"delete table {table(self.run_id)}\n", missing_ok=True)
        if self.method == IPTABLES and self.whole:
            _unchain()
        elif self.method == IPTABLES:
            _iptables("-D", self.quads)
        return self.method == IPTABLES


def lock(quads: Sequence[Quad], wanted: str, *, before: Callable[[Lock], object] = lambda _: None) -> Lock:
    """Hold back the packets of these connections. ``wanted`` is what --network-lock says.

    ``before`` is told of the lock before it is set, for it has to be lifted even if we are killed meanwhile.
    Raises Unsupported when neither program is there, TorporError when the one that is there fails.
    """
    if wanted == "skip" or not quads:
        made = Lock(SKIP, "", ())
        before(made)
        return made
    if _has("nft"):
        made = Lock(NFTABLES, _new_id(), quads)
        before(made)
        made.set()
        return made
    if wanted == "iptables" and _has("iptables"):
        made = Lock(IPTABLES, "", quads)
        before(made)
        try:
            made.set()
        except TorporError:
            _iptables("-D", quads, quiet=True)
            raise
        return made
    raise _no_program()


def lock_all(wanted: str, *, before: Callable[[Lock], object] = lambda _: None) -> Lock:
    """Hold back every packet that comes or goes in our network namespace, but for those with the mark. As lock()."""
    if wanted != "skip" and _has("nft"):
        made = Lock(NFTABLES, _new_id(), whole=True)
        before(made)
        name = table(made.run_id)
        lines = [f"create table {name}"]
        for hook in ("output", "input"):
            lines.append(f"add chain {name} {hook} {{ type filter hook {hook} priority 0; policy drop; }}")
            lines.append(f"add rule {name} {hook} meta mark {MARK:#x} accept")
        _nft("\n".join(lines) + "\n")
        return made
    if wanted == "iptables" and _has("iptables-restore"):
        made = Lock(IPTABLES, "", whole=True)
        before(made)
        try:
            _chain()
        except TorporError:
            _unchain(quiet=True)
            raise
        return made
    if wanted == "skip":
        return Lock(SKIP, "")
    raise _no_program()


def _no_program() -> Unsupported:
    return Unsupported(
        "connections cannot be held back while they are dumped: there is no program `nft`",
        hint="install nftables, or use --network-lock skip if a firewall does this already",
    )


def _new_id() -> str:
    import uuid

    return str(uuid.UUID(bytes=os.urandom(16), version=4))


def table(run_id: str) -> str:
    """The name of the nftables table, its family first. CRIU's has room for 31 characters of it."""
    return f"inet {TABLE_PREFIX}{run_id}"[:31]


def _script(name: str, quads: Iterable[Quad]) -> str:
    """All that nft(8) is to do, in one transaction."""
    lines = [f"create table {name}"]
    for hook in ("output", "input"):
        lines.append(f"add chain {name} {hook} {{ type filter hook {hook} priority 0; }}")
        lines.append(f"add rule {name} {hook} meta mark {MARK:#x} accept")
    four: list[str] = []
    six: list[str] = []
    for here, port, there, peer in ((unmapped(a), b, unmapped(c), d) for a, b, c, d in quads):
        into = four if len(here) == 4 else six
        into.append(f"{text(here)} . {port} . {text(there)} . {peer}")
        into.append(f"{text(there)} . {peer} . {text(here)} . {port}")
    for number, family, kind, members in (("4", "ip", "ipv4", four), ("6", "ip6", "ipv6", six)):
        kinds = f"{kind}_addr . inet_service . {kind}_addr . inet_service"
        lines.append(f"add set {name} conns{number} {{ type {kinds}; }}")
        match = f"{family} saddr . tcp sport . {family} daddr . tcp dport @conns{number} drop"
        lines += [f"add rule {name} {hook} {match}" for hook in ("output", "input")]
        if members:
            unique = ", ".join(dict.fromkeys(members))
            lines.append(f"add element {name} conns{number} {{ {unique} }}")
    return "\n".join(lines) + "\n"


def _has(program: str) -> bool:
    return find_program(program) is not None


def find_program(program: str) -> str | None:
    """The path of a program for administrators; None if there is none."""
    import shutil

    # A caller's PATH may lack the folders of the administrator.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")


def run_program(command: list[str], given: bytes = b"") -> tuple[int, bytes, str]:
    """Run a program in our network namespace: its exit status, what it printed, and its complaint, a line."""
    import subprocess

    done = subprocess.run(command, input=given, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace").strip()
    return done.returncode, done.stdout, said.splitlines()[0] if said else ""


def _nft(script: str, *, missing_ok: bool = False) -> bool:
    """Have nft(8) do something: is it done? If not, what was to be removed is not there."""
    program = find_program("nft")
    if program is None:
        raise Unsupported(
            "the network lock cannot be lifted: there is no program `nft`", hint="install nftables"
        )
    code, _, said = run_program([program, "-f", "-"], script.encode())
    if not code or (missing_ok and "No such file or directory" in said):
        return not code
    raise TorporError(f"nft: {said or f'exit status {code}'}")


#: Whole namespaces are held back by a chain that is called as CRIU's.
_CHAIN = "CRIU"


def _chain() -> None:
    rules = [f"-I {hook} -j {_CHAIN}" for hook in ("INPUT", "OUTPUT")]
    rules += [f"-A {_CHAIN} -m mark --mark {MARK:#x} -j ACCEPT", f"-A {_CHAIN} -j DROP"]
    _iptables_restore([f":{_CHAIN} - [0:0]", *rules])


def _unchain(*, quiet: bool = False) -> None:
    rules = [f"-D {hook} -j {_CHAIN}" for hook in ("INPUT", "OUTPUT")]
    _iptables_restore([f":{_CHAIN} - [0:0]", *rules, f"-X {_CHAIN}"], quiet=quiet)


def _iptables_restore(rules: list[str], *, quiet: bool = False) -> None:
    text = "\n".join(["*filter", *rules, "COMMIT", ""])
    for name in ("iptables-restore", "ip6tables-restore"):
        program = find_program(name)
        if program is None:
            continue
        code, _, said = run_program([program, "-w", "--noflush"], text.encode())
        if code and not quiet:
            raise TorporError(f"{name}: {said or f'exit status {code}'}")


def _iptables(action: str, quads: Iterable[Quad], *, quiet: bool = False) -> int:
    """Add or remove the rules of connections: how many it did."""
    done = 0
    for quad in quads:
        here, port, there, peer = quad
        four = unmapped(here), unmapped(there)
        program = find_program("iptables" if len(four[0]) == 4 else "ip6tables")
        if program is None:
            continue
        ours, theirs = (text(four[0]), str(port)), (text(four[1]), str(peer))
        for chain, source, target in (("INPUT", theirs, ours), ("OUTPUT", ours, theirs)):
            rule = ["--protocol", "tcp", "-m", "mark", "!", "--mark", hex(MARK), "--source", source[0]]
            rule += ["--sport", source[1], "--destination", target[0], "--dport", target[1], "-j", "DROP"]
            code, _, said = run_program([program, "-w", "-t", "filter", action, chain, *rule])
            if code and not quiet:
                raise TorporError(f"{program} {action} {chain}: {said}")
            done += not code
    return done


def lift(inventory_method: int, run_id: str, quads: Sequence[Quad] = (), *, whole: bool = False) -> Lock | None:
    """Lift the lock that a dump has left behind, ours or CRIU's, as its inventory tells. Returns the lock of
    connections that was there, if one was.
    """
    found = Lock(inventory_method, run_id, quads)
    if inventory_method == NFTABLES and run_id:
        return found if found.lift() and not whole else None
    if inventory_method == IPTABLES and whole and _has("iptables-restore"):
        _unchain(quiet=True)
    elif inventory_method == IPTABLES and quads and _has("iptables"):
        # CRIU's own; it need not be there, for the machine may have been started anew.
        lifted = _iptables("-D", quads, quiet=True)
        log.debug(f"lifted {lifted} rules of iptables for {len(quads)} connections")
        return found if lifted else None
    return None


def program_works(program: str, *arguments: str) -> bool:
    """Is the program there, and does it end well?"""
    found = find_program(program)
    return found is not None and run_program([found, *arguments])[0] == 0
