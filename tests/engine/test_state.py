"""What a task is allowed, where it stands, and how it is treated."""

from __future__ import annotations

import os

import pytest

from kit import Targets, Verbs, round_trip
from torpor.resources.task import mempolicy

from .conftest import Survives

PLACE = """
int main(void)
{
	char path[PATH_MAX], expected[PATH_MAX];

	MUST(mkdir("here", 0700));
	MUST(chdir("here"));
	umask(0137);
	CHECK(getcwd(expected, sizeof(expected)));
	ready();
	wait_told("go");
	CHECK(getcwd(path, sizeof(path)) && strcmp(path, expected) == 0);
	CHECK_EQ(umask(0), 0137);
	pass();
}
"""


def test_working_directory_and_umask(survives: Survives) -> None:
    survives(PLACE)


ROOT = """
int main(void)
{
	int outside = MUST(open(".", O_PATH | O_DIRECTORY));

	MUST(mkdir("jail", 0700));
	MUST(mkdir("jail/in", 0700));
	MUST(chroot("jail"));
	MUST(chdir("/in"));
	MUST(mkdirat(outside, "ready", 0700));
	while (faccessat(outside, "go", F_OK, 0))
		usleep(2000);
	MUST(access("/in", F_OK));
	CHECK_EQ(open("/proc", O_PATH), -1);
	int fd = MUST(openat(outside, "result.new", O_CREAT | O_WRONLY, 0600));
	MUST(write(fd, "pass\\n", 5));
	MUST(renameat(outside, "result.new", outside, "result"));
	return 0;
}
"""


def test_a_root_of_its_own(start: Targets, survives: Survives) -> None:
    target = start.c(ROOT, wait=False, flags=["-static"])
    while not os.path.isdir(target.path("ready")):
        assert target.alive(), target.read("result")
    survives(target)


LIMITS = """
int main(void)
{
	struct rlimit asked;

	for (int which = 0; which < 16; which++) {
		MUST(getrlimit(which, &asked));
		if (which == RLIMIT_NPROC || which == RLIMIT_AS)
			continue;
		if (asked.rlim_max > 1 << 30)
			asked.rlim_max = (1ul << 34) + which;
		asked.rlim_cur = asked.rlim_max > 5000 ? asked.rlim_max - 1000 : asked.rlim_max;
		MUST(setrlimit(which, &asked));
	}
	asked.rlim_cur = asked.rlim_max = 0;
	MUST(setrlimit(RLIMIT_CORE, &asked));
	asked.rlim_cur = 64;
	asked.rlim_max = 64;
	MUST(setrlimit(RLIMIT_NOFILE, &asked));  /* less than a restore may want for itself */
	ready();
	wait_told("go");
	MUST(getrlimit(RLIMIT_NOFILE, &asked));
	CHECK(asked.rlim_cur == 64 && asked.rlim_max == 64);
	MUST(getrlimit(RLIMIT_CPU, &asked));
	CHECK_EQ(asked.rlim_max, (1ul << 34) + RLIMIT_CPU);
	pass();
}
"""


def test_resource_limits(survives: Survives) -> None:
    survives(LIMITS)


SCHEDULING = """
#include <sys/personality.h>

static void *thread(void *arg)
{
	struct sched_param zero = {0};
	cpu_set_t first;

	CPU_ZERO(&first);
	CPU_SET(0, &first);
	MUST(sched_setaffinity(0, sizeof(first), &first));
	MUST(sched_setscheduler(0, SCHED_IDLE, &zero));
	MUST(syscall(SYS_ioprio_set, 1, 0, (3 << 13) | 0));  /* idle class */
	MUST(prctl(PR_SET_TIMERSLACK, 123456));
	personality(ADDR_COMPAT_LAYOUT);
	tell("thread", "");
	wait_told("go");
	CHECK_EQ(sched_getscheduler(0), SCHED_IDLE);
	CHECK_EQ(personality(0xffffffff), ADDR_COMPAT_LAYOUT);
	return arg;
}

int main(void)
{
	struct sched_param zero = {0};
	pthread_t id;

	MUST(sched_setscheduler(0, SCHED_BATCH | SCHED_RESET_ON_FORK, &zero));
	MUST(setpriority(PRIO_PROCESS, 0, 7));
	MUST(syscall(SYS_ioprio_set, 1, 0, (2 << 13) | 5));
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	wait_told("thread");
	ready();
	wait_told("go");
	pthread_join(id, NULL);
	CHECK_EQ(sched_getscheduler(0), SCHED_BATCH | SCHED_RESET_ON_FORK);
	CHECK_EQ(getpriority(PRIO_PROCESS, 0), 7);
	CHECK_EQ(syscall(SYS_ioprio_get, 1, 0), (2 << 13) | 5);
	CHECK_EQ(personality(0xffffffff), 0);
	pass();
}
"""


