"""io_uring: a program that uses one finds it as it left it, and what cannot be dumped is named."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest

import kit
import torpor
from kit import Target, Targets, assert_same, observe_settled, observe_tree
from kit.files import slurp_text
from kit.host import open_links

from .conftest import Survives

URING = slurp_text(os.path.join(os.path.dirname(kit.__file__), "uring.h"))

#: Rings have inodes of their own, whose numbers nobody can choose.
NUMBERS = ("/*/maps/*/file",)
SETUPS = {
    "plain": (8, "0"),
    "large": (1024, "IORING_SETUP_SUBMIT_ALL"),
    "cooperative": (16, "IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG"),
    "single": (8, "IORING_SETUP_SINGLE_ISSUER"),
    "deferred": (32, "IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN"),
    "wide": (8, "IORING_SETUP_SQE128 | IORING_SETUP_CQE32"),
    "no array": (8, "IORING_SETUP_NO_SQARRAY"),
    "single, no array": (4, "IORING_SETUP_NO_SQARRAY | IORING_SETUP_SINGLE_ISSUER"),
    "polled": (8, "IORING_SETUP_SQPOLL"),
}

# Nothing, something and everything left unreaped; entries that the kernel has not been told of; then all is used.
IDLE = URING + """
int main(int argc, char **argv)
{
	struct ring ring;
	struct io_uring_sqe sqe;
	unsigned entries = atoi(argv[1]), before = atoi(argv[2]), silent = atoi(argv[3]), unreaped, unsubmitted;
	char *page = malloc(5000);
	int file = MUST(open("data", O_RDWR | O_CREAT, 0600));
	(void)argc;

	ring_make(&ring, entries, SETUP);
	ring_nops(&ring, before);
	for (unsigned i = 0; i < silent; i++) {
		sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 0);
		sqe.flags = IOSQE_CQE_SKIP_SUCCESS;
		ring_push(&ring, &sqe);
		ring_submit(&ring, 1, 0);
	}
	unreaped = strcmp(argv[4], "all") ? (unsigned)atoi(argv[4]) : ring.cq_entries;
	for (unsigned i = 0; i < unreaped; i++) {
		sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 1000 + i);
		ring_push(&ring, &sqe);
		ring_submit(&ring, 1, 0);
	}
	unsubmitted = ring.setup & IORING_SETUP_SQPOLL ? 0 : atoi(argv[5]);
	fill(page, 5000, 7);
	for (unsigned i = 0; i < unsubmitted; i++) {
		sqe = ring_op(IORING_OP_WRITE, file, page + 100 * i, 100, 100 * i, 2000 + i);
		ring_push(&ring, &sqe);
	}
	if (ring.setup & IORING_SETUP_SQPOLL)
		while (*ring.sq_head != ring.submitted) usleep(1000);
	ring_check(&ring, unsubmitted, unreaped);
	ready();
	wait_told("go");

	ring_check(&ring, unsubmitted, unreaped);
	for (unsigned i = 0; i < unreaped; i++) {
		CHECK_EQ(ring_cqe(&ring, *ring.cq_head)->res, 0);
		CHECK_EQ(ring_reap(&ring).user_data, 1000 + i);
	}
	CHECK_EQ(ring_waiting(&ring), 0);
	if (unsubmitted)
		ring_submit(&ring, unsubmitted, unsubmitted);
	for (unsigned i = 0; i < unsubmitted; i++)
		CHECK_EQ(ring_reap(&ring).res, 100);
	memset(page, 0, 5000);
	CHECK_EQ(pread(file, page, 5000, 0), 100 * unsubmitted);
	CHECK(filled(page, 100 * unsubmitted, 7));
	ring_nops(&ring, 4 * entries + 3);
	sqe = ring_op(IORING_OP_WRITE, file, "more", 4, 0, 5);
	CHECK_EQ(ring_do(&ring, sqe), 4);
	sqe = ring_op(IORING_OP_READ, file, page, 4, 0, 6);
	CHECK_EQ(ring_do(&ring, sqe), 4);
	CHECK(!memcmp(page, "more", 4));
	ring_check(&ring, 0, 0);
	pass();
}
"""


def setup(name: str) -> tuple[str, tuple[str, ...]]:
    entries, flags = SETUPS[name]
    return str(entries), (f"-DSETUP=({flags})",)


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize(
    ("before", "silent", "unreaped", "unsubmitted"),
    [
        ("0", "0", "0", "0"),
        ("1", "0", "1", "1"),
        ("1234", "3", "0", "2"),
        ("77", "0", "all", "4"),
        ("5000", "500", "5", "0"),
    ],
)
def test_a_ring_is_as_it_was(
    survives: Survives, name: str, before: str, silent: str, unreaped: str, unsubmitted: str
) -> None:
    entries, flags = setup(name)
    polled = "SQPOLL" in flags[0]
    arguments = (entries, before, silent, unreaped, unsubmitted)
    survives(IDLE, *arguments, flags=flags, compare=not polled, ignore=NUMBERS)


REGISTERED = URING + """
struct ring ring;
static char *area;

