"""Trees whose files lead to what stays outside: pipes, sockets, files and terminals that the caller lends at a restore."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import torpor
from kit import CommandResult, Library, Target, Targets, wait_until
from kit.files import appear, slurp, slurp_text
from kit.verbs import SOURCES
from torpor.images.store import ImageReader

#: Answers each line that comes in by descriptor 3 on descriptor 4, in capitals, as often as it is asked.
ECHO = """
int main(void)
{
	char line[200];

	ready();
	for (;;) {
		ssize_t got = read(3, line, sizeof(line));

		if (got < 0)
			fail("read: %s", strerror(errno));
		if (got == 0)
			pass();
		for (ssize_t at = 0; at < got; at++)
			if (line[at] >= 'a' && line[at] <= 'z')
				line[at] -= 32;
		CHECK_EQ(write(4, line, got), got);
	}
}
"""


PIDFD_GETFD = 438
libc = ctypes.CDLL(None, use_errno=True)


def lend(reader: int, writer: int) -> Callable[[], object]:
    """The target shall have these as its descriptors 3 and 4."""
    # The kit closes all others first, so they have to be opened again by their place in our table.
    pid = os.getpid()

    def setup() -> None:
        pidfd = fcntl.fcntl(os.pidfd_open(pid), fcntl.F_DUPFD_CLOEXEC, 50)
        taken = [libc.syscall(PIDFD_GETFD, pidfd, fd, 0) for fd in (reader, writer)]
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 50) for fd in taken]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)
        os.closerange(5, 50)

    return setup


def asks(send: int, receive: int, words: bytes) -> None:
    os.write(send, words)
    answer = b""
    while len(answer) < len(words):
        answer += os.read(receive, 200)
    assert answer == words.upper()


def key_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def criu(verb: str, images: str, *args: str, lent: tuple[int, ...] = ()) -> str:
    """The criu command with descriptors of ours under their own numbers; its log."""
    argv = [sys.executable, "-m", "torpor", "criu", verb, "--no-default-config", "-D", images, "-o", "log", "-v4", *args]
    env = {**os.environ, "PYTHONPATH": SOURCES}
    done = subprocess.run(argv, env=env, pass_fds=lent, stdin=subprocess.DEVNULL, timeout=60, check=False)
    log = slurp_text(os.path.join(images, "log"))
    assert done.returncode == 0, log
    return log


@pytest.fixture
def pipes() -> Iterator[Callable[[], tuple[int, int]]]:
    made: list[int] = []

    def make() -> tuple[int, int]:
        ends = os.pipe()
        made.extend(ends)
        return ends

    yield make
    for fd in made:
        try:
            os.close(fd)
        except OSError:
            continue


def opened(target: Target, images: str, **options: object) -> None:
    torpor.dump(target.pid, images, **options)
    target.wait_gone()


def entries(images: str, name: str) -> list[Any]:
    folder = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return list(ImageReader(folder).read_all(name))
    finally:
        os.close(folder)


@pytest.mark.parametrize("form", ["proc", "manual"])
@pytest.mark.parametrize("way", ["library", "criu"])
def test_pipes_of_the_caller(
    start: Targets, images: str, pipes: Callable[[], tuple[int, int]], way: str, form: str
) -> None:
    (inside, send), (receive, outside) = pipes(), pipes()
    target = start.c(ECHO, setup=lend(inside, outside))
    asks(send, receive, b"before")
    keys = [key_of(inside), key_of(outside)]
    if form == "manual":
        keys = [key.replace(":", "") for key in keys]
    opened(target, images)
    (inside, send), (receive, outside) = pipes(), pipes()
    lent = list(zip((inside, outside), keys, strict=True))
    if way == "library":
        torpor.restore(images, inherit_fd=lent)
    else:
        words = [word for fd, key in lent for word in ("--inherit-fd", f"fd[{fd}]:{key}")]
        criu("restore", images, "-d", *words, lent=(inside, outside))
    os.close(inside), os.close(outside)
    asks(send, receive, b"after")
    os.close(send)
    assert target.wait_file("result") == "pass\n"
    assert os.read(receive, 1) == b"", "no end is left over anywhere"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_socketpair_with_the_caller(start: Targets, images: str, kind: socket.SocketKind) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    target = start.c(ECHO, setup=lend(there.fileno(), there.fileno()))
    inode = os.fstat(there.fileno()).st_ino
    there.close()
    asks(here.fileno(), here.fileno(), b"before")
    with pytest.raises(torpor.Unsupported, match="outside of the tree"):
        torpor.dump(target.pid, images)
    opened(target, images, external=[f"unix[{inode}]"], ext_unix_sk=True)
    files = [(entry.usk.ino, entry.usk.uflags) for entry in entries(images, "files") if entry.HasField("usk")]
    assert [flags for _, flags in files] == [1, 0], "CRIU has to read of the peer before it reads of the socket"
    with pytest.raises(torpor.Unsupported, match=rf"--inherit-fd fd\[N\]:socket:\[{inode}\]"):
        torpor.restore(images)
    here.close()
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    torpor.restore(images, ext_unix_sk=True, inherit_fd=[(there.fileno(), f"socket:[{inode}]")])
    there.close()
    asks(here.fileno(), here.fileno(), b"after")
    here.shutdown(socket.SHUT_WR) if kind != socket.SOCK_DGRAM else here.send(b"")
    assert target.wait_file("result") == "pass\n"
    here.close()


def test_a_tcp_connection_with_the_caller(start: Targets, images: str) -> None:
    """The descriptor that is lent takes the place of a connection, whatever that was connected to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(2)
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
        target = start.c(ECHO, setup=lend(near.fileno(), near.fileno()))
        inode = os.fstat(near.fileno()).st_ino
        near.close()
        asks(far.fileno(), far.fileno(), b"before")
        opened(target, images, tcp_established=True, network_lock="skip")
        far.close()
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
        torpor.restore(images, inherit_fd=[(near.fileno(), f"socket:[{inode}]")])
        near.close()
        asks(far.fileno(), far.fileno(), b"after")
        far.shutdown(socket.SHUT_WR)
        assert target.wait_file("result") == "pass\n"
        far.close()


