"""Image sets change hands: what Torpor dumps CRIU restores, and the other way round.

CRIU itself is needed for that, so these tests are no part of the normal run. Name its binary,
version 4 or newer, and run them as root::

    TORPOR_PEER_CRIU=/usr/sbin/criu pytest tests/compat/test_criu_images.py

Without the variable nothing is collected from this file. ``test_recorded.py`` looks at sets that
CRIU once made, in every run.

Torpor's own extensions of the format are left out where CRIU would refuse them: pages that tasks
share are stored once unless ``share_pages`` is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from kit import Command, Library, Peer, Target, Targets, Verbs, assert_same, compile_c, observe_tree, wait_until
from kit.files import slurp
from kit.host import descendants, reap
from torpor.images.store import ImageReader

PEER = os.environ.get("TORPOR_PEER_CRIU", "")


class OwnPages(Library):
    """Torpor, writing every page for every task, as CRIU does."""

    def dump(self, pid: int, images: object, **options: object) -> None:
        super().dump(pid, images, share_pages=False, **options)


#: Which of the two dumps and which restores.
WAYS: dict[str, Callable[[], tuple[Verbs, Verbs]]] = {
    "torpor-criu": lambda: (OwnPages(), Peer(PEER)),
    "criu-torpor": lambda: (Peer(PEER), Command()),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("way", WAYS if PEER else [], ids=str)


def _pids(images: str) -> list[int]:
    fd = os.open(images, os.O_RDONLY)
    try:
        return [entry.pid for entry in ImageReader(fd).read_all("pstree")]
    finally:
        os.close(fd)


class TestExchange:
    """Each program is dumped by one, restored by the other, and asked whether it is content."""

    __test__ = bool(PEER)

    def check(
        self, way: str, target: Target, images: str, *ignore: str, **options: object
    ) -> None:
        dumper, restorer = WAYS[way]()
        target.pids()
        before = observe_tree(target.pid)
        dumper.dump(target.pid, images, **options)
        target.seen.update(_pids(images))  # those that were born between our look and the dump have to be reaped as well
        target.wait_gone()
        # Those that were born after they had been counted are ours to reap: their numbers would be in use.
        reap(descendants(os.getpid()))
        assert restorer.restore(images, **options) == target.pid
        assert target.alive(), "restored, and dead"
        assert_same(before, observe_tree(target.pid), ignore)

    def test_sleeping_shell(self, way: str, start: Targets, images: str) -> None:
        script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"
        target = start.command("sh", "-c", script)
        wait_until("it counts", lambda: "3\n" in target.read("stdout"))
        self.check(way, target, images, "*")
        so_far = len(target.read("stdout").split())
        wait_until("it goes on", lambda: len(target.read("stdout").split()) > so_far + 3)
        numbers = [int(word) for word in target.read("stdout").split()]
        assert numbers == list(range(1, len(numbers) + 1))

    def test_python_threads(self, way: str, start: Targets, images: str) -> None:
        target = start.python(PYTHON)
        self.check(way, target, images, "*")
        target.go()

    def test_family_with_full_pipe(self, way: str, start: Targets, images: str) -> None:
        target = start.c(PIPE)
        self.check(way, target, images)
        target.go()

    def test_deleted_file(self, way: str, start: Targets, images: str) -> None:
        target = start.c(DELETED)
        self.check(way, target, images)
        target.go()

    def test_shared_memory(self, way: str, start: Targets, images: str) -> None:
        target = start.c(SHARED)
        # CRIU makes it a memfd, and so it is called one from then on.
        self.check(way, target, images, *(["*/path"] if way == "torpor-criu" else []))
        target.go()

    def test_memory(self, way: str, start: Targets, images: str) -> None:
        target = start.c(MEMORY)
        # "gu": there may be guard pages. It stays with a mapping that was split off later.
        self.check(way, target, images, *(["*/flags"] if way == "torpor-criu" else []))
        target.go()

    def test_fifo_and_locks(self, way: str, start: Targets, images: str) -> None:
        target = start.c(FIFO)
        self.check(way, target, images, file_locks=True)
        target.go()

    def test_a_pid_namespace(self, way: str, start: Targets, images: str) -> None:
        outer = start.command("unshare", "--pid", "--fork", compile_c(INIT), wait=True)
        target = Target.__new__(Target)
        target.folder, target.argv = outer.folder, outer.argv
        _, target.pid, child = outer.pids()
        target.seen = {target.pid, child}
        dumper, restorer = WAYS[way]()
        dumper.dump(target.pid, images)
        for pid in target.seen:
            wait_until("it is gone", lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
        target.pid = restorer.restore(images)
        assert os.readlink(f"/proc/{target.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
        target.go()

    def test_pages_stored_once_are_refused_by_criu(self, way: str, start: Targets, images: str) -> None:
        """They would be zeroes for a reader who does not know where they are."""
        if way != "torpor-criu":
            return
        target = start.c(SHARED)
        target.pids()
        Library().dump(target.pid, images)
        target.wait_gone()
        with pytest.raises(AssertionError, match="status 1"):
            Peer(PEER).restore(images)
        target.wait_gone()
        assert Library().restore(images) == target.pid
        target.go()

    def test_descriptors(self, way: str, start: Targets, images: str) -> None:
        target = start.c(DESCRIPTORS)
        self.check(way, target, images)
        target.go()

    def test_signals_and_timers(self, way: str, start: Targets, images: str) -> None:
        target = start.c(SIGNALS)
        self.check(way, target, images)
        target.go()

    def test_groups_sessions_zombie(self, way: str, start: Targets, images: str) -> None:
        target = start.c(FAMILY)
        self.check(way, target, images)
        target.go()

    def test_credentials_and_filter(self, way: str, start: Targets, images: str) -> None:
        target = start.c(CREDENTIALS)
        self.check(way, target, images)
        target.go()

    def test_threads(self, way: str, start: Targets, images: str) -> None:
        target = start.c(THREADS)
        self.check(way, target, images)
        target.go()

    def test_bpf_maps(self, way: str, start: Targets, images: str) -> None:
        if b"libbpf" not in slurp(PEER):
            pytest.skip("CRIU was built without libbpf (apt install libbpf-dev, and build it again)")
        target = start.c(BPF_MAPS)
        self.check(way, target, images, "*/map_id", "*/memlock")
        target.go()

    def test_datagrams_that_wait_do_not_disturb_criu(self, way: str, start: Targets, images: str) -> None:
        """It drops them, and does not mind that they are in the images."""
        target = start.python(DATAGRAMS)
        self.check(way, target, images, "*/unread")
        target.go()


BPF_MAPS = """
#include <linux/bpf.h>

