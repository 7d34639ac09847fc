"""Siblings whose memory is nearly the same: what each has of its own is its own again after a restore."""

from __future__ import annotations

import random

from torpor.engine.alike import MODELS_MAX, PAGE, Model, Models
from torpor.images import schema as pb
from torpor.images.pages import PE_PARENT, PE_PRESENT, framed_run

from .conftest import Survives

#: Twenty children write to the pages that they have from their parent: all the same, each something else, some the
#: same, some nothing; two give pages back. Each knows what it has to find.
CHILDREN = """
#define PAGES 200
#define CHILDREN 20

static unsigned char *data;

static int expected(int child, int page)
{
	if (page % 10 == 0)
		return 7;                               /* all wrote the same */
	if (page % 10 == 1)
		return 100 + child;                     /* each something of its own */
	if (page % 10 == 2)
		return child % 2 ? 9 : 1;               /* half of them; the others have the parent's */
	if (page % 10 == 3)
		return child % 3 == 0 ? 11 : 12 + child % 2;
	if (page == 4 && child % 9 == 5)
		return 0;                               /* given back */
	return 1;
}

static void check(int child)
{
	for (int page = 0; page < PAGES; page++)
		for (int at = 0; at < 4096; at += 7)
			if (data[page * 4096 + at] != expected(child, page))
				fail("child %d, page %d, byte %d: %d, not %d", child, page, at, data[page * 4096 + at],
				     expected(child, page));
}

int main(void)
{
	pid_t pids[CHILDREN];
	int status;

	data = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(data != MAP_FAILED);
	memset(data, 1, PAGES * 4096);
	for (int child = 0; child < CHILDREN; child++) {
		char name[20];

		snprintf(name, sizeof(name), "child%d", child);
		pids[child] = fork();
		MUST(pids[child]);
		if (pids[child] == 0) {
			for (int page = 0; page < PAGES; page++)
				if (expected(child, page) == 0)
					MUST(madvise(data + page * 4096, 4096, MADV_DONTNEED));
				else if (expected(child, page) != 1)
					memset(data + page * 4096, expected(child, page), 4096);
			tell(name, "");
			wait_told("go");
			check(child);
			_exit(42);
		}
		wait_told(name);
	}
	ready();
	wait_told("go");
	for (int child = 0; child < CHILDREN; child++) {
		CHECK(waitpid(pids[child], &status, 0) == pids[child]);
		CHECK_EQ(status, 42 << 8);
	}
	for (int page = 0; page < PAGES; page++)
		CHECK_EQ(data[page * 4096], 1);
	pass();
}
"""


def test_children_that_have_written_nearly_the_same(survives: Survives) -> None:
    survives(CHILDREN)


def numbered(pid: int) -> int:
    return pid + 1000


def test_a_pagemap_is_the_models_but_for_the_changes() -> None:
    dice = random.Random(1)
    for _ in range(300):
        parts, at = [], dice.randrange(1, 1 << 20)
        for _ in range(dice.randrange(1, 12)):
            parts.append((at * PAGE, dice.randrange(1, 10), dice.randrange(4)))
            at += parts[-1][1] + dice.randrange(3)
        pages = {page: owner or 9 for start, count, owner in parts for page in range(start, start + count * PAGE, PAGE)}
        changes = {page: dice.randrange(5) for page in pages if dice.random() < 0.3}
        runs = [(start, start + count * PAGE) for start, count, _ in parts]
        model = Model(9, runs, [bytes(count * 8) for _, count, _ in parts], parts, [], b"", {}, numbered)
        found: dict[int, int] = {}
        for framed in model.pagemap(sorted(changes.items())):
            run = pb.pagemap_entry.FromString(framed[4:])
            assert len(framed) == 4 + int.from_bytes(framed[:4], "little")
            assert run.flags == (PE_PARENT if run.same_as else PE_PRESENT)
            assert run.vaddr > max(found, default=0)
            for page in range(run.vaddr, run.vaddr + run.nr_pages * PAGE, PAGE):
                found[page] = run.same_as - 1000 if run.same_as else 0
        assert found == {**pages, **changes}


def test_what_differs() -> None:
    runs = [(0x1000, 0x4000), (0x8000, 0x9000)]
    entries = [b"".join(value.to_bytes(8, "little") for value in values) for values in ((5, 6, 7), (8,))]
    own, content = [(0x2000, 0x4000)], b"a" * PAGE + b"b" * PAGE
    parents = {0x1000: 5, 0x2000: 60, 0x3000: 70, 0x8000: 8}
    model = Model(9, runs, entries, [(0x1000, 1, 2), (0x2000, 2, 0), (0x8000, 1, 2)], own, content, parents, numbered)
    others = [b"".join(value.to_bytes(8, "little") for value in values) for values in ((5, 60, 77), (8,))]
    assert list(model.differing(others)) == [(0x2000, True), (0x3000, False)]
    assert list(model.differing(entries)) == []
    assert model.same_content(0x3000, b"b" * PAGE) and model.same_content(0x2000, content)
    assert not model.same_content(0x2000, b"b" * PAGE)
    assert not model.same_content(0x1000, b"a" * PAGE), "that page is not its own"
    assert not model.same_content(0x3000, b"b" * PAGE + b"c" * PAGE), "it ends before"
    assert [model.owner(address) for address in (0x1000, 0x2000, 0x3000, 0x8000)] == [2, 9, 9, 2]
    assert framed_run(0x1000, 1, PE_PARENT, 1002) == next(model.pagemap([]))


def test_models_are_few_and_renewed() -> None:
    models = Models()
    made = [Model(pid, [(0, PAGE)], [bytes(8)], [(0, 1, 0)], [], b"", {}, numbered) for pid in range(MODELS_MAX + 2)]
    for number, model in enumerate(made):
        models.add(1, [(0, (number + 1) * PAGE)], model)
    assert models.find(1, [(0, PAGE)]) is None, "the oldest is forgotten"
    runs = [(0, (MODELS_MAX + 2) * PAGE)]
    assert models.find(2, runs) is None, "another parent's"
    renewed = [count for count in range(1, 70) if models.find(1, runs) is None]
    assert renewed == [4, 16, 64]
    models.add(1, runs, made[0])
    assert models.find(1, runs) is made[0]
