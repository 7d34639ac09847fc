"""Restoring images that are damaged, or made to do damage.

A good set is changed at random, in its bytes (cut off, flipped, exchanged, left out) and in what its
messages say (any field of any message gets an awkward value), and restored. Either that is refused,
as a TorporError that says what is wrong, and leaves nothing behind; or it works, for many fields can
have other values, and then the tree is ended.

TORPOR_CAMPAIGN says how many sets are tried; the same ones each time.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torpor
from kit import Target, Targets, descendants, diff, end_descendants, host_state, wait_until
from kit.files import slurp
from torpor.errors import ImageError, TorporError
from torpor.images import magic
from torpor.images.store import ImageReader

EXAMPLES = int(os.environ.get("TORPOR_CAMPAIGN", "200"))
HANGS_AFTER_S = 20.0

SOURCE = """
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
static void *sleeper(void *unused)
{
	for (;;) pause();
}
int main(void)
{
	int fds[2], counter = eventfd(5, 0), poller = epoll_create1(0), clock = timerfd_create(CLOCK_MONOTONIC, 0);
	int gone = open("gone", O_RDWR | O_CREAT, 0600), memfd = memfd_create("named", 0);
	struct epoll_event event = {.events = EPOLLIN};
	struct sigaction act = {.sa_handler = SIG_IGN};
	struct sigevent nothing = {.sigev_notify = SIGEV_NONE};
	struct itimerspec when = {{1000, 0}, {1000, 0}};
	struct itimerval often = {{1000, 0}, {1000, 0}};
	stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
	char *shared = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), *map;
	sigset_t mask;
	pthread_t thread;
	timer_t timer;

	MUST(pipe(fds));
	CHECK_EQ(write(fds[1], "in the pipe", 11), 11);
	CHECK_EQ(write(gone, "in the deleted file", 19), 19);
	MUST(unlink("gone"));
	MUST(mkfifo("fifo", 0600));
	MUST(open("fifo", O_RDWR));
	MUST(ftruncate(memfd, 8192));
	CHECK(mmap(0, 8192, PROT_READ, MAP_SHARED, memfd, 0) != MAP_FAILED);
	map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, open("/proc/self/exe", O_RDONLY), 0);
	CHECK(map != MAP_FAILED);
	map[5] = shared[7000] = 1;
	MUST(epoll_ctl(poller, EPOLL_CTL_ADD, counter, &event));
	MUST(timerfd_settime(clock, 0, &when, 0));
	MUST(timer_create(CLOCK_MONOTONIC, &nothing, &timer));
	MUST(timer_settime(timer, 0, &when, 0));
	MUST(setitimer(ITIMER_VIRTUAL, &often, 0));
	MUST(sigaltstack(&stack, 0));
	MUST(sigaction(SIGUSR2, &act, 0));
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR1);
	sigprocmask(SIG_BLOCK, &mask, 0);
	raise(SIGUSR1);
	if (fork() == 0) {
		setpgid(0, 0);
		for (;;) pause();
	}
	if (fork() == 0)
		_exit(3);
	pthread_create(&thread, 0, sleeper, 0);
	usleep(50000);
	ready();
	for (;;) pause();
}
"""


class GoodSet:
    """The images of a stopped tree, in memory, and the messages in them."""

    def __init__(self, folder: str, target: Target) -> None:
        self.target = target
        self.folder = folder
        self.files = {name: slurp(os.path.join(folder, name)) for name in os.listdir(folder)}
        self.files.pop("stats-dump", None)
        #: (file, index of the entry, message, what follows it)
        self.messages: list[tuple[str, int, Any, bytes]] = []
        self.heads: dict[str, bytes] = {}
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for file in sorted(self.files):
                name = magic.image_name(file)
                if name is not None and magic.kind_of(name).form != magic.RAW:
                    self._read(ImageReader(fd), name, file)
        finally:
            os.close(fd)
        self.names = sorted(self.files)

    def _read(self, reader: ImageReader, name: str, file: str) -> None:
        content, at = self.files[file], len(magic.head(magic.kind_of(name)))
        self.heads[file] = content[:at]
        for index, span in enumerate(reader.spans(name)):
            start = at + 4 + int.from_bytes(content[at : at + 4], "little")
            at = span.offset + span.size
            self.messages.append((file, index, span.message, content[start:at]))

    def write(self, files: dict[str, bytes], folder: str) -> None:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)

    def with_messages(self, file: str, messages: list[tuple[Any, bytes]]) -> bytes:
        parts = [self.heads[file]]
        for message, behind in messages:
            content = message.SerializePartialToString()
            parts += [len(content).to_bytes(4, "little"), content, behind]
        return b"".join(parts)


# ------------------------------------------------------------------------------- changes to bytes


def cut(content: bytes, where: int, what: int) -> bytes:
    return content[: where % (len(content) + 1)]


def flip(content: bytes, where: int, what: int) -> bytes:
    if not content:
        return content
    at = where % len(content)
    return content[:at] + bytes([content[at] ^ (what % 255 + 1)]) + content[at + 1 :]


def long_varint(content: bytes, where: int, what: int) -> bytes:
    at = where % (len(content) + 1)
    return content[:at] + b"\xff" * (what % 9 + 1) + b"\x01" + content[at + 1 :]


def huge_length(content: bytes, where: int, what: int) -> bytes:
    return content[:8] + (what % (1 << 32)).to_bytes(4, "little") + content[12:]


def repeat(content: bytes, where: int, what: int) -> bytes:
    at = where % (len(content) + 1)
    return content[:at] + content[at : at + what % 200] + content[at:]


def more(content: bytes, where: int, what: int) -> bytes:
    return content + bytes([what % 256]) * (where % 40)


BYTES = (cut, flip, flip, long_varint, huge_length, repeat, more)

# ---------------------------------------------------------------------------- changes to messages

NUMBERS = (
    0, 1, 2, 3, 5, 9, 19, 31, 64, 65, 100, 255, 4095, 4096, 65536, 1 << 20, (1 << 22) - 1, 1 << 22,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 0x200000000000, (1 << 47) - 4096, 1 << 47,
    (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 2, (1 << 64) - 1,
)  # fmt: skip
STEPS = (1, -1, 4096, -4096, 3, 1 << 32)
TEXTS = (
    "", "/", "x", "/etc", "/no such file", "a" * 5000, "/" + "a/" * 3000, "\0", "../x", "/dev/null", "/dev/zero",
    "/proc/self/fd/0", "/proc/1/root", "/proc/self/mem", "/dev/shm/no/such", "/dev/shm/torpor made", "(deleted)", "ü",
)  # fmt: skip


def awkward(message: Any, choices: list[int]) -> str:
    """Give some field somewhere in the message an awkward value; says which."""
    fields = message.DESCRIPTOR.fields
    picks = iter(choices)

    def pick(count: int) -> int:
        return next(picks, 0) % count

    # Fields that are there rather than those that are not.
    present = [field for field, _ in message.ListFields()]
    pool = present if present and pick(4) else list(fields)
    if not pool:
        return ""
    field = pool[pick(len(pool))]
    rest = list(picks)
    if field.is_repeated:
        return f"{field.name} {awkward_list(message, field, rest)}"
    if field.message_type is not None:
        if rest and rest[0] % 8 == 0:
            message.ClearField(field.name)
            return f"{field.name} removed"
        return f"{field.name}." + awkward(getattr(message, field.name), rest[1:])
    if rest and rest[0] % 10 == 0:
        message.ClearField(field.name)
        return f"{field.name} removed"
    value = other_value(field, getattr(message, field.name), rest[1:])
    setattr(message, field.name, value)
    return f"{field.name} = {str(value)[:50]}"


def awkward_list(message: Any, field: Any, choices: list[int]) -> str:
    values = getattr(message, field.name)
    first, second, *rest = [*choices, 0, 0]
    how = first % 6
    if how == 0 and len(values):
        del values[second % len(values)]
        return "one less"
    if field.message_type is not None:
        if how == 1 and len(values):
            values.add().CopyFrom(values[second % len(values)])
            return "one twice"
        if how == 2 and len(values) > 1:
            del values[second % len(values) :]
            return "cut off"
        if how == 3 and len(values) > 1:
            copies = [type(value).FromString(value.SerializePartialToString()) for value in values]
            copies.insert(0, copies.pop(second % len(copies)))
            del values[:]
            values.extend(copies)
            return "in another order"
        one = values[second % len(values)] if len(values) else values.add()
        return f"[{second % max(len(values), 1)}] {awkward(one, rest)}"
    old = values[second % len(values)] if len(values) else field.default_value or 0
    if field.cpp_type == field.CPPTYPE_STRING and not isinstance(old, str | bytes):
        old = "" if field.type == field.TYPE_STRING else b""
    value = other_value(field, old, rest)
    if how == 1 or not len(values):
        values.append(value)
        return f"with {value!r}"[:60]
    values[second % len(values)] = value
    return f"[{second % len(values)}] = {value!r}"[:60]


def other_value(field: Any, old: Any, choices: list[int]) -> Any:
    first, second = [*choices, 0, 0][:2]
    if field.enum_type is not None:
        numbers = [value.number for value in field.enum_type.values]
        return numbers[first % len(numbers)]
    if field.cpp_type == field.CPPTYPE_BOOL:
        return not old
    if field.cpp_type == field.CPPTYPE_STRING:
        text = TEXTS[first % len(TEXTS)]
        return text if field.type == field.TYPE_STRING else text.encode()
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return float(NUMBERS[first % len(NUMBERS)])
    kind = first % 3
    if kind == 0:
        value = NUMBERS[second % len(NUMBERS)]
    elif kind == 1:
        value = old + STEPS[second % len(STEPS)]
    else:
        value = old ^ 1 << second % 64
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    value &= (1 << bits) - 1
    if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64) and value >> (bits - 1):
        value -= 1 << bits
    return value


Choices = list[int]
NUMBER = st.integers(0, (1 << 32) - 1)
KIND = st.sampled_from(["bytes", *["field"] * 6, "file", "entry"])
CHANGE = st.tuples(KIND, st.lists(NUMBER, min_size=12, max_size=12))


def change(good: GoodSet, files: dict[str, bytes], kind: str, numbers: Choices) -> str:
    """Do one change to the files of a set; says what."""
    first, second, third, *rest = numbers
    if kind == "bytes":
        how, name = BYTES[first % len(BYTES)], good.names[second % len(good.names)]
        if name in files:
            files[name] = how(files[name], third, rest[0])
        return f"{how.__name__} {name} {third} {rest[0]}"
    if kind == "file":
        name, other = (good.names[number % len(good.names)] for number in (first, second))
        if third % 3 == 0 and name in files:
            del files[name]
            return f"without {name}"
        files[name] = good.files[other] if third % 3 == 1 else b""
        return f"{other} as {name}" if third % 3 == 1 else f"{name} empty"
    # One of a kind of files, so that a core is not changed ten times as often as anything else.
    kinds = sorted({entry[0].split("-")[0] for entry in good.messages})
    wanted = kinds[first % len(kinds)]
    candidates = [entry for entry in good.messages if entry[0].split("-")[0] == wanted]
    file, index, _, _ = candidates[second % len(candidates)]
    messages = [
        (type(message).FromString(message.SerializePartialToString()), behind)
        for one, _, message, behind in good.messages
        if one == file
    ]
    if kind == "entry":
        what = change_entries(messages, index, third, rest)
    else:
        what = f"entry {index}: " + awkward(messages[index][0], [third, *rest])
    files[file] = good.with_messages(file, messages)
    return f"{file} {what}"


def change_entries(messages: list[tuple[Any, bytes]], index: int, how: int, rest: Choices) -> str:
    if how % 4 == 0:
        del messages[index]
        return f"without entry {index}"
    if how % 4 == 1:
        messages.insert(rest[0] % (len(messages) + 1), messages[index])
        return f"entry {index} twice"
    if how % 4 == 2:
        messages.insert(rest[0] % len(messages), messages.pop(index))
        return f"entry {index} elsewhere"
    message, behind = messages[index]
    messages[index] = (message, behind[: rest[0] % (len(behind) + 1)])
    return f"less behind entry {index}"


# ------------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def good() -> Iterator[GoodSet]:
    with tempfile.TemporaryDirectory(prefix="bad-images-") as folder:
        os.chmod(folder, 0o755)
        images = os.path.join(folder, "images")
        os.mkdir(images)
        targets = Targets(folder)
        try:
            target = targets.c(SOURCE)
            # Stopped: what they would do with damaged memory or registers is not the question.
            for pid in target.pids():
                os.kill(pid, signal.SIGSTOP)
            wait_until("it is stopped", lambda: target.state() == "T")
            torpor.dump(target.pid, images)
            target.wait_gone()
            yield GoodSet(images, target)
        finally:
            targets.end()


def try_restore(good: GoodSet, files: dict[str, bytes], what: list[str]) -> str:
    """Restore the files and require that it is well-behaved; gives the error's text, or ""."""
    keep = set(descendants(os.getpid()))
    with tempfile.TemporaryDirectory(prefix="bad-", dir="/dev/shm") as folder:
        good.write(files, folder)
        places = (folder, good.target.folder)
        before, listed = host_state(*places), outside(good)
        started = time.monotonic()
        try:
            error = refusal(folder)
            if error is None:
                end_descendants(keep)
            after = host_state(*places)
        finally:
            end_descendants(keep)
        assert time.monotonic() - started < HANGS_AFTER_S, what
        assert not diff(before, after), (what, str(error), diff(before, after))
        assert outside(good) == listed, (what, str(error))
    if isinstance(error, ImageError):
        assert error.image.endswith(".img") or error.image == "parent", (what, str(error))
    return "" if error is None else str(error)


