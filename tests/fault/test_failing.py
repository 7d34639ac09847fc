"""The n-th call to the kernel fails, for every n: a dump leaves its targets alone, a restore leaves
nothing, and both say why."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable

import pytest

import torpor
from kit import (
    Faults,
    Target,
    Targets,
    assert_same,
    diff,
    end_descendants,
    host_state,
    observe_settled,
    observe_tree,
    wait_until,
)
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


class Outcome:
    """What became of an operation when call number ``nth`` failed; ``error`` is None if tolerated."""

    def __init__(self, kind: str, nth: int, operation: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        with KINDS[kind](nth) as faults:
            try:
                operation()
            except Exception as error:
                self.error = error
        self.name = f"call {nth}, {faults.hit}: {self.error!r}"

    def complaints(self) -> list[str]:
        """What is wrong with the error itself."""
        if self.error is None or (isinstance(self.error, torpor.TorporError) and str(self.error)):
            return []
        return [f"{self.name}: no error of ours"]


def complain(outcome: Outcome, about: str, differences: list[str]) -> list[str]:
    return [f"{outcome.name}: {about}: {line}" for line in differences[:5]]


@pytest.mark.campaign
@pytest.mark.timeout(240 + campaign_size(0) * 4)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_dump_in_which_a_call_fails(tree: Target, images: str, kind: str) -> None:
    folder = f"{images}/snapshot"
    os.mkdir(folder)

    def dump() -> None:
        torpor.dump(tree.pid, folder, leave_running=True)

    dump()
    before = observe_settled(tree.pid)
    state = host_state()
    count = count_calls(kind, dump)
    assert count > 20
    wrong: list[str] = []
    failed = 0
    for nth in places(count):
        shutil.rmtree(folder)
        os.mkdir(folder)
        outcome = Outcome(kind, nth, dump)
        wrong += outcome.complaints()
        failed += outcome.error is not None
        if outcome.error is not None:
            wrong += complain(outcome, "left", os.listdir(folder))
        wrong += complain(outcome, "here", diff(state, host_state()))
        harm = complain(outcome, "task", diff(before, observe_tree(tree.pid)))
        wrong += harm
        if harm:
            break
        if wrong:
            state = host_state()
    assert not wrong, "\n".join(wrong)
    assert failed > count // 20


@pytest.mark.campaign
@pytest.mark.timeout(240 + campaign_size(0) * 4)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_restore_in_which_a_call_fails(tree: Target, images: str, kind: str) -> None:
    torpor.dump(tree.pid, images, leave_running=True)
    before = observe_settled(tree.pid)
    end(tree)
    torpor.restore(images)
    end(tree)
    state = host_state(images, tree.folder)

    def restore() -> None:
        torpor.restore(images)

    count = count_calls(kind, restore)
    assert count > 20
    wrong: list[str] = []
    failed = 0
    for nth in places(count):
        end(tree)
        outcome = Outcome(kind, nth, restore)
        wrong += outcome.complaints()
        failed += outcome.error is not None
        if outcome.error is None:
            wrong += complain(outcome, "tolerated", diff(before, observe_tree(tree.pid)))
            end(tree)
        elif not soon_nothing_of(tree):
            wrong += complain(outcome, "left", [str(stat_fields(pid)) for pid in tree.pids()])
            end_descendants(set())
        now = host_state(images, tree.folder)
        wrong += complain(outcome, "here", diff(state, now))
        for path in set(now["files"]) - set(state["files"]):
            os.unlink(path)  # or it would stand in the way of the next restore
        if wrong:
            state = host_state(images, tree.folder)
    assert not wrong, "\n".join(wrong)
    assert failed > count // 20
    restore()
    assert_same(before, observe_tree(tree.pid))


def end(target: Target) -> None:
    target.end()
    target.wait_gone()


def soon_nothing_of(target: Target) -> bool:
    """Are all tasks of the tree gone, or dying of their tracer's death?"""
    for _ in range(200):
        reap([*target.seen])
        if not any(stat_fields(pid) for pid in target.seen):
            return True
        time.sleep(0.005)
    return False
