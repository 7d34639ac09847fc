"""The n-th call to the kernel fails, for every n: a dump leaves its targets alone, a restore leaves
nothing, and both say why."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable

import pytest

import torpor
from kit import Faults, Target, Targets, assert_same, host_state, observe_tree, wait_until
from kit.chaos import campaign_size
from kit.faults import OsFaults
from kit.host import reap, stat_fields

TREE = """
#include <sys/eventfd.h>

static void *idle(void *arg) { for (;;) pause(); return arg; }

int main(void)
{
	pthread_t id;
	int pipes[2], shared = MUST(open("data", O_CREAT | O_RDWR, 0600));
	char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	MUST(pipe(pipes));
	MUST(write(pipes[1], "data", 4));
	MUST(eventfd(3, 0));
	MUST(write(shared, "text", 4));
	MUST(unlink("data"));
	map[0] = 5;
	if (fork() == 0)
		for (;;) pause();
	pthread_create(&id, NULL, idle, NULL);
	usleep(30000);
	ready();
	for (;;) pause();
}
"""

KINDS: dict[str, Callable[[int], Faults | OsFaults]] = {
    "gate": lambda nth: Faults(nth, errno.ENOMEM),
    "os": lambda nth: OsFaults(nth, errno.EIO),
}


@pytest.fixture
def tree(start: Targets) -> Target:
    target = start.c(TREE)
    wait_until("both are there", lambda: len(target.pids()) == 2)
    return target


def places(count: int) -> list[int]:
    """Which of ``count`` calls to fail: all, or evenly spread ones if there is no time for all."""
    most = campaign_size(150)
    return sorted({1 + place * count // most for place in range(most)}) if count > most else [
        *range(1, count + 1)
    ]  # fmt: skip


def count_calls(kind: str, operation: Callable[[], object]) -> int:
    with KINDS[kind](0) as faults:
        operation()
    return faults.calls


def fail_once(kind: str, nth: int, operation: Callable[[], object]) -> torpor.TorporError | None:
    """The error that comes out when call number ``nth`` fails; None if it was tolerated."""
    with KINDS[kind](nth) as faults:
        try:
            operation()
        except torpor.TorporError as error:
            assert str(error), f"{faults.hit}: an error without words"
            return error
    return None


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_dump_in_which_a_call_fails(tree: Target, images: str, kind: str) -> None:
    folder = f"{images}/snapshot"

    def dump() -> None:
        os.makedirs(folder, exist_ok=True)
        torpor.dump(tree.pid, folder, leave_running=True)

    dump()
    shutil.rmtree(folder)
    before = observe_tree(tree.pid)
    state = host_state()
    count = count_calls(kind, dump)
    assert count > 20
    failed = 0
    for nth in places(count):
        shutil.rmtree(folder)
        error = fail_once(kind, nth, dump)
        failed += error is not None
        if error is not None:
            assert os.listdir(folder) == [], f"call {nth}: {error}"
        assert_same(state, host_state())
        assert_same(before, observe_tree(tree.pid))
    assert failed > count // 20


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_restore_in_which_a_call_fails(tree: Target, images: str, kind: str) -> None:
    torpor.dump(tree.pid, images, leave_running=True)
    before = observe_tree(tree.pid)
    end(tree)
    torpor.restore(images)
    end(tree)
    state = host_state(images, tree.folder)

    def restore() -> None:
        torpor.restore(images)

    count = count_calls(kind, restore)
    assert count > 20
    failed = 0
    for nth in places(count):
        end(tree)
        error = fail_once(kind, nth, restore)
        failed += error is not None
        if error is None:
            assert_same(before, observe_tree(tree.pid))
            end(tree)
        wait_until(f"call {nth}: {error}: all is gone", lambda: nothing_of(tree), timeout=5)
        assert_same(state, host_state(images, tree.folder))
    assert failed > count // 20
    restore()
    assert_same(before, observe_tree(tree.pid))


def end(target: Target) -> None:
    target.end()
    target.wait_gone()


def nothing_of(target: Target) -> bool:
    reap([*target.seen])
    return not any(stat_fields(pid) for pid in target.seen)
