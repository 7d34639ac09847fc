"""Mappings of every kind: their content, what they share, and every flag that can be seen."""

from __future__ import annotations

import os

import pytest

import torpor
from kit import Targets, Verbs, round_trip

from .conftest import Survives

# What every program here begins with.
COMMON = """
#define PAGE 4096ul
#define RW (PROT_READ | PROT_WRITE)

static UNUSED char *map(size_t pages, int prot, int flags, int fd, off_t offset)
{
	char *place = mmap(NULL, pages * PAGE, prot, flags, fd, offset);

	CHECK(place != MAP_FAILED);
	return place;
}

static UNUSED char *anonymous(size_t pages)
{
	return map(pages, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static UNUSED int file_of(const char *name, size_t pages, unsigned seed)
{
	int fd = MUST(open(name, O_CREAT | O_RDWR, 0600));
	char *text = malloc(pages * PAGE);

	fill(text, pages * PAGE, seed);
	MUST(write(fd, text, pages * PAGE));
	free(text);
	return fd;
}
"""


def program(body: str, after: str, before: str = "") -> str:
    """A program that does ``body``, is put through it all, and then does ``after``."""
    return f'{COMMON}{before}int main(void)\n{{\n{body}\nready();\nwait_told("go");\n{after}\npass();\n}}'


def test_private_and_shared_anonymous(survives: Survives) -> None:
    survives(
        program(
            """
	char *private = anonymous(100), *shared = map(50, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int pid, status;
	fill(private, 40 * PAGE, 1);
	fill(private + 60 * PAGE, PAGE, 2);  /* a hole between */
	fill(shared + 10 * PAGE, 10 * PAGE, 3);
	pid = fork();
	if (pid == 0) {
		fill(private + PAGE, PAGE, 4);
		tell("child", "");
		wait_told("go");
		CHECK(filled(private + PAGE, PAGE, 4) && filled(private + 60 * PAGE, PAGE, 2));
		fill(shared, PAGE, 5);
		_exit(0);
	}
	wait_told("child");""",
            """
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK(filled(private, 40 * PAGE, 1) && zeroed(private + 40 * PAGE, 20 * PAGE));
	CHECK(filled(private + 60 * PAGE, PAGE, 2) && zeroed(private + 61 * PAGE, 39 * PAGE));
	CHECK(filled(shared + 10 * PAGE, 10 * PAGE, 3) && zeroed(shared + 20 * PAGE, 30 * PAGE));
	CHECK(filled(shared, PAGE, 5));  /* still shared with the child */""",
        )
    )


def test_private_and_shared_files(survives: Survives) -> None:
    survives(
        program(
            """
	int fd = file_of("data", 20, 1);
	char *private = map(20, RW, MAP_PRIVATE, fd, 0), *shared = map(5, RW, MAP_SHARED, fd, 5 * PAGE);
	char *readable = map(3, PROT_READ, MAP_SHARED, fd, 0), *text = map(2, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, PAGE);
	char expected[PAGE];
	fill(private + 2 * PAGE, PAGE, 7);  /* a copy of our own */
	memcpy(expected, private, 10);
	private[0] = expected[0];  /* copied, and alike */
	fill(shared + PAGE, PAGE, 8);
	close(fd);""",
            """
	char *whole = malloc(20 * PAGE);
	CHECK(filled(private + 2 * PAGE, PAGE, 7));
	CHECK(filled(shared + PAGE, PAGE, 8));
	fill(whole, 20 * PAGE, 1);
	CHECK(memcmp(readable, whole, 3 * PAGE) == 0 && memcmp(text, whole + PAGE, 2 * PAGE) == 0);
	CHECK(memcmp(private + 10 * PAGE, whole + 10 * PAGE, 10 * PAGE) == 0);
	fd = MUST(open("data", O_RDWR));
	MUST(pwrite(fd, "seen", 4, 12 * PAGE));
	CHECK(memcmp(private + 12 * PAGE, "seen", 4) == 0);  /* not copied: the file shows through */
	memcpy(shared, "written", 7);
	CHECK_EQ(pread(fd, expected, 7, 5 * PAGE), 7);
	CHECK(memcmp(expected, "written", 7) == 0);""",
        )
    )


