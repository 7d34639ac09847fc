"""Memory that is copied while the tree runs: calls that fail and dumps that are killed harm nobody."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest

import torpor
from kit import Target, Targets, diff, host_state, observe_settled, observe_tree, wait_until
from kit.busy import BUSY
from kit.campaign import KINDS, Outcome, count_calls, places
from kit.chaos import campaign_size, duration, kill_in_the_middle
from kit.files import slurp_text
from torpor.engine import precopy

MEMORY = """
static void *idle(void *arg) { for (;;) pause(); return arg; }

int main(void)
{
	pthread_t id;
	size_t size = 3 << 20;
	char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	pthread_create(&id, NULL, idle, NULL);
	memset(map, 5, size);
	ready();
	wait_told("go");
	for (size_t n = 0; n < size; n++)
		CHECK_EQ(map[n], 5);
	pass();
}
"""


def lasting_harm(before: object, pid: int) -> list[str]:
    """What is not as it was, once a task that was let go in the middle has had the time to find its way back."""
    deadline = time.monotonic() + 5
    while (found := diff(before, observe_tree(pid))) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


@pytest.mark.campaign
@pytest.mark.timeout(240 + campaign_size(0) * 4)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_dump_in_which_a_call_fails(
    start: Targets, images: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TREE_BYTES_MIN", "TASK_BYTES_MIN"):
        monkeypatch.setattr(precopy, name, 1)
    target = start.c(MEMORY)
    folder = f"{images}/snapshot"
    os.mkdir(folder)
    early: list[int] = []

    def dump() -> None:
        early.append(torpor.dump(target.pid, folder, leave_running=True).early_pages)

    dump()
    before = observe_settled(target.pid)
    state = host_state()
    count = count_calls(kind, dump)
    assert all(early)
    wrong: list[str] = []
    for nth in places(count, 100):
        shutil.rmtree(folder)
        os.mkdir(folder)
        outcome = Outcome(kind, nth, dump)
        wrong += outcome.complaints()
        for differences in (
            os.listdir(folder) if outcome.error is not None else [],
            diff(state, host_state()),
            lasting_harm(before, target.pid),
        ):
            wrong += [f"{outcome.name}: {line}" for line in differences[:5]]
        if wrong:
            break
    assert not wrong, "\n".join(wrong)
    target.go()


def watched(target: Target) -> bool:
    return " uw" in slurp_text(f"/proc/{target.pid}/smaps")


@pytest.mark.campaign
@pytest.mark.timeout(240 + campaign_size(0) * 4)
def test_a_killed_dump(start: Targets, images: str) -> None:
    target = start.c(BUSY)
    descriptors = os.listdir(f"/proc/{target.pid}/fd")
    target.tell("go")

    def dump() -> None:
        torpor.dump(target.pid, images, leave_running=True)

    seconds = duration(dump)
    dice = random.Random(11)
    killed = 0
    for _ in range(campaign_size(40)):
        killed += kill_in_the_middle(dump, seconds, dice)
        wait_until("nobody watches it any more", lambda: not watched(target))
        assert os.listdir(f"/proc/{target.pid}/fd") == descriptors
    assert killed > 10
    target.tell("enough")
    wait_until("it says how it was", lambda: target.read("result"), timeout=60)
    assert target.read("result") == "pass\n"
