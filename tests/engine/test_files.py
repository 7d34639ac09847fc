"""Descriptors: what they lead to, where they stand, and who shares them."""

from __future__ import annotations

import errno
import os

import pytest

import torpor
from kit import Targets
from torpor.errors import KernelError
from torpor.resources.files import tty

from .conftest import Survives

NOTIFIERS = """
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

int main(void)
{
	int counter = MUST(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	int once = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
	int often = MUST(timerfd_create(CLOCK_BOOTTIME, 0));
	int off = MUST(timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC));
	int watch = MUST(epoll_create1(EPOLL_CLOEXEC)), outer = MUST(epoll_create1(0));
	int pipes[2], signals;
	struct itimerspec far = {{0, 0}, {3000, 0}}, soon = {{0, 20000000}, {0, 1000000}}, now;
	struct epoll_event event, found[4];
	uint64_t value = 0xfffffffffffffffdull;
	sigset_t set;

	MUST(pipe2(pipes, O_NONBLOCK));
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMAX);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	signals = MUST(signalfd(-1, &set, SFD_NONBLOCK));
	MUST(write(counter, &value, 8));
	MUST(timerfd_settime(once, 0, &far, NULL));
	MUST(timerfd_settime(often, 0, &soon, NULL));
	event.events = EPOLLIN | EPOLLET;
	event.data.u64 = 0x1122334455667788ull;
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, pipes[0], &event));
	event.events = EPOLLIN | EPOLLONESHOT;
	event.data.u64 = 2;
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, signals, &event));
	event.events = EPOLLIN;
	event.data.u64 = 3;
	MUST(epoll_ctl(outer, EPOLL_CTL_ADD, watch, &event));
	usleep(50000);
	ready();
	wait_told("go");

	CHECK_EQ(read(counter, &value, 8), 8);
	CHECK_EQ(value, 0xfffffffffffffffdull);
	CHECK(read(counter, &value, 8) == -1 && errno == EAGAIN);
	MUST(timerfd_gettime(once, &now));
	CHECK(now.it_interval.tv_sec == 0 && now.it_value.tv_sec > 2900 && now.it_value.tv_sec < 3000);
	CHECK(read(once, &value, 8) == -1 && errno == EAGAIN);
	CHECK_EQ(read(often, &value, 8), 8);
	CHECK(value >= 2);
	CHECK_EQ(read(often, &value, 8), 8);
	MUST(timerfd_gettime(often, &now));
	CHECK_EQ(now.it_interval.tv_nsec, 20000000);
	MUST(timerfd_gettime(off, &now));
	CHECK(now.it_value.tv_sec == 0 && now.it_value.tv_nsec == 0);
	CHECK_EQ(epoll_wait(outer, found, 4, 0), 0);
	MUST(write(pipes[1], "x", 1));
	CHECK_EQ(epoll_wait(outer, found, 4, 1000), 1);
	CHECK_EQ(found[0].data.u64, 3);
	CHECK_EQ(epoll_wait(watch, found, 4, 1000), 1);
	CHECK_EQ(found[0].data.u64, 0x1122334455667788ull);
	CHECK_EQ(epoll_wait(watch, found, 4, 0), 0);  /* edge-triggered */
	raise(SIGUSR1);
	CHECK_EQ(epoll_wait(watch, found, 4, 1000), 1);
	CHECK_EQ(found[0].data.u64, 2);
	raise(SIGRTMAX);
	CHECK_EQ(epoll_wait(watch, found, 4, 0), 0);  /* one shot */
	{
		struct signalfd_siginfo info;

		CHECK_EQ(read(signals, &info, sizeof(info)), sizeof(info));
		CHECK_EQ(info.ssi_signo, SIGUSR1);
	}
	pass();
}
"""


def test_eventfd_timerfd_signalfd_epoll(survives: Survives) -> None:
    # Expirations that nobody has read show in fdinfo only when somebody asks for them, which a dump does.
    survives(NOTIFIERS, ignore=("*/fds/*/ticks", "*/fds/*/it_value"))


SEMAPHORE = """
#include <sys/eventfd.h>

int main(void)
{
	int fd = MUST(eventfd(5, EFD_SEMAPHORE | EFD_NONBLOCK));
	uint64_t value;

	ready();
	wait_told("go");
	CHECK_EQ(read(fd, &value, 8), 8);
	CHECK_EQ(value, 1);
	for (int i = 0; i < 4; i++)
		MUST(read(fd, &value, 8));
	CHECK(read(fd, &value, 8) == -1 && errno == EAGAIN);
	pass();
}
"""


