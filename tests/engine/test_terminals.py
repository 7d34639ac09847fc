"""Trees with terminals of their own, as those below an sshd, a tmux or a script(1) are."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

import torpor
from kit import Targets, compile_c, wait_until
from kit.verbs import SOURCES
from torpor.errors import KernelError
from torpor.resources import sysv_ipc

from .conftest import Survives

#: A master of a pty in the parent; below it a session on the slave with a job in the background. All of them note
#: what signals they get.
JOBS = """
#include <termios.h>
#include <pty.h>

static volatile sig_atomic_t winch, hup, cont;

static void note(int number)
{
	winch += number == SIGWINCH;
	hup += number == SIGHUP;
	cont += number == SIGCONT;
}

static void notes(int number)
{
	struct sigaction action = {.sa_handler = note};

	MUST(sigaction(number, &action, NULL));
}

static int master;

static void background(void)
{
	char text[10];

	signal(SIGTTIN, SIG_IGN);
	MUST(setpgid(0, 0));
	tell("background", "");
	wait_told("go");
	CHECK_EQ(getsid(0), getppid());
	CHECK_EQ(tcgetpgrp(0), getppid());
	CHECK(read(0, text, 1) == -1 && errno == EIO);  /* it is not its turn */
	_exit(0);
}

static void leader(const char *name)
{
	struct winsize size;
	struct termios settings;
	char line[100];
	int job, status, fd;

	MUST(close(master));
	MUST(setsid());
	fd = MUST(open(name, O_RDWR));
	MUST(ioctl(fd, TIOCSCTTY, 0));
	for (int i = 0; i < 3; i++)
		MUST(dup2(fd, i));
	if (fd > 2)
		MUST(close(fd));
	notes(SIGWINCH);
	notes(SIGHUP);
	notes(SIGCONT);
	MUST(tcgetattr(0, &settings));
	settings.c_lflag &= ~ECHO;
	settings.c_oflag &= ~OPOST;
	settings.c_cc[VEOF] = 7;
	MUST(tcsetattr(0, TCSANOW, &settings));
	job = MUST(fork());
	if (job == 0)
		background();
	MUST(setpgid(job, job) == 0 || errno == EACCES ? 0 : -1);
	MUST(tcsetpgrp(0, getpid()));
	wait_told("background");
	tell("leader", "");
	wait_told("go");

	CHECK_EQ(getsid(0), getpid());
	CHECK_EQ(tcgetpgrp(0), getpid());
	CHECK_EQ(tcgetsid(0), getpid());
	CHECK(strcmp(ttyname(0), name) == 0);
	MUST(close(MUST(open("/dev/tty", O_RDWR))));
	MUST(tcgetattr(0, &settings));
	CHECK(!(settings.c_lflag & ECHO) && !(settings.c_oflag & OPOST) && (settings.c_lflag & ICANON));
	CHECK_EQ(settings.c_cc[VEOF], 7);
	MUST(ioctl(0, TIOCGWINSZ, &size));
	CHECK(size.ws_row == 33 && size.ws_col == 77 && size.ws_xpixel == 5 && size.ws_ypixel == 6);
	CHECK_EQ(winch + hup + cont, 0);
	CHECK_EQ(read(0, line, 100), 6);  /* typed before the dump */
	CHECK(memcmp(line, "typed\\n", 6) == 0);
	CHECK_EQ(write(1, "shown", 5), 5);
	CHECK_EQ(waitpid(job, &status, 0), job);
	CHECK_EQ(status, 0);
	tell("settled", "");
	wait_told("resized");
	CHECK_EQ(winch, 1);
	CHECK_EQ(hup, 0);
	tell("close", "");
	while (!hup)  /* carrier lost: the session's leader hears of it */
		usleep(1000);
	_exit(0);
}