static void use(int polled)
{
	struct io_uring_sqe sqe;
	char text[64];
	int other = MUST(open("other", O_RDWR | O_CREAT, 0600));

	memset(area + 4096, 'b', 4096);
	sqe = ring_op(IORING_OP_WRITE_FIXED, 2, area + 4096, 4096, 0, 1);  /* the file at place 2, the buffer at 1 */
	sqe.flags = IOSQE_FIXED_FILE;
	sqe.buf_index = 1;
	CHECK_EQ(ring_do(&ring, sqe), 4096);
	memset(area, 0, 4096);
	sqe = ring_op(IORING_OP_READ_FIXED, 2, area + 100, 1000, 50, 2);
	sqe.flags = IOSQE_FIXED_FILE;
	sqe.buf_index = 0;
	CHECK_EQ(ring_do(&ring, sqe), 1000);
	CHECK(area[99] == 0 && area[100] == 'b' && area[1099] == 'b' && area[1100] == 0);
	sqe.fd = 1;  /* an empty place */
	CHECK_EQ(ring_do(&ring, sqe), -EBADF);
	sqe.fd = 0;
	sqe.buf_index = 2;
	CHECK_EQ(ring_do(&ring, sqe), -EFAULT);
	sqe = ring_op(IORING_OP_READ, 0, text, 3, 0, 3);  /* the pipe at place 0 */
	sqe.flags = IOSQE_FIXED_FILE;
	CHECK_EQ(ring_do(&ring, sqe), 3);
	CHECK(!memcmp(text, "abc", 3));
	{
		struct { unsigned offset, reserved; uint64_t fds; } update = {1, 0, (uintptr_t)&other};

		CHECK_EQ(ring_register(&ring, IORING_REGISTER_FILES_UPDATE, &update, 1), 1);
	}
	sqe = ring_op(IORING_OP_WRITE, 1, "xyz", 3, 0, 4);
	sqe.flags = IOSQE_FIXED_FILE;
	CHECK_EQ(ring_do(&ring, sqe), 3);
	CHECK(pread(other, text, 64, 0) == 3 && !memcmp(text, "xyz", 3));
}

int main(void)
{
	int files[4] = {-1, -1, -1, -1}, pipes[2];
	struct iovec buffers[3];

	area = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(pipe(pipes));
	files[2] = MUST(open("data", O_RDWR | O_CREAT, 0600));
	files[0] = pipes[0];
	buffers[0] = (struct iovec){area, 4096};
	buffers[1] = (struct iovec){area + 4096, (1 << 20) - 4096};
	buffers[2] = (struct iovec){NULL, 0};
	ring_make(&ring, 16, SETUP);
	MUST(ring_register(&ring, IORING_REGISTER_FILES, files, 4));
	MUST(ring_register(&ring, IORING_REGISTER_BUFFERS, buffers, 3));
	ring_nops(&ring, 100);
	MUST(write(pipes[1], "abc", 3));
	ready();
	wait_told("go");
	use(1);
	MUST(ring_register(&ring, IORING_UNREGISTER_BUFFERS, NULL, 0));
	MUST(ring_register(&ring, IORING_UNREGISTER_FILES, NULL, 0));
	CHECK(ring_register(&ring, IORING_UNREGISTER_FILES, NULL, 0) == -1 && errno == ENXIO);
	pass();
}
"""


@pytest.mark.parametrize("name", ["plain", "single", "deferred", "polled"])
def test_registered_files_and_buffers(survives: Survives, name: str) -> None:
    # Buffers of a ring of one thread are not counted as the task's: it is not the task that has made the ring.
    pinned = ("/*/status/VmPin",) if name in ("single", "deferred") else ()
    survives(REGISTERED, flags=setup(name)[1], compare=name != "polled", ignore=(*NUMBERS, *pinned))


# What else can be said about what is registered: tags, which are told when it is given up; a range of places for new
# files; how many workers there may be.
TAGGED = URING + """
struct tagged { uint32_t count, flags; uint64_t reserved, data, tags; };
struct ring ring;

