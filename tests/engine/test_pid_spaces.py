"""Pid namespaces: trees with some inside, and trees that live in one. Every number in every namespace stays.

What a task is called where stands in its status (NSpid, NSpgid, NSsid), which the observer compares; the programs look
from within.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

import torpor
from kit import (
    Again,
    Targets,
    Verbs,
    assert_same,
    compile_c,
    host_state,
    observe_settled,
    observe_tree,
    round_trip,
    run_torpor,
    wait_until,
)
from kit.apart import AS_INIT, inside
from kit.files import slurp_text
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.images.store import ImageReader, ImageWriter
from torpor.remote import machine

from .conftest import Survives

CLONE_NEWPID = 0x20000000
#: The namespaces are new ones, with the same tasks in them.
NEW = ("*/namespaces/pid*",)


def numbers(pid: int, field: str = "NSpid") -> list[int]:
    """What the kernel says of a task's numbers, from our namespace inwards."""
    line = next(line for line in slurp_text(f"/proc/{pid}/status").splitlines() if line.startswith(f"{field}:"))
    return [int(word) for word in line.split()[1:]]


def space(pid: int, name: str = "pid") -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


NESTED = """
static int clone_into_new(void)
{
	return syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0);
}

static void *naps(void *to) { *(int *)to = syscall(SYS_gettid); for (;;) pause(); }

static volatile int got;
static void on_signal(int number) { got += number; }

static void innermost(void)
{
	CHECK_EQ(getpid(), 1);
	CHECK_EQ(getppid(), 0);
	CHECK_EQ(getpgrp(), 0);         /* the group is outside */
	tell("innermost", "");
	wait_told("go");
	CHECK_EQ(getpid(), 1);
	CHECK_EQ(getppid(), 0);
	CHECK_EQ(getpgrp(), 0);
	CHECK_EQ(getsid(0), 0);
	tell("innermost is well", "");
	for (;;) pause();
}

static void middle(void)            /* a process in the first namespace: 2, with a thread, in a session of its own */
{
	static int tid;
	pthread_t thread;
	sigset_t set;
	timer_t timer;
	siginfo_t info;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN};
	struct itimerspec soon = {.it_value = {0, 300 * 1000 * 1000}};

	signal(SIGUSR1, on_signal);
	MUST(setsid());
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGRTMIN);
	sigprocmask(SIG_BLOCK, &set, NULL);
	CHECK_EQ(pthread_create(&thread, NULL, naps, &tid), 0);
	while (tid == 0)
		usleep(1000);
	MUST(kill(getpid(), SIGUSR2));
	event._sigev_un._tid = syscall(SYS_gettid);
	MUST(timer_create(CLOCK_MONOTONIC, &event, &timer));
	tell("middle", "");
	wait_told("go");
	CHECK_EQ(getpid(), 2);
	CHECK_EQ(getppid(), 1);
	CHECK_EQ(getsid(0), 2);
	CHECK_EQ(getpgrp(), 2);
	CHECK_EQ(sigwaitinfo(&set, &info), SIGUSR2);
	CHECK_EQ(info.si_pid, 2);
	MUST(timer_settime(timer, 0, &soon, NULL));
	CHECK_EQ(sigwaitinfo(&set, &info), SIGRTMIN);
	CHECK_EQ(syscall(SYS_tgkill, 2, tid, 0), 0);
	MUST(syscall(SYS_tgkill, 2, tid, SIGUSR1));
	while (!got)
		usleep(1000);
	tell("middle is well", "");
	for (;;) pause();
}

static void init(void)
{
	int dead, second, fd[2];
	struct f_owner_ex owner = {F_OWNER_PID, 0};

	CHECK_EQ(getpid(), 1);
	if ((second = fork()) == 0)
		middle();
	CHECK_EQ(second, 2);
	MUST(pipe(fd));
	owner.pid = second;
	MUST(fcntl(fd[0], F_SETOWN_EX, &owner));
	if (clone_into_new() == 0)
		innermost();
	if ((dead = fork()) == 0)
		_exit(7);
	tell("init", "");
	wait_told("go");
	int status;
	CHECK_EQ(getpid(), 1);
	CHECK_EQ(waitpid(dead, &status, 0), dead);
	CHECK_EQ(WEXITSTATUS(status), 7);
	CHECK_EQ(fcntl(fd[0], F_GETOWN_EX, &owner), 0);
	CHECK_EQ(owner.pid, second);
	tell("init is well", "");
	for (;;) pause();
}

int main(void)
{
	int child = clone_into_new(), status;

	if (child == 0)
		init();
	MUST(child);
	wait_told("middle");
	wait_told("innermost");
	wait_told("init");
	usleep(100000);
	ready();
	wait_told("go");
	wait_told("middle is well");
	wait_told("innermost is well");
	wait_told("init is well");
	MUST(kill(child, SIGKILL));
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(WTERMSIG(status), SIGKILL);
	pass();
}
"""


