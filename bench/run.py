"""Torpor against CRIU: the same programs, one after the other, in the same run on the same machine.

    python bench/run.py --criu /usr/sbin/criu                  everything (some minutes)
    python bench/run.py --criu ./criu --case python memory     some of it
    python bench/run.py --case small                           Torpor alone

Every measurement starts a program of its own, dumps it, sees it gone, restores it, and asks the
program whether it is content. The ways take turns, so that what else the machine does hits all of
them. Printed is a Markdown table of medians, and each as a multiple of CRIU's.
"""

from __future__ import annotations

import argparse
import os
import platform
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [os.path.join(ROOT, "src"), os.path.join(ROOT, "tests"), HERE]

import programs
from kit import Target, Targets
from kit.host import become_subreaper

SRC = os.path.join(ROOT, "src")


class Failed(Exception):
    """A program could not do it."""


class Way:
    """One way to dump and restore. ``name`` is the heading of its column."""

    name = ""

    def dump(self, pid: int, folder: str, leave_running: bool = False, **options: object) -> None:
        raise NotImplementedError

    def restore(self, folder: str, **options: object) -> None:
        raise NotImplementedError


class CommandWay(Way):
    """Each verb a process of its own: what it takes to start the program counts."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name, self.argv = name, argv

    def _run(self, verb: str, folder: str, *words: str) -> None:
        log = os.path.join(folder, f"{verb}.log")
        argv = [*self.argv, verb, "--no-default-config", "-D", folder, "-o", log, *words]
        env = {**os.environ, "PYTHONPATH": SRC}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled once
        done = subprocess.run(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode:
            tail = open(log, errors="replace").read()[-2000:] if os.path.exists(log) else ""
            raise Failed(f"{' '.join(argv)}: status {done.returncode}\n{tail}")

    def dump(self, pid: int, folder: str, leave_running: bool = False, **options: object) -> None:
        self._run("dump", folder, "-t", str(pid), *flags(leave_running=leave_running, **options))

    def restore(self, folder: str, **options: object) -> None:
        self._run("restore", folder, "--restore-detached", *flags(**options))


def flags(**options: object) -> list[str]:
    """``leave_running=True, network_lock="skip"`` as words of a command line."""
    words = []
    for name, value in options.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


class LibraryWay(Way):
    """Calls in this process, in which everything is loaded."""

    name = "Torpor, library"

    def __init__(self) -> None:
        import torpor

        self.torpor = torpor

    def dump(self, pid: int, folder: str, leave_running: bool = False, **options: object) -> None:
        self.torpor.dump(pid, folder, leave_running=leave_running, **options)

    def restore(self, folder: str, **options: object) -> None:
        self.torpor.restore(folder, **options)


class Case:
    """Something to freeze. ``start`` makes the target, ``place`` is where its images go.

    ``options`` are for dump and restore, ``lock`` for the dump alone.
    """

    def __init__(
        self, name: str, title: str, start: Callable[[Targets], Target], *, rounds: int,
        place: str = "disk", frozen: bool = False, options: dict[str, object] | None = None,
        lock: dict[str, object] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.title, self.start, self.rounds = name, title, start, rounds
        self.place, self.frozen = place, frozen
        self.options, self.lock = options or {}, lock or {}


def all_cases(args: argparse.Namespace) -> list[Case]:
    size, many = str(args.mib), str(args.processes)
    connections, descriptors, watches = str(args.connections), str(args.descriptors), str(args.watches)
    lock = {"network_lock": args.network_lock} if args.network_lock else {}
    tcp = {"options": {"tcp_established": True}, "lock": lock}
    return [
        Case("small", "C program, asleep", lambda s: s.c(programs.SLEEPER), rounds=11),
        Case("python", "Python program, 110 mappings", lambda s: s.python(programs.PYTHON), rounds=11),
        Case("memory", f"{size} MiB, images on disk", lambda s: s.c(programs.MEMORY, size), rounds=5),
        Case("memory-tmpfs", f"{size} MiB, images on tmpfs",
             lambda s: s.c(programs.MEMORY, size), rounds=5, place="tmpfs"),
        Case("frozen", f"frozen, {size} MiB, left running, tmpfs",
             lambda s: s.c(programs.WATCHER, size), rounds=5, place="tmpfs", frozen=True),
        Case("tree", f"{many} processes forked from one",
             lambda s: s.python(programs.TREE, many), rounds=3),
        Case("threads", f"{args.threads} threads",
             lambda s: s.c(programs.THREADS, str(args.threads)), rounds=5),
        Case("mappings", f"{args.mappings} mappings",
             lambda s: s.c(programs.MAPPINGS, str(args.mappings)), rounds=5),
        Case("connections", f"{connections} connections, both ends",
             lambda s: s.c(programs.CONNECTIONS, connections), rounds=5, **tcp),
        Case("clients", f"{connections} connections, one end",
             lambda s: s.c(programs.CLIENT, connections, str(echo_port())), rounds=5, **tcp),
        Case("descriptors", f"{descriptors} descriptors",
             lambda s: s.c(programs.DESCRIPTORS, descriptors), rounds=5),
        Case("watches", f"{watches} inotify watches",
             lambda s: s.c(programs.WATCHES, watches), rounds=5),
    ]  # fmt: skip


def echo_port() -> int:
    """The port of a new process that sends back whatever it gets on any connection; it ends with the targets.

    A new one each time: a program that fails half way may leave a lock on connections of the old one.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        if os.fork() == 0:
            try:
                echo(server)
            finally:
                os._exit(0)
        port: int = server.getsockname()[1]
        return port


