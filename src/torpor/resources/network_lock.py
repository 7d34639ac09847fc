"""Holding back the packets of connections while nobody answers for them.

From the moment when a connection is dumped until it is there again its packets must be dropped, in both
directions: a kernel that knows no such connection answers with a reset. The lock is a table of nftables that
is called as CRIU calls its own, so that either can lift what the other has set; where there is no ``nft``,
rules of iptables, again those of CRIU. Our own packets carry a mark that is let through.
"""

from __future__ import annotations

import os
import uuid

from .. import log
from ..errors import TorporError, Unsupported
from ..linux.inet_diag import text, unmapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MARK = 0xC114
#: inventory_entry.network_lock_method
IPTABLES, NFTABLES, SKIP = 0, 1, 2
#: (our address, our port, the peer's address, the peer's port)
Quad = tuple[bytes, int, bytes, int]


class Lock:
    """A lock that was set; ``method`` and ``run_id`` are what the inventory says about it."""

    __slots__ = ("method", "quads", "run_id")

    def __init__(self, method: int, run_id: str, quads: Sequence[Quad]) -> None:
        self.method = method
        self.run_id = run_id
        self.quads = quads

    def lift(self) -> None:
        """Let the packets through again. Raises TorporError when that fails."""
        if self.method == NFTABLES:
            _nft(f"delete table {table(self.run_id)}\n", missing_ok=True)
        elif self.method == IPTABLES:
            _iptables("-D", self.quads)


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
        made = Lock(NFTABLES, str(uuid.UUID(bytes=os.urandom(16), version=4)), quads)
        before(made)
        _nft(_script(table(made.run_id), quads))
        return made
    if wanted == "iptables" and _has("iptables"):
        made = Lock(IPTABLES, "", quads)
        before(made)
        try:
            _iptables("-I", quads)
        except TorporError:
            _iptables("-D", quads, quiet=True)
            raise
        return made
    raise Unsupported(
        "connections cannot be held back while they are dumped: there is no program `nft`",
        hint="install nftables, or use --network-lock skip if a firewall does this already",
    )


def table(run_id: str) -> str:
    """The name of the nftables table, its family first. CRIU's has room for 31 characters of it."""
    return f"inet CRIU-{run_id}"[:31]


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
    return _find(program) is not None


def _find(program: str) -> str | None:
    import shutil

    # A caller's PATH may lack the folders of the administrator.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")


def _run(command: list[str], given: str = "") -> tuple[int, str]:
    import subprocess

    done = subprocess.run(
        command, input=given.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    return done.returncode, done.stderr.decode(errors="replace").strip()


def _nft(script: str, *, missing_ok: bool = False) -> None:
    program = _find("nft")
    if program is None:
        raise Unsupported(
            "the network lock cannot be lifted: there is no program `nft`", hint="install nftables"
        )
    code, said = _run([program, "-f", "-"], script)
    if not code or (missing_ok and "No such file or directory" in said):
        return
    raise TorporError(f"nft: {said.splitlines()[0] if said else f'exit status {code}'}")


def _iptables(action: str, quads: Iterable[Quad], *, quiet: bool = False) -> None:
    for quad in quads:
        here, port, there, peer = quad
        four = unmapped(here), unmapped(there)
        program = _find("iptables" if len(four[0]) == 4 else "ip6tables")
        if program is None:
            continue
        ours, theirs = (text(four[0]), str(port)), (text(four[1]), str(peer))
        for chain, source, target in (("INPUT", theirs, ours), ("OUTPUT", ours, theirs)):
            rule = ["--protocol", "tcp", "-m", "mark", "!", "--mark", hex(MARK), "--source", source[0]]
            rule += ["--sport", source[1], "--destination", target[0], "--dport", target[1], "-j", "DROP"]
            code, said = _run([program, "-w", "-t", "filter", action, chain, *rule])
            if code and not quiet:
                raise TorporError(f"{program} {action} {chain}: {said}")


def lift(inventory_method: int, run_id: str, quads: Sequence[Quad]) -> None:
    """Lift the lock that a dump has left behind, ours or CRIU's, as its inventory tells."""
    if inventory_method == NFTABLES and run_id:
        Lock(NFTABLES, run_id, quads).lift()
    elif inventory_method == IPTABLES and quads and _has("iptables"):
        # CRIU's own; it need not be there, for the machine may have been started anew.
        _iptables("-D", quads, quiet=True)
        log.debug(f"lifted the rules of iptables for {len(quads)} connections")


def program_works(program: str, *arguments: str) -> bool:
    """Is the program there, and does it end well?"""
    found = _find(program)
    return found is not None and _run([found, *arguments])[0] == 0
