"""Shells and editors in terminals, checked with keys afterwards."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from kit import Target, Targets
from kit.clients import PATIENCE_S
from kit.host import stat_fields, wait_until

from .conftest import Sleeps, need

PORT = 6600

#: As sshd does it: a connection on one side, a terminal with a shell on the other, and one who relays between them.
RELAY = """
import ctypes, fcntl, os, pty, select, socket, struct, termios

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # whoever leaves its parent stays below
listener = socket.create_server(("127.0.0.1", 6600))
ready()
connection, _ = listener.accept()
pid, master = pty.fork()
if pid == 0:
    os.environ.update(TERM="vt100", PS1="$ ", HISTFILE="", HOME=DIR)
    os.execvp("bash", ["bash", "--norc", "--noprofile"])
fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
with open("shell", "w") as file:
    file.write(str(pid))
while True:
    for fd in select.select([master, connection], [], [])[0]:
        try:
            data = os.read(master, 4096) if fd == master else connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            connection.close()
            done(os.waitpid(pid, 0)[1] == 7 << 8)
            time.sleep(30)
        (connection.sendall if fd == master else lambda d: os.write(master, d))(data)
"""


class Terminal:
    """Somebody at the other end of the connection: types keys, and looks for text."""

    def __init__(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", PORT), timeout=PATIENCE_S)
        self.seen = b""

    def type(self, keys: str) -> None:
        self.socket.sendall(keys.encode())

    def expect(self, pattern: str) -> re.Match[bytes]:
        """Wait until what has come since the last match holds the pattern."""
        while not (match := re.search(pattern.encode(), self.seen)):
            try:
                data = self.socket.recv(4096)
            except TimeoutError:
                raise AssertionError(f"waited in vain for {pattern}: {self.seen!r}") from None
            assert data, f"the other side closed: {self.seen!r}"
            self.seen += data
        self.seen = self.seen[match.end() :]
        return match


def foreground(target: Target) -> str:
    """The name of the process that the shell's terminal belongs to."""
    fields = stat_fields(int(target.read("shell")))
    leader = stat_fields(int(fields[7])) if fields else None
    return leader[1] if leader else ""


@pytest.fixture
def session(start: Targets, network: None) -> Iterator[tuple[Target, Terminal]]:
    need("nft")
    target = start.python(RELAY)
    terminal = Terminal()
    terminal.expect(r"\$ ")
    yield target, terminal
    terminal.socket.close()


def test_a_shell_with_jobs(session: tuple[Target, Terminal], sleeps: Sleeps) -> None:
    """Job control: one stopped, one in the background, one in the foreground that reads keys."""
    target, terminal = session
    terminal.type("sleep 1000 &\nsleep 2000\n")
    wait_until("the second is in the foreground", lambda: foreground(target) == "sleep")
    terminal.type("\x1a")
    terminal.expect(r"Stopped\s+sleep 2000")
    terminal.type("x=kept; cat\n")
    wait_until("cat is in the foreground", lambda: foreground(target) == "cat")
    terminal.type("half a li")

    def awake() -> None:
        terminal.type("ne\n")
        terminal.expect(r"half a line\r\n.*half a line\r\n|ne\r\nhalf a line\r\n")
        terminal.type("half a li")

    sleeps(target, tcp_established=True, awake=awake)
    terminal.type("ne\n\x03")
    terminal.expect(r"\^C[^$]*\$ ")
    terminal.type("jobs; echo $x $(stty size)\n")
    terminal.expect(r"Running\s+sleep 1000")
    terminal.expect(r"Stopped\s+sleep 2000|sleep 2000")
    terminal.expect(r"kept 30 90\r\n")
    terminal.type("kill %1 %2; fg %2\n")
    terminal.expect(r"Terminated")
    terminal.type("exit 7\nexit 7\n")
    assert target.wait_file("result") == "pass\n"


