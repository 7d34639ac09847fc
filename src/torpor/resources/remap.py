"""Files that are not found by the name in their entry, and what stands in for the name.

Image: remap-fpath. GHOST: the file is deleted, see ghost.py. LINKED: it has other names, and the
dump gave it one more (``link_remap.N``), which is removed after a restore. NAMED, ours: it has other
names, of which one is known (POSIX semaphores). PROCFS: a file of /proc about a task that is gone.
"""

from __future__ import annotations

import errno
import os
import signal
import struct

from .. import log
from ..errors import ImageError, KernelError, Unsupported
from ..images import schema as pb
from ..linux.call import address_of, buffer, call, try_call
from . import carried, ghost, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from .base import BuildContext, DumpContext

LINKED, GHOST, PROCFS, NAMED = 0, 1, 2, 1000
OLD_GHOST = 1 << 31  # in remap_id, of images without remap_type


# ---------------------------------------------------------------------- dump


def dump(found: paths.Found, place: paths.Place, file_id: int, ctx: DumpContext) -> None:
    """Write what stands in for the name of the file ``file_id``; nothing when the name will do."""
    if place.how == paths.GHOST:
        _write(ctx, file_id, ghost.dump(found, ctx), GHOST)
    elif place.how == paths.LINKED:
        linked = _linked_id(found, place.name, ctx)
        if linked:
            _write(ctx, file_id, linked, LINKED)
        else:
            _write(ctx, file_id, ghost.dump(found, ctx), GHOST)
    elif place.how == paths.OTHER:
        key = ("other name", found.stat.st_dev, found.stat.st_ino, place.other)
        if key not in ctx.memo:
            ctx.memo[key] = _write_link(found, place.other, ctx.new_id("file"), ctx)
        _write(ctx, file_id, ctx.memo[key], NAMED)
    elif place.how == paths.DEAD_TASK:
        _write(ctx, file_id, place.pid, PROCFS)


def _write(ctx: DumpContext, file_id: int, remap_id: int, kind: int) -> None:
    ctx.images.append(
        "remap-fpath", pb.remap_file_path_entry(orig_id=file_id, remap_id=remap_id, remap_type=kind)
    )


def _linked_id(found: paths.Found, name: bytes, ctx: DumpContext) -> int:
    """The id of an entry for another name of the file, made by a new link; 0 where that is
    impossible but a ghost is not."""
    key = ("link remap", found.stat.st_dev, found.stat.st_ino)
    if key not in ctx.memo:
        file_id = ctx.new_id("file")
        link = _make_link(found, name, b"link_remap.%d" % file_id, ctx)
        if link:
            _write_link(found, link, file_id, ctx)
        ctx.memo[key] = file_id if link else 0
    return int(ctx.memo[key])


def _write_link(found: paths.Found, name: bytes, file_id: int, ctx: DumpContext) -> int:
    """Write the entry ``file_id`` for another name of a file, which nobody has open by it."""
    entry = pb.file_entry(type=pb.fd_types.REG, id=file_id)
    entry.reg.id, entry.reg.flags, entry.reg.pos = file_id, 0, 0
    entry.reg.fown.CopyFrom(no_owner())
    pb.put_bytes(entry.reg, "name", name)
    carried.add(entry.reg, found, name, ctx)
    ctx.images.append("files", entry)
    return file_id


def _make_link(found: paths.Found, name: bytes, last: bytes, ctx: DumpContext) -> bytes:
    """Link the file to ``last`` in the directory of ``name`` or, if that is gone, the nearest one
    above it."""
    root = paths.namespace_root(ctx, found.pid)
    parent = os.path.dirname(name)
    while True:
        link = os.path.join(parent, last)
        try:
            root = _link(found, link, root, ctx)
        except FileNotFoundError:
            if parent not in (b"/", b""):
                parent = os.path.dirname(parent)
                continue
            if paths.file_system(found.proc_link) == paths.OVERLAYFS_SUPER_MAGIC:
                return (
                    b""  # the count of names is that of the lower layer, where it cannot be linked
                )
            raise found.refuse("it cannot be linked to a new name") from None
        except FileExistsError:
            raise found.refuse(
                f"{os.fsdecode(link)} exists",
                hint="it is left over from an earlier dump: remove it if it is not needed",
            ) from None
        except OSError as error:
            raise found.refuse(
                f"it cannot be linked to {os.fsdecode(link)}: {error.strerror}"
            ) from None
        links = ctx.memo.setdefault("link remaps", [])
        links.append((root, link))
        return link


def _link(found: paths.Found, link: bytes, root: int, ctx: DumpContext) -> int:
    """Give the file another name; returns a descriptor of the root directory below which it was given, which need not
    be ``root``: a task in a mount namespace of its own may have files that were opened for it in ours.
    """
    try:
        os.link(found.proc_link, paths.below(link), dst_dir_fd=root, follow_symlinks=True)
        return root
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    ours = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    ctx.adopt(ours)
    os.link(found.proc_link, paths.below(link), dst_dir_fd=ours, follow_symlinks=True)
    return ours


def remove_links(ctx: DumpContext) -> None:
    """Take back the links that were made: the dump failed, or the tasks live on and nobody will
    restore them."""
    for root, link in ctx.memo.pop("link remaps", ()):
        try:
            os.unlink(paths.below(link), dir_fd=root)
        except OSError as error:
            log.warning(f"{os.fsdecode(link)} could not be removed: {error.strerror}")


