/* A program in C that takes part in snapshots: docs/guest-protocol.md, nothing to link with.
 *
 *     cc -o guest guest.c && ./guest LOG
 *
 * writes a line to LOG for everything that happens to it, and in every woken copy a number that no
 * other copy has.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

struct guest_page {
	uint32_t generation, version;
	char magic[16];
	unsigned char id[16];
	uint32_t state, signal;
	int32_t eventfd, pid, tid;
	uint32_t limit_ms, point, argument_size, text_size;
	char reserved[52];
	char text[896];
	unsigned char argument[3072];
};

_Static_assert(sizeof(struct guest_page) == 4096, "the layout of the page");

enum { IDLE, PREPARE, READY, REFUSED, RESUMED, ABANDONED, RESTORED };

static volatile struct guest_page *page;
static int page_fd;
static uint64_t state_of_our_generator;

static void prepare(FILE *log)
{
	struct timespec nap = {0, 1000000};

	fprintf(log, "prepare\n");
	fflush(log);
	page->state = READY;
	while (page->state == READY) {
		nanosleep(&nap, NULL);
		/* Whoever takes the snapshot holds this lock; if nobody does, nobody will wake us. */
		if (page->state == READY && flock(page_fd, LOCK_SH | LOCK_NB) == 0) {
			flock(page_fd, LOCK_UN);
			page->state = ABANDONED;
		}
	}
}

static void woken(FILE *log)
{
	if (getrandom(&state_of_our_generator, sizeof(state_of_our_generator), 0) < 0)
		abort();
	fprintf(log, "restored %u %.*s %016llx\n", page->generation, (int)page->argument_size,
		(const char *)page->argument, (unsigned long long)state_of_our_generator);
}

int main(int argc, char **argv)
{
	FILE *log = fopen(argv[1], "a");
	sigset_t mask, before;
	uint64_t count;

	if (argc != 2 || log == NULL)
		return 1;
	/* The signal is blocked and taken where it suits us: here, or between two requests. */
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	sigprocmask(SIG_BLOCK, &mask, &before);

	page_fd = memfd_create("torpor-guest", MFD_CLOEXEC);
	if (page_fd < 0 || ftruncate(page_fd, sizeof(struct guest_page)) < 0)
		return 1;
	page = mmap(NULL, sizeof(struct guest_page), PROT_READ | PROT_WRITE, MAP_SHARED, page_fd, 0);
	if (page == MAP_FAILED)
		return 1;
	page->generation = page->version = 1;
	page->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	page->pid = getpid();
	page->signal = SIGUSR2;
	if (getrandom((void *)page->id, sizeof(page->id), 0) < 0)
		return 1;
	memcpy((void *)page->magic, "torpor guest", 12); /* from here on it is one */

	fprintf(log, "start\n");
	fflush(log);
	for (;;) {
		int number = sigwaitinfo(&mask, NULL);

		if (number < 0 && errno != EINTR)
			return 1;
		if (page->state == PREPARE)
			prepare(log);
		switch (page->state) {
		case RESTORED:
			woken(log);
			if (read(page->eventfd, &count, sizeof(count)) == sizeof(count))
				fprintf(log, "event %llu\n", (unsigned long long)count);
			break;
		case RESUMED:
			fprintf(log, "resumed\n");
			break;
		case ABANDONED:
			fprintf(log, "abandoned\n");
			break;
		default:
			continue;
		}
		page->state = IDLE;
		fflush(log);
	}
}
