"""Copies of a program that has ptys: each has its own, with the same numbers and names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets
from kit.host import stat_fields
from kit.talk import ANSWERS, Talk, snapshot_of
from kit.verbs import SOURCES

# It leads the session of a pty of which it has both ends, and has another one that nobody has opened the slave of.
SERVER = """
import fcntl, termios
master, slave = os.openpty()
other = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
tty = os.open("/dev/tty", os.O_RDWR)
settings = termios.tcgetattr(slave)
settings[1] &= ~termios.OPOST
settings[3] &= ~termios.ECHO
termios.tcsetattr(slave, termios.TCSANOW, settings)
os.fchmod(slave, 0o622)
os.write(master, b"unread line\\n")
os.write(slave, b"unread words")

TIOCGPTN, TIOCGSID = 0x80045430, 0x5429

def number(fd, what=TIOCGPTN):
    return int.from_bytes(fcntl.ioctl(fd, what, bytes(4)), "little")

def answer(line):
    words = line.split()
    if words[0] == "names":
        links = [os.readlink("/proc/self/fd/%d" % fd) for fd in (master, slave, other)]
        return [os.ttyname(slave), number(master), number(other), links]
    if words[0] == "session":
        return [os.getpid(), number(tty, TIOCGSID), os.tcgetpgrp(tty), os.stat(os.ttyname(slave)).st_mode & 0o777]
    if words[0] == "unread":
        return [os.read(slave, 100), os.read(master, 100)]
    if words[0] == "talk":
        os.write(master, words[1].encode() + b"\\n")
        os.write(tty, words[1].upper().encode())
        return [os.read(slave, 100), os.read(master, 100)]
    if words[0] == "open":
        again = os.open(os.ttyname(slave), os.O_RDWR | os.O_NOCTTY)
        os.write(again, b"by name")
        new, _ = os.openpty()
        return [os.read(master, 100), os.ttyname(_)]

"""


@pytest.fixture
def snapshot(start: Targets, images: str) -> Iterator[Target]:
    """The server's snapshot is in ``images``; everything that is woken from it is ended."""
    target = start.python(SERVER + ANSWERS)
    target.names = [os.readlink(f"/proc/{target.pid}/fd/{fd}") for fd in (3, 4, 5)]
    target.terminal = int(stat_fields(target.pid)[6])
    with snapshot_of(target, images):
        yield target


def instance(pid: int | str) -> int:
    """Which devpts a process sees."""
    return os.stat(f"/proc/{pid}/root/dev/pts").st_dev


def check(copies: list[Talk], target: Target) -> None:
    master, slave, other = target.names
    seen = {instance("self")}
    for copy in copies:
        pid = copy.copy.pid
        assert copy.ask("names")[0] == slave and copy.ask("names")[3] == [master, slave, other]
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (3, 4, 5)] == target.names
        assert int(stat_fields(pid)[6]) == target.terminal
        me, session, foreground, mode = copy.ask("session")
        assert session == foreground == me and mode == 0o622
        assert copy.ask("unread") == [b"unread line\n", b"unread words"]
        seen.add(instance(pid))
    assert len(seen) == 1 + len(copies), "two of them see the same terminals"
    for number, copy in enumerate(copies):
        text = f"copy-{number}"
        assert copy.ask(f"talk {text}") == [text.encode() + b"\n", text.upper().encode()]
        numbers = copy.ask("names")[1:3]
        free = next(one for one in range(3) if one not in numbers)
        assert copy.ask("open") == [b"by name", f"/dev/pts/{free}"]


