"""io_uring: requests that wait for an event or for their time go on waiting, and end as they would have."""

from __future__ import annotations

import os
import random
import shutil

import pytest

import kit
import torpor
from kit import Target, Targets, Verbs, assert_same, observe_settled, observe_tree
from kit.chaos import campaign_size, duration, kill_in_the_middle
from kit.clients import Clients, Connection, Refused, tcp
from kit.files import slurp_text
from kit.network import own_network

from .conftest import Survives

#: Each does several dumps and restores.
pytestmark = pytest.mark.timeout(180)

URING = slurp_text(os.path.join(os.path.dirname(kit.__file__), "uring.h"))
SETUPS = {
    "plain": "0",
    "cooperative": "IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG",
    "single": "IORING_SETUP_SINGLE_ISSUER",
    "deferred": "IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN",
    "no array": "IORING_SETUP_NO_SQARRAY | IORING_SETUP_SQE128 | IORING_SETUP_CQE32",
}
NUMBERS = ("/*/maps/*/file",)

ALL = URING + r"""
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

struct ring ring;
static struct __kernel_timespec moment, later;
static int listener, pair[2], pipes[2], full[2], event, unheard[2];
static char received[16], text[16], piped[16], *bulk;
static uint64_t counter;
static struct sockaddr_in6 peer;
static socklen_t peer_size = sizeof(peer);

static int connect_to(int where)
{
	struct sockaddr_in6 name;
	socklen_t size = sizeof(name);
	int fd = MUST(socket(AF_INET6, SOCK_STREAM, 0));

	MUST(getsockname(where, (void *)&name, &size));
	name.sin6_addr = in6addr_loopback;
	MUST(connect(fd, (void *)&name, size));
	return fd;
}

static void put(struct io_uring_sqe sqe)
{
	ring_push(&ring, &sqe);
	ring_submit(&ring, 1, 0);
}

/* The next completion, which must come within some seconds, and nothing else with it. */
static struct io_uring_cqe next(uint64_t user_data)
{
	struct io_uring_cqe cqe;

	for (int i = 0; i < 2000 && !ring_waiting(&ring); i++) {
		MUST(ring_enter(&ring, 0, 0));
		usleep(1000);
	}
	if (!ring_waiting(&ring))
		fail("no completion of %d", (int)user_data);
	cqe = ring_reap(&ring);
	CHECK_EQ(cqe.user_data, user_data);
	return cqe;
}

static void make_wait(void)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6};
	struct io_uring_sqe sqe;

	listener = MUST(socket(AF_INET6, SOCK_STREAM, 0));
	MUST(bind(listener, (void *)&any, sizeof(any)));
	MUST(listen(listener, 8));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, unheard));
	MUST(pipe(pipes));
	MUST(pipe(full));
	event = MUST(eventfd(0, 0));
	bulk = malloc(1 << 20);
	fill(bulk, 1 << 20, 5);
	MUST(fcntl(full[1], F_SETPIPE_SZ, 65536));
	CHECK_EQ(write(full[1], bulk, 65536), 65536);

	sqe = ring_op(IORING_OP_POLL_ADD, pair[0], NULL, 0, 0, 10);
	sqe.poll32_events = POLLIN | POLLRDHUP;
	put(sqe);
	sqe = ring_op(IORING_OP_ACCEPT, listener, &peer, 0, (uintptr_t)&peer_size, 20);
	sqe.accept_flags = SOCK_CLOEXEC | SOCK_NONBLOCK;
	put(sqe);
	sqe = ring_op(IORING_OP_RECV, pair[0], received, sizeof(received), 0, 30);
	put(sqe);
	sqe = ring_op(IORING_OP_READ, pipes[0], piped, sizeof(piped), -1, 40);
	put(sqe);
	sqe = ring_op(IORING_OP_READ, event, &counter, 8, 0, 50);
	sqe.flags = HOW;
	put(sqe);
	sqe = ring_op(IORING_OP_WRITE, full[1], bulk + 4096, 65536, -1, 60);
	put(sqe);
	moment = (struct __kernel_timespec){1000, 0};
	sqe = ring_op(IORING_OP_TIMEOUT, -1, &moment, 1, 3, 70);  /* or three completions */
	put(sqe);
	later = (struct __kernel_timespec){2000000000, 5};
	sqe = ring_op(IORING_OP_TIMEOUT, -1, &later, 1, 0, 80);
	sqe.timeout_flags = IORING_TIMEOUT_ABS | IORING_TIMEOUT_REALTIME;
	put(sqe);
	sqe = ring_op(IORING_OP_RECV, unheard[0], text, 1, 0, 90);
	sqe.flags = IOSQE_IO_LINK;
	ring_push(&ring, &sqe);
	later = (struct __kernel_timespec){3000, 0};
	sqe = ring_op(IORING_OP_LINK_TIMEOUT, -1, &later, 1, 0, 91);
	ring_push(&ring, &sqe);
	ring_submit(&ring, 2, 0);
	memset(&moment, 0xff, sizeof(moment));  /* nobody looks at it any more */
	memset(&later, 0xff, sizeof(later));
	usleep(50000);  /* a worker arms one of them */
}

static void let_come(void)
{
	struct io_uring_cqe cqe;
	int client, status;
	char *back = malloc(65536);

	CHECK_EQ(ring_waiting(&ring), 0);
	MUST(write(pipes[1], "pipe", 4));
	CHECK_EQ(next(40).res, 4);
	CHECK(!memcmp(piped, "pipe", 4));
	counter = 0;
	MUST(eventfd_write(event, 77));
	CHECK_EQ(next(50).res, 8);
	CHECK_EQ(counter, 77);
	client = connect_to(listener);
	cqe = next(20);
	status = MUST(fcntl(cqe.res, F_GETFD));
	CHECK(status & FD_CLOEXEC);
	CHECK(fcntl(cqe.res, F_GETFL) & O_NONBLOCK);
	CHECK_EQ(peer.sin6_family, AF_INET6);
	CHECK_EQ(peer_size, sizeof(peer));
	CHECK_EQ(next(70).res, 0);  /* that was the third */
	MUST(write(client, "hello", 5));
	CHECK_EQ(read(cqe.res, text, 16), 5);

	MUST(write(pair[1], "abc", 3));
	for (int i = 0; i < 2; i++) {  /* both wait for the same thing */
		for (int j = 0; j < 2000 && !ring_waiting(&ring); j++) {
			MUST(ring_enter(&ring, 0, 0));
			usleep(1000);
		}
		cqe = ring_reap(&ring);
		if (cqe.user_data == 10)
			CHECK_EQ(cqe.res & POLLIN, POLLIN);
		else {
			CHECK_EQ(cqe.user_data, 30);
			CHECK_EQ(cqe.res, 3);
			CHECK(!memcmp(received, "abc", 3));
		}
	}
	CHECK_EQ(read(full[0], back, 65536), 65536);
	CHECK(filled(back, 65536, 5));
	CHECK_EQ(next(60).res, 65536);
	CHECK_EQ(read(full[0], back, 65536), 65536);
	CHECK(!memcmp(back, bulk + 4096, 65536));
	CHECK_EQ(write(unheard[1], "z", 1), 1);
	for (int i = 0; i < 2; i++) {
		for (int j = 0; j < 2000 && !ring_waiting(&ring); j++) {
			MUST(ring_enter(&ring, 0, 0));
			usleep(1000);
		}
		cqe = ring_reap(&ring);
		CHECK_EQ(cqe.res, cqe.user_data == 90 ? 1 : -ECANCELED);
	}
	{
		struct io_uring_sqe sqe = ring_op(IORING_OP_TIMEOUT_REMOVE, -1, (void *)80, 0, 0, 81);

		put(sqe);
		for (int i = 0; i < 2; i++) {
			cqe = ring_reap(&ring);
			CHECK_EQ(cqe.res, cqe.user_data == 80 ? -ECANCELED : 0);
		}
	}
}

int main(void)
{
	ring_make(&ring, 8, SETUP);
	ring_nops(&ring, 30);
	make_wait();
	ring_check(&ring, 0, 0);
	ready();
	wait_told("go");
	ring_check(&ring, 0, 0);
	let_come();
	ring_check(&ring, 0, 0);
	ring_nops(&ring, 100);
	pass();
}
"""