PROTECTIONS = """
	char *none = map(4, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *hidden = anonymous(4);
	char *split = anonymous(10), *reserve = map(1 << 18, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *code = map(1, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fill(hidden, 4 * PAGE, 1);
	MUST(mprotect(hidden, 4 * PAGE, PROT_NONE));  /* there is content behind it */
	fill(split, 10 * PAGE, 2);
	MUST(mprotect(split + 2 * PAGE, PAGE, PROT_READ));
	MUST(mprotect(split + 4 * PAGE, PAGE, PROT_NONE));
	MUST(munmap(split + 6 * PAGE, PAGE));
	code[0] = (char)0xc3;  /* ret */
	MUST(mprotect(code, PAGE, PROT_READ | PROT_EXEC));
	MUST(mprotect(reserve + 100 * PAGE, PAGE, RW));
	fill(reserve + 100 * PAGE, PAGE, 3);
"""


def test_protections(survives: Survives) -> None:
    survives(
        program(
            PROTECTIONS,
            """
	MUST(mprotect(hidden, 4 * PAGE, PROT_READ));
	CHECK(filled(hidden, 4 * PAGE, 1));
	MUST(mprotect(none, 4 * PAGE, RW));
	CHECK(zeroed(none, 4 * PAGE));
	CHECK(filled(split, 2 * PAGE, 2));
	CHECK(msync(split + 6 * PAGE, PAGE, MS_ASYNC) == -1 && errno == ENOMEM);
	MUST(mprotect(split + 4 * PAGE, PAGE, PROT_READ));
	((void (*)(void))code)();
	CHECK(filled(reserve + 100 * PAGE, PAGE, 3));""",
        )
    )


def test_every_advice_that_shows(survives: Survives) -> None:
    survives(
        program(
            """
	static const int advices[] = {MADV_SEQUENTIAL, MADV_RANDOM, MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK,
				      MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE};
	char *places[8];
	for (int i = 0; i < 8; i++) {
		places[i] = anonymous(8) + PAGE;
		MUST(munmap(places[i] - PAGE, PAGE));  /* so that no two lie side by side */
		fill(places[i], 2 * PAGE, i);
		if (madvise(places[i], 7 * PAGE, advices[i]))
			CHECK(errno == EINVAL);  /* built without it */
	}""",
            """
	for (int i = 0; i < 8; i++)
		CHECK(filled(places[i], 2 * PAGE, i));
	if (fork() == 0) {
		CHECK(zeroed(places[4], 2 * PAGE));
		CHECK(msync(places[2], PAGE, MS_ASYNC) == -1);
		_exit(0);
	}
	int status;
	MUST(wait(&status));
	CHECK_EQ(status, 0);""",
        )
    )


def test_locked_memory(survives: Survives) -> None:
    survives(
        program(
            """
	char *locked = anonymous(10), *lazily = anonymous(10);
	MUST(mlock(locked, 5 * PAGE));
	MUST(mlock2(lazily, 10 * PAGE, MLOCK_ONFAULT));
	fill(locked, 10 * PAGE, 1);
	fill(lazily, PAGE, 2);""",
            """
	CHECK(filled(locked, 10 * PAGE, 1));
	CHECK(filled(lazily, PAGE, 2) && zeroed(lazily + PAGE, 9 * PAGE));""",
        )
    )


FUTURE = """
static UNUSED int locked(const char *place)
{
	char line[1000];
	unsigned long start, end;
	int here = 0;
	FILE *file = fopen("/proc/self/smaps", "r");

	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx", &start, &end) == 2)
			here = start <= (unsigned long)place && (unsigned long)place < end;
		else if (here && strncmp(line, "VmFlags:", 8) == 0)
			return (strstr(line, " lo") != NULL) + (strstr(line, " lf") != NULL);
	}
	fail("no such mapping");
}
"""


@pytest.mark.parametrize(("flags", "expected"), [("0", 1), ("MCL_ONFAULT", 2)], ids=["at once", "on fault"])
def test_all_of_memory_locked_for_the_future(survives: Survives, flags: str, expected: int) -> None:
    survives(
        program(
            f"MUST(mlockall(MCL_CURRENT | MCL_FUTURE | {flags})); char *p = anonymous(3); fill(p, PAGE, 1);"
            f"int before = locked(p); CHECK(before == {expected} || before == 1);",
            "CHECK(filled(p, PAGE, 1)); char *later = map(5, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);"
            "CHECK_EQ(locked(later), before);",
            FUTURE,
        )
    )