SERVER = """
#include <arpa/inet.h>
int main(void)
{
	char line[100];

	ready();
	for (;;) {
		struct sockaddr_in from;
		socklen_t size = sizeof(from);
		ssize_t got;
		int one = accept(3, NULL, NULL);

		CHECK(one >= 0);
		got = MUST(read(one, line, sizeof(line)));
		MUST(write(one, line, got));
		MUST(close(one));
		if (got == 3)
			pass();
		got = MUST(recvfrom(4, line, sizeof(line), 0, (struct sockaddr *)&from, &size));
		MUST(sendto(4, line, got, 0, (struct sockaddr *)&from, size));
	}
}
"""


@pytest.mark.parametrize("way", ["library", "criu"])
def test_a_listener_and_a_udp_socket_of_the_caller(start: Targets, images: str, way: str) -> None:
    """As systemd and other supervisors hand them down: a copy serves on the sockets that it is given."""

    def sockets() -> tuple[socket.socket, socket.socket]:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        return socket.create_server(("127.0.0.1", 0)), udp

    def asks_tcp(listener: socket.socket, word: bytes) -> None:
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            client.sendall(word)
            assert client.recv(99) == word

    def asks_both(listener: socket.socket, udp: socket.socket) -> None:
        asks_tcp(listener, b"hello")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            client.sendto(b"datagram", udp.getsockname())
            assert client.recvfrom(99) == (b"datagram", udp.getsockname())

    old, new = sockets(), sockets()
    target = start.c(SERVER, setup=lend(old[0].fileno(), old[1].fileno()))
    asks_both(*old)
    keys = [key_of(one.fileno()) for one in old]
    opened(target, images)
    lent = list(zip([one.fileno() for one in new], keys, strict=True))
    # The old ones are still there: without those that are lent their ports would be taken.
    with pytest.raises(torpor.Unsupported, match="is in use by another process"):
        torpor.restore(images)
    if way == "library":
        torpor.restore(images, inherit_fd=lent)
    else:
        words = [word for fd, key in lent for word in ("--inherit-fd", f"fd[{fd}]:{key}")]
        criu("restore", images, "-d", *words, lent=tuple(fd for fd, _ in lent))
    asks_both(*new)
    asks_tcp(new[0], b"end")
    assert target.wait_file("result") == "pass\n"
    for one in (*old, *new):
        one.close()