def test_each_copy_has_terminals_of_its_own(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        copies = [Talk(template) for _ in range(4)]
        check(copies, snapshot)
        # What has been seen by now has been remembered for the next ones.
        check([Talk(template), Talk(template, hostname="fred", cwd="/", overlay=[snapshot.folder])], snapshot)
        assert [copy.end() for copy in copies] == [0] * 4


def test_terminals_without_a_pid_namespace(snapshot: Target, images: str) -> None:
    """A copy with another pid leads its session all the same."""
    with torpor.template(images) as template:
        copies = [Talk(template, fresh_pid=True) for _ in range(3)]
        check(copies, snapshot)
        assert [copy.copy.pid for copy in copies] == [copy.ask("session")[0] for copy in copies]


def test_a_copy_with_terminals_is_dumped_and_copied_again(snapshot: Target, images: str) -> None:
    second = os.path.join(images, "again")
    os.mkdir(second)
    with torpor.template(images) as template:
        torpor.dump(Talk(template).copy.pid, second)
    with torpor.template(second) as template:
        check([Talk(template) for _ in range(3)], snapshot)


def test_restores_into_namespaces_have_terminals_of_their_own(start: Targets, images: str, ends_all: None) -> None:
    target = start.python(SERVER + 'ready()\nwait_told("go")\nos._exit(42 if os.ttyname(slave) else 1)\n')
    pts = os.readlink(f"/proc/{target.pid}/fd/4")
    torpor.dump(target.pid, images)
    target.wait_gone()
    copies = [torpor.restore(images, own_pids=True) for _ in range(3)]
    assert len({instance("self"), *(instance(copy.pid) for copy in copies)}) == 4
    for copy in copies:
        assert os.readlink(f"/proc/{copy.pid}/fd/4") == pts
    target.tell("go")
    assert [os.waitstatus_to_exitcode(os.waitpid(copy.waits_for, 0)[1]) for copy in copies] == [42] * 3


# As in some containers: /dev/ptmx is a file of devpts, mounted there.
PTMX_OF_DEVPTS = '''
import os, subprocess, sys, time
sys.path.insert(0, sys.argv[3])
import torpor

images, folder = sys.argv[1:3]
os.chdir(folder)
subprocess.run(["mount", "-t", "devpts", "-o", "mode=620,ptmxmode=666", "devpts", "/dev/pts"], check=True)
subprocess.run(["mount", "--bind", "/dev/pts/ptmx", "/dev/ptmx"], check=True)
program = """
import os, time
master, slave = os.openpty()
open("ready", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
os.write(slave, b"words")
new, _ = os.openpty()
os._exit(42 if os.read(master, 100) == b"words" and [os.ttyname(slave), os.ttyname(_)] == ["/dev/pts/0", "/dev/pts/1"] else 1)
"""
null = subprocess.DEVNULL
target = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdin=null, stdout=null, stderr=null)
while not os.path.exists("ready"):
    time.sleep(0.01)
torpor.dump(target.pid, images)
target.wait()
with torpor.template(images) as template:
    copies = [template.clone() for _ in range(3)]
    open("go", "w").close()
    assert [copy.wait() for copy in copies] == [42] * 3
'''


def test_ptmx_that_is_a_file_of_devpts(start: Targets, images: str) -> None:
    argv = ["unshare", "--mount", sys.executable, "-c", PTMX_OF_DEVPTS, images, start.folder, SOURCES]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_terminal_of_the_caller_is_where_it_was(start: Targets, images: str, ends_all: None) -> None:
    """Whose terminal is lent finds it by its name: there is no other devpts then."""
    outer, lent = os.openpty()
    # Each copy says what it finds by its status: they would write the same file.
    source = 'one = os.open(NAME, os.O_RDWR | os.O_NOCTTY)\nready()\nwait_told("go")\nos._exit(os.ttyname(one) != NAME)'
    target = start.python(source.replace("NAME", repr(os.ttyname(lent))))
    stat = os.fstat(lent)
    key = f"tty[{stat.st_rdev:x}:{stat.st_dev:x}]"
    torpor.dump(target.pid, images, external=[key])
    target.wait_gone()
    with torpor.template(images, inherit_fd=[(lent, key)]) as template:
        copies = [template.clone(), template.clone()]
    assert {instance(copy.pid) for copy in copies} == {instance("self")}
    target.tell("go")
    assert [copy.wait() for copy in copies] == [0, 0]
    os.close(outer)
    os.close(lent)