@pytest.mark.parametrize("name", SETUPS)
def test_all_kinds_of_requests_go_on_waiting(survives: Survives, name: str) -> None:
    survives(ALL, flags=(f"-DSETUP=({SETUPS[name]})", "-DHOW=0"), ignore=NUMBERS)


def test_a_worker_of_the_kernel_has_armed_one_of_them(survives: Survives) -> None:
    survives(ALL, flags=("-DSETUP=0", "-DHOW=IOSQE_ASYNC"), compare=False)


SERVER = URING + r"""
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

/* A server of its own, with a ring for each thread, that echoes lines; what it does not wait for it does not do. */
enum {ACCEPT = 1, RECV, SEND, CLOCK};
#define THREADS 2

static int listeners[THREADS];
static unsigned ticks[THREADS];

static void put(struct ring *ring, struct io_uring_sqe sqe, unsigned what, int fd)
{
	sqe.user_data = (uint64_t)what << 32 | (unsigned)fd;
	ring_push(ring, &sqe);
}

static void *serve(void *number)
{
	struct ring ring;
	struct __kernel_timespec tick = {0, 20000000};
	static char buffers[THREADS][1024][256];
	unsigned unsubmitted = 2, me = (uintptr_t)number;

	ring_make(&ring, 256, SETUP);
	put(&ring, ring_op(IORING_OP_ACCEPT, listeners[me], NULL, 0, 0, 0), ACCEPT, 0);
	put(&ring, ring_op(IORING_OP_TIMEOUT, -1, &tick, 1, 0, 0), CLOCK, 0);
	for (;;) {
		CHECK_EQ(ring_enter(&ring, unsubmitted, 1), unsubmitted);
		unsubmitted = 0;
		while (ring_waiting(&ring)) {
			struct io_uring_cqe cqe = ring_reap(&ring);
			int fd = (int)cqe.user_data;
			char *buffer;

			switch (cqe.user_data >> 32) {
			case ACCEPT:
				CHECK(cqe.res > 0);
				put(&ring, ring_op(IORING_OP_ACCEPT, listeners[me], NULL, 0, 0, 0), ACCEPT, 0);
				put(&ring, ring_op(IORING_OP_RECV, cqe.res, buffers[me][cqe.res], 256, 0, 0), RECV, cqe.res);
				unsubmitted += 2;
				break;
			case RECV:
				if (cqe.res <= 0) {
					close(fd);
					break;
				}
				buffer = buffers[me][fd];
				put(&ring, ring_op(IORING_OP_SEND, fd, buffer, cqe.res, 0, 0), SEND, fd);
				unsubmitted++;
				break;
			case SEND:
				CHECK(cqe.res > 0);
				put(&ring, ring_op(IORING_OP_RECV, fd, buffers[me][fd], 256, 0, 0), RECV, fd);
				unsubmitted++;
				break;
			case CLOCK:
				CHECK_EQ(cqe.res, -ETIME);
				__atomic_add_fetch(&ticks[me], 1, __ATOMIC_RELAXED);
				put(&ring, ring_op(IORING_OP_TIMEOUT, -1, &tick, 1, 0, 0), CLOCK, 0);
				unsubmitted++;
				break;
			default:
				fail("%d?", (int)(cqe.user_data >> 32));
			}
		}
	}
	return NULL;
}

int main(void)
{
	struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	pthread_t thread;

	for (uintptr_t i = 0; i < THREADS; i++) {
		int one = 1;

		listeners[i] = MUST(socket(AF_INET, SOCK_STREAM, 0));
		MUST(setsockopt(listeners[i], SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)));
		name.sin_port = htons(6500 + i);
		MUST(bind(listeners[i], (void *)&name, sizeof(name)));
		MUST(listen(listeners[i], 8));
		pthread_create(&thread, NULL, serve, (void *)i);
	}
	ready();
	wait_told("go");
	for (int i = 0; i < THREADS; i++) {
		unsigned before = __atomic_load_n(&ticks[i], __ATOMIC_RELAXED);

		CHECK(before > 3);
		for (int j = 0; j < 500 && __atomic_load_n(&ticks[i], __ATOMIC_RELAXED) < before + 3; j++)
			usleep(10000);
		CHECK(__atomic_load_n(&ticks[i], __ATOMIC_RELAXED) >= before + 3);
	}
	pass();
}
"""


