"""Every refusal is said clearly, and everything is as it was."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

import torpor
from kit import (
    Command,
    CommandResult,
    Library,
    Target,
    Targets,
    assert_same,
    diff,
    host_state,
    observe_settled,
    observe_tree,
    run_criu,
    run_torpor,
    wait_until,
)
from kit.files import slurp, slurp_text
from kit.host import stat_fields
from kit.images import changed
from kit.verbs import SOURCES
from torpor.engine import precopy
from torpor.remote import stub

VMA_VVAR = 0x1000

IDLE = 'int main(void) { ready(); wait_told("go"); pass(); }'


@pytest.fixture
def idle(start: Targets) -> Target:
    return start.c(IDLE)


@pytest.fixture
def dead(idle: Target, images: str) -> Target:
    """A target whose images are in ``images`` and that is gone."""
    Library().dump(idle.pid, images)
    idle.wait_gone()
    return idle


def refused(words: str, pid: int, images: str) -> torpor.TorporError:
    """The library refuses to dump, and so does the command, in the same words; no image is left."""
    with pytest.raises(torpor.TorporError, match=words) as caught:
        torpor.dump(pid, images)
    result = run_criu("dump", images, "-t", pid)
    assert result.status == 1, result
    assert caught.value.what in result.log or words in result.log, result
    left = [name for name in os.listdir(images) if name != "dump.log"]
    assert not left, left
    return caught.value


def test_dumping_itself(images: str) -> None:
    with pytest.raises(torpor.TorporError, match="itself"):
        torpor.dump(os.getpid(), images)
    assert os.listdir(images) == []


def test_dumping_an_ancestor(images: str) -> None:
    refused_by_library_in_child = f"""
import sys
sys.path.insert(0, {SOURCES!r})
import torpor, os
try:
    torpor.dump(os.getppid(), {images!r})
except torpor.TorporError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", refused_by_library_in_child],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "ancestor" in done.stdout, done


def test_dumping_init(images: str) -> None:
    with pytest.raises(torpor.TorporError, match="pid 1 is the init process"):
        torpor.dump(1, images)


def test_dumping_a_kernel_thread(images: str) -> None:
    kernel_thread = next((int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_kernel_thread(int(pid))), 0)
    assert kernel_thread, "run it in the first pid namespace"
    refused("kernel thread", kernel_thread, images)


def _is_kernel_thread(pid: int) -> bool:
    try:
        return bool(int(slurp_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[6]) & 0x00200000)
    except OSError:
        return False


def test_dumping_what_is_not_there(idle: Target, images: str) -> None:
    idle.end()
    idle.wait_gone()
    error = refused("no such process", idle.pid, images)
    assert isinstance(error, torpor.TaskGone)
    assert error.status == errno.ESRCH


def test_dumping_a_thread(start: Targets, images: str) -> None:
    target = start.c(
        "static void *idle(void *a) { for (;;) pause(); return a; }"
        " int main(void) { pthread_t t; pthread_create(&t, NULL, idle, NULL); ready();"
        ' wait_told("go"); pass(); }'
    )
    thread = max(int(tid) for tid in os.listdir(f"/proc/{target.pid}/task"))
    refused("thread", thread, images)
    target.go()


@pytest.mark.parametrize("pid", [0, -1, 1 << 30])
def test_dumping_no_pid_at_all(images: str, pid: int) -> None:
    with pytest.raises(torpor.TorporError):
        torpor.dump(pid, images)


def test_a_zombie(start: Targets, images: str) -> None:
    target = start.c("int main(void) { ready(); _exit(3); }", wait=False)
    wait_until("it is dead", lambda: target.state() == "Z")
    refused("ended", target.pid, images)


