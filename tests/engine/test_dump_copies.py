"""Copies, which have namespaces of their own, are dumped like any other process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import torpor
from kit import Target, Targets, diff, host_state, observe_tree, run_torpor, wait_until
from kit.faults import for_every_call
from kit.files import slurp_text
from kit.host import descendants, stat_fields
from kit.talk import Talk

# Whatever names a process: none of it may be a number of the namespace outside.
NUMBERS = """
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

static volatile int fired;
static int ends[2];
static pid_t me, child, worker_tid;

static void on_timer(int number, siginfo_t *info, void *context)
{
	fired = syscall(SYS_gettid);
}

static void *worker(void *arg)
{
	worker_tid = syscall(SYS_gettid);
	for (;;)
		pause();
	return arg;
}

int main(void)
{
	struct sigaction action = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO};
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1};
	struct itimerspec soon = {.it_value = {0, 1000000}};
	struct f_owner_ex owner = {F_OWNER_PID, 0}, group = {F_OWNER_PGRP, 0}, seen;
	struct flock lock = {.l_type = F_WRLCK, .l_len = 10}, other = {.l_type = F_WRLCK, .l_len = 10};
	struct ucred cred, sent;
	socklen_t size = sizeof cred;
	int pipes[2], second[2], proc, pidfd, locked, one = 1, status;
	char byte, text[64], control[CMSG_SPACE(sizeof sent)];
	struct iovec vector = {&byte, 1};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	siginfo_t ended;
	pthread_t thread;
	timer_t timer;
	pid_t checker;

	me = getpid();
	child = fork();
	if (!child) {
		setpgid(0, 0);
		wait_told("go");
		exit(getppid() == me && getpgrp() == getpid() ? 7 : 8);
	}
	setpgid(child, child);
	pthread_create(&thread, NULL, worker, NULL);
	while (!worker_tid)
		usleep(1000);
	sigaction(SIGUSR1, &action, NULL);
	event._sigev_un._tid = worker_tid;
	MUST(timer_create(CLOCK_MONOTONIC, &event, &timer));
	MUST(pipe(pipes));
	MUST(pipe(second));
	owner.pid = me;
	group.pid = child;
	MUST(fcntl(pipes[0], F_SETOWN_EX, &owner));
	MUST(fcntl(second[0], F_SETOWN_EX, &group));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	MUST(setsockopt(ends[0], SOL_SOCKET, SO_PASSCRED, &one, sizeof one));
	MUST(write(ends[1], "x", 1));
	pidfd = MUST(syscall(SYS_pidfd_open, child, 0));
	proc = MUST(open("/proc/self/stat", O_RDONLY));
	locked = MUST(open("locked", O_CREAT | O_RDWR, 0600));
	MUST(fcntl(locked, F_SETLK, &lock));
	ready();
	wait_told("go");
	CHECK_EQ(getpid(), me);
	CHECK_EQ(getsid(0), me);
	CHECK_EQ(getpgid(child), child);
	MUST(timer_settime(timer, 0, &soon, NULL));
	while (!fired)
		usleep(1000);
	CHECK_EQ(fired, worker_tid);
	MUST(fcntl(pipes[0], F_GETOWN_EX, &seen));
	CHECK_EQ(seen.pid, me);
	MUST(fcntl(second[0], F_GETOWN_EX, &seen));
	CHECK_EQ(seen.type, F_OWNER_PGRP);
	CHECK_EQ(seen.pid, child);
	MUST(getsockopt(ends[0], SOL_SOCKET, SO_PEERCRED, &cred, &size));
	CHECK_EQ(MUST(recvmsg(ends[0], &message, 0)), 1);
	memcpy(&sent, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof sent);
	snprintf(text, sizeof text, "%d %d", cred.pid, sent.pid);
	tell("credentials", text);
	CHECK(pread(proc, text, 63, 0) > 0);
	CHECK_EQ(atoi(text), me);
	checker = fork();
	if (!checker) {
		MUST(fcntl(locked, F_GETLK, &other));
		exit(other.l_type == F_WRLCK && other.l_pid == me ? 0 : 9);
	}
	CHECK_EQ(waitpid(checker, &status, 0), checker);
	CHECK_EQ(status, 0);
	MUST(waitid(P_PIDFD, pidfd, &ended, WEXITED));
	CHECK_EQ(ended.si_pid, child);
	CHECK_EQ(ended.si_status, 7);
	pass();
}
"""


@pytest.fixture
def numbers(start: Targets, images: str, ends_all: None) -> Target:
    target = start.c(NUMBERS)
    target.pids()
    torpor.dump(target.pid, images, file_locks=True)
    target.wait_gone()
    return target


def folder(images: str, name: str) -> str:
    path = os.path.join(images, name)
    os.mkdir(path)
    return path


def test_numbers_of_processes_are_those_that_the_copy_knows(numbers: Target, images: str) -> None:
    """Its snapshot is woken in every way there is: the program is content with each."""
    again = folder(images, "again")
    with torpor.template(images, file_locks=True) as template:
        copy = template.clone()
        result = torpor.dump(copy.pid, again, file_locks=True)
        assert result.pids[0] == copy.pid != numbers.pid
        assert copy.wait() == 128 + signal.SIGKILL
    wait_until("its number is free", lambda: stat_fields(numbers.pid) is None)
    numbers.tell("go")
    for wake in (
        lambda: torpor.restore(again, file_locks=True).pid,
        lambda: torpor.restore(again, own_pids=True, file_locks=True).waits_for,
        lambda: clone_of(again),
    ):
        pid = wake()
        assert verdict(numbers) == "pass\n"
        os.waitpid(pid, 0)
        os.unlink(numbers.path("result"))
        # Sockets are made outside of a copy's namespace, where their makers have no number in it.
        seen = 0 if pid != numbers.pid else numbers.pid
        assert numbers.read("credentials") == f"{seen} {seen}"


def verdict(target: Target) -> str:
    wait_until(f"{target} says what it thinks", lambda: os.path.exists(target.path("result")))
    return target.read("result")


def clone_of(images: str) -> int:
    with torpor.template(images, file_locks=True) as template:
        return int(template.clone().waits_for)


def test_a_dumped_copy_may_run_on(numbers: Target, images: str) -> None:
    with torpor.template(images, file_locks=True) as template:
        one = template.clone()
        before = observe_tree(one.pid)
        torpor.dump(one.pid, folder(images, "again"), file_locks=True, leave_running=True)
        assert not diff(before, observe_tree(one.pid))
        assert one.poll() is None
        numbers.tell("go")
        assert verdict(numbers) == "pass\n"
        assert one.wait() == 0


MEMORY = """
int main(void)
{
	char word[8], *private = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *untouched = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int sum;

	memset(private, 'o', 1 << 20);
	memset(untouched, 'u', 1 << 20);
	ready();
	wait_told("go");
	while (read(0, word, 1) == 1) {
		if (*word != '?') {
			memset(private + (1 << 19), *word, 1 << 18);
			madvise(private, 8192, MADV_DONTNEED);
			*shared = *word;
		}
		for (int i = sum = 0; i < 1 << 20; i++)
			sum += private[i] * (i % 7) + untouched[i] * (i % 5);
		dprintf(1, "('%c', '%c', %d, %d)\\n", private[1 << 19], *shared, sum, private[0]);
	}
	exit(42);
}
"""


def test_the_memory_of_a_copy_is_in_its_snapshot(start: Targets, images: str, ends_all: None) -> None:
    """What it shares with the template as well as what it has written since, whoever is gone by then."""
    target = start.c(MEMORY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    again, third = folder(images, "again"), folder(images, "third")
    with torpor.template(images) as template:
        one, other = Talk(template), Talk(template)
        os.write(other.input, b"x")
        os.write(one.input, b"a")
        seen = eval(os.read(one.output, 100))
        assert seen[:2] == ("a", "a") and seen[3] == 0
        torpor.dump(one.copy.pid, again)
        assert one.end() == 137
        assert eval(os.read(other.output, 100))[:2] == ("x", "x")
        assert other.end() == 42
    assert sum(os.path.getsize(os.path.join(again, name)) for name in os.listdir(again) if "pages" in name) > 2 << 20
    for name in os.listdir(images):
        if os.path.isfile(os.path.join(images, name)):
            os.unlink(os.path.join(images, name))
    with torpor.template(again) as template:
        copies = [Talk(template) for _ in range(2)]
        for copy in copies:
            os.write(copy.input, b"?")
            assert eval(os.read(copy.output, 100)) == seen
        os.write(copies[1].input, b"b")
        seen = eval(os.read(copies[1].output, 100))
        torpor.dump(copies[1].copy.pid, third)
        assert [copy.end() for copy in copies] == [42, 137]
    with torpor.template(third) as template:
        copy = Talk(template)
        os.write(copy.input, b"?")
        assert eval(os.read(copy.output, 100)) == seen
        assert copy.end() == 42


GENERATION = """
import mmap, struct, sys
fd = os.open(DIR + "/generation", os.O_RDONLY)
page = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
ready()
wait_told("go")
while os.read(0, 1):
    opened = os.open(DIR + "/generation", os.O_RDONLY)
    seen = [page[:4096], os.pread(fd, 4096, 0), os.pread(opened, 4096, 0)]
    os.close(opened)
    os.write(1, repr(seen).encode() + b"\\n")
