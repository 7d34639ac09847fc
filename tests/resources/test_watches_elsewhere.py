"""inotify and fanotify on file systems whose files show other devices or have no handles: overlayfs, btrfs.

In a mount namespace of the test's own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from kit import Library, Targets
from torpor.images.store import ImageReader

from .test_watches import HEAD, TAIL, fdinfo

CLONE_NEWNS = 0x20000


@pytest.fixture
def own_mounts() -> Iterator[None]:
    """Whatever is mounted is seen by this process and what it starts, and gone afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.getcwd()
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    try:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        yield
    finally:
        assert libc.setns(before, CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        os.close(before)
        os.chdir(folder)


@pytest.fixture
def overlay(own_mounts: None, tmp_path: object) -> str:
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(f"{tmp_path}/{name}")
    with open(f"{tmp_path}/lower/below", "w") as file:
        file.write("x")
    os.mkdir(f"{tmp_path}/lower/folder")
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    done = subprocess.run(["mount", "-t", "overlay", "kit", "-o", options, f"{tmp_path}/merged"], check=False)
    if done.returncode:
        pytest.skip("overlayfs cannot be mounted here")
    return f"{tmp_path}/merged"


@pytest.fixture
def btrfs(own_mounts: None, tmp_path: object) -> Iterator[str]:
    make = shutil.which("mkfs.btrfs")
    if make is None:
        pytest.skip("no mkfs.btrfs: install btrfs-progs")
    disk, folder = f"{tmp_path}/disk", f"{tmp_path}/btrfs"
    with open(disk, "w") as file:
        file.truncate(150 << 20)
    os.mkdir(folder)
    subprocess.run([make, "-q", disk], check=True)
    if subprocess.run(["mount", "-o", "loop", disk, folder], check=False).returncode:
        pytest.skip("no loop device, or no btrfs in this kernel")
    subprocess.run(["btrfs", "-q", "subvolume", "create", f"{folder}/volume"], check=True)
    os.mkdir(f"{folder}/volume/folder")
    with open(f"{folder}/volume/below", "w") as one:
        one.write("x")
    yield f"{folder}/volume"
    subprocess.run(["umount", "-l", folder], check=True)


INOTIFY = """
os.chdir(sys.argv[1])
touch("own")
fd = ok(libc.inotify_init1(os.O_NONBLOCK))
wds = [add(fd, "below", 0x2), add(fd, "folder", 0x100), add(fd, "own", 0x2), add(fd, ".", 0x200)]
touch("copied"); held = os.open("below", os.O_RDONLY)
events(fd)
"""
INOTIFY_AFTER = """
touch("own")
same("own", events(fd)[:1], [(wds[2], 0x2, "")])
events(fd)
touch("folder/new")
same("folder", events(fd), [(wds[1], 0x100, "new")])
os.unlink("copied")
same("here", events(fd), [(wds[3], 0x200, "copied")])
touch("below")
print(events(fd))
"""
FANOTIFY = """
os.chdir(sys.argv[1])
fd = ok(libc.fanotify_init(0x2 | 0x200, 0))  # NONBLOCK, REPORT_FID
mark(fd, 0x1, 0x2 | 0x08000000, "folder"); mark(fd, 0x1, 0x2, "below")
mount, whole = ok(libc.fanotify_init(0x2, 0)), ok(libc.fanotify_init(0x2, 0))
mark(mount, 0x1 | 0x10, 0x8, "."); mark(mount, 0x1 | 0x20 | 0x40, 0x8, "below")  # FAN_MARK_MOUNT, IGNORED_MASK, SURV_MODIFY
mark(whole, 0x1 | 0x100, 0x8, "."); mark(whole, 0x1 | 0x100 | 0x400 | 0x40, 0x10, ".")  # FAN_MARK_FILESYSTEM, IGNORE
told = lambda group=fd: [mask for mask, _ in told_of(group)]
told_of(fd), told_of(mount), told_of(whole)
"""
FANOTIFY_AFTER = """
same("quiet", (told(mount), told(whole)), ([], []))
touch("folder/new")
same("folder", told()[:1], [0x2])
same("mount and file system", (told(mount), told(whole)), ([0x8], [0x8]))
os.utime("below"); open("below", "r+").close()
same("ignored", (told(mount), told(whole)), ([], [0x8]))
"""


def entries(images: str) -> list[Any]:
    folder = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return list(ImageReader(folder).read_all("files"))
    finally:
        os.close(folder)


@pytest.fixture
def trip(start: Targets, library: Library, images: str) -> object:
    def run(place: str, first: str, second: str) -> None:
        target = start.python(HEAD + first + "\nready()\nwait_told('go')\n" + second + TAIL, place)
        lines = fdinfo(target.pid)
        assert lines
        library.dump(target.pid, images)
        target.wait_gone()
        found = [one for entry in entries(images) for one in (*entry.ify.wd, *entry.ffy.mark)]
        handles = [one.f_handle if hasattr(one, "f_handle") else one.ie.f_handle for one in found]
        assert all(handle.path for handle in handles if handle.handle), "by its name it is found on another machine, too"
        library.restore(images)
        assert fdinfo(target.pid) == lines
        target.go()

    return run


def test_inotify_on_overlayfs(trip: object, overlay: str) -> None:
    trip(overlay, INOTIFY, INOTIFY_AFTER)  # type: ignore[operator]


def test_inotify_on_a_subvolume_of_btrfs(trip: object, btrfs: str) -> None:
    trip(btrfs, INOTIFY, INOTIFY_AFTER)  # type: ignore[operator]


def test_fanotify_on_overlayfs(trip: object, overlay: str) -> None:
    trip(overlay, FANOTIFY.replace("0x2 | 0x200, 0", "0x2, 0"), FANOTIFY_AFTER)  # type: ignore[operator]


def test_fanotify_on_a_subvolume_of_btrfs(trip: object, btrfs: str) -> None:
    trip(btrfs, FANOTIFY.replace("0x2 | 0x200, 0", "0x2, 0"), FANOTIFY_AFTER)  # type: ignore[operator]
