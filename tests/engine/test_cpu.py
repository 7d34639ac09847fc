"""The processor's state: every register, in threads that compute while they are dumped."""

from __future__ import annotations

import os

import pytest

from kit import Target, Targets, Verbs, observe_memory, round_trip, wait_until
from kit.files import slurp_text

from .conftest import Survives

REGISTERS = """
/* Fills every register, spins in user space on one flag, and looks at all of them afterwards. */
#define USED __attribute__((used))
static volatile int USED go;
static volatile uint64_t USED got[16];
static unsigned char USED before[16 * 16], USED after[16 * 16];

static void *telling(void *arg) { wait_told("go"); go = 1; return arg; }

#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) \\
	DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#define LOAD(n) "movdqu before+" #n "*16(%rip), %xmm" #n "\\n"
#define STORE(n) "movdqu %xmm" #n ", after+" #n "*16(%rip)\\n"

void spin(void);
asm("spin:\\n"
    "push %rbx\\n push %rbp\\n push %r12\\n push %r13\\n push %r14\\n push %r15\\n"
    EACH(LOAD)
    "mov $0x1111111111111111, %rax\\n mov $0x2222222222222222, %rbx\\n"
    "mov $0x3333333333333333, %rcx\\n mov $0x4444444444444444, %rdx\\n"
    "mov $0x5555555555555555, %rsi\\n mov $0x6666666666666666, %rdi\\n"
    "mov $0x7777777777777777, %rbp\\n mov $0x8888888888888888, %r8\\n"
    "mov $0x9999999999999999, %r9\\n mov $0xaaaaaaaaaaaaaaaa, %r10\\n"
    "mov $0xbbbbbbbbbbbbbbbb, %r11\\n mov $0xcccccccccccccccc, %r12\\n"
    "mov $0xdddddddddddddddd, %r13\\n mov $0xeeeeeeeeeeeeeeee, %r14\\n"
    "mov $0xffffffffffffffff, %r15\\n"
    "std\\n"  /* a flag that nobody else sets */
    "1: cmpl $0, go(%rip)\\n je 1b\\n"
    "mov %rax, got(%rip)\\n mov %rbx, got+8(%rip)\\n mov %rcx, got+16(%rip)\\n"
    "mov %rdx, got+24(%rip)\\n mov %rsi, got+32(%rip)\\n mov %rdi, got+40(%rip)\\n"
    "mov %rbp, got+48(%rip)\\n mov %r8, got+56(%rip)\\n mov %r9, got+64(%rip)\\n"
    "mov %r10, got+72(%rip)\\n mov %r11, got+80(%rip)\\n mov %r12, got+88(%rip)\\n"
    "mov %r13, got+96(%rip)\\n mov %r14, got+104(%rip)\\n mov %r15, got+112(%rip)\\n"
    "pushfq\\n cld\\n pop %rax\\n mov %rax, got+120(%rip)\\n"
    EACH(STORE)
    "pop %r15\\n pop %r14\\n pop %r13\\n pop %r12\\n pop %rbp\\n pop %rbx\\n ret\\n");

int main(void)
{
	pthread_t id;

	fill(before, sizeof(before), 9);
	CHECK(pthread_create(&id, NULL, telling, NULL) == 0);
	tell("ready", "");
	spin();
	CHECK(memcmp(before, after, sizeof(before)) == 0);
	for (int i = 0; i < 15; i++)
		CHECK_EQ(got[i], 0x1111111111111111ul * (i + 1));
	CHECK(got[15] & 0x400);
	pass();
}
"""


def test_every_register_of_a_spinning_thread(survives: Survives) -> None:
    survives(REGISTERS)


VECTORS = """
#include <immintrin.h>

static volatile int go;

static void *telling(void *arg) { wait_told("go"); go = 1; return arg; }

#define SPIN "1: cmpl $0, %[go]\\n je 1b\\n"

int main(void)
{
	unsigned char before[64 * 2 + 8], after[64 * 2 + 8];
	pthread_t id;

	CHECK(pthread_create(&id, NULL, telling, NULL) == 0);
	fill(before, sizeof(before), 4);
	memset(after, 0, sizeof(after));
	tell("ready", "");
#ifdef __AVX512F__
	asm volatile("vmovdqu64 (%[b]), %%zmm1\\n vmovdqu64 64(%[b]), %%zmm31\\n kmovw 128(%[b]), %%k3\\n"
		     SPIN
		     "vmovdqu64 %%zmm1, (%[a])\\n vmovdqu64 %%zmm31, 64(%[a])\\n kmovw %%k3, 128(%[a])\\n"
		     : : [b] "r"(before), [a] "r"(after), [go] "m"(go) : "memory", "cc", "xmm1");
	CHECK(memcmp(before, after, 130) == 0);
#else
	asm volatile("vmovdqu (%[b]), %%ymm1\\n vmovdqu 64(%[b]), %%ymm15\\n"
		     SPIN
		     "vmovdqu %%ymm1, (%[a])\\n vmovdqu %%ymm15, 64(%[a])\\n"
		     : : [b] "r"(before), [a] "r"(after), [go] "m"(go) : "memory", "cc", "xmm1", "xmm15");
	CHECK(memcmp(before, after, 32) == 0 && memcmp(before + 64, after + 64, 32) == 0);
#endif
	pass();
}
"""


