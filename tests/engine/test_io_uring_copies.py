"""Copies of a template whose program has io_urings: each has rings of its own, as they were, and nobody else's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

import kit
import torpor
from kit import Target, Targets
from kit.files import slurp_text
from kit.host import open_links
from kit.talk import Talk, snapshot_of

from .test_io_uring import NODE

URING = slurp_text(os.path.join(os.path.dirname(kit.__file__), "uring.h"))

# Four rings, of the builder, of a thread and of the task. In one of them requests wait for a pipe, an eventfd and their
# time; completions have not been reaped, entries have not been submitted, files and buffers are registered. Answers each
# number N on its standard input: uses all of it with N, and says what came of it.
RINGS = URING + """
static struct ring plain, single, polled, waits;
static char *area, from_pipe[8];
static int file, pipes[2], event;

static unsigned completions(void)
{
	ring_enter(&waits, 0, 0);
	return ring_waiting(&waits);
}

static void take(uint64_t user_data, int result)
{
	struct io_uring_cqe cqe;

	for (int i = 0; i < 5000 && !completions(); i++)
		usleep(1000);
	cqe = ring_reap(&waits);
	CHECK_EQ(cqe.user_data, user_data);
	CHECK_EQ(cqe.res, result);
}

static struct io_uring_sqe fixed(int opcode, int place, unsigned length, int offset)
{
	struct io_uring_sqe sqe = ring_op(opcode, place, area + 4096, length, offset, 9);

	sqe.flags = IOSQE_FIXED_FILE;
	sqe.buf_index = 1;
	return sqe;
}

static void answer(unsigned number)
{
	char text[8] = "";
	uint64_t value = number;

	ring_check(&plain, 2, 1);
	CHECK_EQ(ring_reap(&plain).user_data, 77);
	ring_submit(&plain, 2, 2);  /* what had not been submitted: 3 bytes for the file */
	CHECK_EQ(ring_reap(&plain).res + ring_reap(&plain).res, 3);
	CHECK(pread(file, text, 8, 0) == 3 && !memcmp(text, "ent", 3));

	memcpy(area + 4096, &number, 4);
	CHECK_EQ(ring_do(&polled, fixed(IORING_OP_WRITE_FIXED, 2, 4, 16)), 4);
	memset(area + 4096, 0, 4);
	CHECK_EQ(ring_do(&single, fixed(IORING_OP_READ_FIXED, 2, 4, 16)), 4);
	CHECK(!memcmp(area + 4096, &number, 4));
	ring_nops(&single, 100);

	CHECK_EQ(completions(), 0);
	MUST(write(event, &value, 8));
	take(2, POLLIN);
	MUST(read(event, &value, 8));
	CHECK_EQ(value, number);
	snprintf(text, 8, "%u", number);
	MUST(write(pipes[1], text, strlen(text)));
	take(1, strlen(text));
	take(3, -ECANCELED);  /* the timeout goes with what it stood behind */
	printf("[%u, b'%s', %d]\\n", number, from_pipe, *waits.cq_head);
	fflush(stdout);
}

int main(void)
{
	struct __kernel_timespec hour = {3600, 0};
	struct io_uring_sqe sqe;
	int files[3] = {-1, -1, -1};
	struct iovec buffers[2];
	unsigned number;

	area = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	file = files[2] = MUST(syscall(__NR_memfd_create, "file", 0));
	buffers[0] = (struct iovec){area, 4096};
	buffers[1] = (struct iovec){area + 4096, 4096};
	MUST(pipe(pipes));
	event = MUST(eventfd(0, 0));
	ring_make(&plain, 8, 0);
	ring_make(&single, 8, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
	ring_make(&polled, 8, IORING_SETUP_SQPOLL);
	ring_make(&waits, 16, KIND);
	MUST(ring_register(&single, IORING_REGISTER_FILES, files, 3));
	MUST(ring_register(&single, IORING_REGISTER_BUFFERS, buffers, 2));
	MUST(ring_register(&polled, IORING_REGISTER_FILES, files, 3));
	MUST(ring_register(&polled, IORING_REGISTER_BUFFERS, buffers, 2));
	ring_nops(&plain, 1000);
	ring_nops(&single, 10);
	ring_nops(&polled, 10);
	sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 77);
	ring_push(&plain, &sqe);
	ring_submit(&plain, 1, 1);
	sqe = ring_op(IORING_OP_WRITE, file, "ent", 3, 0, 5);
	ring_push(&plain, &sqe);
	sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 6);
	ring_push(&plain, &sqe);
	sqe = ring_op(IORING_OP_READ, pipes[0], from_pipe, 8, 0, 1);
	sqe.flags = IOSQE_IO_LINK;
	ring_push(&waits, &sqe);
	sqe = ring_op(IORING_OP_LINK_TIMEOUT, -1, &hour, 1, 0, 3);
	ring_push(&waits, &sqe);
	sqe = ring_op(IORING_OP_POLL_ADD, event, NULL, 0, 0, 2);
	sqe.poll32_events = POLLIN;
	ring_push(&waits, &sqe);
	ring_submit(&waits, 3, 0);
	ready();
	wait_told("go");
	while (scanf("%u", &number) == 1)
		answer(number);
	exit(3);
}
"""
KINDS = {"plain": "0", "deferred": "IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN"}


@pytest.fixture(params=KINDS)
def snapshot(start: Targets, images: str, request: pytest.FixtureRequest) -> Iterator[Target]:
    """The program's snapshot is in ``images``; everything that is woken from it is ended."""
    target = start.c(RINGS, flags=(f"-DKIND=({KINDS[request.param]})",))
    with snapshot_of(target, images):
        yield target


def test_each_copy_has_rings_of_its_own(snapshot: Target, images: str) -> None:
    """What one submits, or makes another wait for, shows in none of the others."""
    with torpor.template(images) as template:
        copies = [Talk(template) for _ in range(12)]
    for number, copy in enumerate(copies, 1000):
        assert copy.ask(str(number)) == [number, b"%d" % number, 3], snapshot.read("result")
    assert [copy.end() for copy in copies] == [3] * len(copies)


def test_rings_of_a_copy_with_another_pid(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        copies = [Talk(template, fresh_pid=True) for _ in range(3)] + [Talk(template)]
    for number, copy in enumerate(copies, 1000):
        assert copy.ask(str(number)) == [number, b"%d" % number, 3], snapshot.read("result")
    assert [copy.end() for copy in copies] == [3] * len(copies)


@pytest.mark.skipif(shutil.which("node") is None, reason="apt-get install nodejs")
def test_copies_of_node_each_with_files_of_its_own(start: Targets, images: str, ends_all: None) -> None:
    """Caught in the middle of reading and writing by its rings; each goes on with that in an overlay."""
    target = start.command("node", "-e", NODE, env={"UV_USE_IO_URING": "1"})
    target.wait_file("ready", timeout=60)
    links = open_links(target.pid)
    if "anon_inode:[io_uring]" not in links:
        pytest.skip("this build of Node.js does without io_uring")
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    place = os.path.join(start.folder, "upper")
    os.mkdir(place)
    with torpor.template(images) as template:
        copies = [
            template.clone(overlay=[target.folder], overlay_upper=place, overlay_keep=True) for _ in range(3)
        ]  # fmt: skip
    for copy in copies:
        assert copy.wait() == 0
        assert slurp_text(f"{copy.written_to}/1/upper/result") == "pass\n"
    assert not os.path.exists(target.path("result"))