def test_an_eventfd_that_is_a_semaphore(survives: Survives) -> None:
    survives(SEMAPHORE)


FULL_EPOLL = """
#include <sys/epoll.h>

int main(void)
{
	/* The description stays watched when its descriptor is gone from the number it was added by,
	 * as long as a duplicate lives. */
	int watch = MUST(epoll_create1(0)), pipes[2], moved;
	struct epoll_event event = {EPOLLIN, {.u64 = 7}}, found;

	MUST(pipe(pipes));
	MUST(epoll_ctl(watch, EPOLL_CTL_ADD, pipes[0], &event));
	moved = MUST(dup2(pipes[0], 50));
	ready();
	wait_told("go");
	MUST(write(pipes[1], "x", 1));
	CHECK_EQ(epoll_wait(watch, &found, 1, 1000), 1);
	MUST(epoll_ctl(watch, EPOLL_CTL_DEL, pipes[0], NULL));
	CHECK(epoll_ctl(watch, EPOLL_CTL_DEL, moved, NULL) == -1);
	pass();
}
"""


def test_epoll_knows_a_file_by_the_number_it_was_added_with(survives: Survives) -> None:
    survives(FULL_EPOLL)


REGULAR = """
int main(void)
{
	int fd = MUST(open("data", O_CREAT | O_RDWR | O_CLOEXEC, 0600)), append, path, dir, dirpath;
	char text[100];

	MUST(write(fd, "0123456789", 10));
	MUST(lseek(fd, 4, SEEK_SET));
	append = MUST(open("data", O_WRONLY | O_APPEND | O_NOATIME));
	path = MUST(open("data", O_PATH));
	MUST(mkdir("folder", 0700));
	dir = MUST(open("folder", O_RDONLY | O_DIRECTORY));
	dirpath = MUST(open("folder", O_PATH | O_CLOEXEC));
	MUST(dup2(fd, 100));
	MUST(dup3(fd, 1000, O_CLOEXEC));
	MUST(open("/dev/null", O_RDWR));
	MUST(open("/dev/zero", O_RDONLY | O_NONBLOCK));
	MUST(open("/dev/urandom", O_RDONLY));
	MUST(open("/proc/self/status", O_RDONLY));
	MUST(symlink("data", "link"));
	MUST(open("link", O_PATH | O_NOFOLLOW));
	ready();
	wait_told("go");
	CHECK_EQ(read(fd, text, 2), 2);
	CHECK(memcmp(text, "45", 2) == 0);
	CHECK_EQ(lseek(100, 0, SEEK_CUR), 6);
	CHECK_EQ(lseek(1000, 0, SEEK_CUR), 6);
	CHECK_EQ(fcntl(100, F_GETFD), 0);
	CHECK_EQ(fcntl(1000, F_GETFD), FD_CLOEXEC);
	MUST(write(append, "ABC", 3));
	CHECK_EQ(pread(fd, text, 100, 10), 3);
	CHECK(read(path, text, 1) == -1 && errno == EBADF);
	MUST(openat(dir, "inside", O_CREAT | O_WRONLY, 0600));
	MUST(faccessat(dirpath, "inside", F_OK, 0));
	pass();
}
"""


def test_regular_files_directories_and_devices(survives: Survives) -> None:
    survives(REGULAR)


REPLACED = """
int main(void)
{
	char text[10];
	int old = MUST(open("data", O_CREAT | O_RDWR, 0600)), new;

	MUST(write(old, "old", 3));
	new = MUST(open("data.new", O_CREAT | O_RDWR, 0600));
	MUST(write(new, "new!", 4));
	MUST(rename("data.new", "data"));
	ready();
	wait_told("go");
	CHECK_EQ(pread(old, text, 10, 0), 3);
	CHECK(memcmp(text, "old", 3) == 0);
	CHECK_EQ(pread(new, text, 10, 0), 4);
	CHECK(memcmp(text, "new!", 4) == 0);
	CHECK_EQ(lseek(MUST(open("data", O_RDONLY)), 0, SEEK_END), 4);
	pass();
}
"""


def test_a_file_that_another_was_renamed_over(survives: Survives) -> None:
    # The path that the old file shows has no owner any more; only its content counts.
    survives(REPLACED, ignore=("*/fds/3/link", "*/fds/3/mnt_id"))


