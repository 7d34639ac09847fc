"""inotify and fanotify through the whole engine: who is told of what afterwards, and under which number."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Library, Target, Targets, run_criu
from torpor.errors import Unsupported
from torpor.resources import FileKinds

HEAD = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def ok(n):
    if n < 0: raise OSError(ctypes.get_errno(), "libc")
    return n
def add(fd, path, mask): return ok(libc.inotify_add_watch(fd, path.encode(), ctypes.c_uint32(mask)))
def events(fd):
    try: data = os.read(fd, 1 << 16)
    except BlockingIOError: return []
    found = []
    while data:
        wd, mask, cookie, size = struct.unpack_from("iIII", data)
        found.append((wd, mask, data[16:16 + size].rstrip(b"\\0").decode()))
        data = data[16 + size:]
    return found
def mark(fd, flags, mask, path):
    ok(libc.fanotify_mark(fd, ctypes.c_uint(flags), ctypes.c_uint64(mask), -100, path.encode()))
def told_of(fd):
    found = []
    try: data = os.read(fd, 1 << 16)
    except BlockingIOError: return found
    while data:
        size, _, _, head, mask, file, pid = struct.unpack_from("IBBHQii", data)
        found.append((mask, file))
        data = data[size:]
    return found
def touch(path):
    with open(path, "w") as file: file.write("x")
errors = []
def same(what, a, b):
    if a != b: errors.append(f"{what}: {a!r} is not {b!r}")
"""
TAIL = """
done(not errors, "; ".join(errors)[:2000])
"""
CREATE, DELETE, MODIFY, CLOSE_WRITE, OPEN, ATTRIB = 0x100, 0x200, 0x2, 0x8, 0x20, 0x4


def test_what_is_renamed_after_the_preflight_is_found(tmp_path: Path) -> None:
    """The dump is told where it was, and another file may have that name by then."""
    from kit.file_bench import Bench, source

    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    libc = ctypes.CDLL(None)
    fd = libc.inotify_init1(0)
    assert libc.inotify_add_watch(fd, os.fsencode(old), 2) > 0
    kinds = FileKinds()
    with Bench() as bench:
        one = source(fd, 1)
        kinds.find(one).check(one, bench.dumping)
        bench.dumping.memo.clear()  # as the dump has a memory of its own
        assert list(bench.dumping.hints.values()) == [os.fsencode(old)]
        old.rename(new)
        old.write_text("")
        [watch] = kinds.find(one).dump(one, bench.dumping).wd
        assert watch.f_handle.path == str(new)
    os.close(fd)


@pytest.fixture
def trip(start: Targets, library: Library, images: str) -> Callable[..., Target]:
    """Starts a program in two halves, snapshots it between them, and asks what it thinks."""

    def run(first: str, second: str, **options: object) -> Target:
        target = start.python(HEAD + first + "\nready()\nwait_told('go')\n" + second + TAIL)
        lines = fdinfo(target.pid)
        library.dump(target.pid, images, **options)
        target.wait_gone()
        library.restore(images, **options)
        assert fdinfo(target.pid) == lines
        target.go()
        return target

    return run


def fdinfo(pid: int) -> list[str]:
    """The watches of all descriptors, as the kernel shows them, by kind; a new ghost is another inode."""
    lines = []
    for fd in sorted(os.listdir(f"/proc/{pid}/fdinfo"), key=int):
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            lines += sorted((line for line in file if "notify" in line), key=lambda line: line.partition(":")[0])
    return lines


def test_inotify_keeps_numbers_and_masks_and_tells_of_nothing_else(trip) -> None:
    trip(
        """
os.makedirs("d/sub"); touch("d/file"); touch("d/once"); os.symlink("file", "d/link")
fd = ok(libc.inotify_init1(os.O_NONBLOCK))
for n in range(5): libc.inotify_rm_watch(fd, add(fd, "d", 0xfff))
wds = [add(fd, "d/sub", 0x2), add(fd, "d/file", 0xfff), add(fd, "d/once", 0x8 | 0x80000000),
       add(fd, "d", 0x300 | 0x04000000), add(fd, "d/link", 0xfff | 0x02000000)]
events(fd)
held = os.open("d/file", os.O_RDONLY); events(fd)
""",
        """
same("quiet", events(fd), [])
touch("d/new")
same("created", events(fd), [(wds[3], 0x100, "new")])
touch("d/once"); touch("d/once")
same("once", [e for e in events(fd)], [(wds[2], 0x8, ""), (wds[2], 0x8000, "")])
os.chmod("d/file", 0o600)
same("file", events(fd), [(wds[1], 0x4, "")])
os.unlink("d/link")
link = [(wds[4], 0x4, ""), (wds[4], 0x400, ""), (wds[4], 0x8000, ""), (wds[3], 0x200, "link")]
same("link", sorted(events(fd)), sorted(link))
""",
    )