def test_namespaces_inside_of_the_tree(survives: Survives) -> None:
    survives(NESTED, ignore=NEW)


def test_they_are_in_the_images(start: Targets, images: str) -> None:
    target = start.c(NESTED)
    pids = target.pids()
    run_torpor("dump", target.pid, "-D", images, "--leave-running").must()
    entries = {entry.pid: entry for entry in _entries(images)}
    assert set(entries) == set(pids)
    for pid in pids[1:]:
        assert list(entries[pid].levels.pid) == numbers(pid)
        assert list(entries[pid].levels.pgid) == numbers(pid, "NSpgid")
        assert list(entries[pid].levels.sid) == numbers(pid, "NSsid")
    shown = json.loads(run_torpor("show", images, "--json").must().output)
    by_pid = {task["pid"]: task for task in shown["tasks"]}
    assert "pids" not in by_pid[target.pid]
    for pid in pids[1:]:
        assert by_pid[pid]["pids"] == numbers(pid)
    middle = next(pid for pid in pids if numbers(pid)[1:] == [2])
    threads = {thread["tid"]: thread["tids"] for thread in by_pid[middle]["threads"]}
    assert threads == {int(tid): numbers(int(tid)) for tid in os.listdir(f"/proc/{middle}/task")}
    text = run_torpor("show", images).must().output
    assert f"{middle}/2" in text
    target.go()


def _entries(images: str) -> list[object]:
    fd = os.open(images, os.O_RDONLY)
    try:
        return list(ImageReader(fd).read_all("pstree"))
    finally:
        os.close(fd)


@contextlib.contextmanager
def images_changed(images: str, name: str) -> Iterator[list[object]]:
    """The messages of an image, which are written back as they have become."""
    fd = os.open(images, os.O_RDONLY)
    try:
        with tempfile.TemporaryDirectory() as other:
            messages = list(ImageReader(fd).read_all(name))
            yield messages
            folder = os.open(other, os.O_RDONLY)
            with ImageWriter(folder) as writer:
                for message in messages:
                    writer.append(name, message)
                writer.commit()
            os.close(folder)
            shutil.copy(os.path.join(other, f"{name}.img"), images)
    finally:
        os.close(fd)


UNSHARED = """
int main(void)
{
	int first, second, pid, status;

	MUST(unshare(CLONE_NEWPID));
	if ((first = MUST(fork())) == 0) {
		CHECK_EQ(getpid(), 1);
		wait_told("go");
		CHECK_EQ(getpid(), 1);
		for (;;) pause();
	}
	if ((second = MUST(fork())) == 0) {
		CHECK_EQ(getpid(), 2);
		CHECK_EQ(getppid(), 0);
		wait_told("go");
		CHECK_EQ(getpid(), 2);
		CHECK_EQ(getppid(), 0);
		_exit(3);
	}
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(second, &status, 0), second);
	CHECK_EQ(WEXITSTATUS(status), 3);
	if ((pid = MUST(fork())) == 0)      /* into that namespace still */
		_exit(getppid() == 0 && getpid() > 1 && kill(1, 0) == 0 ? 5 : 6);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 5);
	MUST(kill(first, SIGKILL));
	CHECK_EQ(waitpid(first, &status, 0), first);
	CHECK(fork() == -1 && errno == ENOMEM);     /* it is over */
	pass();
}
"""


def test_children_are_born_into_it(survives: Survives) -> None:
    survives(UNSHARED, ignore=NEW)