static void given_up(unsigned what, uint64_t one, uint64_t other)
{
	struct io_uring_cqe first, second;

	MUST(ring_register(&ring, what, NULL, 0));
	first = ring_reap(&ring);
	second = ring_reap(&ring);
	CHECK((first.user_data == one && second.user_data == other) || (first.user_data == other && second.user_data == one));
}

int main(void)
{
	char *area = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int files[4] = {-1, 0, -1, 0};
	unsigned workers[2] = {3, 5};
	struct { uint32_t first, count; uint64_t reserved; } range = {2, 2, 0};
	uint64_t file_tags[4] = {0, 11, 0, 33}, buffer_tags[2] = {44, 55};
	struct iovec buffers[2] = {{area, 4096}, {area + 4096, 4096}};
	struct tagged some_files = {4, 0, 0, (uintptr_t)files, (uintptr_t)file_tags};
	struct tagged some_buffers = {2, 0, 0, (uintptr_t)buffers, (uintptr_t)buffer_tags};
	struct io_uring_sqe sqe;

	files[1] = MUST(open("one", O_RDWR | O_CREAT, 0600));
	files[3] = MUST(open("two", O_RDWR | O_CREAT, 0600));
	ring_make(&ring, 16, SETUP);
	MUST(ring_register(&ring, 13, &some_files, sizeof(some_files)));  /* IORING_REGISTER_FILES2 */
	MUST(ring_register(&ring, 15, &some_buffers, sizeof(some_buffers)));  /* IORING_REGISTER_BUFFERS2 */
	MUST(ring_register(&ring, 25, &range, 0));  /* IORING_REGISTER_FILE_ALLOC_RANGE */
	MUST(ring_register(&ring, 19, workers, 2));  /* IORING_REGISTER_IOWQ_MAX_WORKERS */
	ready();
	wait_told("go");
	workers[0] = workers[1] = 0;
	MUST(ring_register(&ring, 19, workers, 2));
	CHECK_EQ(workers[0], 3);
	CHECK_EQ(workers[1], 5);
	sqe = ring_op(IORING_OP_OPENAT, AT_FDCWD, "new", 0600, 0, 7);
	sqe.open_flags = O_RDWR | O_CREAT;
	sqe.file_index = ~0u;  /* IORING_FILE_INDEX_ALLOC: the first one that is free, of those in the range */
	CHECK_EQ(ring_do(&ring, sqe), 2);
	given_up(IORING_UNREGISTER_BUFFERS, 44, 55);
	given_up(IORING_UNREGISTER_FILES, 11, 33);
	pass();
}
"""


@pytest.mark.parametrize("name", ["plain", "polled"])
def test_what_is_said_about_registered_things(survives: Survives, name: str) -> None:
    survives(TAGGED, flags=setup(name)[1], compare=name != "polled", ignore=NUMBERS)


EVENTFD = URING + """
int main(void)
{
	struct ring ring;
	uint64_t value;
	int event = MUST(eventfd(5, EFD_NONBLOCK));

	ring_make(&ring, 16, SETUP);
	ring_nops(&ring, 100);
	MUST(ring_register(&ring, KIND, &event, 1));
	ready();
	wait_told("go");
	CHECK_EQ(read(event, &value, 8), 8);
	CHECK_EQ(value, 5);
	ring_nops(&ring, 1);
	if (KIND == IORING_REGISTER_EVENTFD) {
		usleep(20000);
		CHECK_EQ(read(event, &value, 8), 8);
		CHECK_EQ(value, 1);
	} else
		CHECK(read(event, &value, 8) == -1 && errno == EAGAIN);
	CHECK(ring_register(&ring, KIND, &event, 1) == -1 && errno == EBUSY);
	pass();
}
"""


@pytest.mark.parametrize("name", ["plain", "single", "deferred", "polled"])
def test_a_registered_eventfd(survives: Survives, name: str) -> None:
    _, flags = setup(name)
    survives(EVENTFD, flags=(*flags, "-DKIND=IORING_REGISTER_EVENTFD"), compare=name != "polled", ignore=NUMBERS)


def test_an_eventfd_for_what_completes_later(survives: Survives) -> None:
    survives(EVENTFD, flags=(*setup("plain")[1], "-DKIND=IORING_REGISTER_EVENTFD_ASYNC"), ignore=NUMBERS)


LARGE = URING + """
int main(int argc, char **argv)
{
	struct ring ring;
	unsigned count = atoi(argv[1]), reaped = 0;
	(void)argc;

	ring_make(&ring, 4096, SETUP);
	*ring.sq_tail = count;
	memset((void *)ring.array, 0, 4 * ring.entries);
	while (reaped != count) {
		MUST(ring_enter(&ring, 4096, 0));
		reaped = *ring.cq_head = *ring.cq_tail;
	}
	ring.submitted = ring.reaped = count;
	for (unsigned i = 0; i < ring.entries; i++)
		ring.array[i] = i;
	ready();
	wait_told("go");
	ring_check(&ring, 0, 0);
	ring_nops(&ring, 10000);
	pass();
}
"""


@pytest.mark.parametrize("name", ["plain", "deferred", "polled"])
def test_large_counters(survives: Survives, name: str) -> None:
    survives(LARGE, "2000001", flags=setup(name)[1], compare=name != "polled", ignore=NUMBERS)


MANY = URING + """
#include <sys/epoll.h>

