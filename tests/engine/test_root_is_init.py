"""Trees whose root is process 1 of its pid namespace, as that of a container: each copy's own root is its init."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

import torpor
from kit import Target, Targets, assert_same, compile_c, diff, host_state, observe_tree, run_torpor
from kit.apart import AS_INIT, inside
from kit.files import slurp_text
from kit.host import descendants
from torpor.linux import netns

WITH_PROC = (*AS_INIT, "--mount-proc")
#: The number that was given last is kept; whoever has process 1 as parent comes to it; and no signal that it does not
#: handle reaches it from within.
INIT = """
int main(int argc, char **argv)
{
	int child, last, next, status, ends[2], orphans = 0, found = 0;
	char self[16] = "";

	CHECK_EQ(getpid(), 1);
	CHECK_EQ(setsid(), 1);
	MUST(pipe(ends));
	if ((child = MUST(fork())) == 0) {
		CHECK_EQ(read(ends[0], self, 1), 1);
		if (MUST(fork()) == 0) {
			while (getppid() != 1)
				usleep(1000);
			_exit(5);
		}
		_exit(getpid() == 2 && getppid() == 1 ? 4 : 9);
	}
	for (int i = 0; i < 7; i++) {
		if ((last = MUST(fork())) == 0)
			_exit(0);
		CHECK_EQ(waitpid(last, &status, 0), last);
	}
	ready();
	wait_told("go");
	CHECK_EQ(getpid(), 1);
	CHECK_EQ(getppid(), 0);
	CHECK_EQ(getsid(0), 1);
	CHECK_EQ(getpgrp(), 1);
	if ((next = MUST(fork())) == 0)
		_exit(0);
	CHECK_EQ(next, last + 1);
	CHECK_EQ(waitpid(next, &status, 0), next);
	MUST(kill(1, SIGTERM));
	if (argc > 1) {
		MUST(readlink("/proc/self", self, sizeof self - 1));
		CHECK(!strcmp(self, "1"));
	}
	MUST(write(ends[1], "x", 1));
	while (waitpid(-1, &status, 0) > 0) {
		found++;
		orphans += WEXITSTATUS(status) == 5;
		CHECK(WEXITSTATUS(status) == 5 || WEXITSTATUS(status) == 4);
	}
	CHECK_EQ(found, 2);
	CHECK_EQ(orphans, 1);
	pass();
}
"""


def numbers(pid: int) -> list[int]:
    line = next(line for line in slurp_text(f"/proc/{pid}/status").splitlines() if line.startswith("NSpid:"))
    return [int(word) for word in line.split()[1:]]


def own_proc(pid: int) -> bool:
    """Is its /proc another one than ours?"""
    return os.stat(f"/proc/{pid}/root/proc").st_dev != os.stat("/proc").st_dev


def dumped(target: Target, images: str, name: str) -> str:
    path = os.path.join(images, name)
    os.mkdir(path)
    target.pids()
    torpor.dump(target.pid, path)
    target.wait_gone()
    return path


@pytest.fixture(params=[AS_INIT, WITH_PROC], ids=["our-proc", "own-proc"])
def snapshot(request: pytest.FixtureRequest, start: Targets, images: str, ends_all: None) -> tuple[Target, str]:
    """(the program, the folder of its snapshot)."""
    args = ("proc",) if request.param == WITH_PROC else ()
    target, _ = inside(start, compile_c(INIT), *request.param, args=args)
    before = observe_tree(target.pid)
    running = os.path.join(images, "running")
    os.mkdir(running)
    torpor.dump(target.pid, running, leave_running=True)
    assert_same(before, observe_tree(target.pid))
    return target, dumped(target, images, "first")


def is_content(target: Target, waits_for: int) -> None:
    """Let a copy go on and wait for its end."""
    target.tell("go")
    _, status = os.waitpid(waits_for, 0)
    assert (os.waitstatus_to_exitcode(status), target.read("result")) == (0, "pass\n"), target.read("stdout")
    os.unlink(target.path("go"))
    os.unlink(target.path("result"))


WAYS: dict[str, Callable[[str], int]] = {
    "restored": lambda images: int(torpor.restore(images).pid),
    "own-pids": lambda images: int(torpor.restore(images, own_pids=True).pid),
    "cloned": lambda images: cloned(images),
}


def cloned(images: str) -> int:
    with torpor.template(images) as template:
        return int(template.clone().pid)


def test_it_is_woken_in_every_way(snapshot: tuple[Target, str], images: str) -> None:
    """And what has been woken is dumped and woken again."""
    target, first = snapshot
    own = "proc" in target.argv
    for name, wake in WAYS.items():
        pid = wake(first)
        assert numbers(pid) == [pid, 1]
        assert (pid == target.pid) == (name == "restored")
        assert own_proc(pid) == (own or name != "restored")
        copy = Target.__new__(Target)
        copy.folder, copy.argv, copy.pid, copy.seen = target.folder, target.argv, pid, {pid}
        again = dumped(copy, images, f"again-{name}")
        for second, wake_again in WAYS.items():
            pid = wake_again(again)
            assert numbers(pid) == [pid, 1]
            assert own_proc(pid) == (own or (name, second) != ("restored", "restored"))
            is_content(target, pid)


def test_many_at_once(snapshot: tuple[Target, str]) -> None:
    target, images = snapshot
    with torpor.template(images) as template:
        pids = [torpor.restore(images, own_pids=True).waits_for for _ in range(2)]
        pids += [template.clone().waits_for for _ in range(5)]
        assert len({os.readlink(f"/proc/{pid}/ns/pid") for pid in pids}) == 7
        for pid in pids:
            assert [numbers(one)[1:] for one in (pid, *descendants(pid))] == [[1], [2]]
    for pid in pids[:-1]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    is_content(target, pids[-1])


def test_what_is_asked_of_one_copy(snapshot: tuple[Target, str]) -> None:
    target, images = snapshot
    with torpor.template(images) as template:
        with pytest.raises(torpor.Unsupported, match="cannot have a fresh pid: it is process 1 of its pid namespace"):
            template.clone(fresh_pid=True)
        for _ in range(2):
            copy = template.clone(hostname="fred", net="new", cwd="/tmp", overlay=[target.folder])
            enter = ["nsenter", "-t", str(copy.pid), "--uts", "--mount"]
            assert subprocess.check_output([*enter, "hostname"], text=True) == "fred\n"
            assert os.readlink(f"/proc/{copy.pid}/cwd") == "/tmp"
            fd = netns.own()
            assert os.readlink(f"/proc/{copy.pid}/ns/net") != os.readlink(f"/proc/self/fd/{fd}")
            os.close(fd)
            assert own_proc(copy.pid)
            subprocess.run([*enter, "touch", target.path("theirs")], check=True)
            assert not os.path.exists(target.path("theirs"))
            copy.kill()
            assert copy.wait() == 128 + signal.SIGKILL
        copy = template.clone()
        is_content(target, copy.waits_for)


def test_the_command_waits_for_it(start: Targets, images: str, ends_all: None) -> None:
    source = 'int main(void) { setsid(); ready(); wait_told("go"); exit(getpid() == 1 ? 42 : 1); }'
    target, _ = inside(start, compile_c(source), *WITH_PROC)
    first = dumped(target, images, "first")
    target.tell("go")
    assert run_torpor("restore", first, "--own-pids").status == 42
    name = f"test-{os.getpid()}"
    run_torpor("template", "start", first, "--name", name).must()
    try:
        assert run_torpor("clone", name, "--wait").status == 42
    finally:
        run_torpor("template", "stop", name).must()


MOUNTED = """
import os, subprocess, sys, time, torpor
propagation, program, folder, images = sys.argv[1:]
os.chdir(folder)
command = ["unshare", "--pid", "--fork", "--mount-proc", "--propagation", propagation, program]
around = subprocess.Popen(command, env={"KIT_DIR": folder})
while not os.path.exists("ready"):
    time.sleep(0.01)