def test_a_stack_that_grows(survives: Survives) -> None:
    survives(
        program(
            """
	char *stack = map(256, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + 200 * PAGE;
	MUST(munmap(stack - 200 * PAGE, 256 * PAGE));
	CHECK(mmap(stack, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0) == stack);
	fill(stack, PAGE, 1);
	stack[-1] = 2;""",
            """
	CHECK(filled(stack, PAGE, 1));
	CHECK_EQ(stack[-1], 2);
	stack[-5 * (long)PAGE] = 3;  /* and it grows on */
	CHECK_EQ(stack[-5 * (long)PAGE], 3);""",
        )
    )


def test_the_stack_grows_on(survives: Survives) -> None:
    survives(
        program(
            "CHECK_EQ(deep(10), 10);",
            "CHECK_EQ(deep(1000), 1000);",
            "static int deep(int n) { volatile char room[4000]; room[0] = 1; return n ? deep(n - 1) + room[0] : 0; }\n",
        )
    )


def test_the_heap_goes_on(survives: Survives) -> None:
    survives(
        program(
            """
	char *start = sbrk(0);
	CHECK(sbrk(10 * PAGE + 100) == start);
	fill(start, 10 * PAGE + 100, 1);
	char *end = sbrk(0);""",
            """
	CHECK(sbrk(0) == end);
	CHECK(filled(start, 10 * PAGE + 100, 1));
	CHECK(sbrk(5 * PAGE) == end);
	fill(end, 5 * PAGE, 2);
	CHECK(sbrk(0) == end + 5 * PAGE);""",
        )
    )


def test_memfds_with_seals(survives: Survives) -> None:
    survives(
        program(
            """
	int fd = MUST(memfd_create("a name", MFD_ALLOW_SEALING | MFD_CLOEXEC)), plain = MUST(memfd_create("", 0));
	MUST(ftruncate(fd, 10 * PAGE));
	char *mapped = map(10, RW, MAP_SHARED, fd, 0), *copy = map(10, RW, MAP_PRIVATE, fd, 0);
	fill(mapped + PAGE, PAGE, 1);
	fill(copy + 3 * PAGE, PAGE, 2);
	MUST(pwrite(plain, "text", 4, 1 << 20));
	MUST(lseek(plain, 77, SEEK_SET));
	MUST(fchmod(plain, 0600));
	MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));""",
            """
	CHECK_EQ(fcntl(fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	CHECK(ftruncate(fd, PAGE) == -1 && errno == EPERM);
	CHECK(filled(mapped + PAGE, PAGE, 1) && zeroed(mapped, PAGE));
	CHECK(filled(copy + 3 * PAGE, PAGE, 2) && filled(copy + PAGE, PAGE, 1));
	MUST(pwrite(fd, "shared", 6, 5 * PAGE));
	CHECK(memcmp(mapped + 5 * PAGE, "shared", 6) == 0);
	CHECK_EQ(lseek(plain, 0, SEEK_CUR), 77);
	struct stat status;
	MUST(fstat(plain, &status));
	CHECK_EQ(status.st_size, (1 << 20) + 4);""",
        )
    )


def test_a_memfd_sealed_against_writing(survives: Survives) -> None:
    survives(
        program(
            """
	int fd = MUST(memfd_create("sealed", MFD_ALLOW_SEALING));
	char text[PAGE];
	fill(text, PAGE, 5);
	MUST(write(fd, text, PAGE));
	MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE));
	char *mapped = map(1, PROT_READ, MAP_PRIVATE, fd, 0);""",
            """
	CHECK(filled(mapped, PAGE, 5));
	CHECK_EQ(fcntl(fd, F_GET_SEALS), F_SEAL_WRITE);
	CHECK(pwrite(fd, "x", 1, 0) == -1 && errno == EPERM);""",
        )
    )


def test_a_memfd_that_is_only_mapped(survives: Survives) -> None:
    survives(
        program(
            """
	int fd = MUST(memfd_create("mapped", 0)), pid, status;
	MUST(ftruncate(fd, 4 * PAGE));
	char *mapped = map(4, RW, MAP_SHARED, fd, 0);
	fill(mapped, 2 * PAGE, 1);
	close(fd);
	pid = fork();
	if (pid == 0) {
		wait_told("go");
		fill(mapped + 3 * PAGE, PAGE, 2);
		_exit(0);
	}""",
            """
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(filled(mapped, 2 * PAGE, 1) && filled(mapped + 3 * PAGE, PAGE, 2));""",
        )
    )