TRAPPED = """
#include <sched.h>

int main(void)
{
	union sigval value = {.sival_int = 77};
	siginfo_t info;
	sigset_t set;
	int pid, status;

	MUST(unshare(CLONE_NEWPID));
	if ((pid = MUST(fork())) == 0) {
		CHECK_EQ(getpid(), 1);
		sigemptyset(&set);
		sigaddset(&set, SIGTRAP);
		sigprocmask(SIG_BLOCK, &set, NULL);
		MUST(sigqueue(1, SIGTRAP, value));
		tell("queued", "");
		wait_told("go");
		CHECK_EQ(MUST(sigwaitinfo(&set, &info)), SIGTRAP);
		CHECK_EQ(info.si_value.sival_int, 77);
		_exit(3);
	}
	wait_told("queued");
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 3);
	pass();
}
"""


def test_a_trap_that_waits_inside(survives: Survives) -> None:
    """It is queued last of all, by a call that names the task as it names itself."""
    survives(TRAPPED, ignore=NEW)


EMPTY = """
int main(void)
{
	int pid, status;

	MUST(unshare(CLONE_NEWPID));
	ready();
	wait_told("go");
	if ((pid = MUST(fork())) == 0)
		_exit(getpid() == 1 ? 5 : 6);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 5);
	pass();
}
"""


def test_it_has_no_process_yet(survives: Survives) -> None:
    survives(EMPTY, ignore=NEW)


DEAD_INIT = """
static void end_by(int number)
{
	static char path[] = "short";
	struct rlimit none = {0, 0};
	volatile int zero = 0;
	char *page;
	int fd;

	setrlimit(RLIMIT_CORE, &none);
	prctl(PR_SET_DUMPABLE, 0);      /* no core in the status either */
	switch (number) {
	case 0:
		_exit(9);
	case SIGILL:
		__asm__ volatile("ud2");
	case SIGTRAP:
		__asm__ volatile("int3");
	case SIGFPE:
		_exit(7 / zero);
	case SIGSEGV:
		*(volatile int *)8 = 1;
	case SIGBUS:
		fd = MUST(open(path, O_CREAT | O_RDWR, 0600));
		page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
		_exit(*(volatile char *)page);
	case SIGSYS:
		prctl(59, 1, 0, 0, 0);  /* PR_SET_SYSCALL_USER_DISPATCH */
		getpid();
	}
	for (;;) pause();
}

int main(int argc, char **argv)
{
	int child[9], status;
	siginfo_t info;

	for (int i = 1; i < argc; i++) {
		if ((child[i] = MUST(syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0))) == 0)
			end_by(atoi(argv[i]));
		if (atoi(argv[i]) == SIGKILL)
			MUST(kill(child[i], SIGKILL));
		MUST(waitid(P_PID, child[i], &info, WEXITED | WNOWAIT));
	}
	ready();
	wait_told("go");
	for (int i = 1; i < argc; i++) {
		CHECK_EQ(waitpid(child[i], &status, 0), child[i]);
		CHECK_EQ(status, atoi(argv[i]) ? atoi(argv[i]) : 9 << 8);
	}
	pass();
}
"""


def test_an_init_that_is_a_zombie(survives: Survives) -> None:
    """It ended by itself (0), was killed from outside, or by what it did: no other signal ends an init."""
    survives(DEAD_INIT, *map(str, (0, 9, *machine.FAULT_AT)), ignore=NEW)


def test_the_numbers_of_an_init_that_is_a_zombie(start: Targets, verbs: Verbs, images: str) -> None:
    """Nobody else has ever been in its namespace."""
    target = start.c(DEAD_INIT, "9")
    dead = target.pids()[1]
    before = numbers(dead)
    assert before == [dead, 1]
    round_trip(verbs, target, images, ignore=NEW)
    after = numbers(target.pids()[1])
    assert (after[-1], len(after)) == (1, len(numbers(target.pid)) + 1)
    target.go()


def test_an_init_that_no_signal_can_have_ended(start: Targets, images: str) -> None:
    target = start.c(DEAD_INIT, "9")
    target.pids()
    run_torpor("dump", target.pid, "-D", images).must()
    target.wait_gone()
    dead = next(entry.pid for entry in _entries(images) if entry.levels.pid)
    with images_changed(images, f"core-{dead}") as cores:
        cores[0].tc.exit_code = signal.SIGTERM
    with pytest.raises(Unsupported, match="was ended by signal 15, which ends none"):
        torpor.restore(images)


