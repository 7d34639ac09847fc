"""Programs that take care of their own page faults go on doing so."""

from __future__ import annotations

import pytest

from kit import Library, Targets
from torpor.errors import Unsupported

from .conftest import Survives

HEAD = """
#include <linux/userfaultfd.h>
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define PAGE 4096ul

static int make(int flags, unsigned long features)
{
	struct uffdio_api api = {UFFD_API, features, 0};
	int fd = MUST(syscall(SYS_userfaultfd, flags));

	MUST(ioctl(fd, UFFDIO_API, &api));
	return fd;
}

static void serve(int fd, char *start, size_t size, int mode)
{
	struct uffdio_register reg = {{(unsigned long)start, size}, mode, 0};

	MUST(ioctl(fd, UFFDIO_REGISTER, &reg));
}

static char *room(size_t pages)
{
	char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	MUST(madvise(memory, pages * PAGE, MADV_NOHUGEPAGE));
	return memory;
}

static void guard(int fd, char *start, size_t pages, int on)
{
	struct uffdio_writeprotect wp = {{(unsigned long)start, pages * PAGE}, on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};

	MUST(ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
}
"""

MISSING = (
    HEAD
    + """
static int fd;
static char *memory;
static volatile int faults, answering = 1, waits;

static void *monitor(void *arg)
{
	static char page[PAGE] __attribute__((aligned(4096)));
	struct uffd_msg message;

	for (;;) {
		struct pollfd one = {fd, POLLIN, 0};

		if (!answering) {
			usleep(1000);
			continue;
		}
		if (poll(&one, 1, 5) != 1 || read(fd, &message, sizeof(message)) != sizeof(message))
			continue;
		CHECK_EQ(message.event, UFFD_EVENT_PAGEFAULT);
		unsigned long at = message.arg.pagefault.address & -PAGE, index = (at - (unsigned long)memory) / PAGE;
		__sync_fetch_and_add(&faults, 1);
		memset(page, 'a' + index, PAGE);
		struct uffdio_copy copy = {at, (unsigned long)page, PAGE, 0, 0};
		struct uffdio_zeropage zero = {{at, PAGE}, 0, 0};
		MUST(index == 5 ? ioctl(fd, UFFDIO_ZEROPAGE, &zero) : ioctl(fd, UFFDIO_COPY, &copy));
	}
	return NULL;
}

static void *blocked(void *arg)
{
	char *at = arg;

	waits = 1;
	return (void *)(long)*(volatile char *)at;
}

int main(void)
{
	pthread_t thread, other;
	void *value;
	char *large;
	int bare;

	fd = make(O_CLOEXEC | O_NONBLOCK, UFFD_FEATURE_THREAD_ID);
	MUST(dup2(fd, 77));
	bare = MUST(syscall(SYS_userfaultfd, 0));  /* nothing was agreed on with it */
	large = room(2048);  /* is brought in by a userfaultfd of the restore's own */
	memset(large, 'l', 2048 * PAGE);
	serve(fd, large, 2048 * PAGE, UFFDIO_REGISTER_MODE_MISSING);
	memory = room(16);
	memory[14 * PAGE] = 'x';  /* there before it is registered */
	serve(fd, memory, 16 * PAGE, UFFDIO_REGISTER_MODE_MISSING);
	pthread_create(&thread, NULL, monitor, NULL);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(memory[i * PAGE + 7], 'a' + i);
	CHECK_EQ(*(volatile char *)(memory + 5 * PAGE), 0);
	CHECK_EQ(faults, 5);
	answering = 0;
	usleep(20000);
	pthread_create(&other, NULL, blocked, memory + 8 * PAGE);
	while (!waits)
		usleep(1000);
	usleep(50000);
	ready();
	wait_told("go");
	for (int i = 0; i < 4; i++)
		CHECK_EQ(memory[i * PAGE + 9], 'a' + i);
	CHECK_EQ(memory[14 * PAGE], 'x');
	for (int i = 0; i < 2048; i++)
		CHECK_EQ(large[i * PAGE], 'l');
	CHECK_EQ(*(volatile char *)(memory + 5 * PAGE + 8), 0);
	memory[5 * PAGE] = 'w';
	CHECK_EQ(faults, 5);
	answering = 1;
	MUST(pthread_join(other, &value));
	CHECK_EQ((long)value, 'a' + 8);
	CHECK_EQ(memory[15 * PAGE], 'a' + 15);
	CHECK_EQ(faults, 7);
	CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
	CHECK_EQ(fcntl(77, F_GETFD), 0);
	CHECK_EQ(syscall(SYS_kcmp, getpid(), getpid(), 0, fd, 77), 0);
	CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
	struct uffdio_api api = {UFFD_API, 0, 0};
	MUST(ioctl(bare, UFFDIO_API, &api));
	pass();
}
"""
)