SYSV = """
#include <sys/ipc.h>
#include <sys/shm.h>
"""


def test_system_v_shared_memory(survives: Survives) -> None:
    survives(
        program(
            """
	int id = MUST(shmget(IPC_PRIVATE, 8 * PAGE, IPC_CREAT | 0640)), pid, status;
	char *first = shmat(id, NULL, 0), *second = shmat(id, NULL, SHM_RDONLY);
	CHECK(first != (void *)-1 && second != (void *)-1);
	fill(first, 3 * PAGE, 1);
	pid = fork();
	if (pid == 0) {
		wait_told("go");
		fill(first + 7 * PAGE, PAGE, 2);
		_exit(0);
	}
	tell("id", "");
	atexit(forget);
	shm_id = id;""",
            """
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(filled(second, 3 * PAGE, 1) && zeroed(second + 3 * PAGE, 4 * PAGE));
	CHECK(filled(second + 7 * PAGE, PAGE, 2));
	struct shmid_ds info;
	MUST(shmctl(id, IPC_STAT, &info));
	CHECK_EQ(info.shm_nattch, 2);
	CHECK_EQ(info.shm_perm.mode & 0777, 0640);
	MUST(shmdt(second));""",
            SYSV + "static int shm_id;\nstatic void forget(void) { shmctl(shm_id, IPC_RMID, NULL); }\n",
        ),
        ignore=("*/maps/*/file",),  # the segment's number
    )


def test_a_deleted_file_that_is_mapped(survives: Survives) -> None:
    survives(
        program(
            """
	int fd = file_of("gone", 6, 3);
	char *private = map(6, RW, MAP_PRIVATE, fd, 0), *shared = map(6, RW, MAP_SHARED, fd, 0);
	fill(private + PAGE, PAGE, 4);
	fill(shared + 2 * PAGE, PAGE, 5);
	MUST(unlink("gone"));
	close(fd);""",
            """
	CHECK(filled(private + PAGE, PAGE, 4) && filled(shared + 2 * PAGE, PAGE, 5));
	CHECK(filled(private + 2 * PAGE, PAGE, 5));
	CHECK(filled(shared, PAGE, 3));""",
        )
    )


def test_a_mapping_that_reaches_beyond_its_file(survives: Survives) -> None:
    survives(
        program(
            """
	int fd = file_of("short", 2, 1);
	char *mapped = map(8, RW, MAP_SHARED, fd, 0), *private = map(8, RW, MAP_PRIVATE, fd, 0);
	fill(private + PAGE, PAGE, 2);
	MUST(ftruncate(fd, PAGE + 100));""",
            """
	CHECK(filled(mapped, PAGE, 1));
	MUST(ftruncate(fd, 8 * PAGE));
	mapped[7 * PAGE] = 9;
	CHECK_EQ(private[7 * PAGE], 9);""",
        )
    )


def test_huge_pages_where_there_are_any(survives: Survives) -> None:
    survives(
        program(
            """
	char *huge = mmap(NULL, 2 << 20, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (huge != MAP_FAILED)
		fill(huge, 2 << 20, 1);
	char *thp = anonymous(1024);
	madvise(thp, 1024 * PAGE, MADV_HUGEPAGE);
	fill(thp, 1024 * PAGE, 2);""",
            """
	if (huge != MAP_FAILED)
		CHECK(filled(huge, 2 << 20, 1));
	CHECK(filled(thp, 1024 * PAGE, 2));""",
        )
    )


def test_huge_pages_of_each_size(survives: Survives) -> None:
    """Without a reservation they can be mapped where none is free; the size shows in smaps."""
    survives(
        program(
            """
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE;
	char *of_2m = mmap(NULL, 2ul << 30, RW, flags | 21 << 26, -1, 0);
	char *of_1g = mmap(NULL, 2ul << 30, RW, flags | 30 << 26, -1, 0);""",
            """
	CHECK(of_2m == MAP_FAILED || (munmap(of_2m, 2 << 20) == 0 && munmap(of_2m + (2 << 20), 4096) == -1));
	CHECK(of_1g == MAP_FAILED || (munmap(of_1g, 2 << 20) == -1 && munmap(of_1g, 1 << 30) == 0));""",
        )
    )


