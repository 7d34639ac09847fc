"""Signals: actions, masks, stacks, what is pending, and the timers that send them."""

from __future__ import annotations

import os
import signal
import struct

from kit import Targets, Verbs, wait_until
from kit.images import changed

from .conftest import Survives

ACTIONS = """
static void plain(int number) { (void)number; }
static void full(int number, siginfo_t *info, void *context) { (void)number; (void)info; (void)context; }

int main(void)
{
	struct sigaction action, asked;

	memset(&action, 0, sizeof(action));
	action.sa_handler = SIG_IGN;
	MUST(sigaction(SIGPIPE, &action, NULL));
	action.sa_handler = plain;
	sigaddset(&action.sa_mask, SIGTERM);
	sigaddset(&action.sa_mask, SIGRTMAX);
	action.sa_flags = SA_RESTART | SA_NODEFER;
	MUST(sigaction(SIGUSR1, &action, NULL));
	action.sa_sigaction = full;
	action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND | SA_NOCLDWAIT;
	MUST(sigaction(SIGRTMAX, &action, NULL));
	ready();
	wait_told("go");
	MUST(sigaction(SIGPIPE, NULL, &asked));
	CHECK(asked.sa_handler == SIG_IGN);
	MUST(sigaction(SIGUSR1, NULL, &asked));
	CHECK(asked.sa_handler == plain);
	CHECK_EQ(asked.sa_flags & ~0x4000000, SA_RESTART | SA_NODEFER);  /* SA_RESTORER is libc's */
	CHECK(sigismember(&asked.sa_mask, SIGTERM) && sigismember(&asked.sa_mask, SIGRTMAX));
	CHECK(!sigismember(&asked.sa_mask, SIGINT));
	MUST(sigaction(SIGRTMAX, NULL, &asked));
	CHECK(asked.sa_sigaction == full);
	CHECK_EQ(asked.sa_flags & ~0x4000000, SA_SIGINFO | SA_ONSTACK | (int)SA_RESETHAND | SA_NOCLDWAIT);
	MUST(sigaction(SIGUSR2, NULL, &asked));
	CHECK(asked.sa_handler == SIG_DFL);
	pass();
}
"""


def test_actions_with_their_masks_and_flags(survives: Survives) -> None:
    survives(ACTIONS)


PENDING = """
static siginfo_t seen[16];
static int count;

static void note(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	seen[count++] = *info;
}

static pthread_barrier_t barrier;
static pid_t other;

static void *thread(void *unused)
{
	other = syscall(SYS_gettid);
	pthread_barrier_wait(&barrier);
	wait_told("threads");
	sigset_t set;
	sigfillset(&set);
	struct timespec zero = {0, 0};
	siginfo_t info;
	/* Its own comes first. The raw call: libc shows SI_TKILL as SI_USER. */
	CHECK_EQ(syscall(SYS_rt_sigtimedwait, &set, &info, &zero, 8), SIGUSR2);
	CHECK_EQ(info.si_code, SI_TKILL);
	tell("thread-done", "");
	for (;;)
		pause();
	return unused;
}

int main(void)
{
	struct sigaction action;
	sigset_t all, none;
	union sigval value;
	pthread_t id;

	memset(&action, 0, sizeof(action));
	action.sa_sigaction = note;
	action.sa_flags = SA_SIGINFO;
	sigfillset(&action.sa_mask);
	MUST(sigaction(SIGUSR1, &action, NULL));
	MUST(sigaction(SIGRTMIN + 1, &action, NULL));
	sigfillset(&all);
	sigemptyset(&none);
	MUST(sigprocmask(SIG_SETMASK, &all, NULL));
	pthread_barrier_init(&barrier, NULL, 2);
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	pthread_barrier_wait(&barrier);
	for (int i = 0; i < 3; i++) {
		value.sival_ptr = (void *)(0x1234567800000000ul + i);
		MUST(sigqueue(getpid(), SIGRTMIN + 1, value));
	}
	MUST(kill(getpid(), SIGUSR1));
	MUST(syscall(SYS_tgkill, getpid(), other, SIGUSR2));
	ready();
	wait_told("go");
	tell("threads", "");
	wait_told("thread-done");
	MUST(sigprocmask(SIG_SETMASK, &none, NULL));
	CHECK_EQ(count, 4);
	CHECK(seen[0].si_signo == SIGUSR1 && seen[0].si_code == SI_USER && seen[0].si_pid == getpid());
	for (int i = 0; i < 3; i++) {
		CHECK(seen[i + 1].si_signo == SIGRTMIN + 1 && seen[i + 1].si_code == SI_QUEUE);
		CHECK_EQ((unsigned long)seen[i + 1].si_ptr, 0x1234567800000000ul + i);
	}
	pass();
}
"""


