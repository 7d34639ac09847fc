"""What the campaigns of failing calls share: the program, the ways to fail, and what is said of one failure."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any

import torpor

from .chaos import campaign_size
from .faults import Faults, OsFaults
from .files import slurp_text
from .host import descendants
from .programs import HERE

TREE = """
#include <sys/eventfd.h>

static void *idle(void *arg) { for (;;) pause(); return arg; }
static volatile char own[64 << 12];

int main(void)
{
	pthread_t id;
	int pipes[2], shared = MUST(open("data", O_CREAT | O_RDWR, 0600));
	char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	MUST(pipe(pipes));
	MUST(write(pipes[1], "data", 4));
	MUST(eventfd(3, 0));
	MUST(write(shared, "text", 4));
	MUST(unlink("data"));
	map[0] = 5;
	if (fork() == 0) {
		for (int i = 0; i < 64; i++)
			own[i << 12] = i + 1;
		for (;;) pause();
	}
	pthread_create(&id, NULL, idle, NULL);
	usleep(30000);
	ready();
	for (;;) pause();
}
"""

#: What every copy is to have for itself, however it is made: rings of the builder, of the thread and of the task, a
#: request that waits, a session on a pty of its own.
OWN = (
    slurp_text(os.path.join(HERE, "uring.h"))
    + """
#include <pty.h>
#include <sys/shm.h>

int main(void)
{
	struct ring plain, single, polled;
	struct io_uring_sqe sqe;
	int master, slave, pipes[2], segment;
	char text[8];

	MUST(openpty(&master, &slave, NULL, NULL, NULL));
	MUST(ioctl(slave, TIOCSCTTY, 0));
	MUST(write(master, "unread\\n", 7));
	segment = MUST(shmget(IPC_PRIVATE, 8192, IPC_CREAT | 0600));
	CHECK(shmat(segment, NULL, 0) != (void *)-1);
	MUST(shmctl(segment, IPC_RMID, NULL));  /* it is there as long as it is attached */
	MUST(pipe(pipes));
	ring_make(&plain, 8, 0);
	ring_make(&single, 8, IORING_SETUP_SINGLE_ISSUER);
	ring_make(&polled, 8, IORING_SETUP_SQPOLL);
	ring_nops(&single, 20);
	ring_nops(&polled, 20);
	sqe = ring_op(IORING_OP_READ, pipes[0], text, 8, 0, 1);
	ring_push(&plain, &sqe);
	ring_submit(&plain, 1, 0);
	ready();
	for (;;) pause();
}
"""
)

KINDS: dict[str, Callable[[int], Faults | OsFaults]] = {
    "gate": lambda nth: Faults(nth, errno.ENOMEM),
    "os": lambda nth: OsFaults(nth, errno.EIO),
}


def places(count: int, most: int) -> list[int]:
    """Which of ``count`` calls to fail: all, or evenly spread ones if that is more than a campaign of ``most``."""
    most = campaign_size(most)
    return sorted({1 + place * count // most for place in range(most)}) if count > most else [
        *range(1, count + 1)
    ]  # fmt: skip


def count_calls(kind: str, operation: Callable[[], object]) -> int:
    with KINDS[kind](0) as faults:
        operation()
    return faults.calls


class Outcome:
    """What became of an operation when call number ``nth`` failed; ``error`` is None if tolerated."""

    def __init__(self, kind: str, nth: int, operation: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        with KINDS[kind](nth) as faults:
            try:
                operation()
            except Exception as error:
                self.error = error
        self.name = f"call {nth}, {faults.hit}: {self.error!r}"

    def complaints(self) -> list[str]:
        """What is wrong with the error itself."""
        if self.error is None or (isinstance(self.error, torpor.TorporError) and str(self.error)):
            return []
        return [f"{self.name}: no error of ours"]


def spare(template: Any) -> list[int]:
    """The processes that a template keeps ready for copies to come."""
    with contextlib.suppress(torpor.TorporError):  # its held process may be dead
        template.inits.prepare()
    return [pid for init in template.inits.ready for pid in (init, *descendants(init))]
