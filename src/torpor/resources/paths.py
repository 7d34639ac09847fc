"""Where the file behind a /proc link is found by name, or why it cannot be.

A link of /proc (fd/N, exe, cwd, map_files/…) names a file as its mount namespace sees it, which
need not be where that file still is: names are removed, given to other files, hidden by mounts.
Kernel: fs/d_path.c, fs/proc/base.c
"""

from __future__ import annotations

import os
import stat

from ..errors import KernelError, Unsupported
from ..linux.call import buffer, call
from ..linux.kernel import name_bytes
from ..proc import fdinfo, mountinfo
from ..proc.read import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .base import BuildContext, DumpContext

# include/uapi/linux/magic.h
PROC_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, NFS_SUPER_MAGIC = 0x9FA0, 0x794C7630, 0x6969
HUGETLBFS_MAGIC, DEVPTS_SUPER_MAGIC = 0x958458F6, 0x1CD1

#: How a file is to be found again at restore.
NAMED, GHOST, LINKED, EXTERNAL = "named", "ghost", "linked", "external"
#: By another of its names, in the same directory.
OTHER = "other"
#: Of files in /proc: about a task that has ended, or about one of the tree.
DEAD_TASK, LIVE_TASK = "dead task", "live task"

_DELETED = b" (deleted)"


class Place:
    """What to do about one file: ``how`` is one of the constants above, ``name`` its absolute name.

    Of DEAD_TASK files ``pid`` is the task that /proc showed; of OTHER ones ``other`` is the name that remains.
    """

    __slots__ = ("how", "name", "other", "pid")

    def __init__(self, how: str, name: bytes, pid: int = 0, other: bytes = b"") -> None:
        self.how = how
        self.name = name
        self.pid = pid
        self.other = other


class Found:
    """A file to be dumped, seen through a link of /proc.

    ``proc_link`` is that link, ``target`` what it reads as, ``label`` how errors call it, ``stat``
    that of the file.
    """

    __slots__ = ("label", "pid", "proc_link", "stat", "target")

    def __init__(
        self, pid: int, proc_link: str, target: bytes, result: os.stat_result, label: str
    ) -> None:
        self.pid = pid
        self.proc_link = proc_link
        self.target = target
        self.stat = result
        self.label = label

    def refuse(self, why: str, hint: str = "") -> Unsupported:
        """The error that this file cannot be dumped."""
        return Unsupported(f"{self.label}: {why}", hint=hint)


def strip_deleted(target: bytes) -> bytes:
    """``target`` without the kernel's `` (deleted)``."""
    return target.removesuffix(_DELETED)


def file_system(path: str) -> int:
    """The type of the file system that ``path`` is on: a number of linux/magic.h."""
    area = buffer(120)
    call("statfs", name_bytes(path), area)
    return int.from_bytes(area.raw[:8], "little")


def mount_id(proc_link: str) -> int:
    """The id of the mount that a file was opened through."""
    fd = os.open(proc_link, os.O_PATH | os.O_CLOEXEC)
    try:
        return int(fdinfo.parse(read(os.getpid(), f"fdinfo/{fd}")).mnt_id)
    finally:
        os.close(fd)


def namespace_root(ctx: DumpContext, pid: int) -> int:
    """A directory descriptor of the root of a task's mount namespace, ours until the dump ends.

    ``ctx.memo["namespace root", inode of /proc/PID/ns/mnt]`` may have been set to another one
    beforehand.
    """
    known = ("mount namespace", pid)
    if known not in ctx.memo:
        ctx.memo[known] = os.stat(f"/proc/{pid}/ns/mnt").st_ino
    number = ctx.memo[known]
    key = ("namespace root", number)
    if key not in ctx.memo:
        same = number == os.stat("/proc/self/ns/mnt").st_ino
        # A task that was chrooted shows its own root here; the caller knows better for such
        # namespaces.
        path = "/" if same else f"/proc/{pid}/root"
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        ctx.adopt(fd)
        ctx.memo[key] = fd
    return int(ctx.memo[key])


def below(name: bytes) -> bytes:
    """An absolute name as one relative to a root directory."""
    return name.lstrip(b"/") or b"."


def within(ctx: BuildContext, mnt_id: int | None, name: bytes) -> tuple[bytes, int | None]:
    """(path, dir_fd) by which the builder opens an absolute name: below the root of its mount where the images have
    mounts of their own.
    """
    root: int | None = ctx.memo.get(("mount root", mnt_id))
    return (name, None) if root is None else (below(name), root)


