"""Processes and threads: who is whose child, in which group and session, dead, stopped or alive."""

from __future__ import annotations

import os
import signal

from kit import Target, Targets, Verbs, round_trip, wait_until

from .conftest import Survives


def survives_or_is_refused(target: Target, verbs: Verbs, images: str, word: str) -> None:
    """What few programs do may be refused, in words that name it, and then the tree runs on."""
    try:
        verbs.dump(target.pid, images, leave_running=True)
    except Exception as error:
        assert word in str(error) or verbs.name == "criu", error
    else:
        round_trip(verbs, target, images)
    target.go()


FAMILY = """
static const char *names[] = {"session", "group", "member", "plain"};
static int first;

static void child(int how)
{
	switch (how) {
	case 0: MUST(setsid()); break;        /* a session of its own */
	case 1: MUST(setpgid(0, 0)); break;   /* a group of its own */
	case 2:                               /* in the group of the one before */
		MUST(setpgid(0, first));
		break;
	}
	if (how == 0) {
		if (fork() == 0) {
			MUST(setpgid(0, 0));
			tell("grandchild", "");
			for (;;) pause();
		}
		wait_told("grandchild");
	}
	tell(names[how], "");
	for (;;) pause();
}

int main(void)
{
	int pid = 0, status;

	for (int how = 0; how < 4; how++) {
		pid = fork();
		if (pid == 0)
			child(how);
		if (how == 1)
			first = pid;
		wait_told(names[how]);
	}
	ready();
	wait_told("go");
	CHECK_EQ(getpgid(first), first);
	CHECK_EQ(getpgid(pid), getpgrp());
	CHECK_EQ(getsid(first), getsid(0));
	MUST(kill(pid, SIGKILL));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	MUST(kill(-first, SIGTERM));
	CHECK_EQ(waitpid(first, &status, 0), first);
	pass();
}
"""


def test_sessions_and_groups(survives: Survives) -> None:
    survives(FAMILY)


ORPHANED_GROUPS = """
int main(void)
{
	/* The leader of the group and the leader of the session are gone; their members live on. */
	int leader = fork(), status;
	siginfo_t info;

	if (leader == 0) {
		MUST(setsid());
		if (fork() == 0) {
			MUST(setpgid(0, 0));
			if (fork() == 0) {
				for (;;) pause();
			}
			_exit(0);
		}
		MUST(waitid(P_ALL, 0, &info, WEXITED | WNOWAIT));
		_exit(0);
	}
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	CHECK_EQ(waitpid(leader, &status, 0), leader);
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	ready();
	wait_told("go");
	pass();
}
"""


def test_a_session_without_its_leader(start: Targets, verbs: Verbs, images: str) -> None:
    survives_or_is_refused(start.c(ORPHANED_GROUPS), verbs, images, "session")


DEAD = """
int main(void)
{
	int exited = fork(), killed, status;
	siginfo_t info;

	if (exited == 0)
		_exit(42);
	killed = fork();
	if (killed == 0) {
		prctl(PR_SET_NAME, "victim");
		tell("victim", "");
		for (;;) pause();
	}
	wait_told("victim");
	MUST(kill(killed, SIGUSR1));
	MUST(waitid(P_PID, exited, &info, WEXITED | WNOWAIT));
	MUST(waitid(P_PID, killed, &info, WEXITED | WNOWAIT));
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(exited, &status, 0), exited);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
	CHECK_EQ(waitpid(killed, &status, 0), killed);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGUSR1);
	CHECK(waitpid(-1, &status, 0) == -1 && errno == ECHILD);
	pass();
}
"""


def test_zombies_with_their_status(survives: Survives) -> None:
    survives(DEAD)


STOPPED = """
int main(void)
{
	int pid = fork(), status;

	if (pid == 0) {
		raise(SIGSTOP);
		_exit(7);
	}
	CHECK_EQ(waitpid(pid, &status, WUNTRACED), pid);
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(pid, &status, WNOHANG | WUNTRACED), 0);  /* its stop was seen before */
	MUST(kill(pid, SIGCONT));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	pass();
}
"""