STOPPED = """
int main(void)
{
	int child = syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0), status;

	if (child == 0)
		for (;;) pause();
	MUST(kill(child, SIGSTOP));
	CHECK_EQ(waitpid(child, &status, WUNTRACED), child);
	ready();
	wait_told("go");
	MUST(kill(child, SIGCONT));
	CHECK_EQ(waitpid(child, &status, WCONTINUED), child);
	CHECK(WIFCONTINUED(status));
	MUST(kill(child, SIGKILL));
	CHECK_EQ(waitpid(child, &status, 0), child);
	pass();
}
"""


def test_an_init_that_is_stopped(survives: Survives) -> None:
    survives(STOPPED, ignore=NEW)


JOB = """
/* A shell's job: the leader of a group whose members are in a namespace where they cannot see it. */
int main(void)
{
	int job = MUST(fork()), status;

	if (job == 0) {
		int child, helper;

		MUST(setpgid(0, 0));
		if ((helper = fork()) == 0)
			for (;;) pause();
		MUST(unshare(CLONE_NEWPID));
		if ((child = MUST(fork())) == 0) {
			if (MUST(fork()) == 0)
				for (;;) pause();
			for (;;) pause();
		}
		tell("child", "");
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK_EQ(WTERMSIG(status), SIGKILL);
		tell("job is well", "");
		for (;;) pause();
	}
	wait_told("child");
	usleep(50000);
	ready();
	wait_told("go");
	CHECK_EQ(getpgid(job), job);
	MUST(kill(-job, SIGKILL));
	CHECK_EQ(waitpid(job, &status, 0), job);
	pass();
}
"""


def test_a_group_that_its_members_cannot_see(survives: Survives) -> None:
    survives(JOB, ignore=NEW)


# ---------------------------------------------------------------------- a tree in one

INSIDE = """
int main(void)
{
	int own = getpid(), parent = getppid(), child, status;

	setsid();
	if ((child = MUST(fork())) == 0) {
		int mine = getpid();

		wait_told("go");
		_exit(getpid() == mine && getppid() == own ? 4 : 5);
	}
	ready();
	wait_told("go");
	CHECK_EQ(getpid(), own);
	CHECK_EQ(getppid(), parent);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(WEXITSTATUS(status), 4);
	CHECK_EQ(syscall(SYS_gettid), own);
	pass();
}
"""
#: In a namespace where some other program is process 1.
BELOW_INIT = (*AS_INIT, "sh", "-c", '"$0" & wait; :')


