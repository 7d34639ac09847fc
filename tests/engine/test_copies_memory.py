"""The memory of copies of a tree: what it was in every task, the same pages in all copies, and each copy's own once it is
written to."""

from __future__ import annotations

import array
import os
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torpor
from kit import Target, Targets, compile_c, diff, host_state
from kit.host import descendants, end_descendants
from kit.observe import mappings, observe_memory
from torpor.engine.shelf import TABLE_BYTES, Shelf

PAGE = 4096
FRAME = (1 << 55) - 1

# A root with memory that its children inherit and change: much of it, a little, none; and a grandchild.
FORKED = """
import signal
table = {n: str(n) * 3 for n in range(30_000)}

def worker(number, mib, below):
    own = [bytes([number]) * 4096 + b"%d" % n for n in range(mib * 256)]
    if number != 3:
        sum(len(text) for text in table.values())
    if below:
        born(number + 10, below - 1, below - 1)
    os.write(ends[1], b"x")
    while True:
        signal.pause()

def born(number, mib, below):
    if os.fork() == 0:
        worker(number, mib, below)

ends = os.pipe()
for number, mib, below in ((1, 6, 0), (2, 1, 2), (3, 0, 0)):
    born(number, mib, below)
got = b""
while len(got) < 5:
    got += os.read(ends[0], 5)
ready()
while True:
    signal.pause()
"""

EXECUTED = """
import subprocess, sys, signal
child = "import ssl, json; own = [bytes([7]) * 4096 + b'%d' % n for n in range(512)]; print(flush=True); input()"
for argv in ([sys.executable, "-c", child], ["sh", "-c", "echo; read line"], [sys.argv[1]]):
    subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE).stdout.read(1)
ready()
while True:
    signal.pause()
"""

# Mappings of all kinds that have pages: next to one another, of a file, closed, named, growing down, with a guard, not
# for children, and one that has become smaller since it was filled.
KINDS = """
#include <sys/prctl.h>
static volatile char data[20 * 4096] = {1};

int main(void)
{
	char *all = mmap(NULL, 64 << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *named = mmap(NULL, 3 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *wiped = mmap(NULL, 8 << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = MUST(open("data", O_CREAT | O_RDWR, 0600));
	char *file;

	MUST(ftruncate(fd, 32 << 12));
	file = mmap(NULL, 32 << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	for (int i = 0; i < 64; i++)
		memset(all + (i << 12), 'a' + i % 26, 4096);
	for (int i = 0; i < 20; i++)
		data[i << 12] = i + 1, file[i << 12] = i + 1;
	memset(named, 'n', 3 << 20);
	memset(wiped, 'w', 8 << 12);
	MUST(mprotect(all + (16 << 12), 16 << 12, PROT_NONE));
	MUST(mprotect(all + (32 << 12), 8 << 12, PROT_READ));
	MUST(munmap(all + (60 << 12), 4 << 12));
	MUST(munmap(named, 5 << 12));
	prctl(0x53564d41, 0, named + (5 << 12), (3 << 20) - (5 << 12), "a name");
	madvise(named + (100 << 12), 10 << 12, 102);	/* a guard region, where there are any */
	MUST(madvise(all + (40 << 12), 10 << 12, MADV_DONTFORK));
	MUST(madvise(wiped, 8 << 12, MADV_WIPEONFORK));
	MUST(write(1, "x", 1));
	for (;;)
		pause();
}
"""

# A program below a shell below itself. A task cannot become the shell while anything of its own program is mapped.
AGAIN = """
static volatile char data[200 * 4096] = {1};

int main(int argc, char **argv)
{
	int ends[2];
	char byte;

	for (int i = 0; i < 200; i++)
		data[i << 12] = argc;
	if (argc > 1)
		MUST(write(1, "x", 1));
	else {
		MUST(pipe(ends));
		if (fork() == 0) {
			dup2(ends[1], 1);
			execl("/bin/sh", "sh", "-c", "$0 below; :", argv[0], NULL);
		}
		CHECK_EQ(read(ends[0], &byte, 1), 1);
		ready();
	}
	for (;;)
		pause();
}
"""


