"""The observers see what is there, and see when it changes: a blind observer would pass every test."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from kit import (
    Targets,
    assert_same,
    descendants,
    diff,
    for_every_call,
    host_state,
    observe_memory,
    observe_tree,
)
from torpor.errors import KernelError
from torpor.linux.call import call

BUSY = """
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

static void *idle(void *unused) { for (;;) pause(); return unused; }

int main(void)
{
	pthread_t thread;
	int pipes[2], ep = epoll_create1(0), ev = eventfd(7, EFD_SEMAPHORE), tm = timerfd_create(CLOCK_MONOTONIC, 0);
	struct itimerspec when = {{0, 0}, {1000, 0}};
	struct epoll_event event = {EPOLLIN, {.u64 = 99}};

	MUST(pipe(pipes));
	MUST(write(pipes[1], "abc", 3));
	MUST(timerfd_settime(tm, 0, &when, NULL));
	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, ev, &event));
	MUST(dup(pipes[0]));
	CHECK(pthread_create(&thread, NULL, idle, NULL) == 0);
	if (fork() == 0)
		for (;;) pause();
	if (fork() == 0)
		_exit(42);
	ready();
	wait_told("change");
	MUST(lseek(open("stdout", O_RDWR), 0, SEEK_SET));
	MUST(write(pipes[1], "d", 1));
	MUST(nice(3));
	mprotect((void *)((unsigned long)main & -4096ul), 4096, PROT_READ | PROT_EXEC | PROT_WRITE);
	signal(SIGUSR1, SIG_IGN);
	tell("changed", "");
	for (;;) pause();
}
"""


def test_two_looks_at_an_idle_tree_are_alike(start: Targets) -> None:
    target = start.c(BUSY)
    assert len(target.pids()) == 3
    assert_same(observe_tree(target.pid), observe_tree(target.pid))


def test_what_changes_is_seen(start: Targets) -> None:
    target = start.c(BUSY)
    before = observe_tree(target.pid)
    target.tell("change")
    target.wait_file("changed")
    found = "\n".join(diff(before, observe_tree(target.pid)))
    for word in ("unread: 3 → 4", "nice: '0' → '3'", "rwxp", "SigIgn", "fds/9: new"):
        assert word in found, found
    assert not diff(before, observe_tree(target.pid), ("/*",))


def test_sharing_and_zombies_are_seen(start: Targets) -> None:
    target = start.c(BUSY)
    seen = observe_tree(target.pid)
    root, idle, dead = target.pids()
    assert [f"{root}:6", f"{root}:8", f"{idle}:6", f"{idle}:8"] in seen["shared"]["open files"]  # type: ignore[index]
    assert seen[str(dead)]["stat"]["state"] == "zombie"  # type: ignore[index]
    assert seen[str(dead)]["stat"]["exit_code"] == str(42 << 8)  # type: ignore[index]


def test_a_byte_of_memory_is_seen(start: Targets) -> None:
    target = start.c('int main(void) { char *p = malloc(9); char t[40]; sprintf(t, "%p", p); tell("at", t);'
                     " raise(SIGSTOP); ready(); for (;;) pause(); }", wait=False)  # fmt: skip
    target.wait_file("at")
    while target.state() != "T":
        pass
    before = observe_memory(target.pid)
    assert observe_memory(target.pid) == before
    address = int(target.read("at"), 16)
    with open(f"/proc/{target.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"x")
    after = observe_memory(target.pid)
    assert {page for page in before if before[page] != after[page]} == {address & -4096}


def test_targets_leave_nothing(tmp_path: object) -> None:
    before = host_state()
    targets = Targets(str(tmp_path))
    target = targets.c(BUSY)
    os.kill(target.pid, signal.SIGSTOP)
    assert diff(before, host_state())
    targets.end()
    assert_same(before, host_state())
    assert target.pid not in descendants(os.getpid())


def test_for_every_call_fails_each_once() -> None:
    done: list[int] = []

    def three_calls() -> None:
        done.append(sum(call("getpid") > 0 for _ in range(3)))

    outcomes = list(for_every_call(three_calls, number=errno.EIO))
    assert [faults.hit for faults, _ in outcomes] == ["getpid()"] * 3
    assert all(isinstance(e, KernelError) and e.errno == errno.EIO for _, e in outcomes)
    assert done == [3]


@pytest.mark.parametrize("what", ["pass", "fail"])
def test_a_program_is_believed_only_when_it_passes(start: Targets, what: str) -> None:
    target = start.c(f'int main(void) {{ ready(); wait_told("go"); CHECK({int(what == "pass")}); pass(); }}')
    if what == "pass":
        target.go()
    else:
        with pytest.raises(AssertionError, match="line 1: 0"):
            target.go()