def test_a_file_of_the_caller_by_its_path(start: Targets, images: str) -> None:
    """As vLLM restores: standard output and standard error go to new files, at the position of those."""
    target = start.c(
        'int main(void) { MUST(write(1, "one\\n", 4)); ready(); wait_told("go"); MUST(write(1, "two\\n", 4)); pass(); }'
    )
    path = target.path("stdout")
    opened(target, images)
    os.rename(path, target.path("moved"))
    other = target.path("other")
    appear(other, "begun\n")
    fd = os.open(other, os.O_WRONLY | os.O_APPEND)
    log = criu("restore", images, "-d", "--inherit-fd", f"fd[{fd}]:{path[1:]}", "--inherit-fd", f"fd[{fd}]:no/such",
               lent=(fd,))  # fmt: skip
    os.close(fd)
    assert "Warn: --inherit-fd: no file in the images is called no/such" in log
    assert path[1:] not in [line.rpartition(" ")[2] for line in log.splitlines() if "no file in the images" in line]
    target.go()
    assert slurp(other) == b"begun\ntwo\n"
    assert slurp(target.path("moved")) == b"one\n"


def test_an_external_file_that_no_mount_of_the_tree_reaches(start: Targets, images: str, tmp_path: object) -> None:
    folder = os.path.join(str(tmp_path), "torpor-detached")
    os.mkdir(folder)
    subprocess.run(["mount", "-t", "tmpfs", "torpor-test", folder], check=True)
    try:
        with open(os.path.join(folder, "notes"), "w") as file:
            file.write("in")
        reader = os.open(os.path.join(folder, "notes"), os.O_RDONLY)
        target = start.c(
            "int main(void) { char text[9] = {0}; MUST(read(3, text, 1)); ready(); wait_told(\"go\");"
            " MUST(pread(3, text, 8, 0)); CHECK(strcmp(text, \"out\") == 0); pass(); }",
            setup=lend(reader, reader),
        )
        [mount] = [line.split()[1] for line in slurp_text(f"/proc/self/fdinfo/{reader}").splitlines() if "mnt_id" in line]
        key = f"file[{int(mount):x}:{os.fstat(reader).st_ino:x}]"
        os.close(reader)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    with pytest.raises(torpor.Unsupported):
        torpor.dump(target.pid, images)
    opened(target, images, external=[key])
    with pytest.raises(torpor.Unsupported, match="an external file was not given"):
        torpor.restore(images)
    other = target.path("instead")
    appear(other, "out")
    fd = os.open(other, os.O_RDONLY)
    torpor.restore(images, inherit_fd=[(fd, key)])
    os.close(fd)
    target.go()


# ---------------------------------------------------------------------- terminals