def test_droppable_memory_and_guards(survives: Survives) -> None:
    survives(
        program(
            """
	char *droppable = mmap(NULL, 4 * PAGE, RW, 0x08 | MAP_ANONYMOUS, -1, 0);
	char *guarded = anonymous(8);
	int has_guard;
	fill(guarded, 8 * PAGE, 1);
	has_guard = madvise(guarded + 2 * PAGE, 2 * PAGE, 102) == 0;  /* MADV_GUARD_INSTALL */""",
            """
	if (droppable != MAP_FAILED)
		droppable[0] = 1;
	CHECK(filled(guarded, 2 * PAGE, 1));
	if (has_guard) {
		int pipes[2];
		MUST(pipe(pipes));
		CHECK(write(pipes[1], guarded + 2 * PAGE, 1) == -1 && errno == EFAULT);
		CHECK(write(pipes[1], guarded + 3 * PAGE, 1) == -1 && errno == EFAULT);
	}
	CHECK(guarded[4 * PAGE] || 1);""",
        )
    )


def test_terabytes_that_are_hardly_there(survives: Survives) -> None:
    survives(
        program(
            """
	char *vast = mmap(NULL, 1ul << 44, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(vast != MAP_FAILED);
	for (unsigned long i = 1; i < 44; i++)
		vast[1ul << i] = i;""",
            """
	for (unsigned long i = 1; i < 44; i++)
		CHECK_EQ(vast[1ul << i], i);
	CHECK_EQ(vast[1], 0);""",
        )
    )


def test_two_thousand_mappings(survives: Survives) -> None:
    survives(
        program(
            """
	char *all = anonymous(4000);
	for (int i = 0; i < 4000; i += 2) {
		all[i * PAGE] = i;
		MUST(mprotect(all + i * PAGE, PAGE, PROT_READ));
	}""",
            """
	for (int i = 0; i < 4000; i += 2)
		CHECK_EQ(all[i * PAGE], (char)i);
	all[PAGE] = 1;""",
        )
    )


def test_names_of_anonymous_memory(survives: Survives) -> None:
    survives(
        program(
            """
	char *named = anonymous(4);
	fill(named, PAGE, 1);
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, named, 4 * PAGE, "a name");""",
            "CHECK(filled(named, PAGE, 1));",
            "#ifndef PR_SET_VMA\n#define PR_SET_VMA 0x53564d41\n#define PR_SET_VMA_ANON_NAME 0\n#endif\n",
        )
    )


def test_sealed_memory(survives: Survives) -> None:
    survives(
        program(
            """
	char *sealed = anonymous(2);
	fill(sealed, 2 * PAGE, 1);
	MUST(mprotect(sealed, 2 * PAGE, PROT_READ));
	int has_mseal = syscall(462, sealed, 2 * PAGE, 0) == 0;""",
            """
	CHECK(filled(sealed, 2 * PAGE, 1));
	if (has_mseal)
		CHECK(munmap(sealed, 2 * PAGE) == -1 && errno == EPERM);""",
        )
    )


def test_time_can_be_told(survives: Survives) -> None:
    """The vdso is where it was and works: clock_gettime and getcpu go through it."""
    survives(
        program(
            "double before = seconds(); unsigned cpu; CHECK(getcpu(&cpu, NULL) == 0);",
            "CHECK(seconds() > before && seconds() < before + 100); CHECK(getcpu(&cpu, NULL) == 0);",
        )
    )


SHARED_AFTER_FORK = """
	char *data = anonymous(2000);
	fill(data, 2000 * PAGE, 1);
	for (int i = 0; i < 5; i++)
		if (fork() == 0) {
			data[i * PAGE] = 100;
			tell((const char *[]){"a", "b", "c", "d", "e"}[i], "");
			wait_told("go");
			wait_told("measured");
			CHECK_EQ(data[i * PAGE], 100);
			CHECK(filled(data + 10 * PAGE, 0, 1));
			_exit(filled(data, 2000 * PAGE, 1) ? 1 : 0);
		}
	for (int i = 0; i < 5; i++)
		wait_told((const char *[]){"a", "b", "c", "d", "e"}[i]);
"""