def test_scheduling_of_each_thread(survives: Survives) -> None:
    survives(SCHEDULING)


REALTIME = """
int main(void)
{
	struct sched_param priority = {.sched_priority = 3};

	if (sched_setscheduler(0, SCHED_RR, &priority))
		priority.sched_priority = -1;  /* real-time scheduling is not given out on this machine */
	ready();
	wait_told("go");
	if (priority.sched_priority > 0) {
		CHECK_EQ(sched_getscheduler(0), SCHED_RR);
		MUST(sched_getparam(0, &priority));
		CHECK_EQ(priority.sched_priority, 3);
	}
	pass();
}
"""


def test_real_time_scheduling(survives: Survives) -> None:
    survives(REALTIME)


PRCTLS = """
#include <sys/personality.h>

int main(void)
{
	int fd, asked, merged, takes_ids;
	char name[17] = "";

	MUST(prctl(PR_SET_NAME, "a (n)ame) 0 S \\n"));
	MUST(prctl(PR_SET_DUMPABLE, 0));
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	MUST(prctl(PR_SET_TIMERSLACK, 77777));
	MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
	takes_ids = prctl(77, 1, 0, 0, 0) == 0;  /* PR_TIMER_CREATE_RESTORE_IDS: from Linux 6.15 on */
	MUST(syscall(SYS_membarrier, 1 << 4, 0, 0));  /* REGISTER_PRIVATE_EXPEDITED */
	merged = prctl(67, 1, 0, 0, 0) == 0;  /* PR_SET_MEMORY_MERGE: where there is KSM */
	MUST(personality(ADDR_COMPAT_LAYOUT | READ_IMPLIES_EXEC));
	personality(ADDR_COMPAT_LAYOUT);
	fd = MUST(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
	MUST(write(fd, "333", 3));
	close(fd);
	fd = MUST(open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC));
	MUST(write(fd, "0x7f", 4));
	close(fd);
	ready();
	wait_told("go");
	MUST(prctl(PR_GET_NAME, name));
	CHECK(strcmp(name, "a (n)ame) 0 S \\n") == 0);
	CHECK_EQ(prctl(PR_GET_DUMPABLE), 0);
	CHECK_EQ(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
	MUST(prctl(PR_GET_CHILD_SUBREAPER, &asked));
	CHECK_EQ(asked, 1);
	CHECK_EQ(prctl(PR_GET_TIMERSLACK), 77777);
	CHECK_EQ(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), 1);
	CHECK_EQ(personality(0xffffffff), ADDR_COMPAT_LAYOUT);
	CHECK_EQ(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0), PR_MCE_KILL_EARLY);
	if (takes_ids)
		CHECK_EQ(prctl(77, 2, 0, 0, 0), 1);
	MUST(syscall(SYS_membarrier, 1 << 3, 0, 0));  /* EPERM for whoever has not registered */
	CHECK(!merged || prctl(68, 0, 0, 0, 0) == 1);
	pass();
}
"""


def test_prctls_and_what_stands_in_proc(survives: Survives) -> None:
    survives(PRCTLS)