UNREAD = """
os.mkdir("d"); touch("d/file")
fd, none, blocks = ok(libc.inotify_init1(os.O_NONBLOCK)), ok(libc.inotify_init1(os.O_NONBLOCK)), ok(libc.inotify_init1(0))
wds = [add(fd, "d/file", 0x8), add(fd, "d", 0x300), add(none, "d", 0x300), add(blocks, "d", 0x300)]
for n in range(3): touch(f"d/{n}"); touch("d/file")
libc.inotify_rm_watch(none, wds[2])
import select
while len(events(none)) == 0: pass
"""
UNREAD_AFTER = """
same("readable", select.select([fd, none, blocks], [], [], 0)[0], [fd, blocks])
touch("d/file"); touch("d/new")
same("told", events(fd), [(-1, 0x4000, ""), (wds[0], 0x8, ""), (wds[1], 0x100, "new")])
same("blocks", events(blocks), [(-1, 0x4000, ""), (wds[3], 0x100, "new")])
same("nothing", events(none), [])
same("a new one", add(fd, "d/new", 2), max(wds[:2]) + 1)
"""


def test_a_program_with_unread_events_is_told_to_look_again(trip, images: str) -> None:
    trip(UNREAD, UNREAD_AFTER)


FANOTIFY_UNREAD = """
os.mkdir("d"); touch("d/file")
def group(flags, event_flags=0):
    fd = ok(libc.fanotify_init(0x2 | flags, event_flags)); mark(fd, 0x1, 0x8 | 0x08000000, "d"); return fd
names, content, pidfds, unlimited, none = group(0x400 | 0x800), group(0x4, os.O_RDWR), group(0x80 | 0x200), group(0x10), group(0)
blocks = ok(libc.fanotify_init(0, 0)); mark(blocks, 0x1, 0x8 | 0x08000000, "d")
touch("d/one"); touch("d/two"); told_of(none)
"""
FANOTIFY_UNREAD_AFTER = """
touch("d/file")
for fd in (names, content, pidfds, blocks):
    found = [(mask, file) for mask, file in told_of(fd)]
    same(f"told {fd}", (len(found), found[0], found[1][0]), (2, (0x4000, -1), 0x8))
    for _, file in found: file < 0 or os.close(file)
for fd in (unlimited, none): same(f"not told {fd}", [mask for mask, _ in told_of(fd)], [0x8])
"""


def test_a_program_with_unread_events_of_fanotify_is_told_to_look_again(trip) -> None:
    trip(FANOTIFY_UNREAD, FANOTIFY_UNREAD_AFTER)


def test_unread_events_are_named(start: Targets, images: str) -> None:
    target = start.python(
        HEAD + UNREAD + "wait = ok(libc.fanotify_init(0x2, 0)); mark(wait, 0x1, 0x20, 'd/file'); open('d/file').close()\n"
        "tell('fds', f'{fd} {blocks} {wait}')\nready(); wait_told('go')\n"
        "same('left running', [e[0] for e in events(fd)], [wds[1], wds[0]] * 3)\n" + TAIL
    )
    inotify, blocks, fanotify = target.read("fds").split()
    result = run_criu("dump", images, "-t", target.pid, "-R").must()
    for fd, count in ((inotify, 3 * (16 + 32)), (blocks, 3 * 32), (fanotify, 24)):
        assert re.search(rf"Warn: .*fd {fd} .*: {count} bytes of events", result.log), (fd, count, result.log)
    target.go()


def test_a_watched_file_that_is_deleted_but_open(start: Targets, library: Library, images: str) -> None:
    target = start.python(
        HEAD
        + """
touch("gone"); file = os.open("gone", os.O_RDWR)
fd = ok(libc.inotify_init1(os.O_NONBLOCK))
wd = add(fd, "gone", 0xfff); here = add(fd, ".", 0x300); os.unlink("gone"); events(fd)
ready(); wait_told("go"); events(fd)
os.write(file, b"more")
same("modified", events(fd), [(wd, 2, "")])
os.close(file)
"""
        + TAIL
    )
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    shown = fdinfo(target.pid)
    assert [re.search("wd:([0-9a-f]+)", line)[1] for line in shown] == ["2", "1"]  # type: ignore[index]
    target.go()


def test_fanotify_marks(trip) -> None:
    trip(
        """
os.mkdir("d"); touch("d/a"); touch("d/b"); touch("c")
fd = ok(libc.fanotify_init(0x2 | 0x1, 0))
mark(fd, 0x1, 0x20 | 0x08000000, "d")
mark(fd, 0x1, 0x2, "c")
mark(fd, 0x1 | 0x20 | 0x40, 0x20, "d/b")
reports = ok(libc.fanotify_init(0x2 | 0x200, 0))
mark(reports, 0x1 | 0x100, 0x10, "d")
mount = ok(libc.fanotify_init(0x2, os.O_RDONLY | os.O_CLOEXEC))
mark(mount, 0x1 | 0x10 | 0x20 | 0x40, 0x2, "/dev/shm")
""",
        """
open("d/a").close()
told = [(mask, os.readlink(f"/proc/self/fd/{file}")) for mask, file in told_of(fd)]
same("a", told, [(0x20, os.path.abspath("d/a"))])
open("d/b").close()
same("b", told_of(fd), [])
touch("c")
same("c", [mask for mask, _ in told_of(fd)], [0x2])
same("file system", [mask for mask, _ in told_of(reports) if mask & 0x10] != [], True)
""",
    )