def _proportional_kib(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def test_pages_that_a_family_shares_stay_shared(start: Targets, verbs: Verbs, images: str) -> None:
    """8 MB that six processes share copy-on-write count once after the restore, as before it."""
    target = start.c(
        program(
            SHARED_AFTER_FORK,
            """
	int status;
	wait_told("measured");
	for (int i = 0; i < 5; i++) {
		MUST(wait(&status));
		CHECK_EQ(status, 0);
	}
	CHECK(filled(data, 2000 * PAGE, 1));""",
        )
    )
    before = sum(map(_proportional_kib, target.pids()))
    assert before < 12_000
    round_trip(verbs, target, images)
    target.tell("go")
    assert sum(map(_proportional_kib, target.pids())) < before + 2_000
    target.tell("measured")
    target.go()


def test_a_dump_leaves_pages_shared(start: Targets, images: str) -> None:
    """Who reads a page by process_vm_readv(2) makes the kernel copy it for whoever it was read from."""
    target = start.c(program(SHARED_AFTER_FORK, "(void)data;"))
    before = sum(map(_proportional_kib, target.pids()))
    torpor.dump(target.pid, images, leave_running=True)
    assert sum(map(_proportional_kib, target.pids())) < before + 1_000


@pytest.mark.parametrize("how", ["truncated", "replaced"])
def test_a_file_that_has_changed_is_noticed(start: Targets, images: str, criu_cmd: object, how: str) -> None:
    assert callable(criu_cmd)
    target = start.c(
        program('int fd = file_of("data", 4, 1); char *p = map(4, PROT_READ, MAP_SHARED, fd, 0);', "(void)p;")
    )
    criu_cmd("dump", images, "-t", target.pid).must()
    target.wait_gone()
    if how == "truncated":
        os.truncate(target.path("data"), 5000)
    else:
        os.rename(target.path("data"), target.path("old"))
    result = criu_cmd("restore", images, "-d")
    assert result.status == 1
    assert "data" in result.log
    assert not os.path.exists(f"/proc/{target.pid}")


LARGE = """
#define BYTES (24ul << 20)

static unsigned long next(unsigned long state) { return state * 6364136223846793005ul + 1442695040888963407ul; }

int main(void)
{
	unsigned long *area = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), state = 1;

	for (unsigned long n = 0; n < BYTES / 8; n++)
		if (n / 512 % 3000 != 2999)
			area[n] = state = next(state);
	CHECK(mprotect((char *)area + (8 << 20), 4 << 20, PROT_READ) == 0);
	ready();
	wait_told("go");
	state = 1;
	for (unsigned long n = 0; n < BYTES / 8; n++) {
		unsigned long expected = n / 512 % 3000 != 2999 ? state = next(state) : 0;

		if (area[n] != expected)
			fail("word %lu is %lx, expected %lx", n, area[n], expected);
	}
	pass();
}
"""


def test_large_memory(survives: Survives) -> None:
    """It is brought in from outside, in large pieces, and not by the task itself."""
    survives(LARGE)


GROWN = """
enum { PAGES = 32 };

static int holds(char *area, int pages, char what)
{
	for (int page = 0; page < pages; page++)
		if (area[page * 4096] != what || area[page * 4096 + 4095] != what)
			return 0;
	return 1;
}

int main(void)
{
	char *area = mmap(NULL, 4 * PAGES * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *other = area + 2 * PAGES * 4096;
	int status;
	pid_t child;

	CHECK(mmap(area, PAGES * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == area);
	CHECK(mmap(other, 2 * PAGES * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == other);
	memset(area, 'a', PAGES * 4096);
	memset(other, 'b', 2 * PAGES * 4096);
	child = fork();
	if (!child) {
		wait_told("go");
		exit(holds(area, PAGES, 'a') && holds(other, 2 * PAGES, 'b') ? 42 : 1);
	}
	/* One mapping grows, the other shrinks; the child's stay as they were. */
	CHECK(mmap(area + PAGES * 4096, PAGES * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
	memset(area + PAGES * 4096, 'c', PAGES * 4096);
	MUST(munmap(other + PAGES * 4096, PAGES * 4096));
	usleep(20000);
	ready();
	wait_told("go");
	CHECK(holds(area, PAGES, 'a') && holds(area + PAGES * 4096, PAGES, 'c') && holds(other, PAGES, 'b'));
	CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 42);
	pass();
}
"""


def test_mappings_that_have_changed_since_the_fork(survives: Survives) -> None:
    survives(GROWN)
