"""Action scripts and callbacks: which moments there are, what is told at each, and what a failure does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

import torpor
from kit import CommandResult, Target, Targets, descendants, run_torpor
from kit.files import slurp_text
from kit.verbs import SOURCES
from torpor.engine.hooks import MERELY_LOGGED, Action, Hooks
from torpor.options import Options

PROGRAM = 'int main(void) { ready(); wait_told("go"); pass(); }'
DUMP = ["pre-dump", "post-dump"]
RESTORE = ["pre-restore", "post-restore", "pre-resume", "post-resume"]
SCRIPT = """#!/bin/sh
state=$(sed -n 's/^State:.\\(.\\).*/\\1/p' "/proc/${CRTOOLS_INIT_PID:-x}/status" 2>/dev/null)
echo "$CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID:--} ${state:--} $(ls "$CRTOOLS_IMAGE_DIR/" | grep -c inventory.img)" >> "$0.log"
echo "said by the script of $CRTOOLS_SCRIPT_ACTION"
[ "$CRTOOLS_SCRIPT_ACTION" != "$(cat "$0.fails" 2>/dev/null)" ] || exit 7
"""


class Script:
    """An action script that notes: name, pid, state of the root task, is there an inventory?"""

    def __init__(self, folder: str, name: str = "action") -> None:
        self.path = os.path.join(folder, name)
        with open(self.path, "w") as file:
            file.write(SCRIPT)
        os.chmod(self.path, 0o755)

    def fail_at(self, name: str) -> None:
        with open(f"{self.path}.fails", "w") as file:
            file.write(name)

    def lines(self) -> list[str]:
        """What it has noted, and that is forgotten."""
        try:
            noted = slurp_text(f"{self.path}.log").replace(" R ", " S ").splitlines()  # it naps and looks
        except FileNotFoundError:
            return []
        os.unlink(f"{self.path}.log")
        return noted

    def names(self) -> list[str]:
        return [line.split()[0] for line in self.lines()]


@pytest.fixture
def target(start: Targets) -> Target:
    return start.c(PROGRAM)


@pytest.fixture
def script(target: Target) -> Script:
    return Script(target.folder)


def test_every_moment_in_order_with_what_is_true_then(
    target: Target, script: Script, images: str, criu_cmd: Callable[..., CommandResult]
) -> None:
    done = criu_cmd("dump", images, "-t", target.pid, "--action-script", script.path).must()
    assert script.lines() == [f"pre-dump {target.pid} S 0", f"post-dump {target.pid} t 1"]
    assert "said by the script of post-dump\n" in done.log
    target.wait_gone()
    done = criu_cmd("restore", images, "-d", "--action-script", script.path).must()
    noted = script.lines()
    assert noted[:3] == ["pre-restore - - 1", f"post-restore {target.pid} t 1", f"pre-resume {target.pid} t 1"]
    assert [line.split()[:2] for line in noted[3:]] == [["post-resume", str(target.pid)]]
    assert noted[3].split()[2] == "S"
    assert "said by the script of post-resume\n" in done.log
    target.go()


def test_callbacks_are_told_the_same(target: Target, images: str) -> None:
    told: list[tuple[object, ...]] = []

    def notify(action: Action) -> None:
        state = target.state()
        state = "S" if state == "R" else state
        told.append((action.name, action.pid, action.images_dir, action.fd, state))

    torpor.dump(target.pid, images, notify=notify)
    target.wait_gone()
    torpor.restore(images, notify=notify)
    pid = target.pid
    assert told[:-1] == [
        ("pre-dump", pid, images, -1, "S"), ("post-dump", pid, images, -1, "t"),
        ("pre-restore", 0, images, -1, None), ("post-restore", pid, images, -1, "t"),
        ("pre-resume", pid, images, -1, "t"),
    ]  # fmt: skip
    assert told[-1][:2] == ("post-resume", pid)
    target.go()


@pytest.mark.parametrize("name", DUMP)
def test_a_dump_whose_script_fails(
    target: Target, script: Script, images: str, name: str, criu_cmd: Callable[..., CommandResult]
) -> None:
    script.fail_at(name)
    done = criu_cmd("dump", images, "-t", target.pid, "--action-script", script.path)
    # As CRIU has it: what the caller learns by 255 is that the images are complete, and the tasks run on.
    assert done.status == (255 if name == "post-dump" else 1)
    assert f"action {name}: `{script.path}`: exit status 7" in done.log
    assert os.path.exists(os.path.join(images, "inventory.img")) is (name == "post-dump")
    assert script.names() == DUMP[: DUMP.index(name) + 1]
    target.go()


@pytest.mark.parametrize("name", RESTORE)
def test_a_restore_whose_script_fails(target: Target, script: Script, images: str, name: str) -> None:
    torpor.dump(target.pid, images)
    target.wait_gone()
    script.fail_at(name)
    before = descendants(os.getpid())
    late = name in MERELY_LOGGED
    done = run_torpor("restore", images, "-d", "--action-script", script.path, "--pidfile", f"{images}/pid")
    assert done.status == (0 if late else 1), done
    assert script.names() == (RESTORE if late else RESTORE[: RESTORE.index(name) + 1])
    if late:
        target.go()
        return
    assert f"restore: action {name}: `{script.path}`: exit status 7" in done.output
    assert descendants(os.getpid()) == before
    assert not os.path.exists(f"{images}/pid")
    torpor.restore(images)
    target.go()


NAMESPACES = ["setup-namespaces", "post-setup-namespaces"]


def test_namespaces_are_there_before_the_tree(target: Target, script: Script, images: str) -> None:
    """The init of the tree is in them, stopped and alone, when the scripts are told of its number."""
    torpor.dump(target.pid, images)
    target.wait_gone()
    told: list[tuple[str, object]] = []

    def notify(action: Action) -> None:
        seen: object = action.pid
        if action.name in NAMESPACES:
            ours, theirs = (os.stat(f"/proc/{who}/ns/pid").st_ino for who in ("self", action.pid))
            with open(f"/proc/{action.pid}/root/proc/1/status") as status:
                seen = [ours != theirs, action.pid, "\nPid:\t1\n" in status.read(), descendants(action.pid)]
        told.append((action.name, seen))

    tree = torpor.restore(images, own_pids=True, notify=notify, action_script=[script.path])
    init = [True, tree.waits_for, True, []]
    assert told == [
        ("pre-restore", 0), *((name, init) for name in NAMESPACES), *((name, tree.pid) for name in RESTORE[1:])
    ]  # fmt: skip
    noted = script.lines()
    assert noted[1:3] == [f"{name} {tree.waits_for} t 1" for name in NAMESPACES]
    target.tell("go")
    assert os.waitpid(tree.waits_for, 0)[1] == 0


@pytest.mark.parametrize("name", [*NAMESPACES, "post-restore"])
def test_a_restore_into_namespaces_whose_script_fails(target: Target, script: Script, images: str, name: str) -> None:
    torpor.dump(target.pid, images)
    target.wait_gone()
    script.fail_at(name)
    before = descendants(os.getpid())
    for _ in range(3):
        with pytest.raises(torpor.ActionFailed, match=f"action {name}"):
            torpor.restore(images, own_pids=True, action_script=[script.path])
        assert descendants(os.getpid()) == before
    assert name in script.names()


def test_a_restore_that_fails_late_leaves_no_stopped_process_either(start: Targets, images: str) -> None:
    """Stopped ones were let go a moment before, for their parents to know of their stop."""
    target = start.c(
        "int main(void) { int child = fork(), status; if (!child) for (;;) pause(); MUST(kill(child, SIGSTOP));"
        " MUST(waitpid(child, &status, WUNTRACED)); ready(); wait_told(\"go\"); MUST(kill(child, SIGKILL));"
        " CHECK_EQ(waitpid(child, &status, 0), child); pass(); }"
    )
    pids = target.pids()
    torpor.dump(target.pid, images)
    target.wait_gone()
    with pytest.raises(torpor.ActionFailed):
        torpor.restore(images, action_script=["/bin/false"])
    script = os.path.join(target.folder, "late")
    with open(script, "w") as file:
        file.write('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
    os.chmod(script, 0o755)
    with pytest.raises(torpor.ActionFailed, match="post-restore"):
        torpor.restore(images, action_script=[script])
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    torpor.restore(images)
    target.go()


@pytest.mark.parametrize("name", [*DUMP, *RESTORE])
def test_a_callback_that_raises(target: Target, images: str, name: str) -> None:
    def notify(action: Action) -> None:
        if action.name == name:
            raise ZeroDivisionError("by the test")

    if name in DUMP:
        with pytest.raises(torpor.ActionFailed, match=f"dump: action {name}: the callback failed: by the test"):
            torpor.dump(target.pid, images, notify=notify)
        target.go()
        return
    torpor.dump(target.pid, images)
    target.wait_gone()
    if name in MERELY_LOGGED:
        torpor.restore(images, notify=notify)
    else:
        with pytest.raises(torpor.ActionFailed, match=f"restore: action {name}: the callback failed: by the test"):
            torpor.restore(images, notify=notify)
        assert target.state() is None
        torpor.restore(images)
    target.go()


def test_all_scripts_run_the_last_one_first(target: Target, script: Script, images: str) -> None:
    other = Script(target.folder, "other")
    order = os.path.join(target.folder, "order")
    for one in (script, other):
        with open(one.path, "a") as file:
            file.write(f"echo {os.path.basename(one.path)} >> {order}\n")
    other.fail_at("pre-dump")
    done = run_torpor("dump", target.pid, "-D", images, "--action-script", script.path, "--action-script", other.path)
    assert done.status == 1
    assert (script.names(), other.names()) == (["pre-dump"], ["pre-dump"])
    assert slurp_text(order) == "action\n", "the one that failed had come first, and the other was still run"
    target.go()


def test_a_script_that_cannot_be_run_is_found_before_anything(target: Target, script: Script, images: str) -> None:
    os.chmod(script.path, 0o644)
    for path, why in ((script.path, "not executable"), ("/no/such/script", "there is none")):
        with pytest.raises(torpor.UsageError, match=f"action script `{path}`.*{why}"):
            torpor.dump(target.pid, images, action_script=[path])
        assert target.alive()
    target.go()


def test_a_script_without_a_first_line_is_for_the_shell_and_gets_nothing_of_ours(target: Target, images: str) -> None:
    path = os.path.join(target.folder, "plain")
    with open(path, "w") as file:
        file.write('echo "$CRTOOLS_SCRIPT_ACTION" $(grep SigBlk /proc/$$/status) $(ls -l /proc/$$/fd) >> "$0.log"\n')
    os.chmod(path, 0o755)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    ours = os.readlink(f"/proc/self/fd/{writer}")
    torpor.dump(target.pid, images, action_script=[path], leave_running=True)
    os.close(reader), os.close(writer)
    first = slurp_text(f"{path}.log").splitlines()[0].split()
    assert first[:2] == ["pre-dump", "SigBlk:"]
    assert int(first[2], 16) == 0
    assert ours not in first
    target.go()


def test_a_script_that_dies_of_a_signal(target: Target, images: str) -> None:
    path = os.path.join(target.folder, "dies")
    with open(path, "w") as file:
        file.write("#!/bin/sh\nkill -9 $$\n")
    os.chmod(path, 0o755)
    with pytest.raises(torpor.ActionFailed, match="it died of signal 9"):
        torpor.dump(target.pid, images, action_script=[path])
    target.go()


def test_a_dump_that_is_interrupted_in_a_script(target: Target, images: str) -> None:
    path = os.path.join(target.folder, "interrupts")
    with open(path, "w") as file:
        file.write('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = pre-dump ] || { kill -TERM $PPID; exec sleep 100; }\n')
    os.chmod(path, 0o755)
    done = run_torpor("dump", target.pid, "-D", images, "--action-script", path, timeout=30)
    assert done.status == -signal.SIGTERM
    target.go()


@pytest.mark.parametrize("moment", ["pre-restore", "post-restore"])
def test_a_restore_that_is_interrupted_in_a_script(target: Target, images: str, moment: str) -> None:
    torpor.dump(target.pid, images)
    target.wait_gone()
    path = os.path.join(target.folder, "interrupts")
    with open(path, "w") as file:
        file.write(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != {moment} ] || {{ kill -TERM $PPID; exec sleep 100; }}\n')
    os.chmod(path, 0o755)
    done = run_torpor("restore", images, "--action-script", path, timeout=30)
    assert done.status == -signal.SIGTERM
    assert target.state() is None
    torpor.restore(images)
    target.go()


@pytest.mark.parametrize("moment", ["pre-resume", "post-resume"])
def test_a_signal_that_comes_as_the_tasks_are_let_go_is_passed_on(start: Targets, images: str, moment: str) -> None:
    target = start.c(
        "static void end(int n) { _exit(9); }"
        " int main(void) { signal(SIGTERM, end); ready(); for (;;) pause(); }"
    )
    torpor.dump(target.pid, images)
    target.wait_gone()
    path = os.path.join(target.folder, "signals")
    with open(path, "w") as file:
        file.write(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != {moment} ] || kill -TERM $PPID\n')
    os.chmod(path, 0o755)
    done = run_torpor("restore", images, "--action-script", path, timeout=30)
    assert done.status == 9, done
    assert target.state() is None


def test_a_signal_for_criu_ends_it_and_the_tree_runs_on(target: Target, images: str) -> None:
    torpor.dump(target.pid, images)
    target.wait_gone()
    path = os.path.join(target.folder, "signals")
    with open(path, "w") as file:
        file.write('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != pre-resume ] || kill -TERM $PPID\n')
    os.chmod(path, 0o755)
    argv = [sys.executable, "-m", "torpor", "criu", "restore", "-D", images, "--action-script", path]
    env = {**os.environ, "PYTHONPATH": SOURCES}
    done = subprocess.run(argv, env=env, timeout=30, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGTERM
    target.go()


def test_the_tree_has_its_files_to_itself_when_it_is_said_to_run(start: Targets, images: str) -> None:
    target = start.c(
        "int main(void) { int ends[2]; char byte; MUST(pipe(ends)); ready(); wait_told(\"go\"); MUST(close(ends[1]));"
        " CHECK_EQ(read(ends[0], &byte, 1), 0); pass(); }"
    )
    torpor.dump(target.pid, images)
    target.wait_gone()

    def notify(action: Action) -> None:
        if action.name == "post-resume":
            target.go()  # the end of the pipe is seen: nobody else has it

    torpor.restore(images, notify=notify)
    assert target.read("result") == "pass\n"


def test_an_interruption_after_the_tasks_run_takes_nothing_back(target: Target, images: str) -> None:
    torpor.dump(target.pid, images)
    target.wait_gone()

    def notify(action: Action) -> None:
        if action.name == "post-resume":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torpor.restore(images, notify=notify, pidfile="pid")
    assert slurp_text(os.path.join(images, "pid")) == str(target.pid)
    target.go()


def test_what_only_callbacks_can_take_is_no_script_s_business(target: Target, script: Script, images: str) -> None:
    fd = os.open(images, os.O_RDONLY)
    taken: list[int] = []
    hooks = Hooks(Options(action_script=[script.path], notify=lambda action: taken.append(action.fd)), fd)
    hooks.run("orphan-pts-master", 42, fd=fd)
    hooks.run("query-ext-files", 42)
    assert taken == [fd, -1]
    assert script.lines() == []
    assert Hooks(Options(notify=lambda action: [1, 2]), fd).run("query-ext-files") == [1, 2]
    os.close(fd)