def refusal(folder: str) -> TorporError | None:
    """Restore; the error if that was refused."""
    try:
        torpor.restore(folder)
    except TorporError as error:
        return error
    return None


def outside(good: GoodSet) -> list[object]:
    """What the tree's files are like, and those that images are made to name."""
    found: list[object] = []
    for name in sorted(os.listdir(good.target.folder)):
        status = os.lstat(os.path.join(good.target.folder, name))
        found.append((name, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns))
    for name in TEXTS:
        if name.startswith("/") and len(name) < 4096 and os.path.lexists(name):
            status = os.lstat(name)
            found.append((name, status.st_mode, status.st_uid, status.st_gid, status.st_rdev))
    return found


def test_good(good: GoodSet) -> None:
    assert try_restore(good, good.files, []) == ""


@pytest.mark.timeout(60 + EXAMPLES)
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(changes=st.lists(CHANGE, min_size=1, max_size=2))
def test_changed(good: GoodSet, changes: list[tuple[str, Choices]]) -> None:
    files = dict(good.files)
    what = [change(good, files, kind, numbers) for kind, numbers in changes]
    try_restore(good, files, what)


def test_every_file_missing_or_cut(good: GoodSet) -> None:
    for name in good.names:
        files = dict(good.files)
        content = files.pop(name)
        try_restore(good, files, [f"without {name}"])
        for size in {0, 8, len(content) // 2, len(content) - 1}:
            files[name] = content[: max(size, 0)]
            try_restore(good, files, [f"{name}: {size} bytes"])
