"""inotify and fanotify through the whole engine: who is told of what afterwards, and under which number."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

from kit import Library, Target, Targets
from torpor.errors import Unsupported

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
    """The watches of all descriptors, as the kernel shows them; a new ghost is another inode."""
    lines = []
    for fd in sorted(os.listdir(f"/proc/{pid}/fdinfo"), key=int):
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            lines += [line for line in file if "notify" in line]
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