/* Rings that know of one another: two by the thread's own table, one with its thread shared, one watched by epoll. */
int main(void)
{
	struct ring a, b, c, d;
	struct { unsigned offset, reserved; uint64_t fd; } update = {7, 0, 0};
	struct io_uring_params attached = {.flags = IORING_SETUP_SQPOLL | IORING_SETUP_ATTACH_WQ, .sq_thread_idle = 50};
	int watch = MUST(epoll_create1(0)), copy;
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 77}, found;
	struct io_uring_sqe sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 55);

	ring_make(&a, 8, 0);
	ring_make(&b, 64, IORING_SETUP_SINGLE_ISSUER);
	ring_make(&c, 8, IORING_SETUP_SQPOLL);
	attached.wq_fd = c.fd;
	ring_open(&d, 4, &attached);
	ring_nops(&a, 10);
	ring_nops(&b, 2000);
	ring_nops(&c, 300);
	ring_nops(&d, 40);
	update.fd = a.fd;
	CHECK_EQ(ring_register(&a, IORING_REGISTER_RING_FDS, &update, 1), 1);
	a.enter_fd = 7;
	a.enter_flags = IORING_ENTER_REGISTERED_RING;
	update.offset = 2;
	update.fd = b.fd;
	CHECK_EQ(ring_register(&b, IORING_REGISTER_RING_FDS, &update, 1), 1);
	copy = MUST(dup(c.fd));
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, c.fd, &event));
	ready();
	wait_told("go");
	ring_nops(&a, 10);
	b.enter_fd = 2;
	b.enter_flags = IORING_ENTER_REGISTERED_RING;
	ring_nops(&b, 10);
	ring_nops(&d, 10);
	CHECK_EQ(epoll_wait(watch, &found, 1, 0), 0);
	ring_push(&c, &sqe);
	ring_submit(&c, 1, 0);
	CHECK_EQ(epoll_wait(watch, &found, 1, 5000), 1);
	CHECK_EQ(found.data.u64, 77);
	CHECK_EQ(ring_reap(&c).user_data, 55);
	c.fd = c.enter_fd = copy;
	ring_nops(&c, 10);
	{
		char text[4096] = "", path[64];
		int one, other;

		snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", c.fd);
		CHECK(read(MUST(open(path, O_RDONLY)), text, sizeof(text) - 1) > 0);
		one = atoi(strstr(text, "SqThread:") + 9);
		snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", d.fd);
		CHECK(read(MUST(open(path, O_RDONLY)), text, sizeof(text) - 1) > 0);
		other = atoi(strstr(text, "SqThread:") + 9);
		CHECK(one > 0);
		CHECK_EQ(one, other);
	}
	pass();
}
"""


def test_several_rings(survives: Survives) -> None:
    survives(MANY, compare=False)


THREADS = URING + """
struct ring rings[3];

