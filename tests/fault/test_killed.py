"""kill -9 at random moments: a dump leaves its targets unharmed, a restore leaves nothing half-made."""

from __future__ import annotations

import os
import random
import shutil

import pytest

import torpor
from kit import Targets, assert_same, descendants, diff, observe_settled, observe_tree, wait_until
from kit.chaos import campaign_size, duration, kill_in_the_middle
from kit.files import slurp_text
from kit.host import reap, stat_fields

COMPUTE = """
static volatile int stop;

static unsigned long steps(unsigned long state, unsigned long count)
{
	while (count--)
		state = state * 6364136223846793005ul + 1442695040888963407ul;
	return state;
}

static void *thread(void *arg)
{
	unsigned long state = (unsigned long)arg, done = 0;

	for (; !stop; done++)
		state = steps(state, 1000);
	CHECK_EQ(state, steps((unsigned long)arg, done * 1000));
	return NULL;
}

int main(void)
{
	pthread_t ids[2];

	for (unsigned long n = 0; n < 2; n++)
		CHECK(pthread_create(&ids[n], NULL, thread, (void *)(n + 1)) == 0);
	ready();
	wait_told("go");
	stop = 1;
	for (int n = 0; n < 2; n++)
		pthread_join(ids[n], NULL);
	pass();
}
"""

SLEEP = """
int main(void)
{
	struct timespec nap = {0, 30000000}, left;
	double before;

	ready();
	while (!told("go")) {
		before = seconds();
		if (nanosleep(&nap, &left))
			fail("nanosleep: errno %d, %ld ns left", errno, left.tv_nsec);
		CHECK(seconds() - before >= 0.03);
	}
	pass();
}
"""

POLL = """
int main(void)
{
	int pipes[2];
	struct pollfd set;
	double before;
	struct timeval tv;
	fd_set fds;

	MUST(pipe(pipes));
	set = (struct pollfd){pipes[0], POLLIN, 0};
	ready();
	while (!told("go")) {
		before = seconds();
		CHECK_EQ(poll(&set, 1, 20), 0);
		CHECK(seconds() - before >= 0.0199);
		FD_ZERO(&fds);
		FD_SET(pipes[0], &fds);
		tv = (struct timeval){0, 20000};
		before = seconds();
		CHECK_EQ(select(pipes[0] + 1, &fds, NULL, NULL, &tv), 0);
		CHECK(seconds() - before >= 0.0199);
	}
	pass();
}
"""

EIGHT = """
#include <linux/futex.h>

static volatile int stop;
static int word, pipes[2];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile long total;

static void *thread(void *arg)
{
	long kind = (long)arg, rounds = 0;
	struct timespec time = {0, 10000000};
	char byte;

	while (!stop) {
		rounds++;
		switch (kind % 4) {
		case 0:
			pthread_mutex_lock(&lock);
			total++;
			pthread_mutex_unlock(&lock);
			break;
		case 1:
			if (nanosleep(&time, NULL))
				fail("nanosleep: errno %d", errno);
			break;
		case 2:
			if (syscall(SYS_futex, &word, FUTEX_WAIT, 0, &time, NULL, 0) == 0 || errno != ETIMEDOUT)
				fail("futex: errno %d", errno);
			break;
		case 3:
			CHECK_EQ(write(pipes[1], "x", 1), 1);
			CHECK_EQ(read(pipes[0], &byte, 1), 1);
			break;
		}
	}
	return (void *)rounds;
}

int main(void)
{
	pthread_t ids[8];
	long counted = 0;

	MUST(pipe(pipes));
	for (long n = 0; n < 8; n++)
		CHECK(pthread_create(&ids[n], NULL, thread, (void *)n) == 0);
	ready();
	wait_told("go");
	stop = 1;
	for (int n = 0; n < 8; n++) {
		void *rounds;

		pthread_join(ids[n], &rounds);
		CHECK((long)rounds > 0);
		if (n % 4 == 0)
			counted += (long)rounds;
	}
	CHECK_EQ(counted, total);
	pass();
}
"""

TARGETS = {"compute": COMPUTE, "sleep": SLEEP, "poll": POLL, "eight threads": EIGHT}
VOLATILE = ("*/stat/vsize", "*/status/VmSize", "*/status/VmData", "*/maps/*", "*/fds/*/pos")


@pytest.mark.campaign
@pytest.mark.timeout(240 + campaign_size(0) * 4)
@pytest.mark.parametrize("name", [*TARGETS])
def test_a_killed_dump_does_no_harm(start: Targets, images: str, name: str) -> None:
    target = start.c(TARGETS[name])
    dice = random.Random(name)
    folder = f"{images}/snapshot"

    def dump() -> None:
        torpor.dump(target.pid, folder, leave_running=True)

    # In this process once: from here on, nothing has to be imported or looked up for the first time.
    os.mkdir(folder)
    dump()
    before = observe_settled(target.pid)
    seconds = duration(dump)
    killed = 0
    for _ in range(campaign_size(60) // len(TARGETS)):
        shutil.rmtree(folder)
        os.mkdir(folder)
        killed += kill_in_the_middle(dump, seconds * 1.1, dice)
        wait_until(
            f"nothing has changed after {killed} kills: {diff(before, observe_tree(target.pid))}",
            lambda: target.alive() and not diff(before, observe_tree(target.pid), VOLATILE),
            timeout=5,
        )
    assert killed, "every dump was done before it could be killed"
    target.go(timeout=60)


FAMILY = """
static void *idle(void *arg) { for (;;) pause(); return arg; }

int main(void)
{
	pthread_t id;

	for (int i = 0; i < 4; i++)
		if (fork() == 0)
			break;
	pthread_create(&id, NULL, idle, NULL);
	usleep(30000);
	ready();
	for (;;) pause();
}
"""


@pytest.mark.campaign
@pytest.mark.timeout(240 + campaign_size(0) * 4)
def test_a_killed_restore_leaves_no_half_made_task(start: Targets, images: str) -> None:
    target = start.c(FAMILY)
    wait_until("the family is there", lambda: len(target.pids()) == 5)
    wait_until("all have two threads", lambda: all(_threads(pid) == 2 for pid in target.pids()))
    torpor.dump(target.pid, images, leave_running=True)
    before = observe_settled(target.pid)
    target.end()
    target.wait_gone()
    seconds = duration(lambda: torpor.restore(images))
    dice = random.Random(5)
    killed = whole = 0
    for _ in range(campaign_size(60) // 2):
        target.end()
        target.wait_gone()
        killed += kill_in_the_middle(lambda: torpor.restore(images), seconds * 1.1, dice)
        wait_until("what is not whole is gone", lambda: _settled(target.seen), timeout=5)
        left = [pid for pid in target.seen if stat_fields(pid)]
        for pid in left:  # whoever was released is complete
            same = diff(before[str(pid)], observe_tree(pid)[str(pid)], ("*/ppid", "*/PPid"))
            assert not same, same
        whole += len(left) == 5
        assert {pid for pid in descendants(os.getpid()) if _runs_target(pid)} == set(left)
    assert killed
    target.end()
    target.wait_gone()
    torpor.restore(images)
    assert_same(before, observe_tree(target.pid))


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _settled(pids: set[int]) -> bool:
    """Is each of them gone, or free of tracers and not about to die?"""
    reap([*pids, *descendants(os.getpid())])
    for pid in pids:
        try:
            status = slurp_text(f"/proc/{pid}/status")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "TracerPid:\t0" not in status or "State:\tS" not in status:
            return False
    return True


def _runs_target(pid: int) -> bool:
    fields = stat_fields(pid)
    return fields is not None and fields[2] != "Z"