static long bpf(int command, union bpf_attr *attr) { return syscall(SYS_bpf, command, attr, sizeof(*attr)); }

static const struct kind { const char *name; int type, flags, entries, filled, frozen; } kinds[] = {
	{"table", BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, 5000, 4000, 0}, {"array", BPF_MAP_TYPE_ARRAY, 0, 50, 20, 0},
	{"frozen", BPF_MAP_TYPE_HASH, 0, 9, 3, 1}, {"readable", BPF_MAP_TYPE_ARRAY, BPF_F_RDONLY_PROG, 3, 3, 0},
	{"mapped", BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE, 1000, 1000, 0}, {"empty", BPF_MAP_TYPE_HASH, 0, 7, 0, 0},
};
enum { KINDS = sizeof(kinds) / sizeof(kinds[0]) };

static long element(int command, int fd, uint32_t key, uint64_t *value, int flags)
{
	union bpf_attr attr = {.map_fd = fd, .key = (uintptr_t)&key, .value = (uintptr_t)value, .flags = flags};
	return bpf(command, &attr);
}

int main(void)
{
	int fds[KINDS];

	for (int i = 0; i < KINDS; i++) {
		const struct kind *kind = &kinds[i];
		union bpf_attr attr = {.map_type = kind->type, .key_size = 4, .value_size = 8, .max_entries = kind->entries,
				       .map_flags = kind->flags};
		strcpy(attr.map_name, kind->name);
		fds[i] = MUST(bpf(BPF_MAP_CREATE, &attr));
		for (int key = 0; key < kind->filled; key++) {
			uint64_t value = 100000 * (i + 1) + key;
			MUST(element(BPF_MAP_UPDATE_ELEM, fds[i], key, &value, 0));
		}
		union bpf_attr freeze = {.map_fd = fds[i]};
		if (kind->frozen)
			MUST(bpf(BPF_MAP_FREEZE, &freeze));
	}
	ready();
	wait_told("go");
	for (int i = 0; i < KINDS; i++) {
		const struct kind *kind = &kinds[i];
		struct bpf_map_info info = {0};
		union bpf_attr ask = {.info = {.bpf_fd = fds[i], .info_len = sizeof(info), .info = (uintptr_t)&info}};
		uint64_t value = 5;

		MUST(bpf(BPF_OBJ_GET_INFO_BY_FD, &ask));
		CHECK_EQ(info.type, kind->type);
		CHECK_EQ(info.map_flags, kind->flags);
		CHECK_EQ(info.max_entries, kind->entries);
		CHECK(!strcmp(info.name, kind->name));
		for (int key = 0; key < kind->filled; key++) {
			MUST(element(BPF_MAP_LOOKUP_ELEM, fds[i], key, &value, 0));
			CHECK_EQ(value, 100000 * (i + 1) + key);
		}
		if (kind->type == BPF_MAP_TYPE_HASH && !kind->frozen) {
			CHECK(element(BPF_MAP_LOOKUP_ELEM, fds[i], 4999 + kind->entries, &value, 0) < 0 && errno == ENOENT);
			MUST(element(BPF_MAP_UPDATE_ELEM, fds[i], 70000, &value, BPF_NOEXIST));
		}
		if (kind->frozen)
			CHECK(element(BPF_MAP_UPDATE_ELEM, fds[i], 0, &value, 0) < 0 && errno == EPERM);
	}
	pass();
}
"""

DATAGRAMS = """
from socket import *
s, t = socket(AF_INET, SOCK_DGRAM), socket(AF_INET, SOCK_DGRAM)
s.bind(("127.0.0.1", 0)); t.sendto(b"waits", s.getsockname()); s.setblocking(False)
ready(); wait_told("go")
try: first = s.recv(99)
except BlockingIOError: first = b"dropped"
t.sendto(b"later", s.getsockname()); s.settimeout(5)
done(first in (b"waits", b"dropped") and s.recv(99) == b"later", f"{first}")
"""

PYTHON = """
import threading
counts = [0] * 4
stop = False
def count(index):
    while not stop:
        counts[index] += 1
        time.sleep(0.001)