def test_a_stopped_child_stays_stopped(survives: Survives) -> None:
    survives(STOPPED)


TOLD_OF_STOP = """
int main(void)
{
	struct timespec none = {0, 0}, long_enough = {10, 0};
	sigset_t set;
	int pid, status;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	pid = fork();
	if (pid == 0) {
		raise(SIGSTOP);
		_exit(7);
	}
	CHECK_EQ(sigtimedwait(&set, NULL, &long_enough), SIGCHLD);
	CHECK_EQ(waitpid(pid, &status, WUNTRACED), pid);
	ready();
	wait_told("go");
	CHECK(sigtimedwait(&set, NULL, &none) == -1 && errno == EAGAIN);  /* that stop is old news */
	MUST(kill(pid, SIGCONT));
	CHECK_EQ(sigtimedwait(&set, NULL, &long_enough), SIGCHLD);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	pass();
}
"""


def test_a_parent_is_not_told_again_of_a_stop(survives: Survives) -> None:
    survives(TOLD_OF_STOP)


def test_a_stopped_root(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c('int main(void) { ready(); wait_told("go"); pass(); }')
    os.kill(target.pid, signal.SIGSTOP)
    wait_until("it has stopped", lambda: target.state() == "T")
    round_trip(verbs, target, images)
    assert target.state() == "T"
    os.kill(target.pid, signal.SIGCONT)
    target.go()


def test_it_can_be_left_stopped(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c('int main(void) { ready(); wait_told("go"); pass(); }')
    verbs.dump(target.pid, images, leave_stopped=True)
    assert target.state() == "T"
    os.kill(target.pid, signal.SIGCONT)
    target.go()


SUBREAPER = """
int main(void)
{
	int pid, orphan = 0, pipes[2], status;

	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	MUST(pipe(pipes));
	pid = fork();
	if (pid == 0) {
		orphan = fork();
		if (orphan == 0) {
			wait_told("go");
			_exit(3);
		}
		MUST(write(pipes[1], &orphan, sizeof(orphan)));
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	MUST(read(pipes[0], &orphan, sizeof(orphan)));
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(orphan, &status, 0), orphan);  /* it is ours now */
	CHECK_EQ(WEXITSTATUS(status), 3);
	MUST(prctl(PR_GET_CHILD_SUBREAPER, &status));
	CHECK_EQ(status, 1);
	pass();
}
"""


def test_a_subreaper_and_the_orphan_that_it_took(survives: Survives) -> None:
    survives(SUBREAPER)


THREADS = """
static pthread_barrier_t barrier;
static __thread unsigned long mine;
static volatile unsigned long sum;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t tids[8];

static void *thread(void *arg)
{
	long n = (long)arg;
	char name[16];

	snprintf(name, sizeof(name), "worker %ld", n);
	prctl(PR_SET_NAME, name);
	tids[n] = syscall(SYS_gettid);
	mine = 1000 + n;
	pthread_barrier_wait(&barrier);
	wait_told("go");
	CHECK_EQ(mine, 1000 + n);
	CHECK_EQ(syscall(SYS_gettid), tids[n]);
	pthread_mutex_lock(&lock);
	sum += mine;
	pthread_mutex_unlock(&lock);
	return (void *)(n * 3);
}

int main(void)
{
	pthread_t ids[8];

	pthread_barrier_init(&barrier, NULL, 9);
	for (long n = 0; n < 8; n++)
		CHECK(pthread_create(&ids[n], NULL, thread, (void *)n) == 0);
	pthread_barrier_wait(&barrier);
	ready();
	wait_told("go");
	for (long n = 0; n < 8; n++) {
		void *result;

		CHECK(pthread_join(ids[n], &result) == 0);  /* clear_child_tid still works */
		CHECK_EQ((long)result, n * 3);
	}
	CHECK_EQ(sum, 8 * 1000 + 28);
	CHECK(pthread_create(&ids[0], NULL, thread, (void *)0) == 0);
	pass();
}
"""


def test_threads_with_names_numbers_and_storage_of_their_own(survives: Survives) -> None:
    survives(THREADS)


DEAD_LEADER = """
static void *thread(void *arg)
{
	ready();
	wait_told("go");
	pass();
	return arg;
}

int main(void)
{
	pthread_t id;

	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	pthread_exit(NULL);
}
"""


def test_a_process_whose_first_thread_has_ended(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c(DEAD_LEADER, wait=False)
    wait_until("it is ready", lambda: os.path.exists(target.path("ready")))
    wait_until("its first thread has ended", lambda: target.state() == "Z")
    before = len(os.listdir(f"/proc/{target.pid}/task"))
    try:
        verbs.dump(target.pid, images, leave_running=True)
    except Exception as error:
        assert "thread" in str(error) or verbs.name == "criu", error
    assert len(os.listdir(f"/proc/{target.pid}/task")) == before
    target.tell("go")
    wait_until("the other thread goes on", lambda: target.read("result") == "pass\n")


DEEP = """
int main(void)
{
	int depth = 0, status, pid;

	while (depth < 40 && (pid = fork()) == 0)
		depth++;
	if (depth == 40) {
		tell("ready", "");
		wait_told("go");
		return 1;
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 40 - depth);
	if (depth == 0)
		pass();
	return 41 - depth;
}
"""


def test_forty_generations(survives: Survives) -> None:
    survives(DEEP)


WIDE = """
int main(void)
{
	int pids[100], status;

	for (int i = 0; i < 100; i++)
		if ((pids[i] = fork()) == 0) {
			wait_told("go");
			_exit(i);
		}
	ready();
	wait_told("go");
	for (int i = 0; i < 100; i++) {
		CHECK_EQ(waitpid(pids[i], &status, 0), pids[i]);
		CHECK_EQ(WEXITSTATUS(status), i);
	}
	pass();
}
"""


STRANGER = """
int main(void)
{
	char byte, *memory = malloc(4096);
	int reader[2], status, child;

	fill(memory, 4096, 9);
	MUST(pipe2(reader, O_CLOEXEC));
	if ((child = fork()) == 0) {
		/* It shares pages with its parent, and has a child that shares none with anybody. */
		int grandchild = fork();

		if (grandchild == 0) {
			execlp("sleep", "sleep", "1000", NULL);
			_exit(1);
		}
		close(reader[1]);
		wait_told("go");
		kill(grandchild, SIGTERM);
		_exit(waitpid(grandchild, &status, 0) == grandchild && WTERMSIG(status) == SIGTERM &&
		      filled(memory, 4096, 9) ? 0 : 1);
	}
	close(reader[1]);
	CHECK_EQ(read(reader[0], &byte, 1), 0);  /* executed */
	ready();
	wait_told("go");
	CHECK_EQ(MUST(waitpid(child, &status, 0)), child);
	CHECK_EQ(status, 0);
	pass();
}
"""


def test_a_stranger_born_of_an_heir(survives: Survives) -> None:
    survives(STRANGER)



def test_a_hundred_children(survives: Survives) -> None:
    survives(WIDE)


EXIT_SIGNALS = """
static int child(void *unused) { wait_told("go"); return 5; }

int main(void)
{
	static char stacks[2][1 << 15] __attribute__((aligned(16)));
	sigset_t set;
	siginfo_t info;
	int quiet, loud, status;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	loud = MUST(clone(child, stacks[0] + sizeof(stacks[0]), SIGUSR1, NULL));
	quiet = MUST(clone(child, stacks[1] + sizeof(stacks[1]), 0, NULL));
	ready();
	wait_told("go");
	CHECK_EQ(sigwaitinfo(&set, &info), SIGUSR1);
	CHECK_EQ(info.si_pid, loud);
	CHECK_EQ(waitpid(loud, &status, __WALL), loud);
	CHECK_EQ(waitpid(quiet, &status, __WALL), quiet);
	CHECK_EQ(WEXITSTATUS(status), 5);
	pass();
}
"""


def test_children_that_end_with_other_signals(start: Targets, verbs: Verbs, images: str) -> None:
    survives_or_is_refused(start.c(EXIT_SIGNALS), verbs, images, "signal")