def test_what_is_pending_for_the_process_and_for_a_thread(survives: Survives) -> None:
    survives(PENDING)


PENDING_TRAPS = """
#include <sys/signalfd.h>

static pthread_barrier_t barrier;
static pid_t other;
static volatile int called;

static void note(int number) { called += number == SIGTRAP; }

static void *thread(void *unused)
{
	struct timespec zero = {0, 0};
	siginfo_t info;
	sigset_t set;

	other = syscall(SYS_gettid);
	pthread_barrier_wait(&barrier);
	wait_told("threads");
	sigemptyset(&set);
	sigaddset(&set, SIGTRAP);
	/* Its own comes first, and one is left: that of the process. */
	CHECK_EQ(syscall(SYS_rt_sigtimedwait, &set, &info, &zero, 8), SIGTRAP);
	CHECK(info.si_code == SI_TKILL && info.si_pid == getpid());
	tell("thread-done", "");
	for (;;)
		pause();
	return unused;
}

int main(void)
{
	struct sigaction action = {.sa_handler = note};
	union sigval value = {.sival_ptr = (void *)0x123456789abcul};
	struct signalfd_siginfo info;
	sigset_t set, pending;
	pthread_t id;
	int fd;

	MUST(sigaction(SIGTRAP, &action, NULL));
	sigemptyset(&set);
	sigaddset(&set, SIGTRAP);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	fd = MUST(signalfd(-1, &set, SFD_NONBLOCK));
	pthread_barrier_init(&barrier, NULL, 2);
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	pthread_barrier_wait(&barrier);
	MUST(syscall(SYS_tgkill, getpid(), other, SIGTRAP));
	MUST(sigqueue(getpid(), SIGTRAP, value));
	ready();
	wait_told("go");
	tell("threads", "");
	wait_told("thread-done");
	MUST(sigpending(&pending));
	CHECK(sigismember(&pending, SIGTRAP));
	CHECK_EQ(read(fd, &info, sizeof(info)), sizeof(info));
	CHECK(info.ssi_signo == SIGTRAP && info.ssi_code == SI_QUEUE && (int)info.ssi_pid == getpid());
	CHECK_EQ(info.ssi_ptr, 0x123456789abcul);
	CHECK(read(fd, &info, sizeof(info)) == -1 && errno == EAGAIN);
	CHECK_EQ(called, 0);
	MUST(raise(SIGTRAP));
	MUST(sigprocmask(SIG_UNBLOCK, &set, NULL));
	CHECK_EQ(called, 1);
	pass();
}
"""


def test_sigtrap_by_which_programs_are_traced_stays_pending(survives: Survives) -> None:
    """CRIU refuses such a program. One is pending for the process, one for a thread, both with what they carry."""
    survives(PENDING_TRAPS)


ONE_TRAP = """
int main(void)
{
	struct timespec zero = {0, 0};
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTRAP);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	MUST(kill(getpid(), SIGTRAP));
	ready();
	wait_told("go");
	CHECK_EQ(syscall(SYS_rt_sigtimedwait, &set, &info, &zero, 8), SIGTRAP);
	CHECK(info.si_code == SI_USER && info.si_pid == getpid());
	pass();
}
"""


def test_a_pending_sigtrap_of_a_single_thread(survives: Survives) -> None:
    survives(ONE_TRAP)