def test_missing_pages_of_a_thread_that_waits_for_one(survives: Survives) -> None:
    # A thread that waits for a page was counted before the dump, and counts again as soon as it has met it again.
    survives(MISSING, flags=("-pthread",), ignore=("*/fds/*/pending", "*/fds/*/total", "*/pending", "*/total"))


PROTECTED = (
    HEAD
    + """
static int fd;
static char *memory;
static volatile int faults;

static void *monitor(void *arg)
{
	struct uffd_msg message;

	for (;;) {
		CHECK_EQ(read(fd, &message, sizeof(message)), sizeof(message));
		CHECK(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
		faults |= 1 << (message.arg.pagefault.address - (unsigned long)memory) / PAGE;
		guard(fd, (char *)(message.arg.pagefault.address & -PAGE), 1, 0);
	}
	return NULL;
}

int main(void)
{
	pthread_t thread;

	fd = make(O_CLOEXEC, UFFD_FEATURE_PAGEFAULT_FLAG_WP);
	memory = room(8);
	memset(memory, 'm', 8 * PAGE);
	serve(fd, memory, 8 * PAGE, UFFDIO_REGISTER_MODE_WP);
	guard(fd, memory + 2 * PAGE, 3, 1);
	guard(fd, memory + 3 * PAGE, 1, 0);
	guard(fd, memory + 7 * PAGE, 1, 1);
	pthread_create(&thread, NULL, monitor, NULL);
	usleep(20000);
	ready();
	wait_told("go");
	for (int i = 0; i < 8; i++)
		CHECK_EQ(memory[i * PAGE], 'm');
	CHECK_EQ(faults, 0);
	for (int i = 0; i < 8; i++)
		memory[i * PAGE + 1] = 'w';
	CHECK_EQ(faults, 1 << 2 | 1 << 4 | 1 << 7);
	pass();
}
"""
)


def test_write_protected_pages(survives: Survives) -> None:
    survives(PROTECTED, flags=("-pthread",))


USER_MODE_ONLY = (
    HEAD
    + """
/* A system call that meets a missing page fails: only faults of the program itself are its business. */
static void kernel_is_refused(char *memory)
{
	int ends[2];

	MUST(pipe(ends));
	CHECK_EQ(write(ends[1], "x", 1), 1);
	errno = 0;
	CHECK_EQ(read(ends[0], memory, 1), -1);
	CHECK_EQ(errno, EFAULT);
}

int main(void)
{
	char *memory = room(2);

	serve(make(O_CLOEXEC | UFFD_USER_MODE_ONLY, 0), memory, 2 * PAGE, UFFDIO_REGISTER_MODE_MISSING);
	kernel_is_refused(memory);
	ready();
	wait_told("go");
	kernel_is_refused(memory);
	pass();
}
"""
)


def test_one_for_faults_of_the_program_alone(survives: Survives) -> None:
    survives(USER_MODE_ONLY)


def test_one_for_another_process_is_refused_before_anything_is_frozen(
    start: Targets, library: Library, images: str
) -> None:
    source = (
        HEAD + "int main(void) { int fd = make(O_CLOEXEC, 0); CHECK(fd >= 0); if (fork() == 0) { pause(); } "
        'ready(); wait_told("go"); pass(); }'
    )
    target = start.c(source)
    target.pids()
    with pytest.raises(Unsupported, match="memory of another process") as caught:
        library.dump(target.pid, images)
    assert caught.value.causes[0].hint if hasattr(caught.value, "causes") else caught.value.hint
    target.go()


def test_several_that_serve_memory_are_refused(start: Targets, library: Library, images: str) -> None:
    source = (
        HEAD + "int main(void) { int a = make(O_CLOEXEC, 0), b = make(O_CLOEXEC, 0);"
        "serve(a, room(2), 2 * PAGE, UFFDIO_REGISTER_MODE_MISSING);"
        "serve(b, room(2), 2 * PAGE, UFFDIO_REGISTER_MODE_MISSING);"
        'ready(); wait_told("go"); pass(); }'
    )
    target = start.c(source)
    with pytest.raises(Unsupported, match="one of several userfaultfds"):
        library.dump(target.pid, images)
    target.go()