SPARSE_GHOST = """
int main(void)
{
	int fd = MUST(open("ghost", O_CREAT | O_RDWR, 0604)), unnamed;
	struct stat before, after;
	char text[8] = "";

	MUST(ftruncate(fd, 1l << 30));
	MUST(pwrite(fd, "middle", 6, 1 << 20));
	MUST(fchmod(fd, 04711));
	MUST(fchown(fd, 1234, 4321));
	MUST(fstat(fd, &before));
	MUST(unlink("ghost"));
	unnamed = MUST(open(".", O_TMPFILE | O_RDWR, 0600));
	MUST(write(unnamed, "tmp", 3));
	MUST(mkdir("gone", 0700));
	MUST(open("gone", O_RDONLY | O_DIRECTORY));
	MUST(rmdir("gone"));
	ready();
	wait_told("go");
	MUST(fstat(fd, &after));
	CHECK_EQ(after.st_size, before.st_size);
	CHECK_EQ(after.st_mode, before.st_mode);
	CHECK_EQ(after.st_uid, 1234);
	CHECK_EQ(after.st_gid, 4321);
	CHECK_EQ(after.st_nlink, 0);
	CHECK(after.st_blocks < 4096);
	MUST(pread(fd, text, 6, 1 << 20));
	CHECK(strcmp(text, "middle") == 0);
	CHECK_EQ(pread(unnamed, text, 8, 0), 3);
	pass();
}
"""


def test_deleted_files_with_holes_without_names_and_folders(survives: Survives) -> None:
    survives(SPARSE_GHOST, options={"ghost_limit": 1 << 31}, ignore=("*/fds/[456]/link", "*/fds/4/flags"))


ATTRIBUTES = """
#include <linux/capability.h>
#include <sys/xattr.h>

static struct vfs_cap_data capabilities = {VFS_CAP_REVISION_2, {{1 << CAP_KILL, 0}}};

/* Sets some attributes, as many as the file system has. */
static unsigned set(int fd)
{
	unsigned known = fsetxattr(fd, "user.of the user", "va\\0lue", 6, 0) == 0;

	return known | (fsetxattr(fd, "security.capability", &capabilities, XATTR_CAPS_SZ_2, 0) == 0) << 1;
}

static void check(int fd, unsigned known)
{
	char text[100];

	if (known & 1)
		CHECK(fgetxattr(fd, "user.of the user", text, 100) == 6 && memcmp(text, "va\\0lue", 6) == 0);
	if (known & 2)
		CHECK(fgetxattr(fd, "security.capability", text, 100) == XATTR_CAPS_SZ_2 &&
		      memcmp(text, &capabilities, XATTR_CAPS_SZ_2) == 0);
	CHECK(known || flistxattr(fd, text, 100) <= 0);
}

int main(void)
{
	int ghost = MUST(open("ghost", O_CREAT | O_RDWR, 0700)), memory = MUST(memfd_create("memory", 0)), folder;
	unsigned known[3];

	MUST(mkdir("gone", 0700));
	folder = MUST(open("gone", O_RDONLY | O_DIRECTORY));
	MUST(fchown(ghost, 1000, 1000));  /* which takes capabilities away */
	known[0] = set(ghost);
	known[1] = set(memory);
	known[2] = fsetxattr(folder, "user.of the user", "va\\0lue", 6, 0) == 0;
	MUST(unlink("ghost"));
	MUST(rmdir("gone"));
	ready();
	wait_told("go");
	check(ghost, known[0]);
	check(memory, known[1]);
	check(folder, known[2]);
	pass();
}
"""


def test_extended_attributes_of_what_is_carried_along(survives: Survives) -> None:
    survives(ATTRIBUTES, ignore=("*/fds/[35]/link",))


LINKED = """
int main(void)
{
	char text[4];
	int fd = MUST(open("one", O_CREAT | O_RDWR, 0600));

	MUST(write(fd, "abc", 3));
	MUST(link("one", "two"));
	MUST(unlink("one"));
	ready();
	wait_told("go");
	CHECK_EQ(pread(fd, text, 4, 0), 3);
	MUST(pwrite(fd, "ABC", 3, 0));
	CHECK_EQ(pread(MUST(open("two", O_RDONLY)), text, 4, 0), 3);
	CHECK(memcmp(text, "ABC", 3) == 0);  /* it is still the same file that has the other name */
	CHECK(access("one", F_OK) == -1);
	pass();
}
"""