int main(void)
{
	struct winsize size = {33, 77, 5, 6};
	char name[100], text[10] = {0};
	int slave, child, status;

	MUST(openpty(&master, &slave, name, NULL, &size));
	child = MUST(fork());
	if (child == 0)
		leader(name);
	MUST(close(slave));
	wait_told("leader");
	MUST(write(master, "typed\\n", 6));
	usleep(20000);
	ready();
	wait_told("settled");
	CHECK_EQ(tcgetpgrp(master), child);
	CHECK_EQ(read(master, text, 9), 5);
	CHECK(strcmp(text, "shown") == 0);
	size.ws_row = 34;
	MUST(ioctl(master, TIOCSWINSZ, &size));
	usleep(20000);
	tell("resized", "");
	wait_told("close");
	MUST(close(master));
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	pass();
}
"""


def test_a_session_on_a_pty_of_its_parent(survives: Survives) -> None:
    survives(JOBS, flags=("-lutil",))


FOREGROUND = """
#include <pty.h>
#include <termios.h>

int main(void)
{
	int master, slave, job, status;
	char name[100], text[10];

	MUST(openpty(&master, &slave, name, NULL, NULL));
	MUST(ioctl(slave, TIOCSCTTY, 0));
	job = MUST(fork());
	if (job == 0) {
		MUST(setpgid(0, 0));
		signal(SIGTTOU, SIG_IGN);
		MUST(tcsetpgrp(slave, getpid()));
		tell("foreground", "");
		wait_told("go");
		CHECK_EQ(tcgetpgrp(slave), getpgrp());
		CHECK_EQ(read(slave, text, 10), 6);  /* it is its turn: no SIGTTIN */
		_exit(0);
	}
	wait_told("foreground");
	MUST(write(master, "typed\\n", 6));
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(job, &status, 0), job);
	CHECK_EQ(status, 0);
	pass();
}
"""


def test_a_job_in_the_foreground(survives: Survives) -> None:
    survives(FOREGROUND, flags=("-lutil",))


UNREAD = """
#include <pty.h>

int main(void)
{
	int master, slave;
	char name[100], text[10];

	MUST(openpty(&master, &slave, name, NULL, NULL));
	MUST(write(master, "typed\\n", 6));
	MUST(write(slave, "shown", 5));
	ready();
	wait_told("go");
	CHECK_EQ(read(slave, text, 10), 6);
	CHECK(memcmp(text, "typed\\n", 6) == 0);
	CHECK(read(master, text, 10) > 0);
	pass();
}
"""


def test_a_dump_that_fails_puts_back_what_was_typed(
    start: Targets, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start.c(UNREAD, flags=["-lutil"])

    def fail(_: object) -> None:
        raise KernelError("read", errno.EIO)

    monkeypatch.setattr(sysv_ipc, "finish", fail)
    with pytest.raises(KernelError, match="read"):
        torpor.dump(target.pid, images)
    target.go()


#: Leaders of sessions: one that never had a terminal, one that gave it up, one that has ended while its group lives.
LEADERS = """
#include <termios.h>
#include <pty.h>

static int no_terminal(void)
{
	return open("/dev/tty", O_RDWR) == -1 && errno == ENXIO;
}

int main(void)
{
	int master, slave, never, gave_up, ended, status, pipes[2];
	char name[100], byte;

	MUST(openpty(&master, &slave, name, NULL, NULL));
	MUST(pipe(pipes));
	never = MUST(fork());
	if (never == 0) {
		MUST(setsid());
		tell("never", "");
		wait_told("go");
		_exit(getsid(0) != getpid() || !no_terminal());
	}
	gave_up = MUST(fork());
	if (gave_up == 0) {
		MUST(setsid());
		signal(SIGHUP, SIG_IGN);
		MUST(ioctl(slave, TIOCSCTTY, 0));
		MUST(ioctl(slave, TIOCNOTTY));
		tell("gave_up", "");
		wait_told("go");
		_exit(getsid(0) != getpid() || !no_terminal());
	}
	ended = MUST(fork());
	if (ended == 0) {
		MUST(setsid());
		if (MUST(fork()))
			_exit(0);
		tell("orphan", "");
		wait_told("go");
		MUST(write(pipes[1], getsid(0) != getpid() && no_terminal() ? "y" : "n", 1));
		_exit(0);
	}
	CHECK_EQ(waitpid(ended, &status, 0), ended);
	wait_told("never");
	wait_told("gave_up");
	wait_told("orphan");
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(never, &status, 0), never);
	CHECK_EQ(status, 0);
	CHECK_EQ(waitpid(gave_up, &status, 0), gave_up);
	CHECK_EQ(status, 0);
	CHECK_EQ(read(pipes[0], &byte, 1), 1);
	CHECK_EQ(byte, 'y');
	CHECK(tcgetsid(master) == -1);  /* the terminal is nobody's */
	pass();
}
"""


def test_leaders_of_sessions_without_a_terminal(start: Targets, survives: Survives) -> None:
    reaper = "int main(void) { MUST(prctl(PR_SET_CHILD_SUBREAPER, 1)); return main_program(); }"
    source = LEADERS.replace("int main(void)", "static int main_program(void)") + reaper
    survives(source, flags=("-lutil",))


ALONE = """
#include <termios.h>