def stat_or_none(root: int, name: bytes) -> os.stat_result | None:
    """What is called ``name``, a symbolic link itself; None where there is nothing of that name."""
    try:
        return os.stat(below(name), dir_fd=root, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def locate(found: Found, ctx: DumpContext) -> Place:
    """How the file can be found again, asked once for each. Changes nothing; raises Unsupported when
    it cannot be dumped."""
    key = ("place", found.pid, found.target, found.stat.st_dev, found.stat.st_ino)
    place: Place | None = ctx.memo.get(key)
    if place is None:
        place = ctx.memo[key] = _locate(found, ctx)
    return place


def _locate(found: Found, ctx: DumpContext) -> Place:
    external = _external(found, ctx)
    if external:
        return external
    target, result = found.target, found.stat
    if not target.startswith(b"/"):
        raise found.refuse("it has no name in a file system")
    if target.startswith(b"/proc/") or target == b"/proc":
        try:
            if file_system(found.proc_link) == PROC_SUPER_MAGIC:
                return _in_proc(found, ctx)
        except KernelError:
            pass
    root = namespace_root(ctx, found.pid)
    if result.st_nlink:
        here = stat_or_none(root, target)
        if here is not None and (here.st_dev, here.st_ino) == (result.st_dev, result.st_ino):
            return Place(NAMED, target) if not _silly(found) else _linked(found, ctx, target)
        if here is not None and _same_device(here, result) and ctx.options.evasive_devices:
            return Place(NAMED, target)
    name = strip_deleted(target)
    if result.st_nlink == 0 or stat.S_ISDIR(result.st_mode):
        if result.st_nlink and not target.endswith(_DELETED):
            raise _unreachable(found, ctx)
        _check_ghost(found, ctx)
        return Place(GHOST, name)
    return _linked(found, ctx, name)


def _same_device(here: os.stat_result, result: os.stat_result) -> bool:
    kinds = {stat.S_IFMT(here.st_mode), stat.S_IFMT(result.st_mode)}
    return (
        len(kinds) == 1
        and bool(kinds & {stat.S_IFCHR, stat.S_IFBLK})
        and here.st_rdev == result.st_rdev
    )


def _silly(found: Found) -> bool:
    """Is it a name that NFS gave to a deleted file, to vanish with its last user?
    fs/nfs/unlink.c"""
    last = found.target.rpartition(b"/")[2]
    return (
        last[:4] == b".nfs" and len(last) == 28 and file_system(found.proc_link) == NFS_SUPER_MAGIC
    )


def _external(found: Found, ctx: DumpContext) -> Place | None:
    if not any(entry.startswith("file[") for entry in ctx.options.external):
        return None
    key = f"file[{mount_id(found.proc_link):x}:{found.stat.st_ino:x}]"
    return Place(EXTERNAL, key.encode()) if ctx.options.external_value(key) is not None else None


def _in_proc(found: Found, ctx: DumpContext) -> Place:
    name = strip_deleted(found.target)
    first = name.split(b"/")[2:3]
    if not first or not first[0].isdigit():
        return Place(NAMED, found.target)
    pid = int(first[0])
    if not os.path.exists(f"{ctx.proc}/{pid}"):
        return Place(DEAD_TASK, name, pid)
    if found.target.endswith(_DELETED):
        raise found.refuse(
            f"it is about an earlier task {pid}, and another one has that number now"
        )
    if any(pid == task.vpid for task in ctx.tasks.values()) or pid == ctx.number(found.pid):
        return Place(LIVE_TASK, found.target, pid)
    return Place(NAMED, found.target)


def _check_ghost(found: Found, ctx: DumpContext) -> None:
    size = found.stat.st_blocks * 512
    if stat.S_ISREG(found.stat.st_mode) and size > ctx.options.ghost_limit:
        raise found.refuse(
            f"it is deleted and holds {size} bytes, the limit is {ctx.options.ghost_limit}",
            hint=f"--ghost-limit {size}",
        )
    if stat.S_ISSOCK(found.stat.st_mode):
        raise found.refuse("it is a deleted socket, opened by its name")


def _linked(found: Found, ctx: DumpContext, name: bytes) -> Place:
    """The file has a name somewhere, but not the one that it was opened by."""
    if not _mount_is_visible(found) or not (found.target.endswith(_DELETED) or _silly(found)):
        raise _unreachable(found, ctx)
    if not ctx.options.link_remap:
        from . import carried

        others = carried.other_names(found, name, ctx) if carried.concerns(found, name) else []
        if others:
            return Place(OTHER, name, other=others[0])
        other = _name_beside(found, ctx, name) if not _silly(found) else b""
        if other:
            return Place(NAMED, other)
        raise found.refuse(
            f"its name was removed, while {found.stat.st_nlink} others of the same file remain",
            hint="--link-remap makes a link for the restore to find it by",
        )
    return Place(LINKED, name)


def _name_beside(found: Found, ctx: DumpContext, name: bytes) -> bytes:
    """Another name of the same file in the same directory, b"" for none.

    A semaphore of sem_open(3) is made by a name of the moment, which is removed once it has the proper one.
    """
    folder = os.path.dirname(name)
    root = namespace_root(ctx, found.pid)
    try:
        opened = os.open(below(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    except OSError:
        return b""
    try:
        with os.scandir(opened) as entries:
            alike = [os.fsencode(entry.name) for entry in entries if entry.inode() == found.stat.st_ino]
    finally:
        os.close(opened)
    for one in alike:
        path = os.path.join(folder, one)
        here = stat_or_none(root, path)
        if here is not None and (here.st_dev, here.st_ino) == (found.stat.st_dev, found.stat.st_ino):
            return path
    return b""


def _unreachable(found: Found, ctx: DumpContext) -> Unsupported:
    if not _mount_is_visible(found):
        why = "its mount is not visible to the task (unmounted lazily, or of another namespace)"
    elif stat_or_none(namespace_root(ctx, found.pid), found.target) is None:
        why = "nothing is found by its name"
    else:
        why = "another file is found by its name (is something mounted over it?)"
    return found.refuse(why, hint="--external file[MNT_ID:INODE] if the restore is to be given it")


def _mount_is_visible(found: Found) -> bool:
    number = mount_id(found.proc_link)
    # A task that was chrooted is not shown the mounts outside of its root.
    for pid in (found.pid, os.getpid()):
        if number in [mount.mnt_id for mount in mountinfo.parse(read(pid, "mountinfo"))]:
            return True
    return False
