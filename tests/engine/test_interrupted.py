"""System calls that were under way go on, and last as long as they were meant to."""

from __future__ import annotations

import os
import signal
import time

import pytest

from kit import Library, Targets, Verbs, round_trip, wait_until

MAIN = """
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>

static int word = 5, pipes[2], pair[2], ep, ev, sem;

static int call(double wanted)
{
	struct timespec ts = {(long)wanted, (long)((wanted - (long)wanted) * 1e9)}, until;
	struct timeval tv = {ts.tv_sec, ts.tv_nsec / 1000};
	struct pollfd poll_fd = {pipes[0], POLLIN, 0};
	struct epoll_event event;
	fd_set set;
	char byte;
	sigset_t signals;

	(void)until; (void)tv; (void)poll_fd; (void)event; (void)set; (void)byte; (void)signals; (void)ts;
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	FD_ZERO(&set);
	FD_SET(pipes[0], &set);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += ts.tv_sec + (until.tv_nsec + ts.tv_nsec) / 1000000000;
	until.tv_nsec = (until.tv_nsec + ts.tv_nsec) % 1000000000;
	CALL
}

int main(int argc, char **argv)
{
	struct epoll_event event = {EPOLLIN, {.u64 = 1}};
	double wanted = atof(argv[1]), started, took;
	char text[200];
	int result;

	(void)argc;
	MUST(pipe(pipes));
	ep = MUST(epoll_create1(0));
	ev = MUST(eventfd(0, 0));
	SETUP
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, pipes[0], &event));
	ready();
	started = seconds();
	result = call(wanted);
	took = seconds() - started;
	if (sem)
		semctl(sem, 0, IPC_RMID);
	if (result != RESULT)
		fail("result %d, errno %d, after %.3f s", result, errno, took);
	snprintf(text, sizeof(text), "%.6f", took);
	tell("took", text);
	wait_told("go");
	pass();
}
"""

# What is called, and what it must return when its time is over.
TIMED = {
    "nanosleep": ("return nanosleep(&ts, NULL);", "0"),
    "clock_nanosleep-absolute": (
        "return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);",
        "0",
    ),
    "clock_nanosleep-boottime": ("return clock_nanosleep(CLOCK_BOOTTIME, 0, &ts, &until);", "0"),
    "poll": ("return poll(&poll_fd, 1, (int)(wanted * 1000));", "0"),
    "futex": ("return syscall(SYS_futex, &word, FUTEX_WAIT, 5, &ts, NULL, 0) == -1 ? errno : -1;", "ETIMEDOUT"),
    "futex-absolute": (
        "return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 5, &until, NULL, ~0) == -1 ? errno : -1;",
        "ETIMEDOUT",
    ),
}  # fmt: skip

# These answer EINTR when a handler interrupts them, and some even when a stop does; but a dump is
# neither.
COUNTED = {
    "select": ("return select(pipes[0] + 1, &set, NULL, NULL, &tv);", "0"),
    "epoll_wait": ("return epoll_wait(ep, &event, 1, (int)(wanted * 1000));", "0"),
    "epoll_pwait": ("return epoll_pwait(ep, &event, 1, (int)(wanted * 1000), &signals);", "0"),
    "ppoll": ("return ppoll(&poll_fd, 1, &ts, NULL);", "0"),
}

# Their time lies in memory that is not theirs to change: they are made again with the whole of it.
MADE_AGAIN = {
    "sigtimedwait": ("return sigtimedwait(&signals, NULL, &ts) == -1 ? errno : -1;", "EAGAIN"),
    "semtimedop": ("return semtimedop(sem, &(struct sembuf){0, -1, 0}, 1, &ts) == -1 ? errno : -1;", "EAGAIN"),
    "socket-timeout": (
        "CHECK(setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) == 0);"
        "return recv(pair[0], &byte, 1, 0) == -1 ? errno : -1;",
        "EAGAIN",
    ),
}  # fmt: skip

# And these wait until something comes.
UNTIL_WOKEN = {
    "read-pipe": ('return read(pipes[0], &byte, 1);', "1"),
    "poll-forever": ("return poll(&poll_fd, 1, -1);", "1"),
    "epoll-forever": ("return epoll_wait(ep, &event, 1, -1);", "1"),
    "select-forever": ("return select(pipes[0] + 1, &set, NULL, NULL, NULL);", "1"),
}  # fmt: skip


