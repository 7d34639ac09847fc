"""What is frozen and woken in the benchmarks. Every program checks itself when it is told to go on."""

SLEEPER = """
int main(void) { ready(); wait_told("go"); pass(); }
"""

# Imports enough of the standard library to have some 110 mappings, as programs in real life have.
PYTHON = """
import ssl, sqlite3, ctypes, decimal, json, asyncio, hashlib, lzma, bz2, zlib, uuid, socket, select
import xml.parsers.expat, multiprocessing, unicodedata, array, mmap, curses, _elementtree, datetime
data = {n: str(n) * 3 for n in range(30_000)}
ready()
wait_told("go")
done(len(data) == 30_000 and data[777] == "777777777")
"""

# argv[1]: MiB. Every page differs from every other and none is zero.
MEMORY = """
int main(int argc, char **argv)
{
	size_t size = (size_t)atoi(argv[argc - 1]) << 20;
	char *all = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(all != MAP_FAILED);
	for (size_t at = 0; at < size; at += 4096) {
		memset(all + at, (int)(at >> 12) | 1, 4096);
		*(size_t *)(all + at) = at;
	}
	ready();
	wait_told("go");
	for (size_t at = 0; at < size; at += 4096)
		CHECK(*(size_t *)(all + at) == at && all[at + 4095] == (char)((int)(at >> 12) | 1));
	pass();
}
"""

# The same memory in a program that watches the clock: the longest time that it did not run, in
# milliseconds, is what it says in the end.
WATCHER = """
int main(int argc, char **argv)
{
	size_t size = (size_t)atoi(argv[argc - 1]) << 20;
	char *all = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	double last, now, longest = 0;
	char text[40];

	CHECK(all != MAP_FAILED);
	for (size_t at = 0; at < size; at += 4096)
		*(size_t *)(all + at) = at + 1;
	ready();
	for (last = seconds(); ; last = now) {
		now = seconds();
		if (now - last > longest)
			longest = now - last;
		if (*(volatile size_t *)all == 0)
			break;
		static int turns;
		if (++turns % 100000 == 0 && told("go"))
			break;
	}
	snprintf(text, sizeof(text), "%.3f", longest * 1e3);
	tell("pause", text);
	pass();
}
"""

# argv[1]: how many processes, forked from one Python program with a warm heap.
TREE = """
import sys
count = int(sys.argv[1])
data = {n: str(n) * 3 for n in range(60_000)}
pids = []
for _ in range(count - 1):
    pid = os.fork()
    if pid == 0:
        os.close(0)
        import signal
        while True:
            signal.pause()
    pids.append(pid)
ready()
wait_told("go")
import signal
for pid in pids:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
done(data[777] == "777777777")
"""

THREADS = """
static pthread_barrier_t barrier;

static void *idle(void *arg) { pthread_barrier_wait(&barrier); for (;;) pause(); return arg; }

int main(int argc, char **argv)
{
	int count = atoi(argv[argc - 1]) - 1;
	pthread_attr_t attributes;
	pthread_t id;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 << 10);
	pthread_barrier_init(&barrier, NULL, count + 1);
	for (int i = 0; i < count; i++)
		CHECK(pthread_create(&id, &attributes, idle, NULL) == 0);
	pthread_barrier_wait(&barrier);
	ready();
	wait_told("go");
	pass();
}
"""

MAPPINGS = """
int main(int argc, char **argv)
{
	size_t count = atoi(argv[argc - 1]);
	char *all = mmap(NULL, count << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(all != MAP_FAILED);
	for (size_t i = 0; i < count; i += 2) {
		all[i << 12] = i | 1;
		MUST(mprotect(all + (i << 12), 4096, PROT_READ));
	}
	ready();
	wait_told("go");
	for (size_t i = 0; i < count; i += 2)
		CHECK(all[i << 12] == (char)(i | 1));
	pass();
}
"""