static void *work(void *argument)
{
	struct ring *ring = argument;

	ring_make(ring, 16, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
	ring_nops(ring, 1000 + (ring - rings));
	tell(ring == rings ? "t0" : ring == rings + 1 ? "t1" : "t2", "");
	wait_told("go");
	ring_check(ring, 0, 0);
	ring_nops(ring, 1000);
	return NULL;
}

int main(void)
{
	pthread_t threads[3];

	for (int i = 0; i < 3; i++)
		pthread_create(&threads[i], NULL, work, &rings[i]);
	wait_told("t0");
	wait_told("t1");
	wait_told("t2");
	CHECK_EQ(ring_enter(&rings[0], 0, 0), -1);
	CHECK_EQ(errno, EEXIST);
	ready();
	wait_told("go");
	CHECK_EQ(ring_enter(&rings[0], 0, 0), -1);
	CHECK_EQ(errno, EEXIST);
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	pass();
}
"""


def test_a_ring_for_each_thread(survives: Survives) -> None:
    survives(THREADS, ignore=NUMBERS)


FAMILY = URING + """
/* A ring made before a fork is used by parent and child in turn; the child makes another one. */
int main(void)
{
	struct ring shared, own;
	pid_t child;

	ring_make(&shared, 8, 0);
	ring_nops(&shared, 100);
	child = MUST(fork());
	if (child == 0) {
		ring_make(&own, 16, IORING_SETUP_SINGLE_ISSUER);
		ring_nops(&own, 50);
		tell("child", "");
		wait_told("go");
		ring_nops(&own, 50);
		ring_nops(&shared, 20);
		_exit(7);
	} else {
		int status;

		wait_told("child");
		ready();
		wait_told("go");
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK_EQ(status, 7 << 8);
		shared.submitted += 20;
		shared.reaped += 20;
		ring_check(&shared, 0, 0);
		ring_nops(&shared, 30);
		pass();
	}
}
"""


def test_a_ring_shared_by_a_family(survives: Survives) -> None:
    survives(FAMILY, ignore=NUMBERS)


OVERFLOW = URING + """
int main(void)
{
	struct ring ring;
	struct io_uring_sqe sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 0);

	ring_make(&ring, 4, 0);
	ring_nops(&ring, 10);
	for (unsigned i = 0; i < ring.cq_entries + 3; i++) {
		sqe.user_data = 100 + i;
		ring_push(&ring, &sqe);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		CHECK_EQ(syscall(__NR_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0), 1);
	}
	CHECK(*ring.sq_flags & IORING_SQ_CQ_OVERFLOW);
	ready();
	wait_told("go");
	CHECK(*ring.sq_flags & IORING_SQ_CQ_OVERFLOW);
	CHECK_EQ(ring_waiting(&ring), ring.cq_entries);
	for (unsigned i = 0; i < ring.cq_entries; i++)
		CHECK_EQ(ring_reap(&ring).user_data, 100 + i);
	CHECK_EQ(ring_enter(&ring, 0, 0), 0);
	CHECK_EQ(ring_waiting(&ring), 3);
	for (unsigned i = 0; i < 3; i++)
		CHECK_EQ(ring_reap(&ring).user_data, 100 + ring.cq_entries + i);
	CHECK(!(*ring.sq_flags & IORING_SQ_CQ_OVERFLOW));
	pass();
}
"""


def test_completions_that_did_not_fit(survives: Survives) -> None:
    survives(OVERFLOW, ignore=NUMBERS)


# ------------------------------------------------------------------------------- requests under way

WRITES = URING + """
int main(void)
{
	struct ring ring;
	struct io_uring_sqe sqe;
	char *data = malloc(64 << 16);
	int file = MUST(open("data", O_RDWR | O_CREAT, 0600)), seen = 0;

	fill(data, 64 << 16, 3);
	ring_make(&ring, 64, SETUP);
	for (int i = 0; i < 64; i++) {
		sqe = ring_op(IORING_OP_WRITE, file, data + (i << 16), 1 << 16, (uint64_t)i << 16, i);
		sqe.flags = IOSQE_ASYNC;
		ring_push(&ring, &sqe);
	}
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	CHECK_EQ(syscall(__NR_io_uring_enter, ring.fd, 64, 0, 0, NULL, 0), 64);
	ring.submitted = 64;
	ready();
	wait_told("go");
	MUST(ring_enter(&ring, 0, 64));
	while (seen < 64) {
		CHECK_EQ(ring_reap(&ring).res, 1 << 16);
		seen++;
	}
	memset(data, 0, 64 << 16);
	CHECK_EQ(pread(file, data, 64 << 16, 0), 64 << 16);
	CHECK(filled(data, 64 << 16, 3));
	ring_nops(&ring, 100);
	pass();
}
"""


@pytest.mark.parametrize("name", ["plain", "deferred"])
def test_writes_that_are_under_way_end_first(survives: Survives, name: str) -> None:
    survives(WRITES, flags=setup(name)[1], compare=False)


OPENING = URING + """
/* A worker of the kernel sits in open(2) of a pipe until somebody writes to it; the program waits for that. */
int main(void)
{
	struct ring ring;
	char text[8] = "";
	struct io_uring_sqe sqe = ring_op(IORING_OP_OPENAT, AT_FDCWD, "pipe", 0, 0, 42);
	struct io_uring_cqe cqe;

	sqe.flags = IOSQE_ASYNC;
	ring_make(&ring, 8, SETUP);
	ring_nops(&ring, 20);
	ring_push(&ring, &sqe);
	ring_submit(&ring, 1, 0);
	ready();
	CHECK_EQ(ring_enter(&ring, 0, 1), 0);  /* no EINTR */
	CHECK_EQ(ring_waiting(&ring), 1);
	cqe = ring_reap(&ring);
	CHECK_EQ(cqe.user_data, 42);
	CHECK(cqe.res > 0);
	CHECK_EQ(read(cqe.res, text, 3), 3);
	CHECK(!memcmp(text, "abc", 3));
	wait_told("go");
	ring_nops(&ring, 20);
	pass();
}
"""


def pipe_reader(start: Targets, name: str) -> Target:
    target = start.c(OPENING, flags=setup(name)[1], wait=False, setup=lambda: os.mkfifo("pipe"))
    target.wait_ready()
    return target


@pytest.mark.parametrize("name", ["plain", "deferred"])
def test_a_request_that_ends_while_the_dump_waits(start: Targets, images: str, name: str) -> None:
    target = pipe_reader(start, name)
    pipes: list[int] = []
    writer = threading.Timer(1.0, lambda: pipes.append(write_to(target.path("pipe"))))
    writer.start()
    began = time.monotonic()
    try:
        torpor.dump(target.pid, images)
        assert 0.5 < time.monotonic() - began < 10
    finally:
        writer.join()
    target.wait_gone()
    torpor.restore(images)
    target.go()
    os.close(pipes[0])


def write_to(path: str) -> int:
    """Returns what keeps the pipe, and what is in it, alive."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(fd, b"abc")
    return fd