def test_everything_in_the_way_is_named_at_once(start: Targets, images: str) -> None:
    target = start.c(
        "#include <linux/perf_event.h>\n"
        "int main(void) {"
        " static unsigned ring[30];"
        " struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof(event),"
        "   .config = PERF_COUNT_SW_CPU_CLOCK};"
        " MUST(syscall(427, MUST(syscall(425, 4, ring)), 9, NULL, 0));"  # io_uring_setup, IORING_REGISTER_PERSONALITY
        " MUST(syscall(SYS_userfaultfd, O_CLOEXEC));"
        " MUST(syscall(SYS_perf_event_open, &event, 0, -1, -1, 0));"
        ' if (fork() == 0) { MUST(syscall(SYS_userfaultfd, 0)); tell("child", ""); for (;;) pause(); }'
        ' wait_told("child"); ready(); wait_told("go"); pass(); }'
    )
    before = observe_settled(target.pid)
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    causes = getattr(caught.value, "causes", [caught.value])
    text = str(caught.value)
    child = target.pids()[1]
    assert len(causes) >= 4, text
    assert f"task {target.pid}" in text and f"task {child}" in text
    assert "io_uring" in text
    assert [str(cause) for cause in torpor.check(target.pid)]
    assert not os.listdir(images)
    assert_same(before, observe_tree(target.pid))
    result = run_torpor("check", target.pid)
    assert result.status != 0 and "io_uring" in result.output, result
    target.go()


def test_segments_of_its_own(start: Targets, images: str) -> None:
    target = start.c(
        "#include <asm/ldt.h>\n"
        "int main(void) { struct user_desc entry = {.entry_number = 2, .base_addr = 0x1000, .limit = 9};"
        " MUST(syscall(SYS_modify_ldt, 1, &entry, sizeof(entry))); ready(); wait_told(\"go\");"
        ' char text[64]; CHECK_EQ(syscall(SYS_modify_ldt, 0, text, 64), 64); pass(); }'
    )
    refused("local descriptor table", target.pid, images)
    target.go()


def test_processes_that_share_their_memory(start: Targets, images: str) -> None:
    """As between vfork(2) and execve(2)."""
    target = start.c(
        "static int child(void *unused) { for (;;) usleep(1000); return 0; }"
        " int main(void) { static char stack[1 << 16] __attribute__((aligned(16)));"
        " MUST(clone(child, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL));"
        ' ready(); wait_told("go"); pass(); }'
    )
    refused("different processes that share their memory", target.pid, images)
    target.go()


UNSHARED = """
static void *thread(void *arg)
{
	MUST(unshare(WHAT));
	tell("thread", "");
	wait_told("go");
	return arg;
}

int main(void)
{
	pthread_t id;

	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	wait_told("thread");
	ready();
	wait_told("go");
	pthread_join(id, NULL);
	pass();
}
"""


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("CLONE_FILES", ["descriptor table"]), ("CLONE_FS", ["root and working directory"]),
        ("CLONE_NEWNS", ["root and working directory"]), ("CLONE_NEWNET", ["network namespace"]),
        ("CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP", ["host name namespace", "IPC namespace", "cgroup namespace"]),
    ],
)  # fmt: skip
def test_what_a_thread_has_for_itself_is_refused(start: Targets, images: str, what: str, names: list[str]) -> None:
    target = start.c(UNSHARED.replace("WHAT", what))
    (thread,) = (tid for tid in map(int, os.listdir(f"/proc/{target.pid}/task")) if tid != target.pid)
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    for name in names:
        assert re.search(rf"task {target.pid}: its thread {thread} .*{name} of its own", str(caught.value)), caught.value
    assert not os.listdir(images)
    target.go()


def test_a_terminal_of_somebody_else_needs_shell_job(start: Targets, images: str) -> None:
    """Not a session leader: the session's leader is outside of the tree."""
    target = start.command("sleep", "1000", session=False)
    wait_until("it is sleep", lambda: slurp_text(f"/proc/{target.pid}/comm") == "sleep\n")
    error = refused("shell.job", target.pid, images)
    assert "shell" in str(error)
    torpor.dump(target.pid, images, shell_job=True)
    target.wait_gone()
    assert torpor.restore(images, shell_job=True).pid == target.pid
    assert slurp_text(f"/proc/{target.pid}/comm") == "sleep\n"