int main(int argc, char **argv)
{
	int fd = MUST(open(argv[1], O_RDWR));

	MUST(ioctl(fd, TIOCSCTTY, 0));
	MUST(close(fd));
	if (argc > 2)
		MUST(open("/dev/tty", O_RDWR));
	ready();
	wait_told("go");
	MUST(open("/dev/tty", O_RDWR));
	pass();
}
"""


@pytest.mark.parametrize("word", [(), ("dev-tty",)])
def test_a_controlling_terminal_that_nobody_could_give_back(start: Targets, images: str, word: tuple[str, ...]) -> None:
    master, slave = os.openpty()
    target = start.c(ALONE, os.ttyname(slave), *word)
    with pytest.raises(torpor.Unsupported, match=r"no task of the tree has its controlling terminal \(/dev/pts/") as caught:
        torpor.dump(target.pid, images)
    assert "--shell-job" in str(caught.value)
    target.go()
    os.close(master), os.close(slave)


PEER = """
#include <termios.h>

int main(void)
{
	int master = MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY)), slave, unlocked = 0;

	MUST(ioctl(master, TIOCSPTLCK, &unlocked));
	slave = MUST(ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC));
	MUST(dup2(slave, 0));
	MUST(dup3(slave, 9, O_CLOEXEC));
	ready();
	wait_told("go");
	CHECK_EQ(fcntl(0, F_GETFD), 0);
	CHECK_EQ(fcntl(slave, F_GETFD), FD_CLOEXEC);
	CHECK_EQ(fcntl(9, F_GETFD), FD_CLOEXEC);
	CHECK_EQ(fcntl(master, F_GETFD), 0);
	pass();
}
"""


def test_a_slave_whose_description_says_that_exec_closes_it(survives: Survives) -> None:
    """As systemd and LXC open one: fdinfo shows the flag for each of its descriptors, whatever they have themselves."""
    survives(PEER, ignore=("*/fds/0/flags",))


JOB = """
#include <termios.h>