"""


def test_generations_go_on(start: Targets, images: str, ends_all: None) -> None:
    """What stands in for a generation file in a copy is renewed in the copies of that copy."""
    def ask(copy: Talk) -> bytes:
        mapped, read, file = copy.ask("")
        assert mapped == read != file
        return mapped

    run_torpor("generation", "create", f"{start.folder}/generation").must()
    target = start.python(GENERATION.replace("DIR", repr(start.folder)))
    original = open_and_read(f"{start.folder}/generation")
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    again = folder(images, "again")
    with torpor.template(images) as template:
        one = Talk(template)
        first = ask(one)
        torpor.dump(one.copy.pid, again)
        one.end()
    with torpor.template(again) as template:
        copies = [Talk(template) for _ in range(2)]
        pages = [original, first, *map(ask, copies)]
        assert len(set(pages)) == 4
        assert [copy.end() for copy in copies] == [0, 0]


def open_and_read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


IDLE = """
#include <signal.h>

int main(void)
{
	int done = 0;

	signal(SIGCHLD, SIG_IGN);
	MUST(mkdir("own", 0755));
	ready();
	for (;;) {
		usleep(1000);
		if (access("orphan", F_OK) < 0 || done++)
			continue;
		if (!fork()) {
			if (!fork())
				pause();
			_exit(0);
		}
	}
}
"""


@pytest.fixture
def idle(start: Targets, images: str, ends_all: None) -> Target:
    target = start.c(IDLE)
    torpor.dump(target.pid, images)
    target.wait_gone()
    return target


def test_what_is_not_as_a_copy_is_made_is_refused_by_name(idle: Target, images: str) -> None:
    again = folder(images, "again")
    with torpor.template(images) as template:
        plain, named = template.clone(), template.clone(hostname="fred")
        overlaid, mounted = template.clone(overlay=[idle.path("own")]), template.clone()
        enter = ["nsenter", "-t", str(mounted.pid), "-m", "mount", "-t", "tmpfs", "none", idle.path("own")]
        subprocess.run(enter, check=True)
        for copy, words in (
            (named, "it has a uts namespace of its own"),
            (overlaid, "it sees .*/own through an overlay of its own, and what it has written there would be lost"),
            (mounted, r"/own \(tmpfs\) is mounted in its mount namespace, and not so here"),
        ):
            before = observe_tree(copy.pid)
            for dump in (lambda copy=copy: torpor.dump(copy.pid, again), lambda copy=copy: raised(copy.pid)):
                with pytest.raises(torpor.Unsupported, match=words):
                    dump()
            assert not diff(before, observe_tree(copy.pid)) and copy.poll() is None
        idle.tell("orphan")
        wait_until("the init has a child more", lambda: len(descendants(plain.waits_for)) == 2)
        os.unlink(idle.path("orphan"))
        with pytest.raises(torpor.Unsupported, match="in its pid namespace, and not below it: its parent has ended"):
            torpor.dump(plain.pid, again)
        orphan = next(pid for pid in descendants(plain.waits_for) if pid != plain.pid)
        os.kill(orphan, signal.SIGKILL)
        wait_until("it is gone", lambda: stat_fields(orphan) is None)
        assert os.listdir(again) == []
        torpor.dump(plain.pid, again)
        assert plain.wait() == 137


def raised(pid: int) -> None:
    """Raise what the check finds."""
    for problem in torpor.check(pid):
        raise problem


def test_namespaces_of_others_are_refused(start: Targets, images: str, ends_all: None) -> None:
    other = subprocess.Popen(["unshare", "--pid", "--fork", "--mount", "sleep", "1000"], stdin=subprocess.DEVNULL)
    wait_until("it sleeps", lambda: any(stat_fields(pid)[1] == "sleep" for pid in descendants(other.pid)))
    inner = descendants(other.pid)[0]
    with pytest.raises(torpor.Unsupported, match="it has a mnt namespace of its own"):
        torpor.dump(inner, images)
    os.kill(inner, signal.SIGKILL)
    other.wait()


def test_the_command_dumps_a_copy(idle: Target, images: str) -> None:
    name, again = f"test-{os.getpid()}", os.path.join(images, "again")

    def run(*words: str) -> str:
        return subprocess.check_output([sys.executable, "-m", "torpor", *words], text=True, timeout=60)

    run("template", "start", images, "--name", name)
    try:
        pid = run("clone", name).strip()
        run("dump", pid, "-D", again)
    finally:
        run("template", "stop", name)
    wait_until("it is gone", lambda: stat_fields(int(pid)) is None)
    woken = int(run("restore", again, "-d"))
    assert woken == idle.pid and slurp_text(f"/proc/{woken}/comm")


def test_a_failing_dump_leaves_the_copy_running(idle: Target, images: str) -> None:
    """Every call of the gate fails once; then the dump is done."""
    again = folder(images, "again")
    with torpor.template(images) as template:
        copy, sibling = template.clone(), template.clone()
        before, state = observe_tree(copy.pid), host_state(again)
        wrong = []
        for fault, error in for_every_call(lambda: torpor.dump(copy.pid, again), step=3):
            if not isinstance(error, torpor.TorporError) and error is not None:
                wrong.append(f"{fault.hit}: {error!r}")
            if error is None:
                break
            wrong += [f"{fault.hit}: {line}" for line in diff(before, observe_tree(copy.pid))]
            wrong += [f"{fault.hit}: {line}" for line in diff(state, host_state(again))]
            if wrong:
                break
        assert not wrong, "\n".join(wrong)
        assert copy.wait() == 137
        assert sibling.poll() is None
    with torpor.template(again) as template:
        copy = template.clone()
        assert copy.poll() is None