def test_locks_need_to_be_asked_for(start: Targets, images: str) -> None:
    target = start.c(
        '#include <sys/file.h>\nint main(void) { MUST(flock(1, LOCK_EX)); ready(); wait_told("go"); pass(); }'
    )
    refused("file.locks", target.pid, images)
    target.go()


def test_a_ghost_may_be_too_large(start: Targets, images: str) -> None:
    target = start.c(
        'int main(void) { int fd = MUST(open("big", O_CREAT | O_RDWR, 0600));'
        ' char page[1 << 16]; for (int i = 0; i < 40; i++) MUST(write(fd, page, sizeof(page)));'
        ' MUST(unlink("big")); ready(); wait_told("go"); pass(); }'
    )  # fmt: skip
    refused("ghost", target.pid, images)
    target.go()


def test_a_folder_that_is_not_there_or_is_none(idle: Target, images: str) -> None:
    os.makedirs(f"{images}/place")
    with open(f"{images}/place/file", "w"):
        pass
    with pytest.raises(torpor.TorporError, match="file"):
        torpor.dump(idle.pid, f"{images}/place/file")
    idle.go()


def test_a_folder_with_an_older_snapshot(start: Targets, images: str) -> None:
    """The older one is replaced by the newer one, whole, or the dump is refused; never a mixture."""
    first = start.c(IDLE)
    second = start.c(
        'int main(void) { if (fork() == 0) for (;;) pause(); usleep(20000); ready(); wait_told("go"); pass(); }'
    )
    torpor.dump(second.pid, images)
    second.wait_gone()
    try:
        torpor.dump(first.pid, images, leave_running=True)
    except torpor.TorporError as error:
        assert "image" in str(error) or "snapshot" in str(error)
        assert torpor.restore(images).pid == second.pid
        second.go()
    else:
        first.end()
        first.wait_gone()
        assert torpor.restore(images).pid == first.pid
        first.go()


MUCH = """
int main(void)
{
	size_t size = 3 << 20;
	char *private = malloc(size), *deleted = malloc(size), *held = malloc(size);
	int file = open(kit_path("deleted"), O_RDWR | O_CREAT, 0600), memory = memfd_create("memory", 0);
	pid_t child;

	fill(private, size, 1);
	fill(deleted, size, 2);
	fill(held, size, 3);
	CHECK_EQ(write(file, deleted, size), size);
	CHECK_EQ(write(memory, held, size), size);
	CHECK_EQ(unlink(kit_path("deleted")), 0);
	child = fork();
	if (!child) {
		fill(private, size / 2, 4);
		tell("child", "");
		wait_told("go");
		_exit(!filled(private, size / 2, 4));
	}
	wait_told("child");
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(child, &memory, 0), child);
	CHECK_EQ(memory, 0);
	CHECK(filled(private, size, 1) && pread(file, held, size, 0) == (ssize_t)size && filled(held, size, 2));
	pass();
}
"""


