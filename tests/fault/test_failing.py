"""The n-th call to the kernel fails, for every n: a dump leaves its targets alone, a restore leaves
nothing, and both say why."""

from __future__ import annotations

import os
import shutil
import time

import pytest

import torpor
from kit import (
    Target,
    Targets,
    assert_same,
    compile_c,
    diff,
    end_descendants,
    host_state,
    observe_settled,
    observe_tree,
    wait_until,
)
from kit.apart import AS_INIT, inside
from kit.campaign import KINDS, TREE, Outcome, count_calls, places
from kit.chaos import campaign_size
from kit.host import reap, stat_fields

#: What a tree that is woken in namespaces has otherwise; unshare(1), whose output is the same, says something.
NEW = ("*/namespaces/*", "*/ppid", "*/PPid", "*/fds/*/mnt_id", "*/fds/[12]/size")


@pytest.fixture(params=[(), (*AS_INIT, "--mount-proc", "setsid")], ids=["plain", "as-init"])
def tree(request: pytest.FixtureRequest, start: Targets) -> Target:
    """Processes of ours, or in a pid namespace with a /proc, whose process 1 is the root."""
    target = inside(start, compile_c(TREE), *request.param)[0] if request.param else start.c(TREE)
    wait_until("both are there", lambda: len(target.pids()) == 2)
    return target


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
    for nth in places(count, 150):
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
    ignored = NEW if os.path.basename(tree.argv[0]) == AS_INIT[0] else ()
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
    for nth in places(count, 150):
        end(tree)
        outcome = Outcome(kind, nth, restore)
        wrong += outcome.complaints()
        failed += outcome.error is not None
        if outcome.error is None:
            wrong += complain(outcome, "tolerated", diff(before, observe_tree(tree.pid), ignored))
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
    assert_same(before, observe_tree(tree.pid), ignored)


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