def test_a_sigstop_that_was_on_its_way(start: Targets, library: Verbs, images: str) -> None:
    """No program can have one pending while it is looked at: it is put into the images."""
    target = start.c('int main(void) { ready(); wait_told("go"); pass(); }')
    library.dump(target.pid, images)
    target.wait_gone()
    with changed(images, f"core-{target.pid}") as core:
        core.thread_core.signals_p.signals.add(siginfo=struct.pack("<i", signal.SIGSTOP).ljust(128, b"\0"))
    library.restore(images)
    wait_until("it has stopped", lambda: target.state() == "T")
    os.kill(target.pid, signal.SIGCONT)
    target.go()


STACKS = """
static char here[1 << 16], there[1 << 16];
static volatile char *where;

static void handler(int number) { char local; (void)number; where = &local; }

static void *thread(void *arg)
{
	stack_t stack = {.ss_sp = there, .ss_size = sizeof(there), .ss_flags = 1u << 31}, asked;  /* SS_AUTODISARM */

	MUST(sigaltstack(&stack, NULL));
	tell("thread", "");
	wait_told("go");
	MUST(sigaltstack(NULL, &asked));
	CHECK(asked.ss_sp == there && asked.ss_size == sizeof(there));
	return arg;
}

int main(void)
{
	stack_t stack = {.ss_sp = here, .ss_size = sizeof(here)}, asked;
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
	pthread_t id;

	MUST(sigaltstack(&stack, NULL));
	MUST(sigaction(SIGUSR1, &action, NULL));
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	wait_told("thread");
	ready();
	wait_told("go");
	pthread_join(id, NULL);
	MUST(sigaltstack(NULL, &asked));
	CHECK(asked.ss_sp == here && asked.ss_size == sizeof(here) && asked.ss_flags == 0);
	raise(SIGUSR1);
	CHECK(where >= here && where < here + sizeof(here));
	pass();
}
"""


def test_signal_stacks_of_threads(survives: Survives) -> None:
    survives(STACKS)


INSIDE_HANDLER = """
static char stack_memory[1 << 16];
static volatile int finished;

static void handler(int number)
{
	(void)number;
	ready();
	wait_told("go");  /* dumped while on the signal stack, with the mask of the handler */
	finished = 1;
}

int main(void)
{
	stack_t stack = {.ss_sp = stack_memory, .ss_size = sizeof(stack_memory)};
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
	volatile double kept = 1.5;
	sigset_t mask;

	MUST(sigaltstack(&stack, NULL));
	MUST(sigaction(SIGUSR1, &action, NULL));
	raise(SIGUSR1);
	CHECK(finished && kept == 1.5);
	MUST(sigprocmask(SIG_SETMASK, NULL, &mask));
	CHECK(!sigismember(&mask, SIGUSR1));
	pass();
}
"""


def test_inside_a_handler_on_its_stack(survives: Survives) -> None:
    survives(INSIDE_HANDLER)