@pytest.mark.parametrize("around", [AS_INIT, BELOW_INIT], ids=["init", "another"])
def test_a_tree_in_a_namespace(start: Targets, verbs: Verbs, images: str, around: tuple[str, ...]) -> None:
    target, outer = inside(start, compile_c(INSIDE), *around)
    if verbs.name == "untouched":
        return target.go()
    before = observe_settled(target.pid)
    first = os.path.join(images, "running")
    os.mkdir(first)
    verbs.dump(target.pid, first, leave_running=True)
    assert_same(before, observe_tree(target.pid))
    second = os.path.join(images, "killed")
    os.mkdir(second)
    target.pids()
    before = observe_settled(target.pid)  # what is around it has been written to the same file
    verbs.dump(target.pid, second)
    for pid in target.seen:
        wait_until("it is gone", lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    wait_until("those around it are gone", lambda: not outer.alive())
    pid = verbs.restore(second)
    if verbs.same_pids:
        assert pid == target.pid
        assert_same(before, observe_tree(pid), (*NEW, "*/ppid", "*/PPid", "*/fds/[12]/size"))
    target.pid = pid
    assert space(pid) != space(os.getpid())
    target.go()
    wait_until("nobody is left", lambda: not os.path.exists(f"/proc/{pid}") or not target.alive())


def test_a_namespace_between(start: Targets, images: str) -> None:
    """Of it nothing can be seen in the tree; it is not made again, and that is said."""
    between = ("sh", "-c", 'unshare --pid --fork "$0" & wait; :')
    target, outer = inside(start, compile_c(INSIDE), *AS_INIT, *between)
    assert len(numbers(target.pid)) == 3
    before = numbers(target.pid)
    target.pids()
    run_torpor("dump", target.pid, "-D", images).must()
    assert list(_entries(images)[0].levels.pid) == before
    target.wait_gone()
    outer.wait_gone()
    assert "1 between that of the tree and that of its dump" in run_torpor("restore", images, "--explain").must().output
    target.pid = torpor.restore(images).pid
    assert numbers(target.pid) == [before[0], before[2]]
    target.go()


LATE_LEADER = """
/* Its first child was born before it began a session of its own. */
int main(void)
{
	int first, second, status;

	if ((first = MUST(fork())) == 0) {
		wait_told("go");
		CHECK_EQ(getsid(0), 0);
		CHECK_EQ(getpgrp(), 0);
		_exit(4);
	}
	CHECK_EQ(setsid(), 1);
	if ((second = MUST(fork())) == 0) {
		wait_told("go");
		CHECK_EQ(getsid(0), 1);
		_exit(5);
	}
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(first, &status, 0), first);
	CHECK_EQ(WEXITSTATUS(status), 4);
	CHECK_EQ(waitpid(second, &status, 0), second);
	CHECK_EQ(WEXITSTATUS(status), 5);
	pass();
}
"""


def test_a_session_outside_of_the_namespace(start: Targets, verbs: Verbs, images: str) -> None:
    target, outer = inside(start, compile_c(LATE_LEADER), *AS_INIT)
    if verbs.name != "untouched":
        with pytest.raises(Unsupported, match="its session leader is outside of its pid namespace"):
            torpor.dump(target.pid, images)
        target.pids()
        verbs.dump(target.pid, images, shell_job=True)
        target.wait_gone()
        outer.wait_gone()
        with pytest.raises(Unsupported, match="is not a session leader: its session 0 is outside"):
            torpor.restore(images)
        target.pid = verbs.restore(images, shell_job=True)
    target.go()


def test_numbers_outside_that_are_taken(start: Targets, images: str) -> None:
    """The tasks cannot see them: they get others, and keep those that they see."""
    target, _ = inside(start, compile_c(INSIDE), *AS_INIT)
    own, child = numbers(target.pid), numbers(target.pids()[1])
    run_torpor("dump", target.pid, "-D", images).must()
    for pid in target.seen:
        wait_until("it is gone", lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    with taken(child[0]):
        explained = run_torpor("restore", "-D", images, "--explain").must().output
        assert f"{child[0]} is in use" in explained
        run_torpor("restore", "-D", images, "-d", "--pidfile", target.path("pidfile")).must()
    target.pid = int(target.read("pidfile"))
    again = numbers(target.pid), numbers(target.pids()[1])
    assert [one[1] for one in again] == [own[1], child[1]]
    assert not {one[0] for one in again} & {own[0], child[0]}
    target.go()


@contextlib.contextmanager
def taken(pid: int) -> Iterator[None]:
    """Some process has that number meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_int(pid)
    args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1, 0)
    child = libc.syscall(435, args, ctypes.sizeof(args))
    if child == 0:
        while True:
            time.sleep(1000)
    assert child == pid, ctypes.get_errno()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("source", [NESTED, UNSHARED, EMPTY], ids=["nested", "unshared", "empty"])
def test_a_copy_with_namespaces_inside(start: Targets, images: str, ends_all: None, source: str) -> None:
    """It is dumped and copied once more: its own namespace is no part of the snapshot, those below it are."""
    target = start.c(source)
    round_trip(Again(), target, images, ignore=NEW)
    target.go()


# ---------------------------------------------------------------------- what a namespace has for itself

COUNTS = """
static void count(int next)
{
	int status, pid = MUST(fork());

	if (pid == 0)
		_exit(0);
	CHECK_EQ(pid, next);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
}

int main(void)
{
	int init = MUST(syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0)), status;

	if (init == 0) {
		for (int i = 2; i < 9; i++)
			count(i);
		tell("counted", "");
		wait_told("go");
		count(9);
		_exit(7);
	}
	wait_told("counted");
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(init, &status, 0), init);
	CHECK_EQ(WEXITSTATUS(status), 7);
	pass();
}
"""


def test_the_next_number(survives: Survives) -> None:
    """Nor does a dump take one."""
    survives(COUNTS, ignore=NEW)


def limit_in(pid: int, number: int = 0) -> int:
    """The limit of the numbers in the pid namespace of a process, which is set first if there is a ``number``."""
    path = "/proc/sys/kernel/pid_max"
    command = f"echo {number} > {path}; cat {path}" if number else f"cat {path}"
    return int(subprocess.check_output(["nsenter", "-t", str(pid), "--pid", "sh", "-c", command], timeout=60))


def test_the_limit_of_numbers(start: Targets, images: str, ends_all: None) -> None:
    ours = int(slurp_text("/proc/sys/kernel/pid_max"))
    target, _ = inside(start, compile_c(INSIDE), *AS_INIT)
    if limit_in(target.pid) == ours:
        pytest.skip("this kernel has one limit for all (before v6.14), or ours is the greatest there is")
    assert limit_in(target.pid, 777) == 777
    target.pids()
    run_torpor("dump", target.pid, "-D", images).must()
    shown = run_torpor("crit", "show", os.path.join(images, "pidns-9.img")).must().output
    assert json.loads(shown)["entries"][0]["pid_max"] == 777
    target.wait_gone()
    copy = torpor.restore(images, own_pids=True)
    with torpor.template(images) as template:
        for pid in (torpor.restore(images).pid, copy.pid, template.clone().pid):
            assert limit_in(pid) == 777
    assert int(slurp_text("/proc/sys/kernel/pid_max")) == ours


@pytest.mark.parametrize("field", ["last_pid", "pid_max", "mounts"])
def test_bad_settings_are_errors_of_the_image(start: Targets, images: str, field: str) -> None:
    target, _ = inside(start, compile_c(INSIDE), *AS_INIT)
    run_torpor("dump", target.pid, "-D", images, "--leave-running").must()
    for value in (1 << 30, 7 << 22):
        with images_changed(images, "pidns-9") as messages:
            setattr(messages[0], field, value)
        with pytest.raises(ImageError, match=rf"pidns-9\.img: {field}"):
            torpor.restore(images, own_pids=True)
    target.go()


# ---------------------------------------------------------------------- what is refused

GUEST = """
/* Enters a namespace that another process has made. */
int main(void)
{
	int init = syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0), fd, status;
	char path[64];

	if (init == 0)
		for (;;) pause();
	if (fork() == 0) {
		signal(SIGCHLD, SIG_IGN);
		snprintf(path, sizeof(path), "/proc/%d/ns/pid", init);
		fd = MUST(open(path, O_RDONLY));
		MUST(setns(fd, CLONE_NEWPID));
		close(fd);
		if (fork() == 0)
			for (;;) pause();
		tell("entered", "");
		for (;;) pause();
	}
	wait_told("entered");
	ready();
	wait_told("go");
	MUST(kill(init, SIGKILL));
	CHECK_EQ(waitpid(init, &status, 0), init);
	pass();
}
"""

THREADS = """
static void *naps(void *none) { for (;;) pause(); }

