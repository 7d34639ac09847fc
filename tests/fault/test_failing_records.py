"""The n-th call that a restored task makes for itself fails, for every n: nothing is left, and the error names the
call.
"""

from __future__ import annotations

import struct

import pytest

import torpor
from kit import Target, Targets, diff, host_state, wait_until
from torpor.remote import stub
from torpor.remote.machine import RECORD_BYTES
from torpor.remote.program import Program

FAMILY = """
#include <sys/eventfd.h>

static void *idle(void *arg) { for (;;) pause(); return arg; }

int main(void)
{
	pthread_t id;
	int pipes[2];
	char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	MUST(pipe(pipes));
	MUST(eventfd(3, 0));
	map[0] = 5;
	if (fork() == 0)
		for (;;) pause();
	if (fork() == 0)
		_exit(3);
	pthread_create(&id, NULL, idle, NULL);
	ready();
	for (;;) pause();
}
"""
SPACES = """
int main(void)
{
	if (fork() == 0)
		for (;;) pause();
	MUST(unshare(CLONE_NEWPID));
	if (fork() == 0) {
		if (fork() == 0)
			for (;;) pause();
		for (;;) pause();
	}
	if (fork() == 0)
		for (;;) pause();
	usleep(50000);
	ready();
	for (;;) pause();
}
"""
NO_SUCH_CALL = 100_000  # ENOSYS, which no record tolerates


class Broken:
    """Breaks one record of all those that a restore writes: the ``nth``, counted from 0."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.seen = 0
        self.hit = ""

    def __call__(self, arena: stub.Arena, program: Program) -> None:
        content = bytearray(program.compile())
        index = self.nth - self.seen
        if 0 <= index < len(program):
            struct.pack_into("<Q", content, index * RECORD_BYTES, NO_SUCH_CALL)
            self.hit = program.records[index].name
        self.seen += len(program)
        start = program.base - arena.base
        arena.memory[start : start + len(content)] = content


@pytest.fixture(params=[(FAMILY, 3), (SPACES, 5)], ids=["family", "pid-namespaces"])
def dead(request: pytest.FixtureRequest, start: Targets, images: str) -> Target:
    source, count = request.param
    target = start.c(source)
    wait_until("all are there", lambda: len(target.pids()) == count)
    torpor.dump(target.pid, images)
    target.wait_gone()
    return target


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_every_call_of_every_program(dead: Target, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host_state()
    nth, count, broken, wrong = 0, 1, 0, []
    while nth < count:
        fault = Broken(nth)
        monkeypatch.setattr(stub.Arena, "write", lambda arena, program, fault=fault: fault(arena, program))
        try:
            torpor.restore(images)
        except torpor.TorporError as error:
            broken += 1
            if fault.hit not in str(error) or "ENOSYS" not in str(error):
                wrong.append(f"call {nth}, {fault.hit}: {error}")
        else:
            if fault.hit:
                wrong.append(f"call {nth}, {fault.hit}: no error")
            dead.end()
            dead.wait_gone()
        count = max(count, fault.seen)
        wrong += [f"call {nth}, {fault.hit}: {line}" for line in diff(before, host_state())[:3]]
        nth += 1
    assert broken > 100
    assert not wrong, "\n".join(wrong[:20])
    monkeypatch.undo()
    assert torpor.restore(images).pid == dead.pid
