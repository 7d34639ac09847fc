"""Signals that come without end, while a program is stopped, asked and let go: it stops, and gets each of them."""

from __future__ import annotations

import shutil
import tempfile
import time

import torpor
from kit import Targets

from .conftest import Survives

#: Four timers that tick every 100 µs, so that there is nearly always a signal on its way. Counts those of a queue, too:
#: of these none may be lost, and none come twice.
STORM = """
static volatile long ticks, counted;

static void tick(int number) { ticks++; }

static void note(int number, siginfo_t *info, void *context)
{
	if (info->si_value.sival_int != counted)
		fail("number %ld was to come, not %d", counted, info->si_value.sival_int);
	counted++;
}

int main(void)
{
	struct itimerspec often = {{0, 100000}, {0, 100000}};
	struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
	union sigval value = {0};
	pid_t parent = getpid(), child;
	long before;
	int sent = 0;

	MUST(sigaction(SIGRTMIN + 9, &action, NULL));
	for (int n = 0; n < 4; n++) {
		struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + n};
		timer_t timer;

		signal(SIGRTMIN + n, tick);
		MUST(timer_create(CLOCK_MONOTONIC, &event, &timer));
		MUST(timer_settime(timer, 0, &often, NULL));
	}
	child = fork();
	MUST(child);
	if (child == 0) {
		MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
		while (!told("go")) {
			value.sival_int = sent++;
			while (sigqueue(parent, SIGRTMIN + 9, value))
				usleep(100);
			kill(parent, SIGURG);  /* which means nothing to it */
			if (sent % 8 == 0)
				usleep(4000);
		}
		_exit(0);
	}
	ready();
	while (!told("go"))
		before = ticks;
	CHECK_EQ(waitpid(child, NULL, 0) == child || errno == EINTR, 1);
	CHECK(counted > 100);
	while (ticks == before)
		;
	pass();
}
"""


def test_a_dump_among_signals_without_end(start: Targets, images: str) -> None:
    target = start.c(STORM)
    slowest = 0.0
    for _ in range(100):
        folder = tempfile.mkdtemp(dir=images)
        started = time.monotonic()
        torpor.dump(target.pid, folder, leave_running=True)
        slowest = max(slowest, time.monotonic() - started)
        shutil.rmtree(folder)
    assert slowest < 10
    target.go(timeout=60)


#: The second of two processes has a timer, the first has none: what one is asked is not what the other is.
CHILDS_TIMER = """
static volatile long ticks;

static void tick(int number) { ticks++; }

int main(void)
{
	struct itimerspec often = {{0, 5000000}, {0, 5000000}}, asked;
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
	timer_t timer;
	double until;
	pid_t child = fork();

	MUST(child);
	if (child) {
		while (waitpid(child, NULL, 0) != child)
			;
		return 0;
	}
	signal(SIGUSR1, tick);
	MUST(timer_create(CLOCK_MONOTONIC, &event, &timer));
	MUST(timer_settime(timer, 0, &often, NULL));
	ready();
	wait_told("go");
	MUST(timer_gettime(timer, &asked));
	CHECK_EQ(asked.it_interval.tv_nsec, 5000000);
	ticks = 0;
	for (until = seconds() + 5; ticks < 3 && seconds() < until;)
		usleep(1000);
	CHECK(ticks >= 3);
	pass();
}
"""


def test_a_timer_of_a_child_whose_parent_has_none(survives: Survives) -> None:
    survives(CHILDS_TIMER, ignore=("*/status/ShdPnd",))