REPORTS = """
def group(flags, event_flags=0): return ok(libc.fanotify_init(0x2 | flags, event_flags))
def try_mark(fd, flags, mask, path):
    try: mark(fd, flags, mask, path); marked.append((fd, flags, mask))
    except OSError as error: refused.append((hex(flags), hex(mask), error.errno))
marked, refused = [], []
os.mkdir("d"); os.mkdir("e"); touch("d/a"); touch("e/a")
IGNORE, SURV, EVICTABLE, MOUNT, FILESYSTEM, ONDIR, ON_CHILD = 0x400, 0x40, 0x200, 0x10, 0x100, 0x40000000, 0x08000000
names = group(0x400 | 0x800)  # FAN_REPORT_DFID_NAME
try_mark(names, 1, 0x100 | 0x200 | ON_CHILD | ONDIR, "d")  # FAN_CREATE, FAN_DELETE
try_mark(names, 1 | FILESYSTEM, 0x400, ".")  # FAN_DELETE_SELF
targets = group(0x200 | 0x400 | 0x800 | 0x1000)  # and FAN_REPORT_TARGET_FID
try_mark(targets, 1, 0x10000000 | ONDIR, "d")  # FAN_RENAME
try_mark(targets, 1 | EVICTABLE, 0x100, "e")
thread, pidfd, content, many = group(0x100), group(0x80), group(0x4), group(0x10 | 0x20, os.O_RDWR | os.O_CLOEXEC | os.O_APPEND)
try_mark(thread, 1, 0x8, "d/a"); try_mark(pidfd, 1, 0x20, "d/a"); try_mark(content, 1, 0x10 | 0x8, "d/a")
try_mark(many, 1 | MOUNT, 0x8, "."); try_mark(many, 1 | MOUNT | 0x20 | SURV, 0x10, "."); try_mark(many, 1 | MOUNT | IGNORE | SURV, 0x20, "/proc")
ignoring = group(0)
try_mark(ignoring, 1, 0x8 | ON_CHILD, "d"); try_mark(ignoring, 1 | IGNORE | SURV, 0x8, "d/a")
try_mark(ignoring, 1 | FILESYSTEM | IGNORE | SURV, 0x20 | ONDIR, "."); try_mark(ignoring, 1 | 0x20 | SURV, 0x8, "e")
"""
REPORTS_AFTER = """
def masks(fd): return [mask & 0xffffffff for mask, file in told_of(fd)]
# What marks a mount or a file system is told of what others do there, too.
for fd in (targets, thread, pidfd, content, ignoring): same("quiet", masks(fd), [])
if (targets, 1, 0x10000000 | ONDIR) in marked:
    os.rename("d/a", "d/b"); os.rename("d/b", "d/a")
    same("renamed", masks(targets), [0x10000000] * 2)
touch("d/a")
same("thread", masks(thread), [0x8]); same("ignoring", masks(ignoring), [])
touch("d/new"); os.unlink("d/new")
same("created", [mask & 0x300 for mask in masks(names) if mask & 0x300], [0x300])
same("not ignored", masks(ignoring), [0x8])
same("many", bool(masks(many)), True)
"""


def test_fanotify_of_all_kinds(trip) -> None:
    target = trip(REPORTS + "tell('refused', repr(refused))", REPORTS_AFTER)
    assert target.read("refused") == "[]"


def test_who_grants_access_is_refused(start: Targets, library: Library, images: str) -> None:
    target = start.python(
        HEAD + "touch('f'); fd = ok(libc.fanotify_init(0x4, 0)); mark(fd, 0x1, 0x10000, 'f')\n"
        "ready(); wait_told('go')" + TAIL
    )
    with pytest.raises(Unsupported, match="permission"):
        library.dump(target.pid, images)
    target.go()


def test_a_watched_file_that_is_not_there_any_more(start: Targets, library: Library, images: str) -> None:
    target = start.python(
        HEAD + "os.mkdir('d'); fd = ok(libc.inotify_init1(0)); add(fd, 'd', 0xfff); ready(); wait_told('go')" + TAIL
    )
    library.dump(target.pid, images)
    target.wait_gone()
    os.rmdir(target.path("d"))
    with pytest.raises(OSError, match=r"watch of .*/d"):
        library.restore(images)
    assert not target.alive()
    os.mkdir(target.path("d"))
    library.restore(images)
    target.go()
