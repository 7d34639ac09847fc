"""Descriptors of rarer kinds, and descriptors that several tasks have."""

from __future__ import annotations

from .conftest import Survives

SHARED_SIGNALS = """
#include <sys/signalfd.h>

int main(void)
{
	struct signalfd_siginfo info;
	int fd, pid, status;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN + 1);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	fd = MUST(signalfd(-1, &set, SFD_CLOEXEC));
	pid = fork();
	if (pid == 0) {
		raise(SIGUSR1);
		tell("child", "");
		wait_told("go");
		CHECK_EQ(read(fd, &info, sizeof(info)), sizeof(info));
		CHECK(info.ssi_signo == SIGUSR1 && (int)info.ssi_pid == getpid());
		sigdelset(&set, SIGUSR1);
		MUST(signalfd(fd, &set, 0));  /* the parent's mask, too */
		return 0;
	}
	wait_told("child");
	raise(SIGRTMIN + 1);
	ready();
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	raise(SIGUSR1);
	MUST(fcntl(fd, F_SETFL, O_NONBLOCK));
	CHECK_EQ(read(fd, &info, sizeof(info)), sizeof(info));
	CHECK_EQ(info.ssi_signo, SIGRTMIN + 1);
	CHECK(read(fd, &info, sizeof(info)) == -1 && errno == EAGAIN);
	pass();
}
"""


def test_a_signalfd_that_two_tasks_share(survives: Survives) -> None:
    survives(SHARED_SIGNALS)


BPF_MAP = """
#include <linux/bpf.h>

static long bpf(int command, union bpf_attr *attr) { return syscall(SYS_bpf, command, attr, sizeof(*attr)); }

static long element(int command, int fd, void *key, void *value)
{
	union bpf_attr attr = {.map_fd = fd, .key = (uintptr_t)key, .value = (uintptr_t)value};

	return bpf(command, &attr);
}

int main(void)
{
	union bpf_attr attr = {.map_type = BPF_MAP_TYPE_HASH, .key_size = 8, .value_size = 40, .max_entries = 5000,
			       .map_name = "kit"};
	int fd = MUST(bpf(BPF_MAP_CREATE, &attr)), other;
	char value[40];

	MUST(dup2(fd, 90));
	for (uint64_t key = 0; key < 5000; key++) {
		fill(value, sizeof(value), key);
		MUST(element(BPF_MAP_UPDATE_ELEM, fd, &key, value));
	}
	memset(&attr, 0, sizeof(attr));
	attr.map_type = BPF_MAP_TYPE_ARRAY, attr.key_size = 4, attr.value_size = 8, attr.max_entries = 3;
	other = MUST(bpf(BPF_MAP_CREATE, &attr));
	MUST(element(BPF_MAP_UPDATE_ELEM, other, &(int){2}, &(long){0x1234567890l}));
	ready();
	wait_told("go");
	for (uint64_t key = 0; key < 5000; key++) {
		MUST(element(BPF_MAP_LOOKUP_ELEM, 90, &key, value));
		CHECK(filled(value, sizeof(value), key));
	}
	CHECK(element(BPF_MAP_UPDATE_ELEM, fd, &(long){9999}, value) == -1 && errno == E2BIG);
	MUST(element(BPF_MAP_LOOKUP_ELEM, other, &(int){2}, value));
	CHECK_EQ(*(long *)value, 0x1234567890l);
	pass();
}
"""


def test_bpf_maps(survives: Survives) -> None:
    survives(BPF_MAP, ignore=("*/map_id", "*/fds/*/map_id"))


LEASE = """
static volatile sig_atomic_t told_times;
static void count(int number) { told_times += number == SIGUSR2; }

int main(void)
{
	struct f_owner_ex owner = {0};
	int fd, pid, status;

	signal(SIGUSR2, count);
	fd = MUST(open(kit_path("leased"), O_RDWR | O_CREAT, 0600));
	MUST(fcntl(fd, F_SETLEASE, F_WRLCK));
	MUST(fcntl(fd, F_SETSIG, SIGUSR2));
	CHECK(open(kit_path("leased"), O_WRONLY | O_NONBLOCK) == -1 && errno == EWOULDBLOCK);
	CHECK_EQ(told_times, 1);
	pid = fork();
	if (pid == 0) {
		tell("child", "");
		wait_told("go");
		CHECK(fcntl(0, F_GETFD) != -1);
		CHECK_EQ(fcntl(fd, F_GETLEASE), F_UNLCK);
		MUST(fcntl(fd, F_GETOWN_EX, &owner));
		CHECK(owner.pid == getppid() && fcntl(fd, F_GETSIG) == SIGUSR2);
		CHECK_EQ(told_times, 1);
		return 0;
	}
	MUST(close(fd));
	wait_told("child");
	ready();
	wait_told("go");
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(told_times, 1);  /* the owner was told once, when it was broken */
	pass();
}
"""


def test_a_broken_lease_whose_owner_has_no_descriptor_of_it(survives: Survives) -> None:
    survives(LEASE, options={"file_locks": True}, ignore=("*/fds/3/lock*",))  # it shows who took it, which was not it