def _program(call: str, result: str) -> str:
    setup = "sem = MUST(semget(IPC_PRIVATE, 1, 0600));" if "semtimedop" in call else ""
    return MAIN.replace("CALL", call).replace("RESULT", result).replace("SETUP", setup)


@pytest.mark.parametrize("name", [*TIMED, *COUNTED, *MADE_AGAIN])
def test_a_wait_goes_on_and_is_not_cut_short(name: str, start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c(_program(*{**TIMED, **COUNTED, **MADE_AGAIN}[name]), "0.8")
    time.sleep(0.2)
    round_trip(verbs, target, images, compare=False)
    assert float(target.wait_file("took")) >= 0.8
    target.go()


@pytest.mark.parametrize("name", [*TIMED, *COUNTED])
def test_what_has_been_waited_counts(name: str, start: Targets, library: Library, images: str) -> None:
    """A wait of two seconds that is dumped in its middle and restored at once takes two, not three."""
    target = start.c(_program(*{**TIMED, **COUNTED}[name]), "2")
    time.sleep(1.1)
    round_trip(library, target, images, compare=False)
    took = float(target.wait_file("took"))
    assert 2 <= took < 3, took
    target.go()


@pytest.mark.parametrize("name", [*TIMED, *COUNTED])
def test_a_wait_that_is_dumped_again_and_again_comes_to_its_end(
    name: str, start: Targets, library: Library, images: str
) -> None:
    """Both what goes on running and what is restored: its time runs while the task does."""
    target = start.c(_program(*{**TIMED, **COUNTED}[name]), "1.5")
    time.sleep(0.2)
    for _ in range(3):
        library.dump(target.pid, images, leave_running=True)
        time.sleep(0.2)
    round_trip(library, target, images, compare=False)
    time.sleep(0.1)
    round_trip(library, target, images, compare=False)
    took = float(target.wait_file("took"))
    assert 1.5 <= took < 2.5, took
    target.go()


@pytest.mark.parametrize("name", ["nanosleep", "futex", "clock_nanosleep-boottime"])
def test_without_bpf_nothing_is_cut_short(
    name: str, start: Targets, library: Library, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sleep has left, where it was asked to say so, is known; the others begin anew."""
    from torpor.errors import Unsupported
    from torpor.linux import btf

    def refuse(questions: object) -> dict[str, int]:
        raise Unsupported("refused")

    monkeypatch.setattr(btf, "lookup", refuse)
    target = start.c(_program(*TIMED[name]), "1.5")
    time.sleep(0.7)
    round_trip(library, target, images, compare=False)
    took = float(target.wait_file("took"))
    whole = 1.5 if name == "clock_nanosleep-boottime" else 2.2
    assert whole <= took < whole + 0.6, took
    target.go()


SLEEPING_THREADS = """
#include <sys/epoll.h>

static void *sleeping(void *arg)
{
	double started = seconds();
	int way = (int)(long)arg;
	struct epoll_event event;

	if (way == 0)
		CHECK_EQ(nanosleep(&(struct timespec){1, 500000000}, NULL), 0);
	else if (way == 1)
		CHECK_EQ(poll(NULL, 0, 1500), 0);
	else
		CHECK_EQ(epoll_wait(MUST(epoll_create1(0)), &event, 1, 1500), 0);
	started = seconds() - started;
	if (started < 1.5 || started > 2.5)
		fail("way %d took %.3f", way, started);
	return arg;
}

int main(void)
{
	pthread_t ids[9];

	for (long n = 0; n < 9; n++)
		CHECK(pthread_create(&ids[n], NULL, sleeping, (void *)(n % 3)) == 0);
	usleep(50000);
	ready();
	for (int n = 0; n < 9; n++)
		pthread_join(ids[n], NULL);
	wait_told("go");
	pass();
}
"""


def test_threads_that_sleep(start: Targets, library: Library, images: str) -> None:
    target = start.c(SLEEPING_THREADS)
    time.sleep(0.6)
    round_trip(library, target, images)
    target.go()


WAITS_FOR_A_SIGNAL = """
#include <sys/epoll.h>

static volatile int handled;
static void handler(int number) { handled = number; }

int main(void)
{
	sigset_t none, usr1;
	struct epoll_event event;
	int ep = MUST(epoll_create1(0)), result;

	(void)event; (void)ep;
	signal(SIGUSR1, handler);
	sigemptyset(&none);
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	if (BLOCKED)
		MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
	ready();
	result = CALL;
	CHECK_EQ(result, -1);
	CHECK_EQ(errno, EINTR);
	CHECK_EQ(handled, SIGUSR1);
	wait_told("go");
	pass();
}
"""

INTERRUPTIBLE = {
    "pause": ("pause()", 0),
    "sigsuspend": ("sigsuspend(&none)", 1),
    "epoll_wait": ("epoll_wait(ep, &event, 1, -1)", 0),
    "epoll_pwait": ("epoll_pwait(ep, &event, 1, 60000, &none)", 1),
    "poll": ("poll(NULL, 0, 60000)", 0),
    "nanosleep": ("nanosleep(&(struct timespec){60, 0}, NULL)", 0),
}


@pytest.mark.parametrize("name", [*INTERRUPTIBLE])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_real_signal_still_interrupts(name: str, when: str, start: Targets, library: Library, images: str) -> None:
    """A signal with a handler ends the call with EINTR, whether it waits in the snapshot or comes later."""
    call, blocked = INTERRUPTIBLE[name]
    target = start.c(WAITS_FOR_A_SIGNAL.replace("CALL", call).replace("BLOCKED", str(blocked)))
    time.sleep(0.1)
    if when == "before":  # stopped, so that it stays pending
        os.kill(target.pid, signal.SIGSTOP)
        wait_until("it is stopped", lambda: target.state() == "T")
        os.kill(target.pid, signal.SIGUSR1)
    # A mask that a call has put in force for its time is in force again when the call is.
    round_trip(library, target, images, compare=not blocked)
    if when == "before":
        wait_until("it is stopped again", lambda: target.state() == "T")
        os.kill(target.pid, signal.SIGCONT)
    else:
        time.sleep(0.1)
        os.kill(target.pid, signal.SIGUSR1)
    target.go()


@pytest.mark.parametrize("name", [*UNTIL_WOKEN])
def test_a_wait_without_end_goes_on(name: str, start: Targets, verbs: Verbs, images: str) -> None:
    call, result = UNTIL_WOKEN[name]
    # A second process of the tree does the waking.
    waker = """
	if (fork() == 0) {
		wait_told("go");
		usleep(20000);
		MUST(write(pipes[1], "x", 1));
		_exit(0);
	}
	ready();
"""
    target = start.c(_program(call, result).replace("\tready();\n", waker), "0")
    time.sleep(0.1)
    round_trip(verbs, target, images, compare=False)
    target.go()


FUTEX_WAITERS = """
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static int phase, done;

static void *thread(void *arg)
{
	pthread_mutex_lock(&lock);
	while (!phase)
		pthread_cond_wait(&condition, &lock);
	done++;
	pthread_mutex_unlock(&lock);
	return arg;
}

int main(void)
{
	pthread_t ids[6];

	for (int n = 0; n < 6; n++)
		CHECK(pthread_create(&ids[n], NULL, thread, NULL) == 0);
	usleep(50000);
	ready();
	wait_told("go");
	pthread_mutex_lock(&lock);
	phase = 1;
	pthread_cond_broadcast(&condition);
	pthread_mutex_unlock(&lock);
	for (int n = 0; n < 6; n++)
		pthread_join(ids[n], NULL);
	CHECK_EQ(done, 6);
	pass();
}
"""


def test_threads_that_wait_for_a_condition(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c(FUTEX_WAITERS)
    round_trip(verbs, target, images)
    target.go()


NO_SIGNAL_SEEN = """
static volatile int interrupted;

int main(void)
{
	int pipes[2];
	char byte;

	MUST(pipe(pipes));
	if (fork() == 0) {
		wait_told("go");
		usleep(10000);
		MUST(write(pipes[1], "x", 1));
		_exit(0);
	}
	ready();
	for (;;) {
		int result = read(pipes[0], &byte, 1);

		if (result == 1)
			break;
		fail("a dump was seen: read gave %d, errno %d", result, errno);
	}
	pass();
}
"""


def test_ten_dumps_are_not_noticed(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c(NO_SIGNAL_SEEN)
    for _ in range(10):
        verbs.dump(target.pid, images, leave_running=True)
    target.go()