@pytest.mark.parametrize("name", ["plain", "deferred", "polled"])
def test_a_request_that_does_not_end(start: Targets, images: str, name: str) -> None:
    target = pipe_reader(start, name)
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    assert "io_uring" in str(caught.value) and "1 requests" in str(caught.value), caught.value
    assert not os.listdir(images)
    pipe = write_to(target.path("pipe"))
    target.go()
    os.close(pipe)


POLLS = URING + """
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct ring ring;
	struct __kernel_timespec long_time = {1000, 0};
	char text[8] = "";
	int pair[2];
	struct io_uring_sqe sqe;
	struct io_uring_cqe cqe;
	(void)argc;

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	ring_make(&ring, 8, 0);
	if (!strcmp(argv[1], "poll_add")) {
		sqe = ring_op(IORING_OP_POLL_ADD, pair[0], NULL, 0, 0, 42);
		sqe.poll_events = POLLIN;
	} else if (!strcmp(argv[1], "recv"))
		sqe = ring_op(IORING_OP_RECV, pair[0], text, 3, 0, 42);
	else
		sqe = ring_op(IORING_OP_TIMEOUT, -1, &long_time, 1, 1, 42);
	ring_push(&ring, &sqe);
	ring_submit(&ring, 1, 0);
	ready();
	wait_told("go");
	CHECK_EQ(ring_waiting(&ring), 0);
	if (!strcmp(argv[1], "timeout")) {
		sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 1);  /* as many completions as it waits for */
		ring_push(&ring, &sqe);
		ring_submit(&ring, 1, 1);
		CHECK_EQ(ring_reap(&ring).user_data, 1);
	} else
		MUST(write(pair[1], "abc", 3));
	CHECK_EQ(ring_enter(&ring, 0, 1), 0);
	cqe = ring_reap(&ring);
	CHECK_EQ(cqe.user_data, 42);
	CHECK(cqe.res >= 0);
	pass();
}
"""