def raw_pair() -> tuple[int, int]:
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    settings[1] &= ~termios.OPOST
    settings[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    return master, slave


@pytest.mark.parametrize("named", ["external", "by path"])
def test_a_terminal_of_the_caller(start: Targets, images: str, library: Library, named: str) -> None:
    master, slave = raw_pair()
    target = start.c(ECHO, setup=lend(slave, slave))
    status = os.fstat(slave)
    key = f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
    path = os.ttyname(slave)
    os.close(slave)
    asks(master, master, b"before")
    with pytest.raises(torpor.Unsupported, match="other end is outside"):
        torpor.dump(target.pid, images)
    if named == "external":
        opened(target, images, external=[key])
        with pytest.raises(torpor.Unsupported, match="outside of the tree") as caught:
            torpor.restore(images)
        assert key in caught.value.hint
    else:
        opened(target, images, shell_job=True)
        key = path[1:]
    os.close(master)
    master, slave = raw_pair()
    torpor.restore(images, inherit_fd=[(slave, key)])
    os.close(slave)
    asks(master, master, b"after")
    assert target.alive()
    os.close(master)


CONSOLE = """
#include <termios.h>

int main(int argc, char **argv)
{
	char text[3] = {0}, other[3] = {0};
	struct winsize size = {0};
	int held = argc > 1 ? MUST(open("/dev/tty", O_RDWR)) : -1;

	ready();
	wait_told("go");
	MUST(ioctl(3, TIOCGWINSZ, &size));
	CHECK_EQ(size.ws_row, 44);
	MUST(write(3, "out", 3));
	CHECK_EQ(read(3, text, 2), 2);
	CHECK(strcmp(text, "in") == 0);
	CHECK_EQ(tcgetsid(3), getpid());
	if (held >= 0)
		CHECK(strcmp(ttyname(held), "/dev/tty") == 0);
	else
		held = MUST(open("/dev/tty", O_RDONLY));
	MUST(read(held, other, 2));
	CHECK(strcmp(other, "by") == 0);
	pass();
}
"""


def with_terminal(slave: int) -> Callable[[], object]:
    """The target, a leader of a session, shall have the terminal as its descriptor 3 and as its controlling one."""
    setup = lend(slave, slave)

    def work() -> None:
        setup()
        os.close(4)
        fcntl.ioctl(3, termios.TIOCSCTTY, 0)

    return work


@pytest.mark.parametrize("words", [(), ("dev-tty",)])
def test_a_lent_terminal_controls_the_session_as_the_old_one_did(
    start: Targets, images: str, words: tuple[str, ...]
) -> None:
    master, slave = raw_pair()
    target = start.c(CONSOLE, *words, setup=with_terminal(slave))
    status = os.fstat(slave)
    key = f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
    opened(target, images, external=[key])
    os.close(master), os.close(slave)
    master, slave = raw_pair()
    termios.tcsetwinsize(slave, (44, 99))
    # The new one belongs to another session meanwhile, as that of a shell does who restores.
    rest = "int main(void) { signal(SIGHUP, SIG_IGN); ready(); for (;;) pause(); }"
    other = None if words else start.c(rest, setup=with_terminal(slave))
    settings = termios.tcgetattr(slave)
    torpor.restore(images, inherit_fd=[(slave, key)])
    assert termios.tcgetattr(slave) == settings, "the settings are its owner's"
    os.close(slave)
    os.write(master, b"inby")
    target.go()
    assert os.read(master, 9) == b"out"
    assert other is None or other.alive()
    os.close(master)


def test_the_master_of_a_console_is_handed_to_the_caller(start: Targets, images: str) -> None:
    """As runc gets the console of a container: the master was outside, and a new one is handed over."""
    master, slave = raw_pair()
    termios.tcsetwinsize(slave, (44, 99))
    got: list[int] = []
    target = start.c(CONSOLE, setup=with_terminal(slave))
    os.close(slave)
    opened(target, images, orphan_pts_master=True)
    os.close(master)
    with pytest.raises(torpor.Unsupported, match="its other end was outside of the tree"):
        torpor.restore(images, orphan_pts_master=True)  # there is nobody to hand it to

    def notify(action: object) -> None:
        if action.name == "orphan-pts-master":  # type: ignore[attr-defined]
            got.append(os.dup(action.fd))  # type: ignore[attr-defined]

    torpor.restore(images, orphan_pts_master=True, notify=notify)
    [master] = got
    os.write(master, b"inby")
    target.go()
    assert os.read(master, 9) == b"out"
    os.close(master)


def test_an_external_datagram_socket_is_found_by_its_name(
    start: Targets, images: str, criu_cmd: Callable[..., CommandResult]
) -> None:
    name = f"\0torpor-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name)
        near = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.connect(name)
        target = start.c(
            'int main(void) { MUST(write(4, "1", 1)); ready(); wait_told("go"); MUST(write(4, "2", 1)); pass(); }',
            setup=lend(near.fileno(), near.fileno()),
        )
        near.close()
        assert server.recv(9) == b"1"
        with pytest.raises(torpor.Unsupported, match="outside of the tree") as caught:
            torpor.dump(target.pid, images)
        assert "--ext-unix-sk" in caught.value.hint
        criu_cmd("dump", images, "-t", target.pid, "--ext-unix-sk").must()
        target.wait_gone()
        criu_cmd("restore", images, "-d", "--ext-unix-sk").must()
        wait_until("it is back", target.alive)
        target.go()
        assert server.recv(9) == b"2"
