/* io_uring with raw system calls, for test programs: rings that are set up, filled, submitted and reaped by hand.
 * Goes ahead of the program, after kit.h. */
#ifndef URING_H
#define URING_H
#include <linux/io_uring.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif
#ifndef IORING_SETUP_NO_MMAP
#define IORING_SETUP_NO_MMAP (1U << 14)
#endif
#ifndef IORING_SETUP_NO_SQARRAY
#define IORING_SETUP_NO_SQARRAY (1U << 16)
#endif

struct ring {
	int fd, enter_fd;
	unsigned enter_flags, setup, entries, cq_entries, features;
	char *memory, *entry_memory;
	size_t memory_size, entry_memory_size;
	volatile unsigned *sq_head, *sq_tail, *sq_flags, *sq_dropped, *array, *cq_head, *cq_tail, *cq_overflow;
	unsigned sq_mask, cq_mask;
	char *cqes;
	unsigned submitted, reaped;  /* what the program believes */
};

static UNUSED void ring_open(struct ring *ring, unsigned entries, struct io_uring_params *given)
{
	struct io_uring_params params = *given;
	size_t size;

	memset(ring, 0, sizeof(*ring));
	ring->fd = ring->enter_fd = MUST(syscall(__NR_io_uring_setup, entries, &params));
	ring->setup = params.flags;
	ring->entries = params.sq_entries;
	ring->cq_entries = params.cq_entries;
	size = params.cq_off.cqes + params.cq_entries * (params.flags & IORING_SETUP_CQE32 ? 32 : 16);
	if (!(params.flags & IORING_SETUP_NO_SQARRAY) && params.sq_off.array + 4 * params.sq_entries > size)
		size = params.sq_off.array + 4 * params.sq_entries;
	ring->memory_size = size;
	ring->entry_memory_size = params.sq_entries * (params.flags & IORING_SETUP_SQE128 ? 128 : 64);
	if (params.flags & IORING_SETUP_NO_MMAP) {  /* the last words of either struct of offsets: the address */
		memcpy(&ring->memory, (char *)&given->cq_off + 32, 8);
		memcpy(&ring->entry_memory, (char *)&given->sq_off + 32, 8);
	} else {
		ring->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
				    IORING_OFF_SQ_RING);
		ring->entry_memory = mmap(NULL, ring->entry_memory_size, PROT_READ | PROT_WRITE,
					  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	}
	CHECK(ring->memory != MAP_FAILED && ring->entry_memory != MAP_FAILED);
#define WORD(off) ((volatile unsigned *)(ring->memory + (off)))
	ring->sq_head = WORD(params.sq_off.head);
	ring->sq_tail = WORD(params.sq_off.tail);
	ring->sq_flags = WORD(params.sq_off.flags);
	ring->sq_dropped = WORD(params.sq_off.dropped);
	ring->array = WORD(params.sq_off.array);
	ring->cq_head = WORD(params.cq_off.head);
	ring->cq_tail = WORD(params.cq_off.tail);
	ring->cq_overflow = WORD(params.cq_off.overflow);
	ring->sq_mask = *WORD(params.sq_off.ring_mask);
	ring->cq_mask = *WORD(params.cq_off.ring_mask);
	ring->cqes = ring->memory + params.cq_off.cqes;
#undef WORD
	if (!(params.flags & IORING_SETUP_NO_SQARRAY))
		for (unsigned i = 0; i < ring->entries; i++)
			ring->array[i] = i;
}

/* In memory of the program's: the rings at one place, the submission entries at another. */
static UNUSED void ring_make_in(struct ring *ring, unsigned entries, unsigned flags, char *rings, char *sqes)
{
	struct io_uring_params params = {.flags = flags | IORING_SETUP_NO_MMAP};

	memcpy((char *)&params.cq_off + 32, &rings, 8);
	memcpy((char *)&params.sq_off + 32, &sqes, 8);
	ring_open(ring, entries, &params);
}

static UNUSED void ring_make(struct ring *ring, unsigned entries, unsigned flags)
{
	struct io_uring_params params = {.flags = flags, .sq_thread_idle = 50};

	ring_open(ring, entries, &params);
}

/* The next submission entry, cleared; the kernel sees it at once (a ring that is polled may take it half filled: fill
 * the copy and use ring_push). */