@pytest.mark.parametrize("name", ["poll_add", "recv", "timeout"])
def test_what_waits_for_an_event_goes_on_waiting(survives: Survives, name: str) -> None:
    survives(POLLS, name, ignore=NUMBERS)


WAITER = URING + """
struct ring ring;

static void *wait_for_it(void *unused)
{
	CHECK_EQ(ring_enter(&ring, 0, 1), 0);
	CHECK_EQ(ring_waiting(&ring), 1);
	return unused;
}

int main(void)
{
	struct io_uring_sqe sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 42);
	pthread_t thread;

	ring_make(&ring, 8, 0);
	pthread_create(&thread, NULL, wait_for_it, NULL);
	usleep(100000);
	ready();
	wait_told("go");
	ring_push(&ring, &sqe);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	CHECK_EQ(syscall(__NR_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0), 1);
	pthread_join(thread, NULL);
	CHECK_EQ(ring_reap(&ring).user_data, 42);
	pass();
}
"""


def test_a_thread_that_waits_for_a_completion_goes_on_waiting(survives: Survives) -> None:
    survives(WAITER, ignore=NUMBERS)


# ----------------------------------------------------------------------------------- what is refused

REFUSED = URING + """
#ifndef IORING_REGISTER_PBUF_RING
#define IORING_REGISTER_PBUF_RING 22
#endif

int main(int argc, char **argv)
{
	struct ring ring;
	const char *what = argv[1];
	(void)argc;

	if (!strcmp(what, "restricted")) {
		struct io_uring_restriction only = {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_NOP};

		ring_make(&ring, 8, IORING_SETUP_R_DISABLED);
		MUST(ring_register(&ring, IORING_REGISTER_RESTRICTIONS, &only, 1));
		MUST(ring_register(&ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0));
	} else if (!strcmp(what, "credentials")) {
		ring_make(&ring, 8, 0);
		MUST(ring_register(&ring, IORING_REGISTER_PERSONALITY, NULL, 0));
	} else if (!strcmp(what, "provided")) {
		struct { uint64_t ring; uint32_t entries; uint16_t group, flags; uint64_t more[3]; } buffers = {
			(uintptr_t)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 8, 1, 0, {0}};

		ring_make(&ring, 8, 0);
		MUST(ring_register(&ring, IORING_REGISTER_PBUF_RING, &buffers, 1));
	} else if (!strcmp(what, "nowhere else")) {
		int file = MUST(open("data", O_RDWR | O_CREAT, 0600));

		ring_make(&ring, 8, 0);
		MUST(ring_register(&ring, IORING_REGISTER_FILES, &file, 1));
		close(file);
	} else if (!strcmp(what, "share it")) {
		ring_make(&ring, 8, IORING_SETUP_SINGLE_ISSUER);
		if (MUST(fork()) == 0)
			for (;;) pause();
	} else if (!strcmp(what, "descriptor")) {
		ring_make(&ring, 8, 0);
		close(ring.fd);
	}
	ready();
	wait_told("go");
	pass();
}
"""


