"""``fresh``: what a child of fork(2) would find empty, a woken copy does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import torpor
from kit import Library, Target, Targets

from .conftest import Copies

Take = Callable[..., Copies]

WIPED = """
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8
#endif
enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE };
static char *before, *wiped, *half, *after, *droppable, reference[12 * PAGE];

static int holds(const char *where, size_t size, int seed, int wanted)
{
	return wanted ? filled(where, size, seed) : zeroed(where, size);
}

int main(int argc, char **argv)
{
	int kept = !strcmp(argv[1], "kept"), children = atoi(argv[2]), child = 0;

	/* One run of pages in the images: the wiped ones lie in the middle of it. */
	before = mmap(NULL, 12 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	wiped = before + 4 * PAGE;
	after = before + 8 * PAGE;
	MUST(madvise(wiped, 4 * PAGE, MADV_WIPEONFORK));
	half = mmap(NULL, 2 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(madvise(half + PAGE, PAGE, MADV_WIPEONFORK));
	droppable = mmap(NULL, PAGE, RW, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
	fill(before, 12 * PAGE, 1);
	fill(reference, 12 * PAGE, 1);
	fill(half, 2 * PAGE, 2);
	if (children && (child = fork()) == 0) {
		if (!zeroed(wiped, 4 * PAGE) || !zeroed(half + PAGE, PAGE))
			fail("fork(2) does not wipe");
		fill(wiped, 4 * PAGE, 5);
	}
	if (droppable != MAP_FAILED)
		fill(droppable, PAGE, 3);
	if (child || !children)
		ready();
	if (children && !child)
		tell("child-ready", "");
	wait_told("go");
	CHECK(filled(before, 4 * PAGE, 1));
	if (children && !child) {
		CHECK(holds(wiped, 4 * PAGE, 5, kept));
	} else {
		CHECK(kept ? filled(before, 8 * PAGE, 1) : zeroed(wiped, 4 * PAGE));
	}
	CHECK(memcmp(after, reference + 8 * PAGE, 4 * PAGE) == 0);
	CHECK(filled(half, PAGE, 2));
	CHECK(droppable == MAP_FAILED || zeroed(droppable, PAGE)); /* it may be dropped any time, so it always is */
	if (children && !child) {
		tell("child", "fine");
		return 0;
	}
	if (children)
		wait_told("child");
	pass();
}
"""


@pytest.mark.parametrize("kept", ["kept", "fresh"])
@pytest.mark.parametrize("children", ["0", "1"])
def test_wiped_and_droppable_memory(start: Targets, images: str, kept: str, children: str) -> None:
    target = start.c(WIPED, kept, children)
    if children == "1":
        target.wait_file("child-ready")
        target.pids()
    torpor.dump(target.pid, images)
    target.wait_gone()
    Library().restore(images, fresh=kept == "fresh")
    target.go()


VDSO = """
#include <dlfcn.h>
#include <sys/random.h>
struct params { unsigned size, prot, flags, reserved[13]; };
typedef ssize_t vgetrandom(void *, size_t, unsigned, void *, size_t);
int main(int argc, char **argv)
{
	void *vdso = dlopen("linux-vdso.so.1", RTLD_NOLOAD | RTLD_NOW), *state;
	vgetrandom *get = vdso ? (vgetrandom *)dlsym(vdso, "__vdso_getrandom") : NULL;
	struct params params;
	unsigned char bytes[16];

	if (get == NULL || get(NULL, 0, 0, &params, ~0UL) != 0) {
		tell("draws", "\\"missing\\"");
		ready();
		pause();
	}
	/* Ordinary memory for it, as nobody should: what would happen without droppable memory. */
	state = mmap(NULL, 4096, params.prot, argc > 1 ? MAP_PRIVATE | MAP_ANONYMOUS : (int)params.flags, -1, 0);
	CHECK(state != MAP_FAILED);
	CHECK_EQ(get(bytes, 16, 0, state, params.size), 16);
	ready();
	wait_told("go");
	CHECK_EQ(get(bytes, 16, 0, state, params.size), 16);
	char text[40] = "\\"";
	for (int i = 0; i < 16; i++)
		sprintf(text + 1 + 2 * i, "%02x", bytes[i]);
	strcat(text, "\\"");
	tell("draws", text);
	pause();
}
"""


@pytest.mark.parametrize("where", ["droppable", "ordinary"])
def test_getrandom_in_the_vdso(start: Targets, copies: Take, where: str) -> None:
    """Its state is droppable memory: a copy that had the state of another would draw the same numbers."""
    target: Target = start.c(VDSO, *[where][: where == "ordinary"], flags=("-ldl",))
    if target.read("draws"):
        pytest.skip("needs a kernel with getrandom in the vDSO: Linux 6.11")
    woken = copies(target)
    draws = [str(woken.draws()) for _ in range(6)]
    if where == "droppable":
        assert len(set(draws)) == len(draws)
    else:  # the kernel may have reseeded in between, which any state notices: so not all need be equal
        assert len(set(draws)) < len(draws), "it never repeats itself: the test is blind"