NUMA = """
#define PAGE 4096ul
enum { INTERLEAVE = 3, LOCAL = 4, BY_ADDRESS = 2 };

static int policy(void *address)
{
	unsigned long nodes[16];
	int mode;

	MUST(syscall(SYS_get_mempolicy, &mode, nodes, 1024, address, address ? BY_ADDRESS : 0));
	return mode;
}

int main(void)
{
	char *area = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *shared = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	unsigned long nodes = 1;
	int has = access("/sys/devices/system/node", F_OK) == 0, pid, status;

	memset(area, 1, 8 * PAGE);
	if (has) {
		MUST(syscall(SYS_mbind, area, 4 * PAGE, INTERLEAVE, &nodes, 65, 0));
		MUST(syscall(SYS_mbind, shared, PAGE, INTERLEAVE, &nodes, 65, 0));
	}
	pid = fork();
	if (!pid && has)
		MUST(syscall(SYS_mbind, area, 8 * PAGE, LOCAL, NULL, 0, 0));
	if (!pid) {
		MUST(mlock(area + 6 * PAGE, PAGE));
		tell("child", "");
		wait_told("go");
		CHECK(!has || (policy(area) == LOCAL && policy(area + 5 * PAGE) == LOCAL && !policy(NULL)));
		CHECK(area[0] == 1 && area[7 * PAGE] == 1);
		_exit(0);
	}
	if (has)
		MUST(syscall(SYS_set_mempolicy, LOCAL, NULL, 0));
	wait_told("child");
	ready();
	wait_told("go");
	if (has) {
		CHECK(policy(area) == INTERLEAVE && policy(area + 4 * PAGE) == 0 && policy(NULL) == LOCAL);
		CHECK(policy(shared) == INTERLEAVE && policy(shared + PAGE) == 0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	CHECK(area[0] == 1 && area[7 * PAGE] == 1);
	pass();
}
"""