def echo(connection: Connection, client: int, turn: int) -> None:
    line = f"{client}:{turn}:{'x' * (turn % 200)}"
    connection.send(f"{line}\n".encode())
    if (found := connection.line().decode()) != line:
        raise Refused(f"{found!r} for {line!r}")


@pytest.mark.parametrize("name", ["plain", "deferred"])
def test_a_server_that_is_used_meanwhile(start: Targets, verbs: Verbs, images: str, name: str) -> None:
    """Its connections live through it: somebody is always answered, and always once."""
    if shutil.which("nft") is None:
        pytest.skip("nft is missing (./test installs nftables)")
    with own_network():
        target = start.c(SERVER, flags=(f"-DSETUP=({SETUPS[name]})",))
        with Clients(lambda: tcp(6500), echo, count=3) as some, Clients(lambda: tcp(6501), echo, count=3) as others:
            for number, leave_running in enumerate((True, False, False)):
                folder = os.path.join(images, str(number))
                os.mkdir(folder)
                verbs.dump(target.pid, folder, leave_running=leave_running, tcp_established=True)
                if not leave_running and verbs.name != "untouched":
                    target.wait_gone()
                    verbs.restore(folder, tcp_established=True)
                some.make_progress(20)
                others.make_progress(20)
        target.go()