def cpu_flags() -> set[str]:
    for line in slurp_text("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


WIDTHS = [width for width in ("avx", "avx512f") if width in cpu_flags()]


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_registers(survives: Survives, width: str) -> None:
    survives(VECTORS, flags=(f"-m{width}",))


FLOATING = """
static volatile int go;
static void *telling(void *arg) { wait_told("go"); go = 1; return arg; }

int main(void)
{
	unsigned short control, asked;
	unsigned mxcsr = 0xffc0 | 0x6000, mxcsr_asked;
	long double pi = 3.14159265358979323846264338327950288L, got;
	pthread_t id;

	CHECK(pthread_create(&id, NULL, telling, NULL) == 0);
	asm volatile("fnstcw %0" : "=m"(control));
	control = (control & ~0xc00) | 0x800;  /* round up */
	asm volatile("fldcw %0" : : "m"(control));
	asm volatile("ldmxcsr %0" : : "m"(mxcsr));
	tell("ready", "");
	asm volatile("fldt %[pi]\\n 1: cmpl $0, %[go]\\n je 1b\\n fstpt %[got]"
		     : [got] "=m"(got) : [pi] "m"(pi), [go] "m"(go) : "cc", "memory", "st");
	asm volatile("fnstcw %0" : "=m"(asked));
	asm volatile("stmxcsr %0" : "=m"(mxcsr_asked));
	CHECK(memcmp(&pi, &got, 10) == 0);
	CHECK_EQ(asked, control);
	CHECK_EQ(mxcsr_asked & 0xffc0, mxcsr & 0xffc0);
	pass();
}
"""


def test_floating_point_stack_and_modes(survives: Survives) -> None:
    survives(FLOATING)


PROTECTION_KEYS = """
int main(void)
{
	int key = pkey_alloc(0, 0);
	char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned pkru, asked;

	if (key < 0) {  /* a machine without them */
		ready();
		wait_told("go");
		pass();
	}
	page[0] = 1;
	MUST(pkey_mprotect(page, 4096, PROT_READ | PROT_WRITE, key));
	pkey_set(key, PKEY_DISABLE_WRITE);
	asm volatile("rdpkru" : "=a"(pkru) : "c"(0) : "rdx");
	ready();
	wait_told("go");
	asm volatile("rdpkru" : "=a"(asked) : "c"(0) : "rdx");
	CHECK_EQ(asked, pkru);
	CHECK_EQ(pkey_get(key), PKEY_DISABLE_WRITE);
	pass();
}
"""


def test_protection_keys(survives: Survives) -> None:
    survives(PROTECTION_KEYS)


BASES = """
#include <asm/prctl.h>

static void *thread(void *arg)
{
	unsigned long mine = (unsigned long)arg, asked;

	MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, mine));
	tell((const char *[]){"t0", "t1"}[(mine >> 20) & 1], "");
	wait_told("go");
	MUST(syscall(SYS_arch_prctl, ARCH_GET_GS, &asked));
	CHECK_EQ(asked, mine);
	return NULL;
}

int main(void)
{
	unsigned long fs, asked;
	pthread_t ids[2];

	MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &fs));
	CHECK(pthread_create(&ids[0], NULL, thread, (void *)0x7abc00000000ul) == 0);
	CHECK(pthread_create(&ids[1], NULL, thread, (void *)0x7abc00100000ul) == 0);
	wait_told("t0");
	wait_told("t1");
	ready();
	wait_told("go");
	MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &asked));
	CHECK_EQ(asked, fs);
	pthread_join(ids[0], NULL);
	pthread_join(ids[1], NULL);
	pass();
}
"""


def test_segment_bases_of_threads(survives: Survives) -> None:
    survives(BASES)


RSEQ = """
#include <sys/rseq.h>

static struct rseq *mine(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

int main(void)
{
	cpu_set_t set;

	CHECK(__rseq_size > 0);
	ready();
	wait_told("go");
	for (int cpu = 0; cpu < 2; cpu++) {  /* the kernel keeps it up to date: it is registered */
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
		if (sched_setaffinity(0, sizeof(set), &set))
			continue;
		sched_yield();
		CHECK_EQ(mine()->cpu_id, cpu);
	}
	/* Registered already at this address, so doing it again says so. */
	CHECK(syscall(SYS_rseq, mine(), 32, 0, 0x53053053) == -1 && (errno == EBUSY || errno == EINVAL));
	pass();
}
"""


def test_restartable_sequences(survives: Survives) -> None:
    survives(RSEQ)


IN_SEQUENCE = """
#include <linux/rseq.h>

static struct rseq area __attribute__((aligned(32)));
static struct rseq_cs section __attribute__((aligned(32)));
static volatile int go __attribute__((used));
extern char begin[], end[], aborted[];

/* Stays in a sequence until it is told to go: whatever interrupts it sends it back to its beginning. */
static void *spinner(void *arg)
{
	section.start_ip = (unsigned long)begin;
	section.post_commit_offset = end - begin;
	section.abort_ip = (unsigned long)aborted;
	MUST(syscall(SYS_rseq, &area, sizeof(area), 0, 0x53053053));
	tell("spinning", "");
	asm volatile(".globl begin, end, aborted\\n"
		     "begin: movq %1, %0\\n 1: cmpl $0, go(%%rip)\\n je 1b\\n end: jmp 2f\\n"
		     ".long 0x53053053\\n aborted: jmp begin\\n 2: movq $0, %0\\n"
		     : "=m"(area.rseq_cs) : "r"(&section) : "memory", "cc");
	return arg;
}

int main(void)
{
	pthread_t id;

	CHECK(pthread_create(&id, NULL, spinner, NULL) == 0);
	wait_told("spinning");
	while (!*(volatile uint64_t *)&area.rseq_cs)
		usleep(1000);
	ready();
	wait_told("go");
	while (!*(volatile uint64_t *)&area.rseq_cs)  /* the kernel no longer takes it to be in the sequence: is it? */
		usleep(1000);
	go = 1;
	pthread_join(id, NULL);
	pass();
}
"""


def test_a_thread_in_a_restartable_sequence_begins_it_again(start: Targets, survives: Survives) -> None:
    survives(start.c(IN_SEQUENCE, flags=["-static", "-no-pie"], env={"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}))


COMPUTING = """
static volatile int stop;

static unsigned long steps(unsigned long state, unsigned long count)
{
	while (count--)
		state = state * 6364136223846793005ul + 1442695040888963407ul;
	return state;
}

static void *thread(void *arg)
{
	unsigned long state = (unsigned long)arg, done = 0;
	double real = 1;

	while (!stop) {
		state = steps(state, 1000);
		for (int i = 0; i < 100; i++)
			real = real * 1.0000001 + 1e-9;
		done++;
	}
	double expected = 1;
	for (unsigned long n = 0; n < done * 100; n++)
		expected = expected * 1.0000001 + 1e-9;
	CHECK_EQ(state, steps((unsigned long)arg, done * 1000));
	CHECK(memcmp(&real, &expected, sizeof(real)) == 0);
	return NULL;
}

int main(void)
{
	pthread_t ids[4];

	for (unsigned long n = 0; n < 4; n++)
		CHECK(pthread_create(&ids[n], NULL, thread, (void *)(n + 1)) == 0);
	ready();
	wait_told("go");
	stop = 1;
	for (int n = 0; n < 4; n++)
		pthread_join(ids[n], NULL);
	pass();
}
"""


def test_threads_that_compute_lose_nothing(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c(COMPUTING)
    for _ in range(5):
        verbs.dump(target.pid, images, leave_running=True)
    round_trip(verbs, target, images)
    target.go()


WHOLE = """
#include <sys/rseq.h>

int main(void)
{
	char text[64], *heap = malloc(1 << 20), *map;

	fill(heap, 1 << 20, 1);
	map = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fill(map, 1 << 16, 2);
	snprintf(text, sizeof(text), "%lx", (long)__builtin_thread_pointer() + (long)__rseq_offset);
	tell("rseq", text);
	ready();
	pause();
	return 0;
}
"""


def _settled(target: Target) -> dict[int, bytes]:
    wait_until("it sleeps in pause", lambda: slurp_text(f"/proc/{target.pid}/syscall")[:3] == "34 ")
    return observe_memory(target.pid)


def test_no_byte_of_memory_changes(start: Targets, verbs: Verbs, images: str) -> None:
    target = start.c(WHOLE)
    before = _settled(target)
    assert len(before) > 300
    rseq = int(target.read("rseq"), 16) & -4096  # the kernel itself writes there

    def changed() -> set[int]:
        after = _settled(target)
        assert set(before) == set(after)
        return {page for page in before if before[page] != after[page]} - {rseq}

    os.mkdir(f"{images}/running")
    verbs.dump(target.pid, f"{images}/running", leave_running=True)
    assert not changed(), "a dump left something behind"
    round_trip(verbs, target, images)
    assert not changed(), "a restore did"
