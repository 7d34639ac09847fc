"""The n-th call to the kernel fails while a copy with an overlay is made: nothing is left of it, its siblings run on."""

from __future__ import annotations

import os

import pytest

import torpor
from kit import Target, Targets, diff, host_state, wait_until
from kit.campaign import KINDS, Outcome, count_calls, places, spare
from kit.chaos import campaign_size
from kit.host import descendants, end_descendants, stat_fields

PROGRAM = """
int main(void)
{
	int written, mapped;
	char *map;

	MUST(mkdir("own", 0755));
	written = MUST(open("own/written", O_CREAT | O_RDWR, 0600));
	mapped = MUST(open("own/mapped", O_CREAT | O_RDWR, 0600));
	MUST(ftruncate(mapped, 8192));
	map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0);
	MUST(chdir("own"));
	ready();
	for (;;) {
		pwrite(written, "x", 1, 0);
		map[0] = 'x';
		usleep(1000);
	}
}
"""

SWEEPER = ("torpor-sweeper", "rm")  # it becomes that


def dumped(start: Targets, images: str) -> tuple[Target, str, str]:
    """The program, of which there is a snapshot now; its directory to be overlaid, and a place for upper layers."""
    target = start.c(PROGRAM)
    own, place = target.path("own"), target.path("upper")
    os.mkdir(place)
    torpor.dump(target.pid, images)
    target.wait_gone()
    return target, own, place


@pytest.mark.campaign
@pytest.mark.timeout(180 + campaign_size(0) * 4)
@pytest.mark.parametrize("upper", [False, True], ids=["tmpfs", "place"])
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_copy_with_an_overlay_in_which_a_call_fails(
    start: Targets, images: str, ends_all: None, kind: str, upper: bool
) -> None:
    target, own, place = dumped(start, images)
    wishes = {"overlay": [own], **({"overlay_upper": place} if upper else {})}
    before = host_state(images, target.folder)
    wrong, failed = [], 0
    with torpor.template(images) as template:
        sibling = template.clone(**wishes)
        copies = [template.clone(**wishes)]
        folders = {os.path.basename(sibling.written_to)} if upper else set()
        count = count_calls(kind, lambda: copies.append(template.clone(**wishes)))
        end(copies, place, folders)
        assert count > 20
        for nth in places(count, 50):
            state = host_state(images, own)
            outcome = Outcome(kind, nth, lambda: copies.append(template.clone(**wishes)))
            failed += outcome.error is not None
            wrong += outcome.complaints()
            if outcome.error is not None and set(os.listdir(place)) != folders:
                wrong.append(f"{outcome.name}: left: {os.listdir(place)}")
            end(copies, place, folders)
            after = host_state(images, own)
            left = set(after.pop("processes")) - {template.pid, *spare(template), *family(sibling.waits_for)}
            if left := [fields[:3] for fields in map(stat_fields, left) if fields and fields[1] not in SWEEPER]:
                wrong.append(f"{outcome.name}: left: {left}")
            del state["processes"]
            wrong += [f"{outcome.name}: {line}" for line in diff(state, after)]
            if wrong:
                break
        assert not wrong, "\n".join(wrong)
        assert failed > count // 20
        copies.append(template.clone(**wishes))
        assert stat_fields(sibling.pid)[2] in "SR"
        end([*copies, sibling], place, set())
    end_descendants(set(before["processes"]))
    assert not diff(before, host_state(images, target.folder))


@pytest.mark.campaign
@pytest.mark.timeout(180 + campaign_size(0) * 4)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_restore_with_an_overlay_in_which_a_call_fails(
    start: Targets, images: str, ends_all: None, kind: str
) -> None:
    target, own, place = dumped(start, images)
    trees: list[torpor.engine.restore.RestoreResult] = []

    def restore() -> None:
        trees.append(torpor.restore(images, own_pids=True, overlay=[own], overlay_upper=place))

    def end_trees() -> None:
        while trees:
            os.kill(trees[-1].waits_for, 9)
            os.waitpid(trees.pop().waits_for, 0)
        end([], place, set())

    def others() -> dict[str, object]:
        """The state of the machine, without sweepers: those end when they have swept."""
        state = host_state(images, target.folder)
        state["processes"] = {pid: name for pid, name in state["processes"].items() if name not in SWEEPER}
        return state

    restore()
    end_trees()
    before = others()
    count = count_calls(kind, restore)
    end_trees()
    wrong, failed = [], 0
    for nth in places(count, 40):
        outcome = Outcome(kind, nth, restore)
        failed += outcome.error is not None
        wrong += outcome.complaints()
        if outcome.error is None:
            end_trees()
        wrong += [f"{outcome.name}: {line}" for line in diff(before, others())]
    assert not wrong, "\n".join(wrong)
    assert failed > count // 20


def family(pid: int) -> list[int]:
    return [pid, *descendants(pid)]


def end(copies: list, place: str, folders: set[str]) -> None:
    """End the copies; what they wrote at the place goes with them."""
    while copies:
        copy = copies.pop()
        copy.kill()
        assert copy.wait() == 137
    wait_until("the sweepers have swept", lambda: set(os.listdir(place)) <= folders)
    for pid in descendants(os.getpid()):
        fields = stat_fields(pid)
        if fields and fields[1] in SWEEPER and fields[2] == "Z":
            os.waitpid(pid, 0x40000000)