TIMERS = """
static volatile int real, virtual, profile, posix_count;
static volatile union sigval posix_value;

static void count(int number)
{
	if (number == SIGALRM) real++;
	if (number == SIGVTALRM) virtual++;
	if (number == SIGPROF) profile++;
}

static void posix_note(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	posix_value = info->si_value;
	posix_count++;
}

int main(void)
{
	struct itimerval often = {{0, 10000}, {0, 10000}}, far = {{7, 0}, {5000, 0}}, asked;
	struct sigaction action = {.sa_sigaction = posix_note, .sa_flags = SA_SIGINFO};
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
	struct sigevent quiet = {.sigev_notify = SIGEV_NONE}, threaded;
	struct itimerspec tick = {{0, 15000000}, {0, 15000000}}, later = {{0, 0}, {4000, 0}}, posix_asked;
	timer_t gone, ticking, waiting, to_thread;
	double until;

	signal(SIGALRM, count);
	signal(SIGVTALRM, count);
	signal(SIGPROF, count);
	MUST(sigaction(SIGRTMIN, &action, NULL));
	MUST(setitimer(ITIMER_VIRTUAL, &often, NULL));
	MUST(setitimer(ITIMER_REAL, &far, NULL));
	event.sigev_value.sival_ptr = &posix_count;
	MUST(timer_create(CLOCK_MONOTONIC, &event, &gone));
	MUST(timer_create(CLOCK_MONOTONIC, &event, &ticking));
	MUST(timer_create(CLOCK_REALTIME, &quiet, &waiting));
	memset(&threaded, 0, sizeof(threaded));
	threaded.sigev_notify = SIGEV_THREAD_ID;
	threaded.sigev_signo = SIGRTMIN + 1;
	threaded._sigev_un._tid = getpid();
	MUST(timer_create(CLOCK_BOOTTIME, &threaded, &to_thread));
	MUST(timer_delete(gone));  /* a hole in the ids */
	MUST(timer_settime(ticking, 0, &tick, NULL));
	MUST(timer_settime(waiting, 0, &later, NULL));
	ready();
	wait_told("go");

	MUST(getitimer(ITIMER_REAL, &asked));
	CHECK(asked.it_interval.tv_sec == 7 && asked.it_value.tv_sec > 4900 && asked.it_value.tv_sec < 5000);
	MUST(getitimer(ITIMER_VIRTUAL, &asked));
	CHECK_EQ(asked.it_interval.tv_usec, 10000);
	MUST(getitimer(ITIMER_PROF, &asked));
	CHECK(!asked.it_value.tv_sec && !asked.it_value.tv_usec);
	virtual = posix_count = 0;
	for (until = seconds() + 5; (virtual < 3 || posix_count < 3) && seconds() < until;)
		;
	CHECK(virtual >= 3);
	CHECK(posix_count >= 3);
	CHECK(posix_value.sival_ptr == &posix_count);
	MUST(timer_gettime(waiting, &posix_asked));
	CHECK(posix_asked.it_value.tv_sec > 3900 && posix_asked.it_value.tv_sec < 4000);
	MUST(timer_gettime(to_thread, &posix_asked));
	CHECK(!posix_asked.it_value.tv_sec && !posix_asked.it_value.tv_nsec);
	MUST(timer_getoverrun(ticking));
	pass();
}
"""


def test_interval_timers_and_posix_timers(survives: Survives) -> None:
    # A timer that goes on ticking may have its signal pending at the moment of one look and not of the other.
    survives(TIMERS, ignore=("*/status/ShdPnd",))


DEATH_SIGNAL = """
static volatile int got;

static void handler(int number) { got = number; }

int main(void)
{
	if (fork()) {
		wait_told("child");
		ready();
		wait_told("result");
		return 0;
	}
	if (fork() == 0) {
		MUST(prctl(PR_SET_PDEATHSIG, SIGUSR2));
		signal(SIGUSR2, handler);
		tell("child", "");
		while (!got)
			usleep(1000);
		CHECK_EQ(got, SIGUSR2);
		pass();
	}
	wait_told("go");
	return 0;
}
"""


def test_the_signal_that_a_parent_sends_by_dying(survives: Survives) -> None:
    survives(DEATH_SIGNAL)


MASKS = """
static pthread_barrier_t barrier;

static void *thread(void *arg)
{
	sigset_t mine, asked;

	sigemptyset(&mine);
	sigaddset(&mine, SIGUSR1 + (long)arg);
	sigaddset(&mine, SIGRTMIN + (long)arg);
	CHECK(pthread_sigmask(SIG_SETMASK, &mine, NULL) == 0);
	pthread_barrier_wait(&barrier);
	wait_told("go");
	CHECK(pthread_sigmask(SIG_SETMASK, NULL, &asked) == 0);
	for (int number = 1; number <= SIGRTMAX; number++)
		if (number != 32 && number != 33)
			CHECK_EQ(sigismember(&asked, number), sigismember(&mine, number));
	return NULL;
}

int main(void)
{
	pthread_t ids[3];

	pthread_barrier_init(&barrier, NULL, 4);
	for (long i = 0; i < 3; i++)
		CHECK(pthread_create(&ids[i], NULL, thread, (void *)i) == 0);
	pthread_barrier_wait(&barrier);
	ready();
	wait_told("go");
	for (int i = 0; i < 3; i++)
		pthread_join(ids[i], NULL);
	pass();
}
"""


def test_a_mask_for_each_thread(survives: Survives) -> None:
    survives(MASKS)
