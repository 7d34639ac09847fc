/* A program without libc, to be snapshotted where it is small: a parent and a child with a pipe between them that holds
 * data, shared memory, a deleted file, a signal mask and a handler. It has no vDSO, which would bind its images to one kernel. */
#define _GNU_SOURCE
#include <asm/unistd.h>
#include <linux/mman.h>
#include <stddef.h>

static long sys(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
	long result;

	asm volatile("syscall" : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return result;
}
#define CALL(name, a, b, c) sys(__NR_##name, (long)(a), (long)(b), (long)(c), 0, 0, 0)

struct action { void (*handler)(int); unsigned long flags; void (*restorer)(void); unsigned long mask; };
static int pipe_fds[2], file;
static volatile int handled;
static char private_page[4096] __attribute__((aligned(4096)));

asm(".globl restorer\nrestorer:\n mov $15, %eax\n syscall\n");
void restorer(void);
static void handler(int number) { handled++; }

static int same(const char *a, const char *b, int size)
{
	while (size--)
		if (*a++ != *b++)
			return 0;
	return 1;
}

static void result(const char *text, int size)
{
	long fd = CALL(open, "result.tmp", 0101, 0600);

	CALL(write, fd, text, size);
	CALL(rename, "result.tmp", "result", 0);
	CALL(exit_group, 0, 0, 0);
}
#define CHECK(what) do { if (!(what)) result("fail: " #what "\n", sizeof("fail: " #what)); } while (0)

static void wait_told(void)
{
	long pause[2] = {0, 10000000};

	while (CALL(access, "go", 0, 0))
		CALL(nanosleep, pause, 0, 0);
}

void run(long *stack)
{
	long argc = stack[0], *auxv = stack + 1 + argc + 1, vdso = 0, child;
	unsigned long mask = 1 << (10 - 1);
	struct action act = {handler, 0x04000000, restorer, 0}, old;
	char buf[64], *shared;
	int status = -1;

	while (*auxv++)
		;
	for (; auxv[0]; auxv += 2)
		if (auxv[0] == 33)
			vdso = auxv[1];
	CALL(munmap, vdso - VVAR, VVAR + 0x2000, 0);
	CALL(pipe, pipe_fds, 0, 0);
	CALL(write, pipe_fds[1], "in the pipe", 11);
	file = CALL(open, "gone", 0102, 0640);
	CALL(write, file, "in the deleted file", 19);
	CALL(unlink, "gone", 0, 0);
	shared = (char *)sys(__NR_mmap, 0, 8192, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	shared[5000] = 'S';
	private_page[100] = 'P';
	sys(__NR_rt_sigaction, 12, (long)&act, 0, 8, 0, 0);
	sys(__NR_rt_sigprocmask, 0, (long)&mask, 0, 8, 0, 0);
	child = CALL(fork, 0, 0, 0);
	if (!child) {
		CALL(close, pipe_fds[0], 0, 0);
		wait_told();
		shared[6000] = 'C';
		CALL(write, pipe_fds[1], "from the child", 14);
		CALL(exit_group, private_page[100] == 'P' ? 5 : 6, 0, 0);
	}
	CALL(close, pipe_fds[1], 0, 0);
	CALL(rename, "starting", "ready", 0);
	wait_told();
	sys(__NR_wait4, child, (long)&status, 0, 0, 0, 0);
	CHECK(status == 5 << 8);
	CHECK(CALL(read, pipe_fds[0], buf, 64) == 25);
	CHECK(same(buf, "in the pipefrom the child", 25));
	CHECK(CALL(read, pipe_fds[0], buf, 64) == 0);
	CHECK(shared[5000] == 'S' && shared[6000] == 'C');
	CHECK(CALL(lseek, file, 0, 1) == 19);
	CHECK(sys(__NR_pread64, file, (long)buf, 64, 0, 0, 0) == 19);
	CHECK(same(buf, "in the deleted file", 19));
	sys(__NR_rt_sigprocmask, 0, 0, (long)&mask, 8, 0, 0);
	CHECK(mask == 1 << (10 - 1));
	sys(__NR_rt_sigaction, 12, 0, (long)&old, 8, 0, 0);
	CHECK(old.handler == handler);
	CALL(kill, CALL(getpid, 0, 0, 0), 12, 0);
	CHECK(handled == 1);
	result("pass\n", 5);
}

asm(".globl _start\n_start:\n mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
