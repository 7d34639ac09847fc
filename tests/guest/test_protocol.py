"""The guest protocol as docs/guest-protocol.md has it, spoken by others than our own Python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest

import torpor
from kit import Library, Target, Targets, compile_c, run_torpor, wait_until
from kit.files import slurp, slurp_text
from kit.verbs import ROOT, SOURCES

from .conftest import Copies
from .test_callbacks import page_of

Take = Callable[..., Copies]
EXAMPLES = os.path.join(ROOT, "examples")


def started(start: Targets, name: str) -> Target:
    """One of the examples, when it has written that it has started."""
    path = os.path.join(EXAMPLES, name)
    env = {"PYTHONPATH": SOURCES}
    if name.endswith(".c"):
        target = start.command(compile_c(slurp_text(path), header=False), "log")
    elif name.endswith(".py"):
        target = start.command(sys.executable, path, "log", env=env)
    else:
        if not shutil.which("node"):
            pytest.skip("needs node on PATH")
        target = start.command(sys.executable, "-m", "torpor", "guest", "node", path, "log", env=env)
    wait_until("it has started", lambda: "start\n" in target.read("log"), timeout=30)
    return target


@pytest.mark.parametrize("name", ["guest.c", "guest.mjs", "guest_python.py"])
def test_examples(start: Targets, copies: Take, images: str, name: str) -> None:
    target = started(start, name)
    if name.endswith(".mjs"):
        wait_until("it has asked for its signal", lambda: page_of(target.pid)[44] == signal.SIGUSR2)
    first = os.path.join(images, "first")
    os.mkdir(first)
    Library().dump(target.pid, first, leave_running=True)
    wait_until("it goes on", lambda: "resumed\n" in target.read("log"))
    woken = copies(target)
    secrets = []
    for number in range(3):
        woken.wake(argument=b"word%d" % number)
        wait_until("it is awake", lambda n=number: f"word{n}" in target.read("log"))
        found = re.search(rf"restored (\d+) word{number} ([0-9a-f]{{16}})\n", target.read("log"))
        assert found and found[1] == "2"
        secrets.append(found[2])
    assert len(set(secrets)) == 3
    assert target.read("log").startswith("start\nprepare\nresumed\nprepare\nrestored")
    if name == "guest.c":
        wait_until("the event", lambda: "event 1\n" in target.read("log"))


PAGE = """
#include <sys/eventfd.h>
#include <sys/file.h>
static volatile unsigned *words;
static int page_fd, event_fd;
static unsigned make_page(unsigned number, int pid)
{
	page_fd = MUST(memfd_create("torpor-guest", 0));
	event_fd = MUST(eventfd(0, EFD_NONBLOCK));
	MUST(ftruncate(page_fd, 4096));
	words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, page_fd, 0);
	words[0] = words[1] = 1;
	words[11] = number;
	words[12] = event_fd;
	words[13] = pid;
	memcpy((void *)(words + 2), "torpor guest", 12);
	return words[0];
}
"""

def test_its_handler_runs_before_the_program(start: Targets, images: str) -> None:
    """It spins over the word, and would see it change if a single round came before the handler."""
    source = PAGE + """
	static volatile unsigned long rounds, rounds_at_wake;
	static void on_wake(int number) { rounds_at_wake = rounds; }
	int main(void)
	{
		unsigned long seen = 0;
		signal(SIGUSR2, on_wake);
		make_page(SIGUSR2, getpid());
		ready();
		while (words[0] == 1)
			seen = ++rounds;
		wait_told("go");
		CHECK(rounds_at_wake != 0);
		/* The round under way may be finished, and no other is begun. */
		CHECK(seen - rounds_at_wake <= 1);
		CHECK_EQ(words[10], 6);
		pass();
	}
	"""
    target = start.c(source)
    torpor.dump(target.pid, images, guest=False)
    target.wait_gone()
    Library().restore(images)
    target.go()


def test_its_handler_runs_before_those_of_pending_signals(start: Targets, images: str) -> None:
    source = PAGE + """
	static volatile int order;
	static void on_wake(int number) { order = order * 10 + 1; }
	static void on_usr1(int number) { order = order * 10 + 2; }
	int main(void)
	{
		signal(SIGRTMIN + 3, on_wake);
		signal(SIGUSR1, on_usr1);
		make_page(SIGRTMIN + 3, getpid());
		ready();
		wait_told("go");
		CHECK_EQ(order, 12);
		pass();
	}
	"""
    target = start.c(source)
    os.kill(target.pid, signal.SIGSTOP)
    wait_until("stopped", lambda: target.state() == "T")
    os.kill(target.pid, signal.SIGUSR1)  # pending, and not blocked
    torpor.dump(target.pid, images)
    target.wait_gone()
    Library().restore(images)
    wait_until("stopped again", lambda: target.state() == "T")
    os.kill(target.pid, signal.SIGCONT)
    target.go()


def test_a_signal_that_would_kill_is_not_sent(start: Targets, copies: Take, images: str) -> None:
    source = PAGE + 'int main(void) { make_page(SIGUSR2, getpid()); ready(); wait_told("go"); pass(); }'
    target = start.c(source)
    with pytest.raises(torpor.Unsupported, match="signal 12, by which it wants to be told, would end it"):
        torpor.dump(target.pid, images)
    assert target.alive()
    woken = copies(target, guest=False)
    woken.wake()
    target.go()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("words[1] = 7", "version 7"),
        ("words[10] = 99", "state: 99"),
        ("words[11] = 65", "signal: 65"),
        ("words[17] = 5000", "argument: 5000"),
        ("words[18] = 0x80000000", "text: 2147483648"),
        ("words[13] = 0x80000001", "pid: -2147483647"),
    ],
)
def test_a_damaged_page(start: Targets, images: str, what: str, said: str) -> None:
    source = PAGE + f'int main(void) {{ make_page(0, getpid()); {what}; ready(); wait_told("go"); pass(); }}'
    target = start.c(source)
    with pytest.raises(torpor.Unsupported, match=said):
        torpor.dump(target.pid, images)
    assert not os.listdir(images)
    torpor.dump(target.pid, images, guest=False)
    target.wait_gone()
    Library().restore(images)  # it is nobody's business but its own
    target.go()


def test_a_file_that_only_has_the_name(start: Targets, copies: Take, images: str) -> None:
    source = """
	int main(void)
	{
		int fd = MUST(memfd_create("torpor-guest", 0)), small = MUST(memfd_create("torpor-guest", 0));
		char text[4096];
		fill(text, 4096, 3);
		MUST(write(fd, text, 4096));
		MUST(write(small, "torpor guest", 12));
		ready();
		wait_told("go");
		MUST(pread(fd, text, 4096, 0));
		CHECK(filled(text, 4096, 3));
		pass();
	}
	"""
    target = start.c(source)
    copies(target).wake()
    target.go()


def test_the_wrong_descriptor_for_an_eventfd(start: Targets, copies: Take) -> None:
    source = PAGE + """
	int main(void) {
		int out[2];
		MUST(pipe(out));
		make_page(0, getpid());
		words[12] = out[1];
		ready();
		wait_told("go");
		CHECK_EQ(words[0], 2);
		MUST(fcntl(out[0], F_SETFL, O_NONBLOCK));
		CHECK_EQ(read(out[0], out, 4), -1);
		pass();
	}
	"""
    target = start.c(source)
    copies(target, guest=False).wake()
    target.go()


def test_two_dumps_at_once(start: Targets, images: str) -> None:
    source = PAGE + 'int main(void) { make_page(0, getpid()); ready(); wait_told("go"); pass(); }'
    target = start.c(source)
    fd = next(fd for fd in os.listdir(f"/proc/{target.pid}/fd") if "torpor" in os.readlink(f"/proc/{target.pid}/fd/{fd}"))
    import fcntl

    with open(f"/proc/{target.pid}/fd/{fd}", "rb+") as page:
        fcntl.flock(page, fcntl.LOCK_EX)
        with pytest.raises(torpor.Unsupported, match="somebody else takes a snapshot"):
            torpor.dump(target.pid, images)
        page.seek(40)
        assert page.read(4) == bytes(4), "the page was not touched"
    target.go()


def test_a_guest_that_ends_instead(start: Targets, images: str) -> None:
    source = PAGE + """
	static void leave(int number) { _exit(3); }
	int main(void) { signal(SIGUSR2, leave); make_page(SIGUSR2, getpid()); ready(); for (;;) pause(); }
	"""
    target = start.c(source)
    with pytest.raises(torpor.TaskGone, match=f"task {target.pid}: guest: it ended"):
        torpor.dump(target.pid, images)
    assert not os.listdir(images)


# ------------------------------------------------------------------------------ generation files

MAPPED = """
int main(int argc, char **argv)
{
	int fd = MUST(open(argv[1], O_RDONLY)), open_too = MUST(open(argv[1], O_RDONLY));
	volatile unsigned *word = mmap(NULL, sizeof(unsigned), PROT_READ, MAP_SHARED, fd, 0), before, found;
	int ends[2];
	char id[16];

	CHECK(word != MAP_FAILED);
	close(fd);
	before = *word;
	MUST(pipe(ends));
	if (fork() == 0) {
		wait_told("go");
		MUST(write(ends[1], (const void *)(word + 6), 16));
		pause();
	}
	ready();
	wait_told("go");
	CHECK_EQ(*word, before + 1);
	MUST(pread(open_too, (void *)&found, 4, 0));
	CHECK_EQ(found, before + 1);
	CHECK_EQ(read(ends[0], id, 16), 16);
	CHECK(memcmp(id, (const void *)(word + 6), 16) == 0); /* a tree shares one */
	CHECK_EQ(lseek(open_too, 0, SEEK_CUR), 0);
	tell("id", "");
	FILE *file = fopen("ids", "a");
	for (int i = 0; i < 16; i++)
		fprintf(file, "%02x", (unsigned char)id[i]);
	fprintf(file, "\\n");
	fclose(file);
	pass();
}
"""


def test_a_generation_file(start: Targets, images: str, tmp_path: object) -> None:
    path = f"{tmp_path}/sysgenid"
    run_torpor("generation", "create", path).must()
    before = slurp(path)
    assert len(before) == 4096
    assert struct.unpack_from("<I", before)[0] == 1
    assert re.fullmatch(r"1 [0-9a-f]{32}\n", run_torpor("generation", "show", path).must().output)
    again = run_torpor("generation", "create", path)
    assert again.status == 1
    assert "File exists" in again.output
    target = start.c(MAPPED, path)
    target.pids()
    torpor.dump(target.pid, images)
    target.wait_gone()
    os.unlink(path)  # it is not needed any more
    for _ in range(2):
        Library().restore(images)
        target.go()
        for name in ("go", "result", "id"):
            os.unlink(target.path(name))
        target.end()
        target.wait_gone()
    ids = target.read("ids").split()
    assert len(ids) == 2 and len(set(ids)) == 2
    assert ids[0] != before[24:40].hex()


def test_a_generation_file_through_two_snapshots(start: Targets, images: str, tmp_path: object) -> None:
    path = f"{tmp_path}/sysgenid"
    run_torpor("generation", "create", path).must()
    source = MAPPED.replace("before + 1", "before + 2")
    target = start.c(source, path)
    for name in ("one", "two"):
        target.pids()
        os.mkdir(f"{images}/{name}")
        torpor.dump(target.pid, f"{images}/{name}")
        target.wait_gone()
        Library().restore(f"{images}/{name}")
    target.go()


def test_without_a_new_generation_the_file_itself_is_there(start: Targets, images: str, tmp_path: object) -> None:
    path = f"{tmp_path}/sysgenid"
    run_torpor("generation", "create", path).must()
    target = start.c(MAPPED.replace("before + 1", "before"), path)
    target.pids()
    torpor.dump(target.pid, images)
    target.wait_gone()
    Library().restore(images, new_generation=False)
    target.go()


def test_the_criu_command_renews_it_too(start: Targets, images: str, tmp_path: object) -> None:
    path = f"{tmp_path}/sysgenid"
    run_torpor("generation", "create", path).must()
    target = start.c(MAPPED, path)
    target.pids()
    for words in (["dump", "-t", target.pid], ["restore", "-d"]):
        run_torpor("criu", "--no-default-config", *words, "-D", images).must()
        if words[0] == "dump":
            target.wait_gone()
    target.go()


# ------------------------------------------------------------------------------ the command

def test_torpor_guest_gives_the_descriptors(tmp_path: object) -> None:
    code = (
        "import os; page, event = map(int, os.environ['TORPOR_GUEST'].split(','));"
        "print(os.pread(page, 12, 8), os.readlink(f'/proc/self/fd/{page}'), os.readlink(f'/proc/self/fd/{event}'));"
        "import struct; print(struct.unpack('<i', os.pread(page, 4, 52))[0] == os.getpid())"
    )
    argv = [sys.executable, "-m", "torpor", "guest", "--", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": SOURCES})
    assert done.stdout == "b'torpor guest' /memfd:torpor-guest (deleted) anon_inode:[eventfd]\nTrue\n"


@pytest.mark.parametrize("words", [["guest"], ["guest", "-x"], ["generation"], ["generation", "make", "x"]])
def test_wrong_words(words: list[str]) -> None:
    done = run_torpor(*words)
    assert done.status == 1
    assert "takes" in done.output


def test_a_file_that_is_none(tmp_path: object) -> None:
    with open(f"{tmp_path}/other", "w") as file:
        file.write("x" * 4096)
    done = run_torpor("generation", "show", f"{tmp_path}/other")
    assert done.status == 1
    assert "is no generation file" in done.output