def memory_of(pids: dict[int, int]) -> dict[int, dict]:
    """By the numbers that they know themselves by: what tasks have mapped, and what is in there."""
    found = {}
    for number, pid in pids.items():
        areas = {f"{one['start']:x}-{one['end']:x}": one for one in mappings(pid)}
        found[number] = {"mappings": areas, "pages": {f"{at:x}": page for at, page in observe_memory(pid).items()}}
    return found


def tasks(root: int) -> dict[int, int]:
    """The processes of a tree by the numbers that they know themselves by."""
    found = {}
    for pid in (root, *descendants(root)):
        with open(f"/proc/{pid}/status") as file:
            found[int(next(line for line in file if line.startswith("NSpid")).split()[-1])] = pid
    return found


def frames(pid: int) -> dict[int, int]:
    """The page frames of its private writable mappings, by their addresses."""
    found = {}
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for one in mappings(pid):
            if str(one["perms"])[3] != "p" or str(one["path"]).startswith("[v"):
                continue
            count = (one["end"] - one["start"]) // PAGE
            entries = array.array("Q", os.pread(file.fileno(), 8 * count, one["start"] // PAGE * 8))
            found.update(
                (one["start"] + PAGE * index, entry & FRAME) for index, entry in enumerate(entries) if entry >> 63
            )
    return found


@pytest.fixture
def ends_all() -> Iterator[None]:
    keep = set(descendants(os.getpid()))
    yield
    end_descendants(keep)


def dumped(start: Targets, images: str, kind: str) -> tuple[Target, dict[int, dict]]:
    """A tree that was dumped, and what its memory was."""
    # The kernel writes to a restartable sequence's area whenever a task moves to another CPU.
    still = {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}
    if kind == "forked":
        target = start.python(FORKED, env=still)
    elif kind == "again":
        target = start.c(AGAIN, env=still)
    else:
        target = start.python(EXECUTED, compile_c(KINDS), env=still)
    before = memory_of({pid: pid for pid in target.pids()})
    torpor.dump(target.pid, images)
    target.wait_gone()
    return target, before


def without_wiped(memory: dict) -> dict:
    """What copies are to have: nothing in what a fork wipes."""
    for one in memory["mappings"].values():
        for page in range(one["start"], one["end"], PAGE) if "wf" in one["flags"].split() else ():
            memory["pages"].pop(f"{page:x}", None)
    return memory


@pytest.mark.parametrize("kind", ["forked", "executed", "again"])
def test_every_task_has_its_memory_and_shares_it(start: Targets, images: str, ends_all: None, kind: str) -> None:
    target, before = dumped(start, images, kind)
    state = host_state(images, target.folder)
    with torpor.template(images) as template:
        made = [template.clone() for _ in range(3)]
        copies = [tasks(copy.pid) for copy in made]
        for copy in copies:
            found = memory_of(copy)
            assert sorted(found) == sorted(before)
            for pid in before:
                assert diff(without_wiped(before[pid]), without_wiped(found[pid])) == []
        for pid in before:
            one, other = frames(copies[1][pid]), frames(copies[2][pid])
            assert len(one) > 10
            apart = [f"{at:x}" for at in one if other.get(at) != one[at]]
            # Small mappings, and those that are its parent's for the most part; what must not be inherited.
            assert len(apart) < (60 + len(one) // 4 if kind != "again" else 250), (pid, apart)
        for copy in made:
            copy.kill()
            copy.wait()
    assert diff(state, host_state(images, target.folder)) == []


def test_what_one_copy_writes_no_other_sees(start: Targets, images: str, ends_all: None) -> None:
    _, before = dumped(start, images, "forked")
    with torpor.template(images) as template:
        first, second = (tasks(template.clone().pid) for _ in range(2))
        for pid in before:
            places = [at for at in frames(first[pid]) if at % (64 * PAGE) == 0]
            assert places
            with open(f"/proc/{first[pid]}/mem", "r+b", buffering=0) as memory:
                for place in places:
                    os.pwrite(memory.fileno(), b"written by one copy", place)
        third = tasks(template.clone().pid)
    for copy in (second, third):
        found = memory_of(copy)
        assert [pid for pid in before if found[pid] != before[pid]] == []


def test_a_copy_of_a_tree_is_dumped_again(start: Targets, images: str, ends_all: None) -> None:
    _, before = dumped(start, images, "forked")
    again = os.path.join(images, "again")
    os.mkdir(again)
    with torpor.template(images) as template:
        copy = template.clone()
        torpor.dump(copy.pid, again)
        copy.wait()
    restored = torpor.restore(again, own_pids=True)
    found = memory_of(tasks(restored.pid))
    for pid in before:
        assert diff(before[pid], found[pid]) == []


def test_a_file_that_a_copy_has_for_itself_is_not_taken_from_the_template(
    start: Targets, images: str, ends_all: None
) -> None:
    """A private mapping of a file that lies in an overlay: what was not written to is seen through that of the copy."""
    target, before = dumped(start, images, "executed")
    with torpor.template(images) as template:
        copy = template.clone(overlay=[target.folder])
        found = memory_of(tasks(copy.pid))
    for pid in before:
        assert diff(without_wiped(before[pid])["pages"], without_wiped(found[pid])["pages"]) == []
        for place, one in before[pid]["mappings"].items():
            own = found[pid]["mappings"][place]
            concerned = one["path"].startswith(target.folder)
            assert diff(one, own, ("/file", "/path") if concerned else ()) == []
            assert (one["file"] != own["file"]) == concerned


# ------------------------------------------------------------------------------------------ the plan

Shape = st.recursive(st.just([]), lambda children: st.lists(children, max_size=4), max_leaves=12)
Lengths = st.lists(st.integers(1, 3 * TABLE_BYTES // PAGE), max_size=3)


@given(Shape, st.lists(Lengths, min_size=1, max_size=12))
def test_regions_hold_what_their_tasks_have(shape: list, lengths: list[list[int]]) -> None:
    every, wanted = [], {}

    def grow(children: list) -> SimpleNamespace:
        task = SimpleNamespace(pid=len(every) + 1, children=[])
        every.append(task)
        at = 0x1000_0000
        for pages in lengths[len(every) % len(lengths)]:
            wanted.setdefault(task.pid, []).append(SimpleNamespace(start=at, end=at + pages * PAGE))
            at += (pages + 1) * PAGE
        task.children = [grow(child) for child in children]
        return task

    root = grow(shape)
    shelf = Shelf()
    shelf.lay(root, wanted)
    shelf.place(1 << 40)

    def check(task: SimpleNamespace) -> list[tuple[int, int]]:
        own = [
            (shelf.base + offset, shelf.base + offset + entry.end - entry.start)
            for entry, offset in shelf.spots.get(task.pid, {}).values()
        ]
        parts = [check(child) for child in task.children]
        below = own + [span for part in parts for span in part]
        low, high = shelf.region(task)
        assert bool(below) == bool(high)
        assert all(low <= first and last <= high for first, last in below)
        return below

    everything = sorted(check(root))
    assert all(one[1] <= other[0] for one, other in pairwise(everything))
    assert all(shelf.base <= first and last <= shelf.base + shelf.size for first, last in everything)
    regions = sorted(shelf.region(child) for child in root.children if shelf.region(child)[1])
    assert all(one[1] <= other[0] for one, other in pairwise(regions))
    for spots in shelf.spots.values():
        for start, (entry, offset) in spots.items():
            if entry.end - start >= TABLE_BYTES:
                assert (shelf.base + offset - start) % TABLE_BYTES == 0