def dump_is_killed(target: Target, images: str) -> None:
    """kill -9 of a dump, at random moments: nobody notices. Then one that is not killed."""
    dice = random.Random(7)

    def once(name: str) -> None:
        torpor.dump(target.pid, os.path.join(images, name), leave_running=True)

    os.mkdir(os.path.join(images, "first"))
    length = duration(lambda: once("first"))
    for number in range(campaign_size(12)):
        os.mkdir(os.path.join(images, str(number)))
        kill_in_the_middle(lambda name=str(number): once(name), length, dice)  # type: ignore[misc]
        assert target.alive()


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["plain", "deferred"])
def test_a_dump_that_is_killed_leaves_all_waiting(start: Targets, images: str, name: str) -> None:
    target = start.c(ALL, flags=(f"-DSETUP=({SETUPS[name]})", "-DHOW=0"))
    dump_is_killed(target, images)
    os.mkdir(os.path.join(images, "last"))
    torpor.dump(target.pid, os.path.join(images, "last"))
    target.wait_gone()
    torpor.restore(os.path.join(images, "last"))
    target.go()


@pytest.mark.parametrize("options", [{"map": True}, {"map": True, "map_lazy": True}, {"own_pids": True}], ids=str)
def test_ways_to_restore(start: Targets, images: str, options: dict[str, bool]) -> None:
    """Also where the memory that is received into comes later."""
    target = start.c(ALL, flags=("-DSETUP=0", "-DHOW=0"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.pid = torpor.restore(images, **options).pid
    target.go()


REFUSED = URING + r"""
#include <sys/socket.h>
#ifndef IORING_TIMEOUT_MULTISHOT
#define IORING_TIMEOUT_MULTISHOT (1U << 6)
#endif

int main(int argc, char **argv)
{
	struct ring ring;
	struct __kernel_timespec soon = {1000, 0};
	const char *what = argv[1];
	static char text[100];
	static struct iovec vector = {text, 100};
	static struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
	static uint32_t word;
	int pair[2], file = MUST(open("data", O_RDWR | O_CREAT, 0600));
	struct io_uring_sqe sqe;
	(void)argc;

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	ring_make(&ring, 8, strcmp(what, "polls the ring") ? 0 : IORING_SETUP_SQPOLL);
	sqe = ring_op(IORING_OP_RECV, pair[0], text, 10, 0, 42);
	if (!strcmp(what, "again and again")) {
		sqe = ring_op(IORING_OP_TIMEOUT, -1, &soon, 1, 0, 42);
		sqe.timeout_flags = IORING_TIMEOUT_MULTISHOT;
	} else if (!strcmp(what, "recvmsg"))
		sqe = ring_op(IORING_OP_RECVMSG, pair[0], &header, 1, 0, 42);
	else if (!strcmp(what, "futex_wait")) {
		sqe = ring_op(51, 2, &word, 0, 0, 42);  /* a word of 4 bytes */
		sqe.addr2 = 0;
		sqe.addr3 = 0xffffffff;
	} else if (!strcmp(what, "a part of its bytes")) {
		MUST(write(pair[1], "abc", 3));
		sqe.msg_flags = MSG_WAITALL;
	} else if (!strcmp(what, "is linked to it"))
		sqe.flags = IOSQE_IO_LINK;
	ring_push(&ring, &sqe);
	if (!strcmp(what, "is linked to it")) {
		sqe = ring_op(IORING_OP_WRITE, file, "x", 1, 0, 43);
		ring_push(&ring, &sqe);
	}
	if (ring.setup & IORING_SETUP_SQPOLL) {
		MUST(ring_enter(&ring, 0, 0));
		while (*ring.sq_head != 1) usleep(1000);
		usleep(100000);
	} else
		ring_submit(&ring, *ring.sq_tail, 0);
	if (!strcmp(what, "is not open any more"))
		close(pair[0]);
	CHECK_EQ(ring_waiting(&ring), 0);
	if (!strcmp(what, "unmapped"))
		MUST(munmap(ring.entry_memory, ring.entry_memory_size));
	ready();
	wait_told("go");
	CHECK_EQ(ring_waiting(&ring), 0);
	pass();
}
"""


def test_a_ring_that_is_not_mapped_any_more(start: Targets, images: str) -> None:
    target = start.c(REFUSED, "unmapped")
    with pytest.raises(torpor.Unsupported, match="has unmapped the ring"):
        torpor.dump(target.pid, images)
    target.go()


@pytest.mark.parametrize(
    "what", ["again and again", "recvmsg", "a part of its bytes", "is linked to it", "is not open any more",
             "polls the ring"]
)  # fmt: skip
def test_what_cannot_be_made_again_is_named(start: Targets, images: str, what: str) -> None:
    target = start.c(REFUSED, what)
    before = observe_settled(target.pid)
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    text = str(caught.value)
    assert "io_uring" in text and what in text and "hint" in text, text
    assert any(what in str(cause) for cause in torpor.check(target.pid))
    assert not os.listdir(images)
    assert_same(before, observe_tree(target.pid))
    target.go()


def test_a_request_that_the_kernel_does_not_list(start: Targets, images: str) -> None:
    """It is counted all the same."""
    target = start.c(REFUSED, "futex_wait")
    with pytest.raises(torpor.Unsupported, match="1 requests"):
        torpor.dump(target.pid, images)
    assert not os.listdir(images)
    target.go()


MANY = URING + r"""
#include <sys/socket.h>
#define COUNT 300

/* More than fit into the ring at once, with repeated ones among them, of which each event is a completion. */
int main(void)
{
	static int pairs[COUNT][2], listener;
	static char received[COUNT];
	struct ring ring;
	struct sockaddr_un { sa_family_t family; char path[16]; } name = {AF_UNIX, "\0torpor-many"};
	struct io_uring_sqe sqe;
	unsigned events = 0;

	listener = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
	snprintf(name.path + 1, 15, "many.%d", getpid());
	MUST(bind(listener, (void *)&name, sizeof(name)));
	MUST(listen(listener, 100));
	ring_make(&ring, 64, SETUP);
	sqe = ring_op(IORING_OP_ACCEPT, listener, NULL, 0, 0, 1000);
	sqe.ioprio = IORING_ACCEPT_MULTISHOT;
	ring_push(&ring, &sqe);
	ring_submit(&ring, 1, 0);
	for (int i = 0; i < COUNT; i++) {
		MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pairs[i]));
		if (i % 2) {
			sqe = ring_op(IORING_OP_POLL_ADD, pairs[i][0], NULL, IORING_POLL_ADD_MULTI, 0, i);
			sqe.poll32_events = POLLIN;
		} else
			sqe = ring_op(IORING_OP_RECV, pairs[i][0], &received[i], 1, 0, i);
		ring_push(&ring, &sqe);
		ring_submit(&ring, 1, 0);
	}
	for (int round = 0; round < 2; round++) {
		if (round) {
			for (int i = 1; i < 7; i += 2)  /* some that nobody has reaped */
				MUST(write(pairs[i][1], "x", 1));
			CHECK_EQ(ring_enter(&ring, 0, 3), 0);
			CHECK_EQ(ring_waiting(&ring), 3);
			for (int i = 1; i < 7; i += 2) {  /* else it would be told once more of what there is to be read */
				char byte;

				CHECK_EQ(read(pairs[i][0], &byte, 1), 1);
			}
			ready();
			wait_told("go");
			CHECK_EQ(ring_waiting(&ring), 3);
			for (unsigned seen = 0; seen != 7;)
				seen |= 1 << ring_reap(&ring).user_data / 2;
		}
		CHECK_EQ(ring_waiting(&ring), 0);
		for (int i = 1; i < COUNT; i += 2) {
			char byte;
			struct io_uring_cqe cqe;

			MUST(write(pairs[i][1], "x", 1));
			CHECK_EQ(ring_enter(&ring, 0, 1), 0);
			cqe = ring_reap(&ring);
			CHECK_EQ(cqe.user_data, i);
			CHECK_EQ(cqe.res, POLLIN);
			CHECK(cqe.flags & IORING_CQE_F_MORE);
			CHECK_EQ(read(pairs[i][0], &byte, 1), 1);
			events++;
		}
		for (int i = 0; i < 5; i++) {
			int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), accepted;
			struct io_uring_cqe cqe;

			MUST(connect(client, (void *)&name, sizeof(name)));
			CHECK_EQ(ring_enter(&ring, 0, 1), 0);
			cqe = ring_reap(&ring);
			CHECK_EQ(cqe.user_data, 1000);
			CHECK(cqe.flags & IORING_CQE_F_MORE);
			accepted = cqe.res;
			CHECK(accepted > 0);
			close(accepted);
			close(client);
		}
	}
	for (int i = COUNT - 2; i >= 0; i -= 2) {
		struct io_uring_cqe cqe;

		MUST(write(pairs[i][1], "y", 1));
		CHECK_EQ(ring_enter(&ring, 0, 1), 0);
		cqe = ring_reap(&ring);
		CHECK_EQ(cqe.user_data, i);
		CHECK_EQ(cqe.res, 1);
		CHECK_EQ(received[i], 'y');
	}
	CHECK_EQ(events, COUNT);
	ring_nops(&ring, 100);
	pass();
}
"""


@pytest.mark.parametrize("name", ["plain", "cooperative", "single", "deferred"])
def test_many_that_wait_and_some_that_come_again(survives: Survives, name: str) -> None:
    survives(MANY, flags=(f"-DSETUP=({SETUPS[name]})",), ignore=NUMBERS)