def test_numa_policies(start: Targets, library: Verbs, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those of mappings are asked for on machines with several nodes only; the kernel knows them on all.
    monkeypatch.setattr(mempolicy, "has_several_nodes", lambda: True)
    target = start.c(NUMA)
    round_trip(library, target, images)
    target.go()


SESSIONS = """
static void nice_of_session(const char *nice)
{
	int fd = open("/proc/self/autogroup", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;  /* a kernel without it */
	MUST(write(fd, nice, strlen(nice)));
	close(fd);
}

static void check_nice(int expected)
{
	FILE *file = fopen("/proc/self/autogroup", "r");
	char text[100] = "";

	if (file && fgets(text, sizeof(text), file))
		CHECK_EQ(atoi(strstr(text, " nice ") + 6), expected);
}

int main(void)
{
	int status;

	nice_of_session("7");
	if (!fork()) {
		MUST(setsid());
		nice_of_session("-3");
		tell("child", "");
		wait_told("go");
		check_nice(-3);
		_exit(0);
	}
	if (!fork()) {
		tell("member", "");
		wait_told("go");
		check_nice(7);
		_exit(0);
	}
	wait_told("child");
	wait_told("member");
	ready();
	wait_told("go");
	check_nice(7);
	CHECK(wait(&status) > 0 && status == 0);
	CHECK(wait(&status) > 0 && status == 0);
	pass();
}
"""


def test_the_nice_value_of_a_session(survives: Survives) -> None:
    survives(SESSIONS)


LOGIN_UID = """
static void write_uid(const char *text)
{
	int fd = MUST(open("/proc/self/loginuid", O_WRONLY | O_CLOEXEC));

	MUST(write(fd, text, strlen(text)));
	close(fd);
}

static void check_uid(const char *expected)
{
	char text[20] = "";
	int fd = MUST(open("/proc/self/loginuid", O_RDONLY | O_CLOEXEC));

	MUST(read(fd, text, sizeof(text) - 1));
	CHECK(strcmp(text, expected) == 0);
}

int main(void)
{
	const char *names[] = {"unset", "other", "same"};
	int status;

	if (access("/proc/self/loginuid", F_OK)) {  /* a kernel without it */
		ready();
		wait_told("go");
		pass();
	}
	for (int child = 0; child < 2; child++)
		if (!fork()) {
			if (child)
				write_uid("4321");
			if (!fork()) {
				tell(names[child], "");
				wait_told("go");
				check_uid(child ? "4321" : "4294967295");
				_exit(0);
			}
			CHECK(wait(&status) > 0 && status == 0);
			check_uid(child ? "4321" : "4294967295");
			_exit(0);
		}
	wait_told("unset");
	wait_told("other");
	write_uid("1234");
	if (!fork()) {
		tell(names[2], "");
		wait_told("go");
		check_uid("1234");
		_exit(0);
	}
	wait_told("same");
	ready();
	wait_told("go");
	check_uid("1234");
	for (int child = 0; child < 3; child++)
		CHECK(wait(&status) > 0 && status == 0);
	pass();
}
"""


def test_a_login_uid_for_each_task(survives: Survives) -> None:
    survives(LOGIN_UID)


NOT_DUMPABLE = """
int main(void)
{
	MUST(prctl(PR_SET_DUMPABLE, 0));
	ready();
	wait_told("go");
	CHECK_EQ(prctl(PR_GET_DUMPABLE), 0);
	pass();
}
"""


def test_a_task_that_is_not_dumpable(survives: Survives) -> None:
    survives(NOT_DUMPABLE)


CREDENTIALS = """
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/fsuid.h>
#include <grp.h>

static long capset_(struct __user_cap_data_struct *data)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};

	return syscall(SYS_capset, &header, data);
}

static void *thread(void *arg)
{
	struct __user_cap_data_struct data[2] = {{1 << CAP_CHOWN, 1 << CAP_CHOWN | 1 << CAP_KILL, 0}, {0, 0, 0}};
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};

	/* The raw calls change this thread alone. */
	MUST(syscall(SYS_setresgid, 3000, 3001, 3002));
	MUST(capset_(data));
	tell("thread", "");
	wait_told("go");
	memset(data, 0, sizeof(data));
	MUST(syscall(SYS_capget, &header, data));
	CHECK_EQ(data[0].effective, 1 << CAP_CHOWN);
	CHECK_EQ(data[0].permitted, 1 << CAP_CHOWN | 1 << CAP_KILL);
	return arg;
}

int main(void)
{
	gid_t groups[3] = {70, 80, 90}, asked[10];
	uid_t real, effective, saved;
	pthread_t id;
	struct __user_cap_data_struct data[2];
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};

	MUST(syscall(SYS_setgroups, 3, groups));
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	wait_told("thread");
	MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE));
	MUST(prctl(PR_CAPBSET_DROP, CAP_MKNOD));
	MUST(syscall(SYS_capget, &header, data));
	data[0].inheritable |= 1 << CAP_NET_RAW;
	MUST(capset_(data));
	MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
	MUST(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP));
	MUST(syscall(SYS_setresgid, 2000, 2001, 2002));
	MUST(syscall(SYS_setresuid, 1000, 1001, 1002));
	setfsgid(2003);
	setfsuid(1003);
	MUST(prctl(PR_SET_DUMPABLE, 1));
	MUST(chmod(kit_path("."), 0777));
	ready();
	wait_told("go");
	pthread_join(id, NULL);
	CHECK_EQ(syscall(SYS_getgroups, 10, asked), 3);
	CHECK(memcmp(asked, groups, sizeof(groups)) == 0);
	MUST(getresuid(&real, &effective, &saved));
	CHECK(real == 1000 && effective == 1001 && saved == 1002);
	CHECK_EQ(setfsuid(-1), 1003);
	CHECK_EQ(setfsgid(-1), 2003);
	CHECK_EQ(prctl(PR_GET_SECUREBITS), SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP);
	CHECK_EQ(prctl(PR_CAPBSET_READ, CAP_MKNOD), 0);
	CHECK_EQ(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_NET_RAW, 0, 0), 1);
	pass();
}
"""


def test_identities_groups_and_capabilities_of_each_thread(start: Targets, survives: Survives) -> None:
    target = start.c(CREDENTIALS, wait=False)
    os.chmod(target.folder, 0o777)
    survives(target.wait_ready())


ORDINARY_USER = """
int main(void)
{
	MUST(setgid(1000));
	MUST(setuid(1000));
	ready();
	wait_told("go");
	CHECK(geteuid() == 1000 && setuid(0) == -1);
	CHECK_EQ(prctl(PR_GET_DUMPABLE), 0);  /* changing the identity cleared it */
	pass();
}
"""


def test_an_ordinary_user_without_capabilities(start: Targets, survives: Survives) -> None:
    target = start.c(ORDINARY_USER, wait=False)
    os.chmod(target.folder, 0o777)
    survives(target.wait_ready())


FILTER = """
#include <linux/filter.h>
#include <linux/seccomp.h>

#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define REFUSE(nr, error) \\
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), \\
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), \\
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error)

static struct sock_filter no_sync[] = {REFUSE(SYS_sync, ENOTBLK), ALLOW};
static struct sock_filter no_prctl[] = {REFUSE(SYS_getpriority, ENOTDIR), ALLOW};
static struct sock_filter nothing_new[] = {
	/* What a restore would want to call, this task may not: the filter has to come last. */
	REFUSE(SYS_mmap, EPERM), REFUSE(SYS_prctl, EPERM), REFUSE(SYS_rt_sigaction, EPERM),
	REFUSE(SYS_openat, EPERM), REFUSE(SYS_munmap, EPERM), ALLOW,
};

static long install(struct sock_filter *filter, size_t length, unsigned flags)
{
	struct sock_fprog program = {length, filter};

	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static volatile int thread_sync;

static void *thread(void *arg)
{
	MUST(install(no_prctl, 4, 0));  /* this thread only */
	tell("thread", "");
	wait_told("go");
	CHECK(getpriority(PRIO_PROCESS, 0) == -1 && errno == ENOTDIR);
	thread_sync = syscall(SYS_sync) == -1 ? errno : 0;
	return arg;
}

int main(void)
{
	pthread_t id;

	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(install(no_sync, 4, SECCOMP_FILTER_FLAG_LOG));
	CHECK(pthread_create(&id, NULL, thread, NULL) == 0);
	wait_told("thread");
	tell("ready", "");
	if (getenv("STRICT_FILTER"))
		MUST(install(nothing_new, 16, 0));
	while (access(getenv("KIT_DIR"), F_OK) || !told("go"))
		;
	CHECK(syscall(SYS_sync) == -1 && errno == ENOTBLK);
	errno = 0;
	CHECK(getpriority(PRIO_PROCESS, 0) != -1 || errno == 0);
	if (getenv("STRICT_FILTER")) {
		CHECK(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EPERM);
		char good[PATH_MAX];

		strcpy(good, kit_path("good"));
		MUST(rename(good, kit_path("result")));
		_exit(0);
	}
	pthread_join(id, NULL);
	CHECK_EQ(thread_sync, ENOTBLK);
	pass();
}
"""


def test_seccomp_filters_of_each_thread(survives: Survives) -> None:
    survives(FILTER)


def test_a_filter_that_forbids_what_a_restore_needs(start: Targets, survives: Survives) -> None:
    target = start.c(FILTER, env={"STRICT_FILTER": "1"})
    target.tell("good", "pass\n")
    survives(target)


STRICT = """
int main(void)
{
	int pipes[2][2], pid, status;
	char byte;

	MUST(pipe(pipes[0]));
	MUST(pipe(pipes[1]));
	pid = fork();
	if (pid == 0) {
		MUST(prctl(PR_SET_SECCOMP, 1));
		write(pipes[1][1], "r", 1);
		read(pipes[0][0], &byte, 1);
		write(pipes[1][1], &byte, 1);
		syscall(SYS_getpid);  /* deadly */
		syscall(SYS_exit, 0);
	}
	CHECK_EQ(read(pipes[1][0], &byte, 1), 1);
	usleep(20000);
	ready();
	wait_told("go");
	MUST(write(pipes[0][1], "x", 1));
	CHECK_EQ(read(pipes[1][0], &byte, 1), 1);
	CHECK_EQ(byte, 'x');
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	pass();
}
"""


def test_strict_seccomp(survives: Survives) -> None:
    survives(STRICT)


@pytest.mark.parametrize("size", [1, 4000, 100_000], ids=["short", "a page", "long"])
def test_the_command_line_and_the_environment(start: Targets, survives: Survives, size: int) -> None:
    argument = ("x y" * size)[:size]
    source = 'int main(int c, char **v) { ready(); wait_told("go"); CHECK_EQ(strlen(v[1]), SIZE); pass(); }'
    target = start.c(source.replace("SIZE", str(size)), argument, env={"LONG": argument})
    survives(target)


REWRITTEN = """
int main(int argc, char **argv)
{
	(void)argc;
	memset(argv[0], 0, strlen(argv[0]));
	strcpy(argv[0], "renamed");  /* as daemons do */
	ready();
	wait_told("go");
	CHECK(strcmp(argv[0], "renamed") == 0);
	pass();
}
"""


def test_a_command_line_that_was_written_over(survives: Survives) -> None:
    survives(REWRITTEN)