def echo(server: socket.socket) -> None:
    poll = selectors.DefaultSelector()
    poll.register(server, selectors.EVENT_READ)
    while True:
        for key, _ in poll.select():
            if key.fileobj is server:
                poll.register(server.accept()[0], selectors.EVENT_READ)
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                data = connection.recv(4096)
                connection.sendall(data)
            except OSError:
                data = b""
            if not data:
                poll.unregister(connection)
                connection.close()


Times = dict[str, list[float]]


def timed(operation: Callable[[], object]) -> float:
    """How long it takes, in milliseconds."""
    started = time.perf_counter()
    operation()
    return (time.perf_counter() - started) * 1e3


def folder_mib(folder: str) -> float:
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder)) / (1 << 20)


def measure(case: Case, way: Way, place: str) -> dict[str, float]:
    """One target through one way; what is measured, by name."""
    folder = tempfile.mkdtemp(prefix="bench-", dir=place)
    targets = Targets(tempfile.mkdtemp(prefix="bench-"))
    try:
        target = case.start(targets)
        time.sleep(0.05)
        if case.frozen:
            way.dump(target.pid, folder, leave_running=True)
            target.go(timeout=120)
            return {"pause": float(target.read("pause"))}
        found = {"dump": timed(lambda: way.dump(target.pid, folder, **case.options, **case.lock))}
        target.wait_gone(timeout=60)
        found["size"] = folder_mib(folder)
        found["restore"] = timed(lambda: way.restore(folder, **case.options))
        target.go(timeout=120)
        return found
    finally:
        targets.end()
        shutil.rmtree(folder)
        shutil.rmtree(targets.folder)


UNITS = {"dump": "ms", "restore": "ms", "pause": "ms", "size": "MiB"}


def run_case(case: Case, ways: list[Way], place: str, rounds: int) -> list[list[str]]:
    """Rows of the table: (case, what, a median for each way with its ratio to the first)."""
    found: dict[str, Times] = {}
    for number in range(rounds):
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            for what, value in measure(case, way, place).items():
                found.setdefault(what, {}).setdefault(way.name, []).append(value)
        print(f"{case.name}: round {number + 1} of {rounds}", file=sys.stderr)
    rows = []
    for what in sorted(found, key=["dump", "restore", "pause", "size"].index):
        medians = [statistics.median(found[what][way.name]) for way in ways]
        cells = [f"{medians[0]:.1f}"]
        cells += [f"{value:.1f} ({value / medians[0]:.2f})" for value in medians[1:]]
        rows.append([case.title, f"{what}, {UNITS[what]}", *cells])
    return rows


def describe(args: argparse.Namespace) -> str:
    """The machine, in a line."""
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    criu = "no CRIU"
    if args.criu:
        text = subprocess.run([args.criu, "--version"], capture_output=True, text=True, check=True)
        criu = "CRIU " + " ".join(text.stdout.split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    load = os.getloadavg()[0]
    return (
        f"Linux {platform.release()}, {os.cpu_count()} CPUs ({model}), {memory} GiB, "
        f"Python {platform.python_version()}, {criu}; load at the start {load:.1f}"
    )


def torpor_command(path: str) -> list[str]:
    if path:
        return [path]
    beside = os.path.join(os.path.dirname(sys.executable), "torpor-criu")
    return [beside] if os.path.exists(beside) else [sys.executable, "-m", "torpor", "criu"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--criu", default="", help="the program to compare with")
    parser.add_argument("--torpor", default="", help="the torpor-criu command (default: beside python)")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--rounds", type=int, default=0, help="instead of each case's own number")
    parser.add_argument("--disk", default="/var/tmp", help="where images on disk go")
    parser.add_argument("--tmpfs", default="/dev/shm", help="where images in memory go")
    parser.add_argument("--mib", type=int, default=1024, help="memory of the large program")
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1000)
    parser.add_argument("--mappings", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=1000)
    # CRIU's own is iptables, with two rules a connection, each by a program of its own; ours is nftables. With that,
    # CRIU aborts once it holds more than about a thousand descriptors, from 250 connections of both ends on: what it
    # talks to netfilter with calls select(2).
    parser.add_argument("--network-lock", default="", help="for connections: nftables, iptables, skip")
    parser.add_argument("--descriptors", type=int, default=10_000)
    parser.add_argument("--watches", type=int, default=1000)
    parser.add_argument("--no-library", action="store_true", help="only the commands")
    return parser.parse_args()


def main() -> None:
    args = parse()
    become_subreaper()
    cases = all_cases(args)
    unknown = set(args.case) - {case.name for case in cases}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    ways: list[Way] = [CommandWay("CRIU", [args.criu])] if args.criu else []
    ways.append(CommandWay("Torpor, command", torpor_command(args.torpor)))
    if not args.no_library:
        ways.append(LibraryWay())
    print(describe(args), end="\n\n")
    print(f"| | | {' | '.join(way.name for way in ways)} |")
    print(f"|---|---|{'---|' * len(ways)}")
    for case in cases:
        if args.case and case.name not in args.case:
            continue
        place = args.tmpfs if case.place == "tmpfs" else args.disk
        able = []
        for way in ways:
            try:
                measure(case, way, place)  # once for caches, and for what is imported late
                able.append(way)
            except Failed as error:
                print(f"{case.name}: {way.name} cannot do it: {error}", file=sys.stderr)
        for row in run_case(case, able, place, args.rounds or case.rounds) if able else ():
            cells = dict(zip((way.name for way in able), row[2:], strict=True))
            filled = [*row[:2], *(cells.get(way.name, "fails") for way in ways)]
            print(f"| {' | '.join(filled)} |", flush=True)


if __name__ == "__main__":
    main()
