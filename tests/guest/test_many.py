"""Copies of a template that run side by side: what they may not have in common."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator

import pytest

import torpor
from kit import Target, Targets, run_torpor, wait_until
from torpor.engine.copies import CopyOptions

Program = Callable[..., Target]

COUNT = 30

DRAWS = """
import json, random, ssl, uuid
from torpor import guest
mine = random.Random(7)
ssl.RAND_bytes(1)
guest.enable()
ready()
if guest.snapshot_point() == guest.RESTORED:
    tell("copy-" + guest.argument().decode(), json.dumps({
        "random": random.random(), "Random": mine.random(), "RAND_bytes": ssl.RAND_bytes(16).hex(),
        "uuid1": str(uuid.uuid1()), "id": guest.generation.id.hex(), "event": guest.generation.clear(),
        "counter": guest.generation.counter, "pid": os.getpid()}))
time.sleep(1000)
"""


@pytest.fixture
def template(images: str) -> Iterator[Callable[..., object]]:
    """Dumps a target, ending it, and holds a template of it."""
    with contextlib.ExitStack() as stack:

        def hold(target: Target, **options: object) -> object:
            target.pids()
            torpor.dump(target.pid, images)
            target.wait_gone()
            return stack.enter_context(torpor.template(images, **options))

        yield hold


def said(target: Target, name: str) -> str:
    """What a copy has written; the target's own pid is nobody's."""
    wait_until(f"a copy makes `{name}`: {target.read('result')}", lambda: os.path.exists(target.path(name)), timeout=60)
    return target.read(name)


def ended(copies: list[object]) -> None:
    for copy in copies:
        copy.kill()  # type: ignore[attr-defined]
        copy.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["namespaces", "fresh pids"])
def test_many_copies_have_nothing_in_common(program: Program, template: Callable[..., object], how: str) -> None:
    target = program(DRAWS)
    held = template(target)
    copies = []
    try:
        for number in range(COUNT):
            wishes = {"argument": str(number).encode(), "fresh_pid": how == "fresh pids"}
            copies.append(held.clone(**wishes))  # type: ignore[attr-defined]
        draws = [json.loads(said(target, f"copy-{number}")) for number in range(COUNT)]
    finally:
        ended(copies)
    for name in ("random", "Random", "RAND_bytes", "uuid1", "id"):
        assert len({one[name] for one in draws}) == COUNT, name
    assert {one["counter"] for one in draws} == {2}
    assert all(one["event"] for one in draws)
    assert len({one["pid"] for one in draws}) == (1 if how == "namespaces" else COUNT)


def test_the_argument_of_the_template_is_for_those_without_one(program: Program, template: Callable[..., object]) -> None:
    target = program(DRAWS)
    held = template(target, argument=b"template")
    copies = []
    try:
        copies.append(held.clone(CopyOptions(argument=b"own")))  # type: ignore[attr-defined]
        copies.append(held.clone())  # type: ignore[attr-defined]
        for name in ("own", "template"):
            assert json.loads(said(target, f"copy-{name}"))["counter"] == 2
    finally:
        ended(copies)
    with pytest.raises(torpor.UsageError, match="3073 bytes"):
        CopyOptions(argument=bytes(3073))


READS = """
int main(int argc, char **argv)
{
	int fd = MUST(open(argv[1], O_RDONLY)), ids = MUST(open("ids", O_WRONLY | O_CREAT | O_APPEND, 0644));
	volatile unsigned *word = mmap(NULL, sizeof(unsigned), PROT_READ, MAP_SHARED, fd, 0), number;
	char line[64];

	ready();
	wait_told("go");
	MUST(pread(fd, (void *)&number, 4, 0));
	snprintf(line, sizeof(line), "%u,%u,%x%x\\n", word[0], number, word[6], word[7]);
	MUST(write(ids, line, strlen(line)));
	pause();
}
"""


def test_a_generation_file(start: Targets, template: Callable[..., object], tmp_path: object) -> None:
    path = f"{tmp_path}/sysgenid"
    run_torpor("generation", "create", path).must()
    target = start.c(READS, path)
    held = template(target)
    os.unlink(path)
    copies = [held.clone() for _ in range(3)]  # type: ignore[attr-defined]
    try:
        target.tell("go")
        wait_until("all have looked", lambda: len(target.read("ids").split()) == 3)
        seen = [line.split(",") for line in target.read("ids").split()]
        assert all(line[:2] == ["2", "2"] for line in seen), seen
        assert len({line[2] for line in seen}) == 3
    finally:
        ended(copies)


WIPED = """
int main(void)
{
	char *area = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(madvise(area, 4096, MADV_WIPEONFORK));
	int child = fork();
	fill(area, 8192, child ? 1 : 2);
	if (child)
		ready();
	else
		tell("child-ready", "");
	wait_told("go");
	CHECK(zeroed(area, 4096));
	CHECK(!zeroed(area + 4096, 4096));
	if (!child) {
		tell("child", "");
		return 0;
	}
	wait_told("child");
	pass();
}
"""


def test_memory_that_fork_wipes_is_empty(start: Targets, template: Callable[..., object]) -> None:
    target = start.c(WIPED)
    target.wait_file("child-ready")
    copies = [template(target).clone()]  # type: ignore[attr-defined]
    try:
        target.tell("go")
        assert said(target, "result") == "pass\n"
    finally:
        ended(copies)


def test_strict(program: Program, template: Callable[..., object]) -> None:
    target = program("import ssl\nssl.RAND_bytes(1)\nready()\ntime.sleep(1000)")
    with pytest.raises(torpor.Unsupported, match="a secret that nobody renews: openssl"):
        template(target, strict=True)


def test_the_command_hands_over_arguments(program: Program, images: str) -> None:
    target = program(DRAWS)
    torpor.dump(target.pid, images)
    target.wait_gone()
    name = f"guest-{os.getpid()}"
    run_torpor("template", "start", images, "--name", name).must()
    try:
        run_torpor("clone", name, "-n", "3", "--argument", "word%d").must()
        seen = [json.loads(said(target, f"copy-word{number}"))["random"] for number in (1, 2, 3)]
        assert len(set(seen)) == 3
    finally:
        run_torpor("template", "stop", name)