def no_owner() -> Message:
    """The fown_entry of a description that sends no signals."""
    return pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)


# ---------------------------------------------------------------------- restore


class Remaps:
    """All of remap-fpath."""

    __slots__ = ("by_file", "kinds")

    def __init__(self, ctx: BuildContext) -> None:
        #: file id → (kind, remap id)
        self.by_file: dict[int, tuple[int, int]] = {}
        for entry in ctx.images.read_all("remap-fpath"):
            kind, number = entry.remap_type, entry.remap_id
            if not entry.HasField("remap_type"):
                kind = GHOST if number & OLD_GHOST else LINKED
                number &= ~OLD_GHOST
            self.by_file[entry.orig_id] = (kind, number)


def remap_of(ctx: BuildContext, file_id: int) -> tuple[int, int] | None:
    """(kind, number) of what stands in for the name of a file, None when its name will do."""
    remaps: Remaps = ctx.once("remaps", lambda: Remaps(ctx))
    return remaps.by_file.get(file_id)


def open_remapped(ctx: BuildContext, entry: Message, flags: int, kind: int, number: int) -> int:
    """Open a reg_file_entry that ``remap_of`` says is not found by its name."""
    if kind == PROCFS:
        return _open_of_dead_task(ctx, entry, flags, number)
    users = _users(ctx, kind, number)
    if kind == GHOST:
        found = ghost.anchors(ctx, number, users)
    elif kind in (LINKED, NAMED):
        found = ctx.once(("linked", number), lambda: _linked_anchors(ctx, number, users, stays=kind == NAMED))
    else:
        raise ImageError("remap-fpath.img", f"file {entry.id}", f"remap type {kind} is not known")
    if flags == entry.flags and entry.id in found.ready:
        return os.dup(found.ready[entry.id])
    path = f"/proc/self/fd/{found.by_name[pb.get_bytes(entry.name)]}"
    return os.open(path, ghost.opening_flags(flags) & ~os.O_NOFOLLOW)


def _users(ctx: BuildContext, kind: int, number: int) -> list[Message]:
    """The entries of all files that are the same file of that kind and number."""
    remaps: Remaps = ctx.memo["remaps"]
    return [
        ctx.files[file_id][1]
        for file_id, remap in remaps.by_file.items()
        if remap == (kind, number) and file_id in ctx.files
    ]


def _linked_anchors(ctx: BuildContext, number: int, users: list[Message], *, stays: bool) -> ghost.Anchors:
    """The file that the entry ``number`` names; it loses that name after a restore unless that ``stays``."""
    if number not in ctx.files or not hasattr(ctx.files[number][1], "name"):
        raise ImageError("remap-fpath.img", f"remap to file {number}", "there is no such file")
    carried.ensure(ctx, ctx.files[number][1])
    link = pb.get_bytes(ctx.files[number][1].name)
    found = ghost.Anchors()
    for user in users:
        name = pb.get_bytes(user.name)
        if name in found.by_name:
            continue
        with ghost.Brief() as brief:
            brief.parents(name)
            shown = link
            try:
                os.link(link, name, follow_symlinks=False)
                brief.made(name)
                shown = name
            except FileExistsError:
                pass  # it belongs to somebody else now: the file goes by its link's name
            found.by_name[name] = ctx.keep(os.open(shown, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
            same = [other for other in users if pb.get_bytes(other.name) == name]
            ghost.open_now(ctx, found, same, shown)
    if stays:
        return found
    # The images can be restored again as long as the restore has not succeeded.
    ctx.memo.setdefault("after_restore", []).append(lambda: _unlink(link))
    return found


def _unlink(link: bytes) -> None:
    try:
        os.unlink(link)
    except OSError as error:
        log.warning(f"{os.fsdecode(link)} could not be removed: {error.strerror}")


def _open_of_dead_task(ctx: BuildContext, entry: Message, flags: int, pid: int) -> int:
    """Open a file of /proc about a task with that number, which is made for it.

    It ends when the tasks have what they need: nobody can enter a directory of a task that is gone.
    """
    _stand_in(ctx, pid)
    return os.open(pb.get_bytes(entry.name), ghost.opening_flags(flags))


def _stand_in(ctx: BuildContext, pid: int) -> None:
    stand_ins: set[int] = ctx.memo.setdefault("dead tasks", set())
    if pid in stand_ins:
        return
    child = _clone_with_pid(pid)
    if child == 0:
        while True:
            try_call("pause")
    stand_ins.add(pid)

    def end() -> None:
        if pid in stand_ins:
            stand_ins.discard(pid)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    ctx.memo.setdefault("after_mappings", []).append(end)
    ctx.undo.add(f"task {pid}, which stands in for a dead one", end)


def _clone_with_pid(pid: int) -> int:
    """fork(2) with the child's number chosen. Kernel: kernel/fork.c, clone_args.set_tid"""
    number = buffer(4)
    struct.pack_into("<i", number, 0, pid)
    args = struct.pack("<11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, address_of(number), 1, 0)
    try:
        return call("clone3", args, len(args))
    except KernelError as error:
        if error.errno == errno.EEXIST:
            raise Unsupported(
                f"it is a file of /proc about task {pid}, long ended; another task has that number"
            ) from None
        raise