def test_a_full_screen_editor(session: tuple[Target, Terminal], sleeps: Sleeps) -> None:
    """Raw mode, an unwritten buffer, an undo history, a swap file; and a resize afterwards."""
    need("vim.tiny")
    target, terminal = session
    terminal.type("vim.tiny -u NONE text\n")
    terminal.expect("~")
    terminal.type("ifirst line\rsecond")
    terminal.expect("second")

    sleeps(target, tcp_established=True)
    # ^O in front of a command: after an escape the editor waits for what might follow.
    terminal.type(" line\x0f:w\r")
    terminal.expect("written")
    assert target.read("text") == "first line\nsecond line\n"
    terminal.type("\rthird\x0f:w\r")
    wait_until("it is written", lambda: target.read("text") == "first line\nsecond line\nthird\n")
    terminal.type("\x0fu\x0f:wq\r")
    wait_until("it is undone", lambda: target.read("text") == "first line\nsecond line\n")
    terminal.type("stty -a; exit 7\n")
    terminal.expect(r"rows 30; columns 90;")
    terminal.expect(r"(?<!-)icanon")
    assert target.wait_file("result") == "pass\n"
    assert not os.path.exists(target.path(".text.swp"))


def test_a_multiplexer_and_its_client(session: tuple[Target, Terminal], sleeps: Sleeps) -> None:
    """tmux in the terminal: its server has left its parent, and writes to the terminal of its client itself."""
    need("tmux")
    target, terminal = session
    terminal.type("SHELL=/bin/sh LC_ALL=C.UTF-8 tmux -S tmux.sock -f /dev/null new-session -s main\n")
    terminal.expect(r"\[main\]")
    terminal.type("x=kept\n")
    numbers = itertools.count(40)

    def awake() -> None:
        number = next(numbers)
        terminal.type(f"echo $x-$(({number} + 1))\n")
        terminal.expect(f"kept-{number + 1}")

    sleeps(target, tcp_established=True, awake=awake)
    for key in "\x02d":  # detach; keys that come at once count as pasted text
        time.sleep(0.1)
        terminal.type(key)
    terminal.expect(r"\[detached \(from session main\)\]")
    terminal.type("tmux -S tmux.sock attach\n")
    terminal.expect("kept-41")
    terminal.type("exit\n")
    terminal.expect(r"\[exited\]")
    terminal.type("exit 7\n")
    assert target.wait_file("result") == "pass\n"


def tmux(target: Target, *words: str) -> str:
    command = ["tmux", "-S", target.path("tmux.sock"), *words]
    env = {**os.environ, "TERM": "vt100", "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=30).stdout


def screen(target: Target, window: str) -> str:
    return tmux(target, "capture-pane", "-p", "-t", window)


def test_tmux(start: Targets, sleeps: Sleeps) -> None:
    """A server with two terminals, used by its own client before and after."""
    need("tmux", "vim.tiny")
    env = {"TERM": "screen", "PS1": "$ ", "LC_ALL": "C.UTF-8", "SHELL": "/bin/sh"}
    target = start.command("tmux", "-S", "tmux.sock", "-f", "/dev/null", "-D", env=env)
    wait_until("it listens", lambda: os.path.exists(target.path("tmux.sock")))
    tmux(target, "new-session", "-d", "-s", "s", "-n", "shell", "-x", "80", "-y", "20", "sh")
    tmux(target, "new-window", "-t", "s:", "-n", "editor", "-c", target.folder, "vim.tiny -u NONE notes")
    tmux(target, "send-keys", "-t", "s:shell", "x=kept; cd /", "Enter")
    wait_until("the editor is there", lambda: "[New File]" in screen(target, "s:editor"))
    tmux(target, "send-keys", "-t", "s:editor", "iunwritten")
    wait_until("the editor shows it", lambda: "unwritten" in screen(target, "s:editor"))
    before = screen(target, "s:editor"), screen(target, "s:shell"), tmux(target, "list-panes", "-a")
    sleeps(target, ext_unix_sk=True)
    assert before == (screen(target, "s:editor"), screen(target, "s:shell"), tmux(target, "list-panes", "-a"))
    tmux(target, "send-keys", "-t", "s:shell", "echo $x $PWD", "Enter")
    wait_until("the shell answers", lambda: "\nkept /\n" in screen(target, "s:shell"))
    tmux(target, "resize-window", "-t", "s:editor", "-x", "60", "-y", "15")
    tmux(target, "send-keys", "-t", "s:editor", " before", "C-o", ":wq", "Enter")
    wait_until("it is written", lambda: target.read("notes") == "unwritten before\n")
    tmux(target, "kill-server")
    target.wait_gone()
