"""The n-th call to the kernel fails while a template or a copy is made: nothing is left of it, its siblings run on, and
the next copy is made as if nothing had been."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import pytest

import torpor
from kit import Targets, compile_c, diff, host_state, wait_until
from kit.apart import AS_INIT, inside
from kit.campaign import KINDS, OWN, TREE, Outcome, count_calls, places, spare
from kit.chaos import campaign_size
from kit.host import descendants, end_descendants, stat_fields
from torpor.linux import call as gate

#: Whose root has an init of ours, and whose root is process 1 itself; one with much that each copy has for itself.
AROUND = (*AS_INIT, "--mount-proc", "setsid")
CASES = pytest.mark.parametrize(
    ("around", "source", "processes"), [((), TREE, 2), (AROUND, TREE, 2), ((), OWN, 1)],
    ids=["below-init", "as-init", "what each has for itself"],
)  # fmt: skip


def dumped(
    start: Targets, images: str, around: tuple[str, ...] = (), source: str = TREE, processes: int = 2
) -> str:
    target, outer = inside(start, compile_c(source), *around) if around else (start.c(source),) * 2
    wait_until("all are there", lambda: len(target.pids()) >= processes)
    torpor.dump(target.pid, images)
    target.wait_gone()
    outer.wait_gone()
    return target.folder


@pytest.mark.campaign
@pytest.mark.timeout(180 + campaign_size(0) * 4)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_template_in_which_a_call_fails(start: Targets, images: str, ends_all: None, kind: str) -> None:
    folder = dumped(start, images)
    torpor.template(images).close()
    state = host_state(images, folder)
    count = count_calls(kind, lambda: torpor.template(images).close())
    assert count > 10
    wrong = []
    for nth in places(count, 60):
        outcome = Outcome(kind, nth, lambda: torpor.template(images).close())
        wrong += outcome.complaints()
        wrong += [f"{outcome.name}: {line}" for line in diff(state, host_state(images, folder))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.campaign
@pytest.mark.timeout(180 + campaign_size(0) * 4)
@CASES
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_copy_in_which_a_call_fails(
    start: Targets, images: str, ends_all: None, kind: str, around: tuple[str, ...], source: str, processes: int
) -> None:
    dumped(start, images, around, source, processes)
    wrong = []
    failed = 0
    with torpor.template(images) as template:
        sibling = template.clone()

        copies = [template.clone(), template.clone()]
        count = count_calls(kind, lambda: copies.append(template.clone()))
        end(copies)
        assert count > 20
        for nth in places(count, 60):
            # The init that is kept ready may be taken by a copy that fails; its number is not the point.
            before = host_state()
            del before["processes"]
            outcome = Outcome(kind, nth, lambda: copies.append(template.clone()))
            end(copies)
            failed += outcome.error is not None
            wrong += outcome.complaints()
            after = host_state()
            left = set(after.pop("processes")) - {template.pid, *spare(template), *tree(sibling.waits_for)}
            if left:
                wrong.append(f"{outcome.name}: left: {[stat_fields(pid)[:3] for pid in left if stat_fields(pid)]}")
            wrong += [f"{outcome.name}: {line}" for line in diff(before, after)]
            if wrong:
                break
        copies.append(template.clone())
        end(copies)
        assert stat_fields(sibling.pid) is not None
        sibling.kill()
        sibling.wait()
    assert not wrong, "\n".join(wrong)
    assert failed > count // 20
    assert not descendants(os.getpid())


def end(copies: list) -> None:
    while copies:
        copy = copies.pop()
        copy.kill()
        assert copy.wait() == 137


def tree(pid: int) -> list[int]:
    return [pid, *descendants(pid)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("limit", "least"), [(30, 10), (1010, 490)])
def test_no_process_can_be_made_any_more(
    start: Targets, images: str, ends_all: None, limit: int, least: int
) -> None:
    """A limit of the control group stops the copies; what runs goes on, and more are made when there is room."""
    base = "/sys/fs/cgroup/pids" if os.path.exists("/sys/fs/cgroup/pids/cgroup.procs") else "/sys/fs/cgroup"
    group = f"{base}/torpor-test-{os.getpid()}"
    os.mkdir(group)
    assert os.path.exists(f"{group}/pids.max"), f"{base} does not count processes"
    target = start.c("int main(void) { ready(); for (;;) pause(); }")
    torpor.dump(target.pid, images)
    target.wait_gone()
    holder = os.fork()
    if holder == 0:
        code = 1
        try:
            code = copies_until_none_more(images, group, limit, least)
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    try:
        _, status = os.waitpid(holder, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        end_descendants(set())
    finally:
        wait_until("it is empty", lambda: removed(group))


def removed(group: str) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(group)
    return not os.path.exists(group)


def copies_until_none_more(images: str, group: str, limit: int, least: int) -> int:
    with open(f"{group}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    with open(f"{group}/pids.max", "w") as file:
        file.write(str(limit))
    with torpor.template(images) as template:
        copies = []
        for _ in range(limit):
            try:
                copies.append(template.clone())
            except torpor.KernelError as error:
                if error.errno != errno.EAGAIN:
                    return 2
                break
        if not least <= len(copies) < limit or any(copy.poll() is not None for copy in copies):
            return 3
        for copy in copies[:5]:
            copy.kill()
            copy.wait()
        template.clone()
        for _ in range(3):
            with contextlib.suppress(torpor.TorporError):
                copies.append(template.clone())
        return 0 if all(copy.poll() is None for copy in copies[5:]) else 4


class Killer:
    """In place of a fault: kills a process when the gate is about to do its ``nth`` call."""

    def __init__(self, nth: int, victim: Callable[[], int]) -> None:
        self.nth, self.victim, self.calls, self.hit = nth, victim, 0, ""

    def __call__(self, name: str) -> None:
        self.calls += 1
        if self.calls == self.nth and (pid := self.victim()):
            self.hit = f"call {self.nth}, {name}: {stat_fields(pid)[1]} is killed"
            os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Killer:
        gate.fault = self
        return self

    def __exit__(self, *exc: object) -> None:
        gate.fault = None


@pytest.mark.campaign
@pytest.mark.timeout(180 + campaign_size(0) * 4)
@CASES
@pytest.mark.parametrize("whom", ["the first", "the last", "the held process"])
def test_a_process_of_a_copy_is_killed_in_mid_creation(
    start: Targets, images: str, ends_all: None, whom: str, around: tuple[str, ...], source: str, processes: int
) -> None:
    """The init, or the youngest of its tree: the copy fails, or has come into being and is dead; the next one is made.
    Without the held process there are no copies any more, and that is said."""
    dumped(start, images, around, source, processes)
    template = torpor.template(images)
    sibling = template.clone()

    def victim() -> int:
        if whom == "the held process":
            return template.pid
        known = {template.pid, *template.inits.ready, *tree(sibling.waits_for)}
        fresh = [pid for pid in descendants(os.getpid()) if pid not in known and stat_fields(pid)[2] != "Z"]
        return 0 if not fresh else fresh[0] if whom == "the first" else fresh[-1]

    copies = [template.clone()]
    end(copies)
    with Killer(0, victim) as counted:
        copies.append(template.clone())
    end(copies)
    wrong, hits = [], 0
    for nth in places(counted.calls, 40):
        error: BaseException | None = None
        with Killer(nth, victim) as killer:
            try:
                copies.append(template.clone())
            except Exception as caught:
                error = caught
        hits += bool(killer.hit)
        if error is not None and not isinstance(error, torpor.TorporError):
            wrong.append(f"{killer.hit}: {error!r}")
        if whom == "the held process" and killer.hit:
            for copy in copies:
                copy.kill()
                copy.wait()
            copies.clear()
            with pytest.raises(torpor.TorporError):
                template.clone()
            wait_until("it is known to be gone", lambda template=template: not template.alive())
            template.close()
            template = torpor.template(images)
        else:
            end(copies)
            copies.append(template.clone())
            end(copies)
        left = set(descendants(os.getpid())) - {template.pid, *spare(template), *tree(sibling.waits_for)}
        wrong += [f"{killer.hit}: {error!r}: left: {stat_fields(pid)[:3]}" for pid in left if stat_fields(pid)]
        if wrong:
            break
    assert not wrong, "\n".join(wrong)
    assert hits > 5  # much is made before there is any process
    assert sibling.poll() is None
    template.close()
    end([sibling])
    assert not descendants(os.getpid())


HOLD = """
import os, sys, time, torpor
template = torpor.template(sys.argv[1])
copies = [template.clone() for _ in range(3)]
print(template.pid, *(copy.pid for copy in copies), flush=True)
while True:
    template.clone()