@pytest.mark.parametrize("what", ["restricted", "credentials", "provided", "nowhere else", "share it", "descriptor"])
def test_what_cannot_be_dumped_is_named(start: Targets, images: str, what: str) -> None:
    target = start.c(REFUSED, what)
    before = observe_settled(target.pid)
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    text = str(caught.value)
    word = {"restricted": "restrictions", "provided": "provided"}.get(what, what)
    assert "io_uring" in text and word in text, text
    assert not os.listdir(images)
    assert_same(before, observe_tree(target.pid))
    target.go()


UNMAPPED = URING + """
/* Nobody could see from the mappings that there is a ring, and that a request is under way. */
int main(void)
{
	struct ring ring;
	struct io_uring_sqe sqe = ring_op(IORING_OP_OPENAT, AT_FDCWD, "pipe", 0, 0, 42);

	sqe.flags = IOSQE_ASYNC;
	MUST(mkfifo(kit_path("pipe"), 0600));
	ring_make(&ring, 8, 0);
	ring_push(&ring, &sqe);
	ring_submit(&ring, 1, 0);
	munmap(ring.memory, ring.memory_size);
	munmap(ring.entry_memory, ring.entry_memory_size);
	ready();
	wait_told("go");
	pass();
}
"""


def test_a_busy_ring_that_is_not_mapped(start: Targets, images: str) -> None:
    target = start.c(UNMAPPED)
    with pytest.raises(torpor.Unsupported, match="under way"):
        torpor.dump(target.pid, images)
    target.go()


POWERLESS = URING + """
#include <linux/capability.h>

/* The thread that polls a ring has the credentials of the program, also afterwards. */
static int attempt(struct ring *ring)
{
	struct io_uring_sqe sqe = ring_op(IORING_OP_OPENAT, AT_FDCWD, "secret", 0, 0, 9);

	sqe.open_flags = O_RDONLY;
	return ring_do(ring, sqe);
}

int main(void)
{
	struct ring ring;
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct none[2] = {{0}};
	int secret = MUST(open("secret", O_RDWR | O_CREAT, 0600));

	MUST(fchown(secret, 12345, 12345));
	MUST(syscall(SYS_capset, &header, none));
	ring_make(&ring, 8, SETUP);
	CHECK_EQ(attempt(&ring), -EACCES);
	ready();
	wait_told("go");
	CHECK_EQ(attempt(&ring), -EACCES);
	pass();
}
"""


@pytest.mark.parametrize("name", ["polled", "plain"])
def test_a_ring_has_no_more_rights_than_its_program(survives: Survives, name: str) -> None:
    survives(POWERLESS, flags=setup(name)[1], compare=False)


# --------------------------------------------------------------------------------- a program of others

NODE = """
const fs = require('fs').promises;
let rounds = 0;

async function turn(until) {
  while (!await until()) {
    await fs.writeFile('data', `round ${rounds}`);
    if (await fs.readFile('data', 'utf8') !== `round ${rounds}`) throw new Error(`round ${rounds}`);
    rounds++;
    await new Promise((resume) => setTimeout(resume, 10));
  }
}

const there = (path) => fs.access(path).then(() => true, () => false);

async function main() {
  await turn(() => rounds > 20);
  await fs.writeFile('ready', '');
  await turn(() => there('go'));
  const before = rounds;
  await turn(() => rounds > before + 20);
  await fs.writeFile('result.new', 'pass\\n');
  await fs.rename('result.new', 'result');
}

main().catch(async (error) => fs.writeFile('result', `${error.stack}\\n`));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="apt-get install nodejs")
def test_node_that_reads_and_writes_all_the_time(start: Targets, images: str) -> None:
    """libuv has a ring with SQPOLL for files and one for changes to its epoll, for each event loop."""
    target = start.command("node", "-e", NODE, env={"UV_USE_IO_URING": "1"})
    target.wait_file("ready", timeout=60)
    links = open_links(target.pid)
    if "anon_inode:[io_uring]" not in links:
        pytest.skip("this build of Node.js does without io_uring")
    for number in range(2):
        folder = os.path.join(images, str(number))
        os.mkdir(folder)
        torpor.dump(target.pid, folder)
        target.wait_gone()
        torpor.restore(folder)
    target.go(timeout=60)