static UNUSED void ring_push(struct ring *ring, const struct io_uring_sqe *sqe)
{
	unsigned tail = *ring->sq_tail, size = ring->setup & IORING_SETUP_SQE128 ? 128 : 64;

	for (int i = 0; i < 5000 && tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) >= ring->entries; i++)
		usleep(1000);  /* a ring that is polled shows its head a little later than the completion */
	CHECK(tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) < ring->entries);
	memset(ring->entry_memory + (tail & ring->sq_mask) * size, 0, size);
	memcpy(ring->entry_memory + (tail & ring->sq_mask) * size, sqe, 64);
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

static UNUSED int ring_enter(struct ring *ring, unsigned submit, unsigned wait)
{
	unsigned flags = ring->enter_flags | IORING_ENTER_GETEVENTS;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (ring->setup & IORING_SETUP_SQPOLL && *ring->sq_flags & IORING_SQ_NEED_WAKEUP)
		flags |= IORING_ENTER_SQ_WAKEUP;
	return syscall(__NR_io_uring_enter, ring->enter_fd, submit, wait, flags, NULL, 0);
}

static UNUSED void ring_submit(struct ring *ring, unsigned count, unsigned wait)
{
	CHECK_EQ(ring_enter(ring, count, wait), count);
	ring->submitted += count;
}

static UNUSED unsigned ring_waiting(struct ring *ring)
{
	return __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - *ring->cq_head;
}

static UNUSED struct io_uring_cqe *ring_cqe(struct ring *ring, unsigned index)
{
	unsigned size = ring->setup & IORING_SETUP_CQE32 ? 32 : 16;

	return (void *)(ring->cqes + (index & ring->cq_mask) * size);
}

/* Takes the next completion, which must be there. */
static UNUSED struct io_uring_cqe ring_reap(struct ring *ring)
{
	struct io_uring_cqe cqe;

	CHECK(ring_waiting(ring) > 0);
	cqe = *ring_cqe(ring, *ring->cq_head);
	__atomic_store_n(ring->cq_head, *ring->cq_head + 1, __ATOMIC_RELEASE);
	ring->reaped++;
	return cqe;
}

static UNUSED struct io_uring_sqe ring_op(int opcode, int fd, const void *address, unsigned length, uint64_t offset,
					  uint64_t user_data)
{
	struct io_uring_sqe sqe;

	memset(&sqe, 0, sizeof(sqe));
	sqe.opcode = opcode;
	sqe.fd = fd;
	sqe.addr = (uintptr_t)address;
	sqe.len = length;
	sqe.off = offset;
	sqe.user_data = user_data;
	return sqe;
}

/* One request, and its completion. */
static UNUSED int ring_do(struct ring *ring, struct io_uring_sqe sqe)
{
	struct io_uring_cqe cqe;

	ring_push(ring, &sqe);
	ring_submit(ring, 1, 1);
	if (!ring_waiting(ring))
		for (int i = 0; i < 2000 && !ring_waiting(ring); i++)
			usleep(1000);
	cqe = ring_reap(ring);
	CHECK_EQ(cqe.user_data, sqe.user_data);
	return cqe.res;
}

static UNUSED void ring_nops(struct ring *ring, unsigned count)
{
	struct io_uring_sqe sqe = ring_op(IORING_OP_NOP, -1, NULL, 0, 0, 0);

	while (count) {
		unsigned part = count < ring->entries ? count : ring->entries;

		for (unsigned i = 0; i < part; i++) {
			sqe.user_data = ring->submitted + i;
			ring_push(ring, &sqe);
		}
		ring_submit(ring, part, part);
		for (unsigned i = 0; i < part; i++) {
			while (!ring_waiting(ring))
				usleep(100);
			CHECK_EQ(ring_reap(ring).user_data, ring->submitted - part + i);
		}
		count -= part;
	}
}

/* Is everything where the program believes it to be? */
static UNUSED void ring_check(struct ring *ring, unsigned unsubmitted, unsigned unreaped)
{
	CHECK_EQ(*ring->sq_head, ring->submitted);
	CHECK_EQ(*ring->sq_tail, ring->submitted + unsubmitted);
	CHECK_EQ(*ring->cq_head, ring->reaped);
	CHECK_EQ(*ring->cq_tail, ring->reaped + unreaped);
	CHECK_EQ(*ring->cq_overflow, 0);
	CHECK_EQ(*ring->sq_dropped, 0);
}

static UNUSED int ring_register(struct ring *ring, unsigned what, const void *data, unsigned count)
{
	return syscall(__NR_io_uring_register, ring->fd, what, data, count);
}
#endif
