"""Memory that is copied while the tree runs: whatever the tree does meanwhile, the snapshot is of the moment of the stop."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torpor
from kit import Target, Targets, assert_same, observe_settled, observe_tree, wait_until
from kit.busy import BUSY
from kit.files import slurp_text
from torpor.engine import precopy

PAGE = precopy.PAGE

# Sixteen thousand numbered pages; when told, everything that can happen to pages happens to some of them.
CHANGES = """
#define PAGE 4096ul
#define PAGES 16000ul
#define RW (PROT_READ | PROT_WRITE)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

static char *all, *more, *moved, *between;

static void number(char *from, size_t count, size_t first)
{
	for (size_t n = 0; n < count; n++)
		*(size_t *)(from + n * PAGE + 8) = first + n;
}

static void check(const char *what, char *from, size_t count, size_t first)
{
	for (size_t n = 0; n < count; n++)
		if (*(size_t *)(from + n * PAGE + 8) != first + n)
			fail("%s: page %zu holds %zu", what, n, *(size_t *)(from + n * PAGE + 8));
}

static char *page(size_t n) { return all + n * PAGE; }

int main(void)
{
	int pid, status;

	all = mmap(NULL, PAGES * PAGE, RW, ANON, -1, 0);
	number(all, PAGES, 1);
	MUST(madvise(page(8000), 100 * PAGE, MADV_DONTNEED));  /* a hole that is filled meanwhile */
	ready();
	wait_told("change");
	number(page(10), 50, 70010);                           /* written */
	MUST(madvise(page(100), 30 * PAGE, MADV_DONTNEED));    /* given back */
	MUST(madvise(page(200), 30 * PAGE, MADV_DONTNEED));    /* … and used again */
	number(page(205), 5, 70205);
	MUST(munmap(page(300), 30 * PAGE));                    /* unmapped */
	CHECK(mmap(page(305), 20 * PAGE, RW, ANON | MAP_FIXED, -1, 0) == page(305)); /* … another in its place */
	number(page(305), 20, 70305);
	number(page(8040), 20, 78040);
	moved = mmap(NULL, 64 * PAGE, PROT_NONE, ANON, -1, 0);
	CHECK(mremap(page(1000), 64 * PAGE, 64 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved);
	MUST(mprotect(page(2000), 100 * PAGE, PROT_READ));
	MUST(mprotect(page(3000), 100 * PAGE, PROT_NONE));
	more = mmap(NULL, 500 * PAGE, RW, ANON, -1, 0);
	number(more, 500, 90000);
	if ((pid = MUST(fork())) == 0) {
		number(page(5000), 10, 75000);
		number(page(5000), 10, 5001);
		for (;;)
			pause();
	}
	number(page(5100), 10, 75100);
	tell("changed", "");
	wait_told("go");
	MUST(mprotect(page(3000), 100 * PAGE, PROT_READ));
	check("before", page(0), 10, 1);
	check("written", page(10), 50, 70010);
	CHECK(zeroed(page(100), 30 * PAGE));
	CHECK(zeroed(page(200), 5 * PAGE));
	check("used again", page(205), 5, 70205);
	CHECK(zeroed(page(210), 20 * PAGE));
	check("another", page(305), 20, 70305);
	check("behind", page(330), 600, 331);
	check("moved", moved, 64, 1001);
	check("read-only", page(2000), 100, 2001);
	check("hidden", page(3000), 100, 3001);
	check("new", more, 500, 90000);
	check("of the parent", page(5000), 100, 5001);
	check("after the fork", page(5100), 10, 75100);
	CHECK(zeroed(page(8000), 40 * PAGE));
	check("filled", page(8040), 20, 78040);
	CHECK(zeroed(page(8060), 40 * PAGE));
	check("the rest", page(8100), PAGES - 8100, 8101);
	MUST(kill(pid, SIGKILL));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	pass();
}
"""

IDLE = """
int main(void)
{
	char *all = mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memset(all, 5, 64 << 20);
	ready();
	wait_told("go");
	for (size_t n = 0; n < 64 << 20; n++)
		CHECK_EQ(all[n], 5);
	pass();
}
"""

EXEC = """
int main(int argc, char **argv)
{
	size_t size = 64 << 20;
	char *all = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memset(all, told("change") ? 7 : 5, size);
	if (!told("change")) {
		ready();
		wait_told("change");
		execv("/proc/self/exe", argv);
	}
	tell("changed", "");
	wait_told("go");
	for (size_t n = 0; n < size; n++)
		CHECK_EQ(all[n], 7);
	pass();
}
"""


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Target], None]:
    """Have a target do its changes when its memory has been copied and it has not been stopped yet."""

    def arrange(target: Target) -> None:
        run = precopy.Precopy.run

        def then_change(self: precopy.Precopy, root: int) -> None:
            run(self, root)
            assert self.of(root) is not None, "nothing was copied early"
            target.tell("change")
            wait_until("it has changed", lambda: os.path.exists(target.path("changed")))

        monkeypatch.setattr(precopy.Precopy, "run", then_change)

    return arrange


@pytest.mark.parametrize("source", [CHANGES, EXEC], ids=["changes", "exec"])
def test_what_happens_meanwhile(
    start: Targets, images: str, meanwhile: Callable[[Target], None], source: str
) -> None:
    target = start.c(source)
    meanwhile(target)
    result = torpor.dump(target.pid, images, leave_running=True)
    assert (result.early_pages > 14_000) == (source is CHANGES)
    before = observe_settled(target.pid)
    end(target)
    torpor.restore(images)
    assert_same(before, observe_tree(target.pid))
    target.go()


def end(target: Target) -> None:
    target.pids()
    target.end()
    target.wait_gone()


@pytest.mark.parametrize("moves", [False, True], ids=["in place", "moving"])
def test_a_busy_program(start: Targets, images: str, moves: bool) -> None:
    """What is moved (mremap) is not watched any more, and copied again."""
    target = start.c(BUSY if moves else BUSY.replace("if (!whole)", "if (1)"))
    target.tell("go")
    folders = [f"{images}/{number}" for number in range(6)]
    early = 0
    for folder in folders:
        os.mkdir(folder)
        early += torpor.dump(target.pid, folder, leave_running=True).early_pages
    assert early or moves
    finish(target)
    for folder in folders:
        os.unlink(target.path("enough"))
        os.unlink(target.path("result"))
        target.wait_gone()
        torpor.restore(folder)
        finish(target)


def finish(target: Target) -> None:
    target.tell("enough")
    wait_until(f"{target} says how it was", lambda: target.read("result"), timeout=60)
    assert target.read("result") == "pass\n"


def test_nothing_is_left_behind(start: Targets, images: str) -> None:
    target = start.c(IDLE)
    before = observe_settled(target.pid)
    assert torpor.dump(target.pid, images, leave_running=True).early_pages > 16_000
    assert_same(before, observe_tree(target.pid))
    assert " uw" not in slurp_text(f"/proc/{target.pid}/smaps")
    end(target)
    torpor.restore(images)
    assert_same(before, observe_tree(target.pid))
    target.go()


def test_it_can_be_switched_off(start: Targets, images: str) -> None:
    target = start.c(IDLE)
    assert torpor.dump(target.pid, images, leave_running=True, precopy=False).early_pages == 0
    end(target)
    torpor.restore(images)
    target.go()


#: For each of some pages, whether it was there at first and at last, and whether it was written in between.
WHAT = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40)


def runs(pages: list[bool]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number, there in enumerate(pages):
        if there and found and found[-1][1] == number * PAGE:
            found[-1] = (found[-1][0], (number + 1) * PAGE)
        elif there:
            found.append((number * PAGE, (number + 1) * PAGE))
    return found


class Fake:
    """A tracker, and a writer of images with one image."""

    def __init__(self, folder: str, written: list[tuple[int, int]]) -> None:
        self.images = self
        self._written = written
        self.file = os.open(os.path.join(folder, "pages"), os.O_RDWR | os.O_CREAT)
        self.aside = os.open(os.path.join(folder, "aside"), os.O_RDWR | os.O_CREAT)

    def protect(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return spans

    def new_id(self, kind: str) -> int:
        return 1

    def raw(self, name: str) -> int:
        return self.file

    def scratch(self) -> int:
        return self.aside

    def written(self, start: int, end: int) -> list[tuple[int, int]]:
        return [(low, high) for low, high in self._written if low < end and high > start]


@given(what=WHAT)
def test_every_page_finds_its_place(what: list[tuple[bool, bool, bool]]) -> None:
    first, last = [one for one, _, _ in what], [one for _, one, _ in what]
    written = [there and (changed or not before) for before, there, changed in what]
    with tempfile.TemporaryDirectory() as folder:
        fake = Fake(folder, runs(written))
        copy = precopy.Copy(fake, fake, runs(first))  # type: ignore[arg-type]
        for number, there in enumerate(first):
            if there:
                os.write(fake.file, b"%4095d." % number)
        offset = 0
        for start, stop in runs(first):
            copy._add(start, stop - start, offset)
            offset += stop - start
        for start, stop in copy.settle(runs(last)):
            for number in range(start // PAGE, stop // PAGE):
                assert written[number], f"page {number} is read again without need"
                copy.add(memoryview(b"%4095d!" % number))
        copy.complete()
        wanted = b"".join(
            b"%4095d%c" % (number, b"!" if written[number] else b".") for number, there in enumerate(last) if there
        )
        assert os.pread(fake.file, len(wanted) + 1, 0) == wanted
        os.close(fake.file)
        os.close(fake.aside)
