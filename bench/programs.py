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

# argv[1]: how many workers, argv[2]: MiB that each fills for itself. Forked from one Python program with a warm heap.
WORKERS = """
import signal, sys
table = {n: str(n) * 3 for n in range(60_000)}
filled = os.pipe()
for number in range(int(sys.argv[1])):
    if os.fork() == 0:
        own = [bytes([number + 1]) * 4096 + b"%d" % n for n in range(int(sys.argv[2]) * 256)]
        sum(len(text) for text in table.values())
        os.write(filled[1], b"x")
        while True:
            signal.pause()
    os.read(filled[0], 1)
ready()
while True:
    signal.pause()
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


# argv[1]: how many. Both ends of all connections are its own; every tenth has something in flight.
CONNECTIONS = """
#include <netinet/in.h>
#include <sys/socket.h>
int main(int argc, char **argv)
{
	int count = atoi(argv[argc - 1]), listener = MUST(socket(AF_INET, SOCK_STREAM, 0));
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(name);
	int *ends = calloc(2 * count, sizeof(int));
	char text[8];

	MUST(bind(listener, (struct sockaddr *)&name, length));
	MUST(listen(listener, 64));
	MUST(getsockname(listener, (struct sockaddr *)&name, &length));
	for (int i = 0; i < count; i++) {
		ends[2 * i] = MUST(socket(AF_INET, SOCK_STREAM, 0));
		MUST(connect(ends[2 * i], (struct sockaddr *)&name, length));
		ends[2 * i + 1] = MUST(accept(listener, NULL, NULL));
		if (i % 10 == 0)
			MUST(write(ends[2 * i], "hello", 5));
	}
	ready();
	wait_told("go");
	for (int i = 0; i < count; i++) {
		if (i % 10)
			MUST(write(ends[2 * i], "hello", 5));
		CHECK_EQ(read(ends[2 * i + 1], text, 5), 5);
		CHECK(memcmp(text, "hello", 5) == 0);
		MUST(write(ends[2 * i + 1], "back", 4));
		CHECK_EQ(read(ends[2 * i], text, 4), 4);
	}
	pass();
}
"""

# argv[1]: how many, argv[2]: the port of somebody outside who sends back what it gets.
CLIENT = """
#include <arpa/inet.h>
#include <sys/socket.h>
int main(int argc, char **argv)
{
	int count = atoi(argv[argc - 2]);
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[argc - 1])) };
	int *ends = calloc(count, sizeof(int));
	char text[8];

	name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	for (int i = 0; i < count; i++) {
		ends[i] = MUST(socket(AF_INET, SOCK_STREAM, 0));
		MUST(connect(ends[i], (struct sockaddr *)&name, sizeof(name)));
		MUST(write(ends[i], "hello", 5));
		CHECK_EQ(read(ends[i], text, 5), 5);
	}
	ready();
	wait_told("go");
	for (int i = 0; i < count; i++) {
		MUST(write(ends[i], "again", 5));
		CHECK_EQ(read(ends[i], text, 5), 5);
		CHECK(memcmp(text, "again", 5) == 0);
	}
	pass();
}
"""

# argv[1]: how many descriptors. Half of them are files, each by a description of its own, some are pipes (CRIU takes
# a thousand at most), the rest eventfds, half of them twice.
DESCRIPTORS = """
#include <sys/eventfd.h>
int main(int argc, char **argv)
{
	int count = atoi(argv[argc - 1]), pipes[256][2], *events = calloc(count, sizeof(int)), first = 0;
	char name[20];
	uint64_t value;

	for (int i = 0; i < count / 2; i++) {
		snprintf(name, sizeof(name), "file%d", i % 100);
		int fd = MUST(open(name, O_RDWR | O_CREAT, 0600));
		first = first ? first : fd;
		MUST(lseek(fd, i, SEEK_SET));
	}
	for (int i = 0; i < 256; i++) {
		MUST(pipe(pipes[i]));
		MUST(write(pipes[i][1], "x", 1));
	}
	for (int i = 0; i < count / 4 - 256; i++) {
		events[i] = MUST(eventfd(i + 1, 0));
		MUST(dup(events[i]));
	}
	ready();
	wait_told("go");
	for (int i = 0; i < count / 2; i++)
		CHECK_EQ(lseek(first + i, 0, SEEK_CUR), i);
	for (int i = 0; i < 256; i++)
		CHECK_EQ(read(pipes[i][0], name, 2), 1);
	for (int i = 0; i < count / 4 - 256; i++) {
		CHECK_EQ(read(events[i] + 1, &value, 8), 8);
		CHECK_EQ(value, i + 1);
	}
	pass();
}
"""

# argv[1]: how many watches.
WATCHES = """
#include <sys/inotify.h>
int main(int argc, char **argv)
{
	int count = atoi(argv[argc - 1]), watcher = MUST(inotify_init1(IN_NONBLOCK)), last = 0;
	char name[20];
	struct inotify_event event;

	for (int i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "watched%d", i);
		close(MUST(open(name, O_RDWR | O_CREAT, 0600)));
		last = MUST(inotify_add_watch(watcher, name, IN_ATTRIB));
	}
	ready();
	wait_told("go");
	MUST(chmod(name, 0644));
	CHECK_EQ(read(watcher, &event, sizeof(event)), sizeof(event));
	CHECK_EQ(event.wd, last);
	pass();
}
"""