[pid] = open(f"/proc/{around.pid}/task/{around.pid}/children").read().split()

def show(pid):
    lines = [line.split() for line in open(f"/proc/{pid}/mountinfo")]
    print(next([word for word in line[6:] if ":" in word] for line in lines if line[4] == "/"))

show(pid)
torpor.dump(int(pid), images)
around.wait()
with torpor.template(images) as template:
    for woken in (torpor.restore(images).pid, torpor.restore(images, own_pids=True).pid, template.clone().pid):
        show(woken)
        os.kill(woken, 9)
"""


@pytest.mark.parametrize(("propagation", "tag"), [("private", ""), ("slave", "master:")])
def test_how_mounts_propagate(start: Targets, images: str, ends_all: None, propagation: str, tag: str) -> None:
    """Where the mounts around it are shared."""
    program = compile_c("int main(void) { setsid(); ready(); for (;;) pause(); }")
    script = [sys.executable, "-c", MOUNTED, propagation, program, start.folder, images]
    around = ["unshare", "--mount", "--propagation", "shared", *script]
    with open(os.path.join(start.folder, "shown"), "w+") as shown:
        subprocess.run(around, check=True, timeout=60, stdout=shown)
    lines = slurp_text(shown.name).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"['{tag}") if tag else line == "[]" for line in lines), lines


def test_mounts_that_a_copy_would_not_have_are_refused(start: Targets, images: str) -> None:
    source = 'int main(void) { setsid(); ready(); wait_told("go"); pass(); }'
    target, _ = inside(start, compile_c(source), *WITH_PROC, "--propagation", "shared")
    before = observe_tree(target.pid)
    with pytest.raises(torpor.Unsupported, match="mounts propagate to its mount namespace in a way of its own"):
        torpor.dump(target.pid, images)
    mount = ["nsenter", "-t", str(target.pid), "--mount", "mount"]
    subprocess.run([*mount, "--make-rprivate", "/"], check=True)
    subprocess.run([*mount, "-o", "remount,bind,nosuid", "/"], check=True)
    with pytest.raises(torpor.Unsupported, match=r"/ .* is mounted in its mount namespace, and not so here"):
        torpor.dump(target.pid, images)
    subprocess.run([*mount, "-o", "remount,bind,suid", "/"], check=True)
    assert not diff(before, observe_tree(target.pid))
    torpor.dump(target.pid, images, leave_running=True)
    target.go()


def test_nothing_is_left_of_copies_that_cannot_be_made(snapshot: tuple[Target, str]) -> None:
    """The first calls after its birth fail: those that put it into control groups."""
    _, images = snapshot
    with torpor.template(images) as template:
        before = host_state()
        for _ in range(2):
            with pytest.raises(torpor.KernelError, match="control group"):
                template.clone(cgroup=("/nowhere",))
        assert not diff(before, host_state())
