"""A program that shows it when one page of its memory is not what it should be."""

from __future__ import annotations

# Keeps account of what each page has to hold, does everything that there is to be done to memory, and looks.
BUSY = """
#define PAGE 4096ul
#define PAGES 16000ul
#define RW (PROT_READ | PROT_WRITE)
enum { MINE, EMPTY, NEW };

static char *all;
static unsigned char state[PAGES];
static unsigned long dice = 88172645463325252ul;

static unsigned long roll(unsigned long sides)
{
	dice ^= dice << 13; dice ^= dice >> 7; dice ^= dice << 17;
	return dice % sides;
}

static int right(size_t n)
{
	const char *page = all + n * PAGE;

	if (state[n] == EMPTY)
		return zeroed(page, PAGE);
	return *(const size_t *)page == n * 2 + state[n] + 1 && page[4095] == (char)((int)n | 1);
}

static void mark(size_t n, int what)
{
	memset(all + n * PAGE, (int)n | 1, PAGE);
	*(size_t *)(all + n * PAGE) = n * 2 + what + 1;
	state[n] = (unsigned char)what;
}

static void look(size_t n)
{
	if (!right(n))
		fail("page %zu in state %d is %lx %x", n, state[n], *(long *)(all + n * PAGE), all[n * PAGE + 4095]);
}

static char *anonymous(void)
{
	char *place = mmap(NULL, PAGES * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(place != MAP_FAILED);
	return place;
}

int main(void)
{
	size_t n, count;
	char *there;
	int pid, status, whole = 1;

	all = anonymous();
	for (n = 0; n < PAGES; n++)
		mark(n, MINE);
	ready();
	wait_told("go");
	for (long turn = 0; !told("enough"); turn++) {
		n = roll(PAGES), count = 1 + roll(n + 40 < PAGES ? 40 : PAGES - n);
		switch (roll(turn < 20 ? 3 : 12)) {
		case 0:
			MUST(madvise(all + n * PAGE, count * PAGE, MADV_DONTNEED));
			memset(state + n, EMPTY, count);
			break;
		case 1:
			mark(n, NEW);
			break;
		case 3:
			if (!whole)
				break;
			there = anonymous();
			CHECK(mremap(all, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there) == there);
			all = there;
			break;
		case 4:
			pid = MUST(fork());
			if (pid == 0) {
				for (int i = 0; i < 5; i++)
					look(roll(PAGES));
				_exit(0);
			}
			CHECK_EQ(waitpid(pid, &status, 0), pid);
			CHECK_EQ(status, 0);
			break;
		case 5:
			MUST(mprotect(all + n * PAGE, count * PAGE, PROT_READ));
			look(n);
			MUST(mprotect(all, PAGES * PAGE, RW));
			break;
		case 6:
			/* What is mapped anew is a mapping of its own: from then on there is none to be moved. */
			if (turn < 1500)
				break;
			whole = 0;
			CHECK(mmap(all + n * PAGE, count * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
			      MAP_FAILED);
			memset(state + n, EMPTY, count);
			break;
		default:
			look(n);
			usleep(500);
		}
	}
	for (n = 0; n < PAGES; n++)
		look(n);
	pass();
}
"""
