"""Damaged images of System V semaphores, message queues and shared memory, and of POSIX message queues.

Every field of every message gets awkward values, one at a time, and what follows the messages is cut and lengthened; in
an IPC namespace of the test's own, with the objects gone and with them still there. A restore either refuses that, as
a TorporError, and leaves all objects as they were, or it works.

TORPOR_CAMPAIGN says how many changes of each image are tried, evenly spread over all that there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import torpor
from kit import Targets, descendants, diff, end_descendants, host_state, wait_until
from kit.campaign import places
from kit.files import slurp, slurp_text
from torpor.errors import ImageError, TorporError

from .test_bad_images import TEXTS, GoodSet

CLONE_NEWIPC, IPC_RMID, IPC_STAT = 0x08000000, 0, 2
KINDS = {"sem": "semctl", "msg": "msgctl", "shm": "shmctl"}
LIBC = ctypes.CDLL(None, use_errno=True)

SOURCE = """
#include <mqueue.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
int main(void)
{
	struct { long type; char text[32]; } message = {7, "the first"};
	struct sembuf take[2] = {{1, -2, SEM_UNDO}, {2, 1, SEM_UNDO}};
	unsigned short values[3] = {5, 6, 7};
	struct mq_attr attr = {.mq_maxmsg = 4, .mq_msgsize = 64};
	int set = MUST(semget(0x1234, 3, IPC_CREAT | IPC_EXCL | 0640)), queue = MUST(msgget(0x1235, IPC_CREAT | IPC_EXCL | 0600));
	int segment = MUST(shmget(0x1236, 20000, IPC_CREAT | IPC_EXCL | 0600));
	char *shared = shmat(segment, NULL, 0);
	mqd_t mq = mq_open("/bad", O_RDWR | O_CREAT | O_EXCL, 0600, &attr);

	CHECK(shared != (void *)-1 && mq >= 0);
	strcpy(shared + 5000, "shared");
	MUST(semctl(set, 0, SETALL, values));
	MUST(semop(set, take, 2));
	MUST(msgsnd(queue, &message, 10, 0));
	message.type = 9;
	MUST(msgsnd(queue, &message, 0, 0));
	MUST(mq_send(mq, "urgent", 6, 5));
	MUST(mq_send(mq, "", 0, 1));
	ready();
	for (;;) pause();
}
"""


@pytest.fixture(scope="module")
def good() -> Iterator[GoodSet]:
    """In a namespace of its own until the last test of the module has ended."""
    ours = os.open("/proc/self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    assert LIBC.unshare(CLONE_NEWIPC) == 0, os.strerror(ctypes.get_errno())
    with tempfile.TemporaryDirectory(prefix="bad-ipc-") as folder:
        images = os.path.join(folder, "images")
        os.mkdir(images)
        targets = Targets(folder)
        try:
            target = targets.c(SOURCE)
            os.kill(target.pid, signal.SIGSTOP)
            wait_until("it is stopped", lambda: target.state() == "T")
            torpor.dump(target.pid, images)
            target.wait_gone()
            yield GoodSet(images, target)
        finally:
            targets.end()
            assert LIBC.setns(ours, CLONE_NEWIPC) == 0
            os.close(ours)


# ------------------------------------------------------------------------------- what there is


def objects() -> dict[str, list[list[str]]]:
    """All objects of the namespace, as the kernel lists them, without who has used them when."""
    found = {}
    for kind in KINDS:
        head, *rows = [line.split() for line in slurp_text(f"/proc/sysvipc/{kind}").splitlines()]
        kept = [at for at, name in enumerate(head) if not name.endswith(("time", "pid", "nattch"))]
        found[kind] = [[row[at] for at in kept] for row in rows]
    library = ctypes.CDLL("librt.so.1", use_errno=True)
    queue = library.mq_open(b"/bad", os.O_RDWR)
    if queue >= 0:
        found["mq"] = [[slurp_text(f"/proc/self/fd/{queue}")]]
        os.close(queue)
    else:
        assert ctypes.get_errno() == errno.ENOENT, os.strerror(ctypes.get_errno())
        found["mq"] = []
    return found


def remove_all() -> None:
    for kind, name in KINDS.items():
        for line in slurp_text(f"/proc/sysvipc/{kind}").splitlines()[1:]:
            number = int(line.split()[1])
            arguments = (number, 0, IPC_RMID) if kind == "sem" else (number, IPC_RMID, None)
            assert LIBC[name](*arguments) == 0
    ctypes.CDLL("librt.so.1").mq_unlink(b"/bad")


def attempt(good: GoodSet, files: dict[str, bytes], what: str, *, there: bool) -> TorporError | None:
    """Restore the files and require good behaviour; the error, if it was refused."""
    keep = set(descendants(os.getpid()))
    remove_all()
    if there:
        torpor_restore(good, good.files)
        end_descendants(keep)
    with tempfile.TemporaryDirectory(prefix="bad-", dir="/dev/shm") as folder:
        good.write(files, folder)
        before = host_state(folder), objects()
        error = None
        try:
            torpor.restore(folder)
        except TorporError as found:
            error = found
            assert not diff(before, (host_state(folder), objects())), (what, str(error))
        finally:
            end_descendants(keep)
    if isinstance(error, ImageError):
        assert error.image.endswith(".img") and str(error), what
    return error


def torpor_restore(good: GoodSet, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="good-", dir="/dev/shm") as folder:
        good.write(files, folder)
        torpor.restore(folder)


# ------------------------------------------------------------------------------- changes

NUMBERS = (0, 1, 2, 7, 31, 255, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def others(field: Any, old: Any) -> list[Any]:
    """Other values for a field that holds ``old``."""
    if field.enum_type is not None:
        return [value.number for value in field.enum_type.values if value.number != old]
    if field.cpp_type == field.CPPTYPE_BOOL:
        return [not old]
    if field.cpp_type == field.CPPTYPE_STRING:
        texts = [*TEXTS, "/bad", "bad", "x" * 256]
        return [text for text in (texts if isinstance(old, str) else map(str.encode, texts)) if text != old]
    bits = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    found = {number & (1 << bits) - 1 for number in (*NUMBERS, old + 1, old - 1, -old)}
    if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
        found = {number - (1 << bits) if number >> bits - 1 else number for number in found}
    return sorted(found - {old})


def changes(message: Any, place: str = "") -> Iterator[tuple[str, Callable[[Any], object]]]:
    """(what, how to do it to a copy of the message) for everything that can be changed in it."""
    for field in message.DESCRIPTOR.fields:
        name, values = field.name, getattr(message, field.name)
        where = f"{place}{name}"
        if field.is_repeated:
            yield f"{where} twice", lambda m, n=name: getattr(m, n).extend(list(getattr(m, n)))
            yield f"{where} removed", lambda m, n=name: m.ClearField(n)
            if field.message_type is not None:
                for index, one in enumerate(values):
                    for what, do in changes(one, f"{where}[{index}]."):
                        yield what, lambda m, n=name, i=index, d=do: d(getattr(m, n)[i])
        elif not message.HasField(name):
            continue
        else:
            yield f"{where} removed", lambda m, n=name: m.ClearField(n)
            if field.message_type is not None:
                for what, do in changes(values, f"{where}."):
                    yield what, lambda m, n=name, d=do: d(getattr(m, n))
            else:
                for value in others(field, values):
                    yield f"{where} = {str(value)[:40]}", lambda m, n=name, v=value: setattr(m, n, v)


def damaged(good: GoodSet, file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(what, files) for each change to an image of IPC objects, or to the message queue among the files."""
    entries = [(message, behind) for name, _, message, behind in good.messages if name == file]
    for index, (message, behind) in enumerate(entries):
        if file == "files.img" and not message.HasField("mq"):
            continue
        for what, do in changes(message):
            if file == "files.img" and not what.startswith("mq."):
                continue
            changed = type(message).FromString(message.SerializePartialToString())
            do(changed)
            yield f"{file} {what}", _with(good, file, entries, index, changed, behind)
        for size in {0, 1, len(behind) // 2, len(behind) - 1} if behind else ():
            yield f"{file} {size} of {len(behind)}", _with(good, file, entries, index, message, behind[: max(size, 0)])
        yield f"{file} longer", _with(good, file, entries, index, message, behind + b"\xff" * 70)
    twice = [*entries, *entries]
    yield f"{file} twice", {**good.files, file: good.with_messages(file, twice)}
    yield f"{file} without any", {**good.files, file: good.with_messages(file, [])}
    yield f"without {file}", {name: content for name, content in good.files.items() if name != file}


def _with(
    good: GoodSet, file: str, entries: list[tuple[Any, bytes]], index: int, message: Any, behind: bytes
) -> dict[str, bytes]:
    changed = [*entries]
    changed[index] = message, behind
    return {**good.files, file: good.with_messages(file, changed)}


# ------------------------------------------------------------------------------- tests

FILES = ("ipcns-sem-3.img", "ipcns-msg-3.img", "ipcns-shm-3.img", "files.img")


@pytest.mark.parametrize("there", [False, True], ids=["gone", "there"])
def test_good(good: GoodSet, there: bool) -> None:
    assert set(FILES) <= set(good.names)
    assert attempt(good, good.files, "nothing", there=there) is None
    assert [len(rows) for rows in objects().values()] == [1, 1, 1, 1]
    assert "QSIZE:6" in objects()["mq"][0][0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("there", [False, True], ids=["gone", "there"])
@pytest.mark.parametrize("file", FILES)
def test_every_field(good: GoodSet, file: str, there: bool) -> None:
    refused = 0
    every = [*damaged(good, file)]
    for place in places(len(every), 60):
        what, files = every[place - 1]
        error = attempt(good, files, what, there=there)
        refused += error is not None
        if error is not None:
            assert not isinstance(error, torpor.KernelError) or error.errno, what
    assert refused > 10, "hardly anything is refused: the test is blind"
    with contextlib.suppress(FileNotFoundError):
        assert slurp(os.path.join(good.folder, file)) == good.files[file]