"""


@pytest.mark.timeout(60 + campaign_size(0) * 2)
@pytest.mark.parametrize("around", [(), AROUND], ids=["below-init", "as-init"])
def test_a_holder_that_is_killed_leaves_complete_copies_only(
    start: Targets, images: str, ends_all: None, around: tuple[str, ...]
) -> None:
    dumped(start, images, around, "int main(void) { ready(); for (;;) pause(); }", 1)
    for wait_ms in (turn % 12 * 7 for turn in range(campaign_size(12))):
        holder = subprocess.Popen([sys.executable, "-c", HOLD, images], stdout=subprocess.PIPE, text=True)
        held, *pids = map(int, holder.stdout.readline().split())
        time.sleep(wait_ms / 1000)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
        wait_until("the held process ends", lambda held=held: gone(held))
        assert all(stat_fields(pid)[2] == "S" for pid in pids)
        wait_until("nothing half made is left", lambda: all(whole(pid) for pid in descendants(os.getpid())))
        end_descendants(set())


def gone(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return (fields := stat_fields(pid)) is None or fields[2] == "Z"


def whole(pid: int) -> bool:
    """A root of a copy sleeps in pause(2); an init waits; what has ended is no harm."""
    fields = stat_fields(pid)
    return fields is None or fields[2] in "SZ"