int main(void)
{
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, naps, NULL), 0);
	MUST(unshare(CLONE_NEWPID));
	ready();
	wait_told("go");
	pass();
}
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [(GUEST, "a pid namespace whose init is not a child of the same parent"), (THREADS, "it has several threads")],
    ids=["entered", "threads"],
)
def test_what_cannot_be_made_again_is_refused_before_anything_is_frozen(
    start: Targets, images: str, source: str, why: str
) -> None:
    target = start.c(source)
    before = observe_settled(target.pid)
    checked = run_torpor("check", target.pid)
    assert checked.status == 1
    assert why in checked.output
    refused = run_torpor("dump", target.pid, "-D", images)
    assert refused.status == 1
    assert why in refused.output
    assert os.listdir(images) == ["dump.log"]
    assert_same(before, observe_tree(target.pid))
    target.go()


def test_bad_numbers_are_errors_of_the_image(start: Targets, images: str) -> None:
    target = start.c(NESTED)
    pids = target.pids()
    run_torpor("dump", target.pid, "-D", images).must()
    target.wait_gone()
    entries = _entries(images)
    at = next(index for index, entry in enumerate(entries) if entry.pid == pids[1])

    def broken(change: object) -> list[object]:
        changed = [pb.pstree_entry.FromString(entry.SerializeToString()) for entry in entries]
        change(changed[at].levels, changed)
        return changed

    changes = {
        "levels.pid": lambda levels, _: levels.pid.append(1),
        "levels.ns_id": lambda levels, _: levels.ns_id.insert(0, 77),
        "levels.pgid": lambda levels, _: levels.pgid.__setitem__(0, 1 << 30),
        "levels.threads": lambda levels, _: levels.threads.add(tid=[5, 5]),
    }
    state = host_state()
    for field, change in changes.items():
        with images_changed(images, "pstree") as messages:
            messages[:] = broken(change)
        with pytest.raises(ImageError, match=field.replace(".", r"\.")):
            torpor.restore(images)
    assert host_state() == state