@pytest.mark.parametrize("early", [True, False])
def test_a_full_disk(start: Targets, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    """Wherever in the dump of whatever kind of content the room is at an end."""
    for name in ("TREE_BYTES_MIN", "TASK_BYTES_MIN"):
        monkeypatch.setattr(precopy, name, 1)
    target = start.c(MUCH)
    small = target.path("small")
    os.mkdir(small)
    before = observe_settled(target.pid)
    places = set()
    for kib in range(4, 64 << 10, 780):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", small], check=True)
        try:
            torpor.dump(target.pid, small, leave_running=True, precopy=early, ghost_limit=4 << 20)
            break
        except torpor.KernelError as error:
            assert error.errno == errno.ENOSPC and error.hint == "the file system of the images directory is full"
            assert os.listdir(small) == []
            places.add(error.call)
        finally:
            subprocess.run(["umount", small], check=True)
        assert_same(before, observe_tree(target.pid), ("*/namespaces/*",))
    else:
        pytest.fail("64 MiB are not enough")
    assert {"write `pages-1.img`", "write `ghost-file-1.img`"} <= places
    target.go()


def test_without_privileges(idle: Target, images: str) -> None:
    os.chmod(images, 0o777)
    code = f"""
import os, sys
sys.path.insert(0, {SOURCES!r})
import torpor, torpor.engine.dump
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    torpor.dump({idle.pid}, {images!r})
except torpor.TorporError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert str(idle.pid) in done.stdout, done
    idle.go()


# ------------------------------------------------------------------------------------------ restore


def not_restored(words: str, images: str) -> torpor.TorporError:
    """A restore fails in these words and leaves nothing; the command says the same."""
    before = host_state(images)
    with pytest.raises(torpor.TorporError, match=words) as caught:
        torpor.restore(images)
    assert_same(before, host_state(images))
    result = run_criu("restore", images, "-d")
    assert result.status == 1, result
    assert "Error" in result.log, result
    assert "Traceback" not in result.log + result.output, result
    assert_same(before["processes"], host_state(images)["processes"])
    os.unlink(f"{images}/restore.log")
    return caught.value


def refused_beforehand(words: str, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restore is refused before it makes any process."""

    def launch(*_: object, **__: object) -> None:
        raise AssertionError("a process is made")

    with monkeypatch.context() as patched:
        patched.setattr(stub, "launch", launch)
        with pytest.raises(torpor.Unsupported, match=words):
            torpor.restore(images)


def test_a_pid_that_is_taken(start: Targets, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is created."""
    target = start.c(IDLE)
    torpor.dump(target.pid, images, leave_running=True)
    refused_beforehand(f"{target.pid} is in use", images, monkeypatch)
    error = not_restored(str(target.pid), images)
    assert "taken" in str(error) or "in use" in str(error) or "exists" in str(error), error
    target.go()


def test_a_pid_of_a_child_that_nobody_has_waited_for(dead: Target, images: str) -> None:
    """A restore waits for its parent, a moment; and it says so."""
    zombie = _process_with_pid(dead.pid)
    os.kill(zombie, signal.SIGKILL)
    wait_until("it has ended", lambda: _state(zombie) == "Z")
    not_restored(f"its parent {os.getpid()} has not waited for it", images)
    parent = threading.Timer(0.5, os.waitpid, (zombie, 0))
    parent.start()
    run_torpor("restore", images, "-d").must()
    parent.join()
    dead.go()


def _state(pid: int) -> str | None:
    fields = stat_fields(pid)
    return fields and fields[2]


def test_registers_that_this_cpu_does_not_have(dead: Target, images: str) -> None:
    with changed(images, f"core-{dead.pid}") as core:
        core.thread_info.fpregs.xsave.xstate_bv |= 1 << 62  # the last component, which no processor has yet
    not_restored("does not have: XSAVE component 62", images)


def test_the_vdso_of_another_kernel(dead: Target, images: str) -> None:
    with changed(images, f"mm-{dead.pid}") as mm:
        first = next(entry for entry in mm.vmas if entry.status & VMA_VVAR)
        first.start += 4096  # as on a kernel with fewer pages of data there
    not_restored("another vDSO", images)


def test_a_tid_that_is_taken(start: Targets, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is created."""
    target = start.c(
        "static void *idle(void *a) { for (;;) pause(); return a; }"
        " int main(void) { pthread_t t; pthread_create(&t, NULL, idle, NULL); ready();"
        ' wait_told("go"); pass(); }'
    )
    tid = max(int(name) for name in os.listdir(f"/proc/{target.pid}/task"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    squatter = _process_with_pid(tid)
    try:
        refused_beforehand(f"{tid} is in use", images, monkeypatch)
        not_restored(str(tid), images)
    finally:
        os.kill(squatter, signal.SIGKILL)
        os.waitpid(squatter, 0)
    assert torpor.restore(images).pid == target.pid
    target.go()


def _process_with_pid(wanted: int) -> int:
    """A sleeping child with this pid."""
    for _ in range(100):  # whoever forks in the same moment may get it
        with open("/proc/sys/kernel/ns_last_pid", "wb", buffering=0) as file:
            file.write(str(wanted - 1).encode())
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        if pid == wanted:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise AssertionError(f"process id {wanted} cannot be had")


def test_no_images_at_all(images: str) -> None:
    not_restored("inventory", images)


@pytest.mark.parametrize("way", ["missing", "empty", "cut", "garbage"])
def test_every_file_that_is_broken_is_named(dead: Target, images: str, way: str) -> None:
    """Whatever file is broken in whatever way, the error names it, and nothing is left."""
    whole = f"{images}.whole"
    shutil.copytree(images, whole)
    try:
        names = [name for name in sorted(os.listdir(images)) if name.endswith(".img")]
        assert len(names) >= 7
        for name in names:
            if name.startswith(("stats", "cgroup", "seccomp")):
                continue  # nothing in there is needed
            path = f"{images}/{name}"
            content = slurp(path)
            os.unlink(path)
            if way != "missing":
                with open(path, "wb") as file:
                    file.write(_broken(content, way))
            with pytest.raises(torpor.TorporError) as caught:
                torpor.restore(images)
            text = str(caught.value)
            known_by = (name, name.removesuffix(".img"), name.split("-")[0])
            assert any(word in text for word in known_by), f"{name} {way}: {text}"
            shutil.copy(f"{whole}/{name}", path)
        assert torpor.restore(images).pid == dead.pid
        dead.go()
    finally:
        shutil.rmtree(whole)


def _broken(content: bytes, way: str) -> bytes:
    if way == "cut":
        return content[: len(content) - max(1, min(5000, len(content) // 2))]
    return b"" if way == "empty" else bytes(byte ^ 0x5A for byte in content)


def test_restoring_twice_at_the_same_time(dead: Target, images: str) -> None:
    assert torpor.restore(images).pid == dead.pid
    with pytest.raises(torpor.TorporError, match=str(dead.pid)):
        torpor.restore(images)
    dead.go()


def test_restoring_ten_times_one_after_the_other(dead: Target, images: str) -> None:
    state = host_state(images)
    for _ in range(10):
        assert torpor.restore(images).pid == dead.pid
        assert dead.alive()
        dead.end()
        dead.wait_gone()
        assert not diff(state, host_state(images))
    assert torpor.restore(images).pid == dead.pid
    dead.go()


def test_the_library_leaves_nothing_behind(start: Targets, images: str) -> None:
    """Descriptors, mappings of this process, children, signal handlers: as they were."""
    target = start.c(IDLE)
    torpor.dump(target.pid, images, leave_running=True)  # everything is imported now
    before = host_state()
    torpor.dump(target.pid, images)
    target.wait_gone()
    torpor.restore(images)
    assert_same(before, host_state())
    target.go()


def test_unknown_options_are_refused(idle: Target, images: str) -> None:
    with pytest.raises(torpor.UsageError, match="leave_runing"):
        torpor.dump(idle.pid, images, leave_runing=True)
    result = run_criu("dump", images, "-t", idle.pid, "--leave-runing")
    assert result.status == 1, result
    idle.go()


def test_what_the_command_says_when_it_is_done(idle: Target, images: str) -> None:
    result: CommandResult = run_criu("dump", images, "-t", idle.pid)
    assert result.status == 0 and result.output == "", result
    assert "Dumping finished successfully" in result.log, result
    idle.wait_gone()
    Command().restore(images)
    assert "Restore finished successfully" in slurp_text(f"{images}/restore.log")
    idle.go()
