"""Rings that lie in the program's own memory (IORING_SETUP_NO_MMAP), as databases with many processes have them."""

from __future__ import annotations

import os

import pytest

import kit
import torpor
from kit import Targets, assert_same, observe_settled, observe_tree
from kit.files import slurp_text

from .conftest import Survives, copies_end_well

URING = slurp_text(os.path.join(os.path.dirname(kit.__file__), "uring.h"))

# One area for several rings, each used by another process; whoever looks may reap for another. How the area is made, and
# where in it the first ring begins, is the argument.
FAMILY = URING + """
#include <sys/mman.h>
#define RINGS 3
#define EACH 16384
static struct ring *rings;

static char *area(const char *how)
{
	size_t size = 4 << 20;
	int fd = -1;
	char *all;

	if (!strcmp(how, "memfd")) {
		fd = MUST(memfd_create("rings", 0));
		MUST(ftruncate(fd, size));
	}
	all = mmap(NULL, size, PROT_READ | PROT_WRITE,
		   MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0) | (!strcmp(how, "huge") ? MAP_HUGETLB : 0), fd, 0);
	CHECK(all != MAP_FAILED);
	if (fd >= 0)
		close(fd);
	memset(all, 0x5a, 3 * 4096);
	memset(all + 3 * 4096 + RINGS * EACH, 0x5a, 4096);
	rings = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	return all + 3 * 4096;
}

static void unread(struct ring *ring, unsigned count)
{
	struct io_uring_sqe sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 77);

	for (unsigned i = 0; i < count; i++)
		ring_push(ring, &sqe);
	ring_submit(ring, count, count);
}

int main(int argc, char **argv)
{
	char *start = area(argv[1]);
	int file = MUST(open("data", O_RDWR | O_CREAT, 0600)), status;
	pid_t children[RINGS];

	for (int i = 0; i < RINGS; i++) {
		memset(start + i * EACH, 0, EACH);
		ring_make_in(&rings[i], 8, i == 2 ? IORING_SETUP_NO_SQARRAY : 0, start + i * EACH + 4096, start + i * EACH);
	}
	for (int i = 0; i < RINGS; i++)
		if ((children[i] = MUST(fork())) == 0) {
			char name[] = "child0";

			name[5] += i;
			ring_nops(&rings[i], 100 * i + 1000);
			unread(&rings[i], 3);
			tell(name, "");
			wait_told("go");
			ring_check(&rings[i], 0, 3);
			for (int j = 0; j < 3; j++) {
				struct io_uring_cqe cqe = ring_reap(&rings[i]);

				CHECK_EQ(cqe.user_data, 77);
				CHECK_EQ(cqe.res, 0);
			}
			ring_nops(&rings[i], 300);
			CHECK_EQ(ring_do(&rings[i], ring_op(IORING_OP_WRITE, file, "text", 4, 4 * i, 5)), 4);
			_exit(7);
		}
	wait_told("child0"); wait_told("child1"); wait_told("child2");
	ready();
	wait_told("go");
	for (int i = 0; i < RINGS; i++) {
		CHECK_EQ(waitpid(children[i], &status, 0), children[i]);
		CHECK_EQ(status, 7 << 8);
		ring_nops(&rings[i], 20);
	}
	CHECK_EQ(lseek(file, 0, SEEK_END), 4 * RINGS);
	for (int i = 0; i < 3 * 4096; i++)
		CHECK_EQ(start[i - 3 * 4096], 0x5a);
	for (int i = 0; i < 4096; i++)
		CHECK_EQ(start[RINGS * EACH + i], 0x5a);
	if (argc > 2)  /* one of many */
		exit(42);
	pass();
}
"""


@pytest.fixture
def huge_pages() -> None:
    path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    with open(path) as file:
        before = file.read()
    with open(path, "w") as file:
        file.write("16")
    yield
    with open(path, "w") as file:
        file.write(before)


@pytest.mark.parametrize("how", ["plain", "memfd", "huge"])
def test_rings_in_memory_that_a_family_shares(survives: Survives, huge_pages: None, how: str) -> None:
    # Shared huge pages come back as a memfd of some, and are counted where they are touched.
    survives(FAMILY, how, ignore=("/*/HugetlbPages", "/*/maps/*/path") if how == "huge" else ())


def test_each_copy_has_such_rings_of_its_own(start: Targets, images: str) -> None:
    copies_end_well(start.c(FAMILY, "plain", "copies"), images)


REFUSED = URING + """
int main(int argc, char **argv)
{
	struct ring ring;
	int shared = strcmp(argv[1], "not shared") ? MAP_SHARED : MAP_PRIVATE, pipes[2];
	char *memory = mmap(NULL, 16384, PROT_READ | PROT_WRITE, shared | MAP_ANONYMOUS, -1, 0), byte;
	struct iovec buffer = {memory + 8192, 4096};
	struct io_uring_sqe sqe;

	(void)argc;
	ring_make_in(&ring, 8, strcmp(argv[1], "one thread") ? 0 : IORING_SETUP_SINGLE_ISSUER, memory + 4096, memory);
	if (!strcmp(argv[1], "registered buffers"))
		MUST(syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1));
	if (!strcmp(argv[1], "own memory")) {
		MUST(pipe(pipes));
		sqe = ring_op(IORING_OP_READ, pipes[0], &byte, 1, 0, 1);
		ring_push(&ring, &sqe);
		ring_submit(&ring, 1, 0);
	}
	ready();
	wait_told("go");
	pass();
}
"""


@pytest.mark.parametrize("what", ["not shared", "one thread", "registered buffers", "own memory"])
def test_what_is_not_supported_is_named(start: Targets, images: str, what: str) -> None:
    target = start.c(REFUSED, what)
    before = observe_settled(target.pid)
    with pytest.raises(torpor.Unsupported, match=f"io_uring.*{what}"):
        torpor.dump(target.pid, images)
    assert not os.listdir(images)
    assert_same(before, observe_tree(target.pid))
    target.go()
