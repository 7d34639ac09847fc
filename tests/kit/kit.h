/* What every C test program may use. A program sets something up, calls ready(), waits until it is told to go on
 * (wait_told("go")), looks at what it finds, and ends with pass() or, by CHECK and MUST, with the reason why not. */
#ifndef KIT_H
#define KIT_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

static UNUSED const char *kit_path(const char *name)
{
	static __thread char path[PATH_MAX];
	const char *dir = getenv("KIT_DIR");

	snprintf(path, sizeof(path), "%s/%s", dir ? dir : ".", name);
	return path;
}

/* Makes a file appear with its whole content at once. */
static UNUSED void tell(const char *name, const char *text)
{
	char temporary[PATH_MAX], final[PATH_MAX];
	int fd;

	snprintf(final, sizeof(final), "%s", kit_path(name));
	snprintf(temporary, sizeof(temporary), "%.4000s.tmp.%d", final, (int)getpid());
	fd = open(temporary, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0666);
	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text) || close(fd) ||
	    rename(temporary, final))
		_exit(112);
}

static UNUSED void ready(void) { tell("ready", ""); }

static UNUSED int told(const char *name) { return access(kit_path(name), F_OK) == 0; }

/* Naps until the file is there. Raw nanosleep: signals and their handlers do not disturb it. */
static UNUSED void wait_told(const char *name)
{
	struct timespec nap = {0, 2 * 1000 * 1000};

	while (!told(name))
		nanosleep(&nap, NULL);
}

static UNUSED void pass(void)
{
	tell("result", "pass\n");
	exit(0);
}

static UNUSED __attribute__((format(printf, 1, 2), noreturn)) void fail(const char *format, ...)
{
	char text[2000] = "fail: ";
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text + 6, sizeof(text) - 8, format, arguments);
	va_end(arguments);
	strcat(text, "\n");
	tell("result", text);
	exit(1);
}

#define CHECK(condition) \
	do { if (!(condition)) fail("line %d: %s (errno %d)", __LINE__, #condition, errno); } while (0)

#define CHECK_EQ(got, expected) \
	do { \
		long long g_ = (long long)(got), e_ = (long long)(expected); \
		if (g_ != e_) \
			fail("line %d: %s is %lld (%#llx), expected %lld (%#llx)", __LINE__, #got, g_, \
			     (unsigned long long)g_, e_, (unsigned long long)e_); \
	} while (0)

/* For calls that return -1: the result of a call that must work. */
#define MUST(call) \
	({ \
		long r_ = (long)(call); \
		if (r_ == -1) fail("line %d: %s: %s", __LINE__, #call, strerror(errno)); \
		r_; \
	})

static UNUSED double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

/* Bytes that depend on a seed and a place, and nothing else. */
static UNUSED void fill(void *where, size_t size, unsigned seed)
{
	unsigned char *byte = where;

	for (size_t i = 0; i < size; i++)
		byte[i] = (unsigned char)((i * 2654435761u + seed * 40503u + (i >> 8)) >> 3);
}

static UNUSED int filled(const void *where, size_t size, unsigned seed)
{
	const unsigned char *byte = where;

	for (size_t i = 0; i < size; i++)
		if (byte[i] != (unsigned char)((i * 2654435761u + seed * 40503u + (i >> 8)) >> 3))
			return 0;
	return 1;
}

static UNUSED int zeroed(const void *where, size_t size)
{
	const unsigned char *byte = where;

	for (size_t i = 0; i < size; i++)
		if (byte[i])
			return 0;
	return 1;
}
#endif
