"""The folder of POSIX shared memory and semaphores, /dev/shm: a file system of its own for a copy.

A segment is found by its name, of which there is one, and it is memory: what one copy writes all others would read.
So a copy whose snapshot carries files of /dev/shm (carried.py) has a tmpfs of its own there, in its mount namespace
(engine/own_mounts.py), with the files that the tree has and no others. It goes with the copy. As with the IPC
namespace (ipc_space.py), nobody outside has a part in it.

Kernel: mm/shmem.c (shmem_show_options() for what is said about the one that is there)
"""

from __future__ import annotations

import os
import stat

from .. import log
from ..errors import Unsupported, doing
from ..images import schema as pb
from ..linux import mounts
from ..proc import maps, mountinfo
from ..proc.read import numbers, read
from .carried import FOLDER
from .remap import remap_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ..images.schema import Message
    from ..model.snapshot import Snapshot
    from .base import BuildContext

SOURCE = "torpor"
PATH = os.fsdecode(FOLDER.rstrip(b"/"))
MEMO = "own shm"  # in ctx.memo: the numbers of the files that are there
_SETTINGS = ("size", "mode", "uid", "gid", "nr_inodes")
_ATTRIBUTES = {
    b"nosuid": mounts.MOUNT_ATTR_NOSUID, b"nodev": mounts.MOUNT_ATTR_NODEV, b"noexec": mounts.MOUNT_ATTR_NOEXEC,
}  # fmt: skip


# --------------------------------------------------------------------------------------- restore


def decide(snapshot: Snapshot, ctx: BuildContext) -> bool:
    """Is the tree to have one? Notes which files it concerns. It is not if the snapshot does not carry all that the
    tree has open there: then a copy finds what is there, as any program does.
    """
    named = [entry.reg for entry in snapshot.files.values() if is_inside(entry) and remap_of(ctx, entry.id) is None]
    if not named or _mounted() is None:
        return False
    odd = next((entry for entry in named if not is_carried(entry)), None)
    if odd is not None:
        log.warning(f"{odd.name} is not in the snapshot: copies have what is in {PATH} in common (--overlay {PATH})")
        return False
    ctx.memo[MEMO] = {entry.id for entry in named}
    return True


def has(ctx: BuildContext, file_id: int) -> bool:
    """Is it one of the files in there?"""
    return file_id in ctx.memo.get(MEMO, ())


def is_inside(entry: Message) -> bool:
    """Is a file_entry that of a file there?"""
    return bool(entry.HasField("reg") and pb.get_bytes(entry.reg.name).startswith(FOLDER))


def is_carried(entry: Message) -> bool:
    """Can the file of a reg_file_entry be made there?"""
    return bool(entry.HasField("carried") and b"/" not in pb.get_bytes(entry.name).removeprefix(FOLDER))


def mount_own() -> None:
    """Mount a new one, like the one that is there, in the mount namespace of the calling thread. Raises KernelError."""
    there = _mounted()
    assert there is not None
    with doing(f"tmpfs on `{PATH}`"):
        settings = {name: value for name, value in mountinfo.settings(there).items() if name in _SETTINGS}
        settings.setdefault("mode", f"{stat.S_IMODE(os.stat(PATH).st_mode):o}")
        attributes = sum(_ATTRIBUTES.get(option, 0) for option in there.options)
        mounts.mount("tmpfs", {"source": SOURCE, **settings}, PATH, attributes)


def _mounted() -> mountinfo.Mount | None:
    """What is to be seen there, if that is a tmpfs."""
    mounts_here = mountinfo.parse(read(os.getpid(), "mountinfo"))
    there = [one for one in mounts_here if one.mountpoint == os.fsencode(PATH)]
    return there[-1] if there and there[-1].fstype == b"tmpfs" else None


# ------------------------------------------------------------------------------------------ dump


def is_own(mount: mountinfo.Mount) -> bool:
    """Is it one of :func:`mount_own`?"""
    return (mount.fstype, mount.source, mount.mountpoint) == (b"tmpfs", SOURCE.encode(), os.fsencode(PATH))


def troubles(root: int, tree: Collection[int]) -> Iterator[Unsupported]:
    """The files in that of process ``root`` which no task of the ``tree`` has open or mapped: they would be lost."""
    folder = f"/proc/{root}/root{PATH}"
    with os.scandir(folder) as entries:
        left = {(one.stat(follow_symlinks=False).st_dev, one.inode()): one.name for one in entries}
    for pid in tree if left else ():
        for one in maps.parse(read(pid, "maps")):
            left.pop((os.makedev(*one.dev), one.inode), None)
        for fd in numbers(pid, "fd"):
            try:
                found = os.stat(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            left.pop((found.st_dev, found.st_ino), None)
    for name in left.values():
        yield Unsupported(
            f"{PATH}/{name} is in a file system of its own, and no task has it open: it would be lost",
            hint="have the program open or remove it before the dump",
        )