int main(void)
{
	struct termios settings;
	char byte;

	MUST(tcgetattr(0, &settings));
	cfmakeraw(&settings);
	MUST(tcsetattr(0, TCSANOW, &settings));
	ready();
	CHECK_EQ(read(0, &byte, 1), 1);  /* no line is waited for */
	CHECK_EQ(write(0, &byte, 1), 1);
	pass();
}
"""


def test_the_job_of_a_shell_gets_its_terminal_as_it_had_set_it(start: Targets, images: str) -> None:
    """As an editor needs it; and where the restore fails the terminal is as it was."""
    master, slave = os.openpty()
    cooked = termios.tcgetattr(slave)
    path = os.ttyname(slave)

    def stdin() -> None:
        os.dup2(os.open(path, os.O_RDWR | os.O_NOCTTY), 0)

    target = start.command(compile_c(JOB), wait=True, session=False, setup=stdin)
    raw = termios.tcgetattr(slave)
    assert raw != cooked
    torpor.dump(target.pid, images, shell_job=True)
    target.wait_gone()
    termios.tcsetattr(slave, termios.TCSANOW, cooked)
    argv = [sys.executable, "-m", "torpor", "restore", images, "-j", "-d"]
    env = {**os.environ, "PYTHONPATH": SOURCES}
    failed = subprocess.run([*argv, "--action-script", "/bin/false"], env=env, stdin=slave, check=False)
    assert failed.returncode == 1
    assert termios.tcgetattr(slave) == cooked
    late = os.path.join(target.folder, "late")
    with open(late, "w") as file:
        file.write('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
    os.chmod(late, 0o755)
    failed = subprocess.run([*argv, "--action-script", late], env=env, stdin=slave, check=False)
    assert failed.returncode == 1
    assert termios.tcgetattr(slave) == cooked
    subprocess.run(argv, env=env, stdin=slave, check=True)
    assert termios.tcgetattr(slave) == raw
    os.write(master, b"k")
    assert target.wait_file("result") == "pass\n"
    assert os.read(master, 9) == b"k"
    os.close(master), os.close(slave)


# ---------------------------------------------------------------------- virtual terminals

VT_OPENQRY, VT_DISALLOCATE, VT_SETMODE, KDSETMODE = 0x5600, 0x5608, 0x5602, 0x4B3A
KD_TEXT, KD_GRAPHICS, VT_AUTO, VT_PROCESS = 0, 1, 0, 1


@pytest.fixture
def vt() -> Iterator[int]:
    """The number of a virtual terminal that nobody uses."""
    try:
        any_vt = os.open("/dev/tty0", os.O_WRONLY | os.O_NOCTTY)
    except OSError as error:
        pytest.skip(f"no virtual terminals here: {error}")
    number = struct.unpack("i", fcntl.ioctl(any_vt, VT_OPENQRY, bytes(4)))[0]
    assert number > 1
    yield number

    def given_back() -> bool:
        try:
            fcntl.ioctl(any_vt, VT_DISALLOCATE, number)
        except OSError as error:
            if error.errno != errno.EBUSY:  # the program is about to end
                raise
            return False
        return True

    wait_until("the virtual terminal is free", given_back)
    os.close(any_vt)


VIRTUAL = """
#include <termios.h>

int main(int argc, char **argv)
{
	struct termios settings;
	int fd = MUST(open(argv[1], O_RDWR | O_NOCTTY));

	MUST(tcgetattr(fd, &settings));
	settings.c_lflag &= ~ECHO;
	settings.c_cc[VEOF] = 9;
	MUST(tcsetattr(fd, TCSANOW, &settings));
	ready();
	wait_told("go");
	MUST(tcgetattr(fd, &settings));
	CHECK(!(settings.c_lflag & ECHO) && settings.c_cc[VEOF] == 9);
	CHECK(strcmp(ttyname(fd), argv[1]) == 0);
	pass();
}
"""


def test_a_virtual_terminal_is_opened_again(survives: Survives, vt: int) -> None:
    survives(VIRTUAL, f"/dev/tty{vt}")


@pytest.mark.parametrize(
    ("request_of", "argument", "back", "why"),
    [
        (KDSETMODE, KD_GRAPHICS, KD_TEXT, "it shows graphics"),
        (VT_SETMODE, struct.pack("bbhhh", VT_PROCESS, 0, 10, 10, 0), struct.pack("bbhhh", VT_AUTO, 0, 0, 0, 0), "is asked"),
    ],
)  # fmt: skip
def test_a_virtual_terminal_in_a_state_that_is_not_kept(
    start: Targets, images: str, vt: int, request_of: int, argument: int | bytes, back: int | bytes, why: str
) -> None:
    target = start.c(VIRTUAL, f"/dev/tty{vt}")
    fd = os.open(f"/dev/tty{vt}", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(fd, request_of, argument)
    try:
        with pytest.raises(torpor.Unsupported, match=why) as caught:
            torpor.dump(target.pid, images)
        status = os.fstat(fd)
        key = f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
        assert f"--external {key}" in caught.value.hint
    finally:
        fcntl.ioctl(fd, request_of, back)
    torpor.dump(target.pid, images, external=[key])
    target.wait_gone()
    with pytest.raises(torpor.Unsupported, match="outside of the tree"):
        torpor.restore(images)
    torpor.restore(images, inherit_fd=[(fd, key)])
    os.close(fd)
    target.go()
