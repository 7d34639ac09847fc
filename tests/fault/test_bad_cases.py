"""What a restore needs has gone, changed or been taken: a clear error, the machine as before, and the way out works.

In a network and an IPC namespace of the test's own. What can be in the way of a dump is in tests/engine/test_errors.py.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

import torpor
from kit import Target, Targets, diff, host_state, run_criu
from kit.files import slurp_text
from kit.network import own_network
from torpor.errors import TorporError

CLONE_NEWIPC = 0x08000000
LIBC = ctypes.CDLL(None, use_errno=True)

HEAD = """
import ctypes, os, shutil, struct, sys
from socket import *
libc = ctypes.CDLL(None, use_errno=True)
def ok(n):
    if n < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return n
def udp(here, peer=None):
    s = socket(AF_INET, SOCK_DGRAM); s.bind(here)
    if peer: s.connect(peer)
    return s
"""


class Case:
    """A program, what happens to what it needs, the error that names it, and how that is made good again.

    ``spoil`` is a command of the shell in the program's folder, or a function that gives something to be closed.
    """

    def __init__(
        self, first: str, spoil: str | Callable[[Target], Any], error: str, mend: str = "true", *, then: str = "",
        hint: bool = True, **options: object,
    ) -> None:  # fmt: skip
        self.first, self.spoil, self.error, self.mend, self.then = first, spoil, error, mend, then
        self.hint, self.options = hint, options


def listens(port: int, kind: str = "SOCK_STREAM") -> Callable[[Target], Any]:
    def spoil(_: Target) -> Any:
        taken = socket.socket(socket.AF_INET, getattr(socket, kind))
        taken.bind(("127.0.0.1", port))
        if kind == "SOCK_STREAM":
            taken.listen(1)
        return taken

    return spoil


def same_connection(_: Target) -> Any:
    """Two other sockets have the connection."""
    both = ExitStack()
    with socket.create_server(("127.0.0.2", 6810)) as server:
        both.enter_context(socket.create_connection(("127.0.0.2", 6810), source_address=("127.0.0.1", 6811)))
        both.enter_context(server.accept()[0])
    return both


def own_slot(kind: str) -> Callable[[Target], Any]:
    """Another object has the slot of the identifier: ``shm``, ``sem`` or ``msg``."""

    def spoil(target: Target) -> Any:
        number = int(target.read("number"))
        assert LIBC[f"{kind}ctl"](*((number, 0, 0) if kind == "sem" else (number, 0, None))) == 0
        with open(f"/proc/sys/kernel/{kind}_next_id", "w") as file:
            file.write(str(number % 32768 + 5 * 32768))
        arguments = {"sem": (0, 1, 0o600), "msg": (0, 0o600), "shm": (0, 4096, 0o600)}[kind]
        taken = LIBC[f"{kind}get"](*arguments)
        assert taken == number % 32768 + 5 * 32768

        class Taken:
            def close(self) -> None:
                assert LIBC[f"{kind}ctl"](*((taken, 0, 0) if kind == "sem" else (taken, 0, None))) == 0

        return Taken()

    return spoil


ROUTE, ROUTE_BACK = "ip route del 10.98.0.0/16 dev lo", "ip route add 10.98.0.0/16 dev lo"
#: Here listens the test itself.
AFAR, AFAR_BACK = "ip addr del 10.99.1.1/32 dev lo", "ip addr add 10.99.1.1/32 dev lo"
CONNECTED = """
server = create_server(("127.0.0.2", 6810)); client = create_connection(("127.0.0.2", 6810), source_address=("127.0.0.1", 6811))
other = server.accept()[0]; server.close()
"""
INOTIFY = """
fd = ok(libc.inotify_init1(os.O_NONBLOCK)); ok(libc.inotify_add_watch(fd, b"watched", 2))
"""
FANOTIFY = """
fd = ok(libc.fanotify_init(2, 0)); ok(libc.fanotify_mark(fd, 1, ctypes.c_uint64(2), -100, b"watched"))
"""

CASES = {
    "no route to the peer of a UDP socket": Case(
        "s = udp(('127.0.0.1', 6800), ('10.98.1.1', 9))", ROUTE, r"no route to 10\.98\.1\.1:9", ROUTE_BACK,
        then="s.getpeername() == ('10.98.1.1', 9)",
    ),
    "no route to the peer of a connection": Case(
        "s = create_connection(('10.99.1.1', 6802), source_address=('127.0.0.1', 6803))", AFAR,
        r"no route to 10\.99\.1\.1:6802", AFAR_BACK, then="s.send(b'hi') == 2", tcp_established=True,
    ),
    "the port of a listener": Case(
        "s = create_server(('127.0.0.1', 6804))", listens(6804), "port 6804|6804 is in use", then="s.listen(1) is None"
    ),
    "the port of a UDP socket": Case(
        "s = udp(('127.0.0.1', 6805))", listens(6805, "SOCK_DGRAM"), "6805 is in use",
        then="s.getsockname()[1] == 6805",
    ),
    "a connection that exists already": Case(
        CONNECTED, same_connection, "exists already|in use",
        then="other.send(b'hi') == 2 and client.recv(9) == b'hi'", tcp_established=True,
    ),
    "the path of a unix socket": Case(
        "s = socket(AF_UNIX, SOCK_STREAM); s.bind('sock'); s.listen(1)", "rm sock; mkdir -p sock/used", "sock",
        "rm -r sock", then="socket(AF_UNIX, SOCK_STREAM).connect('sock') is None", hint=False,
    ),
    "a file that was replaced": Case(
        "open('file', 'w').write('12345'); s = open('file')", "echo another one > file",
        r"file: 12 bytes now, and had 5|12 bytes now", "printf 12345 > file", then="s.read() == '12345'", hint=False,
    ),
    "a file that was removed": Case(
        "open('file', 'w').write('12345'); s = open('file')", "rm file", r"file: .*ENOENT", "printf 12345 > file",
        then="s.read() == '12345'", hint=False,
    ),
    "a mapped library of another build": Case(
        "import _ctypes; shutil.copy(_ctypes.__file__, 'lib.so'); lib = ctypes.CDLL(os.path.abspath('lib.so'))",
        "cp lib.so kept.so; printf x | dd of=lib.so bs=1 seek=600 conv=notrunc status=none; echo >> lib.so", "lib.so",
        "mv kept.so lib.so", then="lib is not None", hint=False,
    ),
    "a fifo that is a file now": Case(
        "os.mkfifo('fifo'); s = os.open('fifo', os.O_RDWR); os.write(s, b'waits')", "rm fifo; echo > fifo", "fifo",
        "rm fifo; mkfifo fifo", then="os.read(s, 9) == b'waits'", hint=False,
    ),
    "the slot of a semaphore set": Case(
        "n = ok(libc.semget(0, 1, 0o600)); op = struct.pack('Hhh', 0, 1, 0x1000); ok(libc.semop(n, op, 1)); tell('number', str(n))",
        own_slot("sem"), "identifier cannot be had", then="libc.semctl(n, 0, 12, 0) == 1",
    ),
    "the slot of a message queue": Case(
        "n = ok(libc.msgget(0, 0o600)); ok(libc.msgsnd(n, struct.pack('q', 1) + b'hi', 2, 0)); tell('number', str(n))",
        own_slot("msg"), "identifier cannot be had", then="libc.msgrcv(n, ctypes.create_string_buffer(99), 9, 0, 0) == 2",
    ),
    "the slot of a segment": Case(
        "n = ok(libc.shmget(0, 4096, 0o600)); libc.shmat.restype = ctypes.c_void_p; a = libc.shmat(n, None, 0)\n"
        "ctypes.memmove(a, b'here', 4); tell('number', str(n))",
        own_slot("shm"), "identifier cannot be had", then="ctypes.string_at(a, 4) == b'here'",
    ),
    "what inotify watches": Case(
        f"open('watched', 'w').close(){INOTIFY}", "rm watched", "watch of .*/watched", "touch watched",
        then="open('watched', 'w').write('x') and len(os.read(fd, 99)) == 16", hint=False,
    ),
    "what fanotify watches": Case(
        f"open('watched', 'w').close(){FANOTIFY}", "rm watched", "watch of .*/watched", "touch watched",
        then="open('watched', 'w').write('x') and len(os.read(fd, 99)) == 24", hint=False,
    ),
    "the directory that it is in": Case(
        "os.mkdir('d'); os.chdir('d')", "rmdir d", r"/d\b.*ENOENT|ENOENT.*/d\b", "mkdir d",
        then="os.getcwd().endswith('/d')", hint=False,
    ),
    "the program itself": Case(
        "shutil.copy('/bin/sleep', 'prog'); pid = os.spawnl(os.P_NOWAIT, './prog', 'prog', '1000')\n"
        "while b'sleep' in os.readlink(f'/proc/{pid}/exe').encode(): pass",
        "mv prog kept", "prog.*ENOENT", "mv kept prog", then="os.kill(pid, 9) is None", hint=False,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_namespaces() -> Iterator[None]:
    ours = os.open("/proc/self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    assert LIBC.unshare(CLONE_NEWIPC) == 0, os.strerror(ctypes.get_errno())
    try:
        with own_network():
            subprocess.run(f"{ROUTE_BACK} && {AFAR_BACK}", shell=True, check=True)
            with socket.create_server(("10.99.1.1", 6802)):
                yield
    finally:
        assert LIBC.setns(ours, CLONE_NEWIPC) == 0
        os.close(ours)


def shown(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def machine(target: Target, images: str) -> object:
    """What a restore that failed could have changed."""
    ipc = {kind: slurp_text(f"/proc/sysvipc/{kind}") for kind in ("sem", "msg", "shm")}
    network = [shown("ss -Hantux state all"), shown("ip -o addr; ip route show table all"), shown("nft list ruleset")]
    return host_state(images, target.folder), ipc, network


@pytest.mark.parametrize("name", CASES)
def test_it_is_named_and_nothing_has_changed(start: Targets, images: str, name: str) -> None:
    case = CASES[name]
    then = case.then or "True"
    target = start.python(f"{HEAD}{case.first}\nready(); wait_told('go')\ndone({then}, 'it is not as it was')")
    target.pids()
    torpor.dump(target.pid, images, **case.options)
    target.wait_gone()
    taken = None
    if isinstance(case.spoil, str):
        subprocess.run(case.spoil, shell=True, check=True, cwd=target.folder)
    else:
        taken = case.spoil(target)
    before = machine(target, images)
    with pytest.raises(TorporError, match=case.error) as caught:
        torpor.restore(images, **case.options)
    assert not case.hint or caught.value.hint, str(caught.value)
    assert not diff(before, machine(target, images)), str(caught.value)
    flags = [f"--{option.replace('_', '-')}" for option in case.options]
    result = run_criu("restore", images, "-d", *flags)
    assert result.status == 1
    assert "Traceback" not in result.output + result.log and "Error: restore: " in result.log, repr(result)
    os.unlink(f"{images}/restore.log")
    assert not diff(before, machine(target, images)), result.log
    if taken is not None:
        with closing(taken):
            pass
    subprocess.run(case.mend, shell=True, check=True, cwd=target.folder)
    torpor.restore(images, **case.options)
    target.go()
