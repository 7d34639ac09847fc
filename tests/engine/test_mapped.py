"""restore --map: programs run while their memory is still in the images, and never see anything but what was theirs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import torpor
from kit import Target, Targets, assert_same, descendants, observe_settled, observe_tree, run_torpor, wait_until
from kit.files import slurp_text
from kit.host import reap, stat_fields
from kit.verbs import SOURCES

COMMON = """
#define PAGE 4096ul
#define RW (PROT_READ | PROT_WRITE)
#define PAGES 2048ul  /* 8 MiB */

/* Every page differs from every other. */
static UNUSED void mark(char *all, size_t from, size_t to)
{
	for (size_t n = from; n < to; n++) {
		memset(all + n * PAGE, (int)n | 1, PAGE);
		*(size_t *)(all + n * PAGE) = n + 1;
	}
}

static UNUSED int marked_as(const char *page, size_t n)
{
	return *(const size_t *)page == n + 1 && page[8] == (char)((int)n | 1) && page[4095] == (char)((int)n | 1);
}

static UNUSED int marked(const char *all, size_t from, size_t to)
{
	for (size_t n = from; n < to; n++)
		if (!marked_as(all + n * PAGE, n))
			return 0;
	return 1;
}

static UNUSED char *anonymous(size_t pages)
{
	char *all = mmap(NULL, pages * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(all != MAP_FAILED);
	return all;
}

static UNUSED char *own(void)
{
	char *all = anonymous(PAGES + 2);

	/* Alone, not joined with what lies beside it. */
	MUST(munmap(all, PAGE));
	MUST(munmap(all + (PAGES + 1) * PAGE, PAGE));
	mark(all + PAGE, 0, PAGES);
	return all + PAGE;
}
"""


def program(after: str, before: str = "", outside: str = "") -> str:
    return f"""{COMMON}{outside}int main(void)
{{
	char *all = own();
	{before}
	ready();
	wait_told("go");
	{after}
	pass();
}}"""


def pagers() -> list[int]:
    """Pagers and guards that are below this process."""
    found = []
    reap([pid for pid in descendants(os.getpid()) if (stat_fields(pid) or "")[2:3] == ["Z"]])
    for pid in descendants(os.getpid()):
        fields = stat_fields(pid)
        if fields and fields[1].strip("()") in ("torpor-pager", "torpor-guard") and fields[2] not in "ZX":
            found.append(pid)
    return found


def pager() -> int:
    return next(pid for pid in pagers() if (stat_fields(pid) or ["", ""])[1].strip("()") == "torpor-pager")


def wait_done(timeout: float = 60) -> None:
    wait_until("the pager has ended", lambda: not pagers(), timeout=timeout)


def is_lazy(pid: int) -> bool:
    """Is memory of the process registered with a userfaultfd?"""
    return any(
        line.startswith("VmFlags:") and " um" in line for line in slurp_text(f"/proc/{pid}/smaps").splitlines()
    )


# What programs do to memory that is not there yet, one by one.
CASES = {
    "read": ("CHECK(marked(all, 0, PAGES));", ""),
    "write": ("mark(all, 100, 200); CHECK(marked(all, 0, PAGES));", ""),
    "read from the end": ("for (size_t n = PAGES; n-- > 0; ) CHECK(marked(all, n, n + 1));", ""),
    "by a system call": (
        'int fd = MUST(open("/dev/null", O_WRONLY)), p[2]; char one; MUST(pipe(p));'
        "MUST(write(p[1], all + 700 * PAGE, 1)); MUST(read(p[0], &one, 1)); CHECK_EQ(one, *(char *)(all + 700 * PAGE));"
        "MUST(write(fd, all, PAGES * PAGE)); CHECK(marked(all, 0, PAGES));", "",
    ),
    "dontneed": (
        "MUST(madvise(all + 300 * PAGE, 500 * PAGE, MADV_DONTNEED));"
        "CHECK(zeroed(all + 300 * PAGE, 500 * PAGE)); CHECK(marked(all, 0, 300) && marked(all, 800, PAGES));"
        "usleep(300000); CHECK(zeroed(all + 300 * PAGE, 500 * PAGE));", "",
    ),
    "dontneed all": (
        "MUST(madvise(all, PAGES * PAGE, MADV_DONTNEED)); usleep(300000); CHECK(zeroed(all, PAGES * PAGE));", "",
    ),
    "dontneed, write again": (
        "for (size_t n = 0; n < PAGES; n += 2) MUST(madvise(all + n * PAGE, PAGE, MADV_DONTNEED));"
        "for (size_t n = 0; n < PAGES; n += 4) mark(all, n, n + 1);"
        "for (size_t n = 0; n < PAGES; n++)"
        " CHECK(n % 4 == 2 ? zeroed(all + n * PAGE, PAGE) : marked(all, n, n + 1));", "",
    ),
    "free": (
        "MUST(madvise(all + 300 * PAGE, 500 * PAGE, MADV_FREE));"
        "for (size_t n = 300; n < 800; n++)"
        " CHECK(zeroed(all + n * PAGE, PAGE) || marked(all, n, n + 1));"
        "CHECK(marked(all, 0, 300) && marked(all, 800, PAGES));", "",
    ),
    "unmap and map again": (
        "MUST(munmap(all + 300 * PAGE, 500 * PAGE));"
        "CHECK(mmap(all + 300 * PAGE, 500 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);"
        "CHECK(zeroed(all + 300 * PAGE, 500 * PAGE)); CHECK(marked(all, 0, 300) && marked(all, 800, PAGES));", "",
    ),
    "map over it": (
        "CHECK(mmap(all + 300 * PAGE, 500 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);"
        "CHECK(zeroed(all + 300 * PAGE, 500 * PAGE)); CHECK(marked(all, 0, 300) && marked(all, 800, PAGES));", "",
    ),
    "move": (
        "char *there = anonymous(PAGES), *got = mremap(all, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,"
        " there); CHECK(got == there); CHECK(marked(there, 0, PAGES));", "",
    ),
    "move, leaving the place": (
        "char *got = mremap(all, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | 4 /* DONTUNMAP */, NULL);"
        "CHECK(got != MAP_FAILED); CHECK(zeroed(all, PAGES * PAGE)); CHECK(marked(got, 0, PAGES));", "",
    ),
    "move to and fro": (
        "char *there = anonymous(PAGES);"
        "CHECK(mremap(all, 1000 * PAGE, 1000 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there) == there);"
        "CHECK(marked_as(there + 10 * PAGE, 10));"
        "CHECK(mremap(there, 1000 * PAGE, 1000 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, all) == all);"
        "CHECK(marked(all, 0, PAGES));", "",
    ),
    "grow and shrink": (
        "char *got = mremap(all, PAGES * PAGE, 2 * PAGES * PAGE, MREMAP_MAYMOVE); CHECK(got != MAP_FAILED);"
        "CHECK(zeroed(got + PAGES * PAGE, PAGES * PAGE)); CHECK(marked(got, 1000, PAGES));"
        "CHECK(mremap(got, 2 * PAGES * PAGE, 500 * PAGE, 0) == got);"
        "CHECK(mremap(got, 500 * PAGE, 1000 * PAGE, MREMAP_MAYMOVE) != MAP_FAILED);", "",
    ),
    "protect": (
        "for (size_t n = 0; n < PAGES; n += 3) MUST(mprotect(all + n * PAGE, PAGE, PROT_READ));"
        "CHECK(marked(all, 0, PAGES));", "",
    ),
    "read only from the start": (
        "CHECK(marked(all, 0, PAGES)); MUST(mprotect(all, PAGES * PAGE, RW)); mark(all, 0, PAGES);",
        "MUST(mprotect(all, PAGES * PAGE, PROT_READ));",
    ),
    "locked": ("CHECK(marked(all, 0, PAGES));", "MUST(mlock(all, PAGES * PAGE));"),
    "lock later": ("MUST(mlock(all, PAGES * PAGE)); CHECK(marked(all, 0, PAGES));", ""),
    "holes": (
        "for (size_t n = 0; n < PAGES; n++)"
        " CHECK(n % 7 == 3 || n > 1500 ? zeroed(all + n * PAGE, PAGE) : marked(all, n, n + 1));"
        "mark(all, 0, PAGES); CHECK(marked(all, 0, PAGES));",
        "for (size_t n = 0; n < PAGES; n++) if (n % 7 == 3 || n > 1500)"
        " MUST(madvise(all + n * PAGE, PAGE, MADV_DONTNEED));",
    ),
    "guard regions": (
        "MUST(madvise(all + 300 * PAGE, 16 * PAGE, 102)); usleep(300000);"
        "CHECK(write(MUST(open(\"/dev/null\", O_WRONLY)), all, 1) == 1);"
        "int p[2]; MUST(pipe(p));"
        "CHECK(write(p[1], all + 303 * PAGE, 1) == -1 && errno == EFAULT);"
        "CHECK(marked(all, 0, 300) && marked(all, 316, PAGES));"
        "CHECK(write(p[1], all + 303 * PAGE, 1) == -1 && errno == EFAULT);", "",
    ),
    "fork": (
        "int pid = MUST(fork()), status;"
        "if (pid == 0) { CHECK(marked(all, 0, PAGES)); mark(all, 0, 10); _exit(7); }"
        "mark(all + 20 * PAGE, 0, 10); CHECK_EQ(waitpid(pid, &status, 0), pid); CHECK_EQ(status, 7 << 8);"
        "CHECK(marked(all, 0, 20) && marked(all + 20 * PAGE, 0, 10) && marked(all, 30, PAGES));", "",
    ),
    "fork a family": (
        "int pids[4], status; for (int i = 0; i < 4; i++) if ((pids[i] = MUST(fork())) == 0) {"
        " MUST(madvise(all + i * 100 * PAGE, 100 * PAGE, MADV_DONTNEED));"
        " int pid = MUST(fork()); if (pid == 0) { CHECK(marked(all, 500, PAGES)); "
        " CHECK(zeroed(all + i * 100 * PAGE, 100 * PAGE)); _exit(3); }"
        " CHECK_EQ(waitpid(pid, &status, 0), pid); CHECK_EQ(status, 3 << 8);"
        " CHECK(marked(all, 400, PAGES)); CHECK(zeroed(all + i * 100 * PAGE, 100 * PAGE)); _exit(3); }"
        "for (int i = 0; i < 4; i++) { CHECK_EQ(waitpid(pids[i], &status, 0), pids[i]); CHECK_EQ(status, 3 << 8); }"
        "CHECK(marked(all, 0, PAGES));", "",
    ),
    "fork, not for children": (
        "MUST(madvise(all + 100 * PAGE, 100 * PAGE, MADV_WIPEONFORK));"
        "MUST(madvise(all + 300 * PAGE, 100 * PAGE, MADV_DONTFORK));"
        "int pid = MUST(fork()), status;"
        "if (pid == 0) { CHECK(marked(all, 0, 100) && zeroed(all + 100 * PAGE, 100 * PAGE)); "
        " CHECK(marked(all, 200, 300) && marked(all, 400, PAGES)); _exit(7); }"
        "CHECK_EQ(waitpid(pid, &status, 0), pid); CHECK_EQ(status, 7 << 8);"
        "CHECK(marked(all, 0, PAGES));", "",
    ),
    "orphan": (
        "if (MUST(fork())) _exit(0); usleep(100000); CHECK(marked(all, 0, PAGES));", "",
    ),
    "exec": (
        "int pid = MUST(fork()), status;"
        'if (pid == 0) { execl("/bin/true", "true", NULL); _exit(1); }'
        "CHECK_EQ(waitpid(pid, &status, 0), pid); CHECK_EQ(status, 0);"
        "CHECK(marked(all, 0, PAGES));", "",
    ),
    "on the heap": (
        "CHECK(marked(heap, 0, PAGES)); CHECK(sbrk(-(long)(PAGES * PAGE / 2)) != (void *)-1);"
        "CHECK(sbrk(PAGES * PAGE) != (void *)-1); CHECK(marked(heap, 0, PAGES / 2 - 1));"
        "CHECK(zeroed(heap + PAGES / 2 * PAGE, PAGES * PAGE / 2));",
        "char *heap = sbrk(0); heap += -(long)heap & 4095;"
        "CHECK(brk(heap + PAGES * PAGE) == 0); mark(heap, 0, PAGES);",
    ),
}


def woken(start: Targets, images: str, source: str, **options: object) -> Target:
    """A program that was dumped and restored, and is told to go on before it runs."""
    target = start.c(source)
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    target.pid = torpor.restore(images, map=True, **options).pid
    return target


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "filled"])
@pytest.mark.parametrize("name", CASES)
def test_whatever_a_program_does(start: Targets, images: str, name: str, lazy: bool) -> None:
    after, before = CASES[name]
    if name == "guard regions" and not lazy:
        pytest.skip("a guard region that is made while its memory is copied can be lost: ADR 0009")
    target = woken(start, images, program(after, before), map_lazy=lazy)
    wait_until(f"{target} has looked at itself", lambda: target.read("result"), timeout=60)
    assert target.read("result") == "pass\n"
    wait_done()


THREADS = """
static char *shared;
static void *look(void *arg)
{
	size_t mine = (size_t)arg;

	for (size_t n = 0; n < PAGES; n++) {
		size_t at = (n * 769 + mine * 131) % PAGES;

		CHECK(marked_as(shared + at * PAGE, at));
	}
	return NULL;
}
"""


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "filled"])
def test_many_threads_wait_at_once(start: Targets, images: str, lazy: bool) -> None:
    source = program(
        "pthread_t ids[8]; shared = all;"
        "for (size_t n = 0; n < 8; n++) CHECK(pthread_create(&ids[n], NULL, look, (void *)n) == 0);"
        "for (int n = 0; n < 8; n++) pthread_join(ids[n], NULL);", "", THREADS,
    )
    woken(start, images, source, map_lazy=lazy).go(timeout=60)
    wait_done()


def test_it_is_an_ordinary_process_afterwards(start: Targets, images: str) -> None:
    target = start.c(program("CHECK(marked(all, 0, PAGES));"))
    before = observe_settled(target.pid)
    torpor.dump(target.pid, images)
    target.wait_gone()
    torpor.restore(images, map=True)
    shutil.rmtree(images)  # what is needed of them is open
    wait_done()
    assert not is_lazy(target.pid)
    assert_same(before, observe_tree(target.pid))
    target.go()
    os.mkdir(images)


def test_a_tree_of_processes(start: Targets, images: str) -> None:
    """A child that has its parent's memory in common gets it by forking; one that has its own is mapped."""
    source = program(
        "int status; CHECK_EQ(waitpid(child, &status, 0), child); CHECK_EQ(status, 5 << 8);"
        "CHECK(marked(all, 0, PAGES));",
        'int child = MUST(fork()); if (child == 0) { mark(all, 1, PAGES); mark(all + PAGE, 0, 10);'
        ' tell("child", ""); wait_told("go"); CHECK(marked(all, 11, PAGES) && marked(all + PAGE, 0, 10)); _exit(5); }'
        'wait_told("child");',
    )
    target = woken(start, images, source)
    target.go(timeout=60)
    wait_done()


def test_as_a_command(start: Targets, images: str) -> None:
    target = start.c(program("CHECK(marked(all, 0, PAGES));"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    lines = run_torpor("restore", images, "--map", "--explain").must().output
    assert "8192 KiB are brought in when it is touched, and in the background" in lines
    assert not pagers()
    assert run_torpor("restore", images, "-d", "--map", "--map-lazy").must().output.split() == [str(target.pid)]
    time.sleep(0.3)
    assert is_lazy(target.pid), "it is not lazy at all"
    target.go()
    wait_done()


def test_the_pager_is_no_child_of_the_caller(start: Targets, images: str) -> None:
    target = start.c(program("CHECK(marked(all, 0, PAGES));"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    script = (
        "import os, torpor; pid = torpor.restore({images!r}, map=True, map_lazy=True).pid;"
        "print(open(f'/proc/self/task/{{os.getpid()}}/children').read().split() == [str(pid)])"
    )
    env = {**os.environ, "PYTHONPATH": SOURCES}
    argv = [sys.executable, "-c", script.format(images=images)]
    assert subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout == "True\n"
    assert pagers()
    target.go()
    wait_done()


def test_into_a_pid_namespace_of_its_own(start: Targets, images: str) -> None:
    target = start.c(program("CHECK(marked(all, 0, PAGES));"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    for _ in range(2):  # one beside the other
        target.pid = torpor.restore(images, map=True, own_pids=True).pid
    target.go()
    wait_done()


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "filled"])
def test_dumped_again_with_the_pager_at_work(start: Targets, images: str, lazy: bool) -> None:
    first, second = os.path.join(images, "1"), os.path.join(images, "2")
    os.mkdir(first)
    os.mkdir(second)
    target = start.c(program("CHECK(marked(all, 0, 500) && zeroed(all + 500 * PAGE, 100 * PAGE)); "
                             "CHECK(marked(all, 600, PAGES)); CHECK(marked(all, 0, 500));",
                             'MUST(madvise(all + 500 * PAGE, 100 * PAGE, MADV_DONTNEED));'))  # fmt: skip
    before = observe_settled(target.pid)
    torpor.dump(target.pid, first)
    target.wait_gone()
    torpor.restore(first, map=True, map_lazy=lazy)
    if lazy:
        assert is_lazy(target.pid)
    assert not torpor.check(target.pid)
    torpor.dump(target.pid, second)
    target.wait_gone()
    wait_done()
    shutil.rmtree(first)
    torpor.restore(second)
    assert_same(before, observe_tree(target.pid))
    target.go()


def test_a_child_dumped_with_the_pager_at_work(start: Targets, images: str) -> None:
    first, second = os.path.join(images, "1"), os.path.join(images, "2")
    os.mkdir(first)
    os.mkdir(second)
    source = program(
        'int pid = MUST(fork()), status; if (pid == 0) { MUST(setsid()); char text[20]; '
        'snprintf(text, 20, "%d", (int)getpid()); tell("child", text);'
        ' wait_told("more"); CHECK(marked(all, 0, PAGES)); tell("result", "pass\\n"); _exit(0); }'
        "CHECK_EQ(waitpid(pid, &status, 0), pid); CHECK_EQ(status, 9); wait_told(\"never\");"
    )
    target = woken(start, first, source, map_lazy=True)
    child = int(target.wait_file("child"))
    assert is_lazy(child)
    torpor.dump(child, second)
    assert torpor.restore(second).pid == child
    target.tell("more")
    assert target.wait_file("result") == "pass\n"
    os.kill(target.pid, signal.SIGKILL)
    wait_done()


def test_images_that_are_cut_short_end_the_program(start: Targets, images: str) -> None:
    source = program("for (;;) CHECK(marked(all, 0, PAGES));")
    target = start.c(source)
    torpor.dump(target.pid, images)
    target.wait_gone()
    log = os.path.join(images, "restore.log")
    run_torpor("restore", images, "-d", "--map", "--map-lazy", "-o", log).must()
    for name in os.listdir(images):
        if name.startswith("pages-"):
            os.truncate(os.path.join(images, name), 1 << 20)
    target.tell("go")
    wait_until("it is gone", lambda: (reap([target.pid]), not target.alive())[1], timeout=20)
    assert target.read("result") == "", "it has seen something else"
    wait_done()
    assert f"task {target.pid} is killed" in slurp_text(log) and "cut short" in slurp_text(log)


def test_images_that_are_cut_short_end_children_too(start: Targets, images: str) -> None:
    source = program(
        'int pid = MUST(fork()); tell(pid ? "one" : "two", ""); wait_told("more");'
        "for (size_t n = 0; n < PAGES; n++) if (!marked(all, n, n + 1)) tell(\"wrong\", \"\"); for (;;) pause();"
    )
    target = woken(start, images, source, map_lazy=True)
    target.wait_file("one")
    target.wait_file("two")
    pids = target.pids()
    for name in os.listdir(images):
        if name.startswith("pages-"):
            os.truncate(os.path.join(images, name), 0)
    target.tell("more")
    wait_until("both are gone", lambda: (reap(pids), not any(stat_fields(pid) for pid in pids))[1], timeout=20)
    assert not os.path.exists(target.path("wrong"))
    wait_done()


def test_a_restore_that_fails_leaves_no_pager(start: Targets, images: str) -> None:
    target = start.c(program(""))
    torpor.dump(target.pid, images)
    target.wait_gone()
    with pytest.raises(torpor.TorporError, match="restore"):
        torpor.restore(images, map=True, pidfile=images)
    assert not target.alive()
    wait_until("nothing is left", lambda: not pagers(), timeout=2)
