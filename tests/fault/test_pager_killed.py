"""kill -9 of a pager or its guard at random moments: a program never sees anything but its own memory."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest

import torpor
from kit import Targets, descendants, run_torpor, wait_until
from kit.busy import BUSY
from kit.chaos import campaign_size
from kit.host import reap, stat_fields


def named(name: str) -> list[int]:
    """Processes of that name below this one, which live."""
    found = []
    for pid in descendants(os.getpid()):
        fields = stat_fields(pid)
        if fields and fields[2] == "Z":
            reap([pid])
        elif fields and fields[1].strip("()") == name:
            found.append(pid)
    return found


def both() -> tuple[list[int], list[int]]:
    """The pager and its guard, when both are there under their names: one is forked from the other."""
    wait_until("there are both", lambda: named("torpor-pager") and named("torpor-guard"))
    guards = named("torpor-guard")
    return [pid for pid in named("torpor-pager") if pid not in guards], guards


def end(pid: int) -> None:
    """Kill a pager or a guard. Until it is dead it is seen by its name, and the other one could be killed beside it."""
    os.kill(pid, signal.SIGKILL)
    wait_until("it is dead", lambda: pid not in (*named("torpor-pager"), *named("torpor-guard")))


@pytest.mark.campaign
@pytest.mark.timeout(300 + campaign_size(0) * 4)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "filled"])
def test_a_killed_pager_does_no_harm(start: Targets, images: str, lazy: bool) -> None:
    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    dice = random.Random(7)
    kills = 0
    for number in range(campaign_size(12) // 3):
        target.wait_gone()
        for name in ("go", "enough", "result"):
            if os.path.exists(target.path(name)):
                os.unlink(target.path(name))
        target.pid = torpor.restore(images, map=True, map_lazy=lazy).pid
        target.tell("go")
        until = time.monotonic() + 3
        while time.monotonic() < until and not target.read("result"):
            # Never both at once: as long as one of the two lives, nothing is lost.
            if not named("torpor-pager") or not named("torpor-guard"):
                time.sleep(0.001)
                continue
            time.sleep(dice.uniform(0, 0.05))
            victims = named(dice.choice(("torpor-pager", "torpor-pager", "torpor-guard")))
            if victims and named("torpor-guard") and named("torpor-pager"):
                end(victims[0])
                kills += 1
        target.tell("enough")
        wait_until(f"{target} says how it was, round {number}", lambda: target.read("result"), timeout=60)
        assert target.read("result") == "pass\n"
        wait_until("the pager is gone", lambda: not named("torpor-pager") and not named("torpor-guard"), timeout=30)
    assert kills, "none was killed"


def test_a_guard_that_is_killed_when_it_has_started_a_pager(
    start: Targets, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that pager's parent: somebody else collects it, and its pid may say nothing by the time it is looked for."""
    from torpor.engine import pager

    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    run_pager = pager.Pair.run_pager

    def alone(self: pager.Pair) -> int:
        if self.guard_pid:
            os.kill(self.guard_pid, signal.SIGKILL)
            while os.path.exists(f"/proc/{self.guard_pid}"):
                time.sleep(0.01)
        return run_pager(self)

    monkeypatch.setattr(pager.Pair, "run_pager", alone)
    target.pid = torpor.restore(images, map=True, map_lazy=True).pid
    pagers, guards = both()
    os.kill(pagers[0], signal.SIGKILL)
    wait_until("both are others", lambda: named("torpor-pager") and set(named("torpor-guard")).isdisjoint(guards))
    target.tell("go")
    target.tell("enough")
    wait_until("it says how it was", lambda: target.read("result"), timeout=60)
    assert target.read("result") == "pass\n"


def test_a_pager_that_is_killed_as_it_hears_that_the_tasks_run(
    start: Targets, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restore says so once. Who comes after this pager must know."""
    from torpor.engine import paging

    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    await_release = paging.Wanted.await_release

    def killed(self: paging.Wanted, *book: Any) -> None:
        await_release(self, *book)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(paging.Wanted, "await_release", killed)
    target.pid = torpor.restore(images, map=True, map_lazy=True).pid
    target.tell("go")
    target.tell("enough")
    wait_until("it says how it was", lambda: target.read("result"), timeout=60)
    assert target.read("result") == "pass\n"


def test_a_pager_that_dies_with_its_guard_before_the_tasks_run_fails_the_restore(start: Targets, images: str) -> None:
    """Afterwards nobody can help any more; until then the restore itself notices."""
    from torpor.engine import mapped

    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    target.wait_gone()

    def kill_both(self: mapped.Handle) -> None:
        ready(self)
        pagers, guards = both()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (*guards, *pagers):
                os.kill(pid, number)
        wait_until("both are gone", lambda: not named("torpor-guard") and not named("torpor-pager"))

    ready = mapped.Handle.await_ready
    mapped.Handle.await_ready = kill_both  # type: ignore[method-assign]
    try:
        with pytest.raises(torpor.Unsupported, match="pager"):
            torpor.restore(images, map=True)
    finally:
        mapped.Handle.await_ready = ready  # type: ignore[method-assign]
    assert not target.alive()


def test_a_restore_that_is_killed_leaves_no_pager(start: Targets, images: str) -> None:
    from kit.chaos import duration, kill_in_the_middle

    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    dice = random.Random(3)
    killed = 0

    def restore() -> None:
        torpor.restore(images, map=True)

    seconds = duration(restore)
    for _ in range(campaign_size(10)):
        target.seen.add(target.pid)
        target.end()
        target.wait_gone()
        killed += kill_in_the_middle(restore, seconds, dice)
        wait_until("pagers end", lambda: not named("torpor-pager") and not named("torpor-guard"), timeout=20)
        if target.alive():  # it was let go: then it is complete
            target.tell("go")
            target.tell("enough")
            wait_until("it says how it was", lambda: target.read("result"), timeout=60)
            assert target.read("result") == "pass\n"
            for name in ("go", "enough", "result"):
                os.unlink(target.path(name))
    assert killed


def test_the_command_says_that_the_pager_was_replaced(start: Targets, images: str) -> None:
    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    log = os.path.join(images, "log")
    run_torpor("restore", images, "-d", "--map", "--map-lazy", "-o", log).must()
    os.kill(both()[0][0], signal.SIGKILL)
    target.tell("go")
    target.tell("enough")
    wait_until("it says how it was", lambda: target.read("result"), timeout=60)
    assert target.read("result") == "pass\n"
    with open(log) as file:
        assert "another one takes over" in file.read()


def test_a_pager_that_fails_again_and_again_ends_the_program(
    start: Targets, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not go on with memory that nobody brings in, nor with zeros."""
    from torpor import log
    from torpor.engine import pager

    def broken(self: pager.Pager, space: pager.Space, address: int) -> None:
        raise RuntimeError("a bug")

    target = start.c(BUSY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    monkeypatch.setattr(pager.Pager, "_bring_page", broken)
    path = os.path.join(images, "log")
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    log.open_log(fd)
    try:
        target.pid = torpor.restore(images, map=True, map_lazy=True).pid
    finally:
        log.open_log(-1)
        os.close(fd)
    target.tell("go")
    wait_until("it is gone", lambda: (reap([target.pid]), not target.alive())[1], timeout=30)
    assert target.read("result") == ""
    wait_until("pagers end", lambda: not named("torpor-pager") and not named("torpor-guard"), timeout=20)
    with open(path) as file:
        assert "it has failed again and again" in file.read()