threads = [threading.Thread(target=count, args=(index,)) for index in range(4)]
for thread in threads:
    thread.start()
ready()
wait_told("go")
before = list(counts)
time.sleep(0.1)
grown = all(later > sooner for later, sooner in zip(counts, before))
stop = True
for thread in threads:
    thread.join()
done(grown, f"{before} {counts}")
"""

PIPE = """
int main(void)
{
	int fds[2], n;
	char big[70000], buf[70000];

	MUST(pipe(fds));
	MUST(fcntl(fds[1], F_SETPIPE_SZ, 1 << 17));
	for (unsigned i = 0; i < sizeof big; i++)
		big[i] = i * 7;
	CHECK_EQ(write(fds[1], big, sizeof big), (long)sizeof big);
	if (fork() == 0) {
		close(fds[0]);
		wait_told("go");
		CHECK_EQ(write(fds[1], "end", 3), 3);
		_exit(0);
	}
	close(fds[1]);
	ready();
	wait_told("go");
	for (n = 0; n < 70000;) {
		int got = read(fds[0], buf + n, sizeof buf - n);
		CHECK(got > 0);
		n += got;
	}
	CHECK(!memcmp(buf, big, sizeof big));
	CHECK_EQ(read(fds[0], buf, 10), 3);
	CHECK(!memcmp(buf, "end", 3));
	CHECK_EQ(read(fds[0], buf, 10), 0);
	CHECK_EQ(fcntl(fds[0], F_GETPIPE_SZ), 1 << 17);
	CHECK(wait(&n) > 0);
	CHECK_EQ(n, 0);
	pass();
}
"""

DELETED = """
int main(void)
{
	char *name = "gone", buf[32], *map;
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0640), other = open(name, O_RDONLY);
	int big = open("big gone", O_RDWR | O_CREAT, 0600);

	MUST(fd);
	MUST(other);
	CHECK_EQ(write(fd, "what was written", 16), 16);
	MUST(ftruncate(fd, 8192));
	map = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED);
	strcpy(map + 5000, "mapped");
	CHECK_EQ(pwrite(big, "far", 3, 40000), 3);
	MUST(unlink(name));
	MUST(unlink("big gone"));
	ready();
	wait_told("go");
	CHECK_EQ(lseek(fd, 0, SEEK_CUR), 16);
	CHECK_EQ(pread(other, buf, 16, 0), 16);
	CHECK(!memcmp(buf, "what was written", 16));
	CHECK(!strcmp(map + 5000, "mapped"));
	strcpy(map + 100, "through the map");
	CHECK_EQ(pread(other, buf, 16, 100), 16);
	CHECK(!strcmp(buf, "through the map"));
	CHECK_EQ(pread(big, buf, 4, 40000), 3);
	CHECK(!memcmp(buf, "far", 3));
	CHECK(access(name, F_OK) < 0);
	pass();
}
"""

SHARED = """
int main(void)
{
	int memfd = memfd_create("named", MFD_ALLOW_SEALING), status;
	char *shared = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *private, *named;

	MUST(memfd);
	MUST(ftruncate(memfd, 12288));
	CHECK_EQ(pwrite(memfd, "in the memfd", 12, 4096), 12);
	MUST(fcntl(memfd, F_ADD_SEALS, F_SEAL_GROW));
	named = mmap(0, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	private = mmap(0, 12288, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd, 0);
	CHECK(shared != MAP_FAILED && named != MAP_FAILED && private != MAP_FAILED);
	strcpy(private + 4096, "own");
	strcpy(shared + 70000, "shared");
	if (fork() == 0) {
		wait_told("go");
		strcpy(shared + 80000, "by the child");
		_exit(strcmp(shared + 70000, "shared") != 0);
	}
	ready();
	wait_told("go");
	CHECK(wait(&status) > 0);
	CHECK_EQ(status, 0);
	CHECK(!strcmp(shared + 80000, "by the child"));
	CHECK(!memcmp(named + 4096, "in the memfd", 12));
	CHECK(!strcmp(private + 4096, "own"));
	CHECK_EQ(fcntl(memfd, F_GET_SEALS), F_SEAL_GROW);
	pass();
}
"""

MEMORY = """
#define AREA(n, prot, flags) mmap(0, (n) * 4096, prot, MAP_PRIVATE | MAP_ANONYMOUS | (flags), -1, 0)
int main(void)
{
	char *plain = AREA(64, PROT_READ | PROT_WRITE, 0), *none = AREA(4, PROT_NONE, 0);
	char *read_only = AREA(4, PROT_READ | PROT_WRITE, 0), *locked = AREA(2, PROT_READ | PROT_WRITE, 0);
	char *guarded = AREA(8, PROT_READ | PROT_WRITE, 0), *grows = AREA(16, PROT_READ | PROT_WRITE, MAP_GROWSDOWN);
	char *code = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, open("/proc/self/exe", O_RDONLY), 0);
	char *heap = sbrk(50000), was = code[1];
	int fds[2];

	MUST(pipe(fds));
	for (int i = 0; i < 64; i += 3)
		plain[i * 4096 + i] = i + 1;
	strcpy(none == MAP_FAILED ? 0 : read_only, "read only");
	MUST(mprotect(read_only, 4 * 4096, PROT_READ));
	strcpy(locked, "locked");
	MUST(mlock(locked, 8192));
	memset(guarded, 'g', 8 * 4096);
	MUST(madvise(guarded + 2 * 4096, 2 * 4096, 102));
	strcpy(grows + 15 * 4096, "grows");
	MUST(madvise(plain, 64 * 4096, MADV_DONTDUMP));
	code[0] = 'X';
	strcpy(heap + 40000, "heap");
	ready();
	wait_told("go");
	for (int i = 0; i < 64; i++)
		CHECK_EQ(plain[i * 4096 + i], i % 3 ? 0 : i + 1);
	CHECK(!strcmp(read_only, "read only"));
	CHECK(!strcmp(locked, "locked"));
	CHECK(!strcmp(grows + 15 * 4096, "grows"));
	CHECK(!strcmp(heap + 40000, "heap"));
	CHECK(sbrk(0) == heap + 50000);
	CHECK(code[0] == 'X' && code[1] == was);
	CHECK(write(fds[1], guarded + 4096, 1) == 1);
	CHECK(write(fds[1], guarded + 2 * 4096, 1) < 0 && errno == EFAULT);
	CHECK(guarded[4 * 4096] == 'g');
	CHECK(write(fds[1], none, 1) < 0 && errno == EFAULT);
	pass();
}
"""

FIFO = """
#include <sys/file.h>
int main(void)
{
	struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 5};
	int both, reader, file = open("locked", O_RDWR | O_CREAT, 0600), other, status;
	char buf[10];

	MUST(file);
	CHECK_EQ(write(file, "0123456789012345", 16), 16);
	MUST(fcntl(file, F_SETLK, &lock));
	MUST(other = open("locked too", O_RDWR | O_CREAT, 0600));
	MUST(flock(other, LOCK_EX));
	MUST(mkfifo("fifo", 0600));
	MUST(both = open("fifo", O_RDWR));
	MUST(reader = open("fifo", O_RDONLY | O_NONBLOCK));
	CHECK_EQ(write(both, "queued", 6), 6);
	ready();
	wait_told("go");
	CHECK_EQ(read(reader, buf, 10), 6);
	CHECK(!memcmp(buf, "queued", 6));
	if (fork() == 0) {
		int again = open("locked too", O_RDWR);

		CHECK(fcntl(file, F_SETLK, &lock) < 0);
		CHECK(flock(again, LOCK_EX | LOCK_NB) < 0);
		_exit(0);
	}
	CHECK(wait(&status) > 0);
	CHECK_EQ(status, 0);
	pass();
}
"""

DESCRIPTORS = """
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
int main(void)
{
	sigset_t mask;
	int counter = eventfd(5, EFD_NONBLOCK), poller = epoll_create1(EPOLL_CLOEXEC), signals, timer;
	int log = open("log", O_WRONLY | O_CREAT | O_APPEND, 0600), copy = dup(log), null;
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x1122334455667788};
	struct signalfd_siginfo info;
	struct itimerspec when = {.it_value = {1000, 0}, .it_interval = {7, 0}}, left;
	unsigned long value;

	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	sigprocmask(SIG_BLOCK, &mask, 0);
	MUST(signals = signalfd(-1, &mask, SFD_NONBLOCK));
	MUST(timer = timerfd_create(CLOCK_MONOTONIC, 0));
	MUST(timerfd_settime(timer, 0, &when, 0));
	MUST(epoll_ctl(poller, EPOLL_CTL_ADD, counter, &event));
	MUST(null = open("/dev/null", O_RDWR));
	MUST(dup2(null, 100));
	CHECK_EQ(write(log, "before\\n", 7), 7);
	kill(getpid(), SIGUSR2);
	ready();
	wait_told("go");
	event.data.u64 = 0;
	CHECK_EQ(epoll_wait(poller, &event, 1, 1000), 1);
	CHECK(event.data.u64 == 0x1122334455667788);
	CHECK_EQ(read(counter, &value, 8), 8);
	CHECK_EQ(value, 5);
	CHECK_EQ(read(signals, &info, sizeof info), (long)sizeof info);
	CHECK_EQ(info.ssi_signo, SIGUSR2);
	MUST(timerfd_gettime(timer, &left));
	CHECK(left.it_value.tv_sec > 900 && left.it_value.tv_sec <= 1000 && left.it_interval.tv_sec == 7);
	CHECK_EQ(write(copy, "after\\n", 6), 6);
	CHECK_EQ(lseek(log, 0, SEEK_CUR), 13);
	CHECK(fcntl(poller, F_GETFD) == FD_CLOEXEC);
	CHECK_EQ(write(100, "x", 1), 1);
	pass();
}
"""

SIGNALS = """
#include <sys/time.h>
#include <sys/resource.h>
static volatile int seen, value;
static void handler(int number, siginfo_t *info, void *context)
{
	seen++;
	value = info->si_value.sival_int;
}
int main(void)
{
	struct sigaction act = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART}, old;
	struct itimerval often = {{50, 0}, {500, 0}}, left;
	struct itimerspec when = {.it_value = {300, 0}}, rest;
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
	struct rlimit limit = {100, 200};
	timer_t timer;
	sigset_t mask;
	stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536}, now;

	sigemptyset(&mask);
	sigaddset(&mask, SIGRTMIN + 3);
	sigprocmask(SIG_BLOCK, &mask, 0);
	sigaction(SIGRTMIN + 3, &act, 0);
	signal(SIGHUP, SIG_IGN);
	MUST(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){42}));
	MUST(setitimer(ITIMER_REAL, &often, 0));
	MUST(timer_create(CLOCK_MONOTONIC, &event, &timer));
	MUST(timer_settime(timer, 0, &when, 0));
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	MUST(sigaltstack(&stack, 0));
	umask(027);
	ready();
	wait_told("go");
	CHECK_EQ(seen, 0);
	sigprocmask(SIG_UNBLOCK, &mask, 0);
	CHECK_EQ(seen, 1);
	CHECK_EQ(value, 42);
	sigaction(SIGHUP, 0, &old);
	CHECK(old.sa_handler == SIG_IGN);
	sigaction(SIGRTMIN + 3, 0, &old);
	CHECK(old.sa_sigaction == handler && old.sa_flags & SA_RESTART);
	MUST(getitimer(ITIMER_REAL, &left));
	CHECK(left.it_value.tv_sec > 400 && left.it_interval.tv_sec == 50);
	MUST(timer_gettime(timer, &rest));
	CHECK(rest.it_value.tv_sec > 200);
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	CHECK(limit.rlim_cur == 100 && limit.rlim_max == 200);
	MUST(sigaltstack(0, &now));
	CHECK(now.ss_sp == stack.ss_sp && now.ss_size == 65536);
	CHECK_EQ(umask(0), 027);
	pass();
}
"""

FAMILY = """
int main(void)
{
	int status, pid[4];

	for (int i = 0; i < 4; i++) {
		pid[i] = fork();
		if (pid[i] == 0) {
			if (i == 0) _exit(3);
			if (i == 1) setsid();
			if (i == 2) setpgid(0, 0);
			for (;;) pause();
		}
	}
	usleep(50000);
	MUST(kill(pid[3], SIGSTOP));
	usleep(50000);
	ready();
	wait_told("go");
	CHECK_EQ(getsid(pid[1]), pid[1]);
	CHECK_EQ(getpgid(pid[2]), pid[2]);
	CHECK_EQ(getsid(pid[2]), getsid(0));
	CHECK_EQ(waitpid(pid[0], &status, 0), pid[0]);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
	for (int i = 1; i < 4; i++) {
		MUST(kill(pid[i], SIGKILL));
		CHECK_EQ(waitpid(pid[i], &status, 0), pid[i]);
	}
	pass();
}
"""

CREDENTIALS = """
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
int main(void)
{
	gid_t groups[3] = {11, 22, 33}, got[3];
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpgid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 77),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = {4, code};

	MUST(setgroups(3, groups));
	MUST(prctl(PR_CAPBSET_DROP, 5, 0, 0, 0));
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter));
	MUST(prctl(PR_SET_NAME, "a new name"));
	MUST(setpriority(PRIO_PROCESS, 0, 5));
	ready();
	wait_told("go");
	CHECK_EQ(prctl(PR_CAPBSET_READ, 5, 0, 0, 0), 0);
	CHECK_EQ(prctl(PR_CAPBSET_READ, 6, 0, 0, 0), 1);
	CHECK_EQ(getgroups(3, got), 3);
	CHECK(!memcmp(got, groups, sizeof got));
	CHECK(getpgid(0) < 0 && errno == 77);
	CHECK_EQ(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
	CHECK_EQ(getpriority(PRIO_PROCESS, 0), 5);
	pass();
}
"""

THREADS = """
static pthread_barrier_t all;
static volatile int counts[4];
static __thread int own;
static void *work(void *arg)
{
	long index = (long)arg;
	sigset_t mask;
	double x = index + 0.5;

	own = 100 + index;
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR1 + index);
	pthread_sigmask(SIG_BLOCK, &mask, 0);
	pthread_barrier_wait(&all);
	while (!told("go")) {
		x = x * 1.0000001;
		counts[index]++;
		usleep(1000);
	}
	pthread_sigmask(SIG_BLOCK, 0, &mask);
	return (void *)(long)(own == 100 + index && x > index && sigismember(&mask, SIGUSR1 + index));
}
int main(void)
{
	pthread_t threads[4];
	void *good;

	pthread_barrier_init(&all, 0, 5);
	for (long i = 0; i < 4; i++)
		pthread_create(&threads[i], 0, work, (void *)i);
	pthread_barrier_wait(&all);
	ready();
	wait_told("go");
	for (int i = 0; i < 4; i++) {
		CHECK_EQ(pthread_join(threads[i], &good), 0);
		CHECK(good);
		CHECK(counts[i] > 0);
	}
	pass();
}
"""


INIT = """
int main(void)
{
	int child, status;

	CHECK_EQ(getpid(), 1);
	MUST(setsid());
	if ((child = MUST(fork())) == 0) {
		wait_told("go");
		_exit(getpid() == 2 && getppid() == 1 ? 4 : 5);
	}
	ready();
	wait_told("go");
	CHECK_EQ(getpid(), 1);
	CHECK_EQ(getsid(0), 1);
	CHECK_EQ(child, 2);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(WEXITSTATUS(status), 4);
	pass();
}
"""