def test_a_deleted_name_of_a_file_that_has_others(survives: Survives) -> None:
    survives(LINKED, options={"link_remap": True}, ignore=("*/fds/3/link", "*/fds/3/links", "*/fds/3/ino"))


@pytest.mark.parametrize("fails", [False, True], ids=["leaves it running", "fails"])
def test_a_dump_takes_its_links_back(
    start: Targets, images: str, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    target = start.c(LINKED)
    before = sorted(os.listdir(target.folder))
    if not fails:
        torpor.dump(target.pid, images, link_remap=True, leave_running=True)
    else:

        def finish(_: object) -> None:
            assert sorted(os.listdir(target.folder)) != before
            raise KernelError("read", errno.EIO)

        monkeypatch.setattr(tty, "finish", finish)
        with pytest.raises(KernelError):
            torpor.dump(target.pid, images, link_remap=True)
    assert sorted(os.listdir(target.folder)) == before
    target.go()


FIFO = """
int main(void)
{
	char text[10];
	int both, reader, writer;

	MUST(mkfifo("fifo", 0600));
	both = MUST(open("fifo", O_RDWR));
	reader = MUST(open("fifo", O_RDONLY | O_NONBLOCK));
	writer = MUST(open("fifo", O_WRONLY));
	MUST(fcntl(both, F_SETPIPE_SZ, 1 << 18));
	MUST(write(writer, "hello", 5));
	ready();
	wait_told("go");
	CHECK_EQ(fcntl(both, F_GETPIPE_SZ), 1 << 18);
	CHECK_EQ(read(reader, text, 10), 5);
	CHECK(memcmp(text, "hello", 5) == 0);
	CHECK(read(reader, text, 10) == -1 && errno == EAGAIN);
	MUST(write(both, "again", 5));
	CHECK_EQ(read(reader, text, 10), 5);
	pass();
}
"""


def test_a_fifo_with_data(survives: Survives) -> None:
    survives(FIFO)


PIPES = """
int main(void)
{
	int full[2], half[2], closed[2];
	char *big = malloc(1 << 20), text[100];

	MUST(pipe2(full, O_NONBLOCK));
	MUST(fcntl(full[1], F_SETPIPE_SZ, 1 << 20));
	fill(big, 1 << 20, 3);
	CHECK_EQ(write(full[1], big, 1 << 20), 1 << 20);
	MUST(pipe(half));
	MUST(write(half[1], "left", 4));
	MUST(close(half[1]));
	MUST(pipe(closed));
	MUST(close(closed[0]));
	ready();
	wait_told("go");
	CHECK(write(full[1], "x", 1) == -1 && errno == EAGAIN);
	memset(big, 0, 1 << 20);
	CHECK_EQ(read(full[0], big, 1 << 20), 1 << 20);
	CHECK(filled(big, 1 << 20, 3));
	CHECK_EQ(read(half[0], text, 100), 4);
	CHECK_EQ(read(half[0], text, 100), 0);
	signal(SIGPIPE, SIG_IGN);
	CHECK(write(closed[1], "x", 1) == -1 && errno == EPIPE);
	pass();
}
"""


def test_pipes_full_and_with_one_end(survives: Survives) -> None:
    survives(PIPES)


PACKETS = """
int main(void)
{
	int pipes[2];
	char text[100];

	MUST(pipe2(pipes, O_DIRECT));
	MUST(write(pipes[1], "one", 3));
	MUST(write(pipes[1], "three", 5));
	ready();
	wait_told("go");
	MUST(write(pipes[1], "fourth", 6));
	CHECK_EQ(read(pipes[0], text, 100), 3);
	CHECK_EQ(read(pipes[0], text, 100), 5);
	CHECK(memcmp(text, "three", 5) == 0);
	CHECK_EQ(read(pipes[0], text, 100), 6);
	pass();
}
"""


def test_a_pipe_in_packet_mode(survives: Survives) -> None:
    survives(PACKETS)


SHARED_TABLE = """
static int child(void *pipes)
{
	int *p = pipes;
	char text[4];

	CHECK_EQ(read(p[0], text, 4), 2);  /* the parent closes, opens and writes meanwhile */
	CHECK(fcntl(p[0] + 20, F_GETFD) >= 0);
	CHECK_EQ(umask(022), 0111);
	return 0;
}

int main(void)
{
	static char stack[1 << 16] __attribute__((aligned(16)));
	int pipes[2], pid, status;

	MUST(pipe(pipes));
	pid = MUST(clone(child, stack + sizeof(stack), CLONE_FILES | CLONE_FS | SIGCHLD, pipes));
	ready();
	wait_told("go");
	MUST(dup2(pipes[0], pipes[0] + 20));
	umask(0111);
	MUST(write(pipes[1], "go", 2));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(umask(0), 022);
	pass();
}
"""


def test_a_table_and_a_folder_that_two_processes_share(survives: Survives) -> None:
    survives(SHARED_TABLE)


SHARED_POSITION = """
int main(void)
{
	int fd = MUST(open("data", O_CREAT | O_RDWR, 0600)), other, pid, status;

	MUST(write(fd, "0123456789", 10));
	other = MUST(open("data", O_RDWR));
	MUST(lseek(fd, 3, SEEK_SET));
	pid = fork();
	if (pid == 0) {
		MUST(dup2(fd, 77));
		MUST(close(fd));
		tell("child", "");
		wait_told("go");
		MUST(lseek(77, 8, SEEK_SET));
		MUST(lseek(other, 2, SEEK_SET));
		return 0;
	}
	wait_told("child");
	ready();
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(lseek(fd, 0, SEEK_CUR), 8);
	CHECK_EQ(lseek(other, 0, SEEK_CUR), 2);
	pass();
}
"""


def test_one_position_for_parent_and_child(survives: Survives) -> None:
    survives(SHARED_POSITION)


LOCKS = """
#include <sys/file.h>

int main(void)
{
	int posix = MUST(open("posix", O_CREAT | O_RDWR, 0600));
	int whole = MUST(open("flock", O_CREAT | O_RDWR, 0600));
	int ofd = MUST(open("ofd", O_CREAT | O_RDWR, 0600)), again;
	struct flock range = {F_WRLCK, SEEK_SET, 10, 5, 0}, shared = {F_RDLCK, SEEK_SET, 100, 0, 0};
	struct flock open_file = {F_WRLCK, SEEK_SET, 0, 50, 0}, asked;
	int pid, status;

	MUST(fcntl(posix, F_SETLK, &range));
	MUST(fcntl(posix, F_SETLK, &shared));
	MUST(flock(whole, LOCK_SH));
	MUST(fcntl(ofd, F_OFD_SETLK, &open_file));
	ready();
	wait_told("go");
	pid = fork();
	if (pid == 0) {
		int fd = MUST(open("posix", O_RDWR));

		asked = (struct flock){F_WRLCK, SEEK_SET, 0, 0, 0};
		MUST(fcntl(fd, F_GETLK, &asked));
		CHECK(asked.l_type == F_WRLCK && asked.l_start == 10 && asked.l_len == 5);
		CHECK_EQ(asked.l_pid, getppid());
		asked = (struct flock){F_WRLCK, SEEK_SET, 100, 0, 0};
		MUST(fcntl(fd, F_GETLK, &asked));
		CHECK(asked.l_type == F_RDLCK);
		CHECK(flock(MUST(open("flock", O_RDWR)), LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK);
		MUST(flock(MUST(open("flock", O_RDWR)), LOCK_SH | LOCK_NB));
		return 0;
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	again = MUST(open("ofd", O_RDWR));
	asked = (struct flock){F_RDLCK, SEEK_SET, 49, 1, 0};
	CHECK(fcntl(again, F_OFD_SETLK, &asked) == -1);
	asked = (struct flock){F_RDLCK, SEEK_SET, 50, 1, 0};
	MUST(fcntl(again, F_OFD_SETLK, &asked));
	pass();
}
"""


def test_locks_of_all_kinds(survives: Survives) -> None:
    survives(LOCKS, options={"file_locks": True})


OWNERS = """
int main(void)
{
	int pipes[2], leased, fd;
	struct f_owner_ex owner = {F_OWNER_TID, 0}, group = {F_OWNER_PGRP, 0}, asked;

	MUST(pipe(pipes));
	owner.pid = getpid();
	group.pid = getpgrp();
	MUST(fcntl(pipes[0], F_SETOWN_EX, &owner));
	MUST(fcntl(pipes[0], F_SETSIG, SIGRTMIN + 3));
	MUST(fcntl(pipes[1], F_SETOWN_EX, &group));
	MUST(fcntl(pipes[0], F_SETFL, O_ASYNC | O_NONBLOCK));
	fd = MUST(open("leased", O_CREAT | O_RDWR, 0600));
	close(fd);
	leased = MUST(open("leased", O_RDONLY));
	MUST(fcntl(leased, F_SETLEASE, F_RDLCK));
	signal(SIGRTMIN + 3, SIG_IGN);
	ready();
	wait_told("go");
	MUST(fcntl(pipes[0], F_GETOWN_EX, &asked));
	CHECK(asked.type == F_OWNER_TID && asked.pid == getpid());
	CHECK_EQ(fcntl(pipes[0], F_GETSIG), SIGRTMIN + 3);
	CHECK(fcntl(pipes[0], F_GETFL) & O_ASYNC);
	CHECK_EQ(fcntl(leased, F_GETLEASE), F_RDLCK);
	pass();
}
"""


def test_owners_signals_and_leases(survives: Survives) -> None:
    survives(OWNERS, options={"file_locks": True})


TERMINAL = """
#include <termios.h>

int main(void)
{
	int master = MUST(posix_openpt(O_RDWR | O_NOCTTY)), slave;
	struct winsize size = {33, 77, 0, 0}, asked;
	struct termios mode;
	char text[20];

	MUST(grantpt(master));
	MUST(unlockpt(master));
	slave = MUST(open(ptsname(master), O_RDWR));  /* the session's terminal from now on */
	MUST(ioctl(slave, TIOCSWINSZ, &size));
	MUST(tcgetattr(slave, &mode));
	mode.c_lflag &= ~(ECHO | ICANON);
	mode.c_cc[VMIN] = 3;
	MUST(tcsetattr(slave, TCSANOW, &mode));
	ready();
	wait_told("go");
	MUST(ioctl(slave, TIOCGWINSZ, &asked));
	CHECK(asked.ws_row == 33 && asked.ws_col == 77);
	MUST(tcgetattr(slave, &mode));
	CHECK(!(mode.c_lflag & (ECHO | ICANON)));
	CHECK_EQ(mode.c_cc[VMIN], 3);
	CHECK_EQ(tcgetsid(slave), getpid());
	CHECK_EQ(tcgetpgrp(slave), getpid());
	MUST(write(master, "abc", 3));
	CHECK_EQ(read(slave, text, 20), 3);
	MUST(write(slave, "def", 3));
	CHECK_EQ(read(master, text, 20), 3);
	pass();
}
"""


def test_a_terminal_of_its_own(survives: Survives) -> None:
    survives(TERMINAL)


MANY = """
int main(void)
{
	for (int i = 0; i < 900; i++)
		MUST(dup2(i % 2 ? 1 : 0, 10 + i));
	ready();
	wait_told("go");
	for (int i = 0; i < 900; i++)
		MUST(fcntl(10 + i, F_GETFD));
	CHECK(fcntl(9, F_GETFD) == -1);
	CHECK(fcntl(910, F_GETFD) == -1);
	pass();
}
"""


def test_a_full_table(survives: Survives) -> None:
    survives(MANY)


def test_a_high_number(survives: Survives) -> None:
    """Descriptors that the restore needs for itself must not be in the way of the program's own."""
    survives(
        "int main(void) {"
        " struct rlimit l; getrlimit(RLIMIT_NOFILE, &l); l.rlim_cur = l.rlim_max;"
        " MUST(setrlimit(RLIMIT_NOFILE, &l)); int top = l.rlim_max - 1;"
        ' MUST(dup2(1, top)); MUST(dup2(0, top / 2)); ready(); wait_told("go");'
        ' MUST(write(top, "", 0)); MUST(fcntl(top / 2, F_GETFD)); pass(); }'
    )


@pytest.mark.parametrize("which", [(), (0,), (0, 1, 2)], ids=["none", "stdin", "all"])
def test_standard_descriptors_may_be_closed(survives: Survives, which: tuple[int, ...]) -> None:
    closed = " ".join(f"close({fd});" for fd in which)
    survives(f'int main(void) {{ {closed} ready(); wait_told("go"); pass(); }}')


def test_the_file_is_the_same_after_somebody_else_has_moved_it(start: Targets, survives: Survives) -> None:
    """What is open by another name (a hard link made later) stays open."""
    target = start.c(
        'int main(void) { int fd = MUST(open("a", O_CREAT | O_RDWR, 0600)); MUST(write(fd, "x", 1));'
        ' ready(); wait_told("go"); char c; CHECK_EQ(pread(fd, &c, 1, 0), 1); pass(); }'
    )
    os.rename(target.path("a"), target.path("b"))
    survives(target)
