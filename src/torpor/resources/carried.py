"""Files of /dev/shm that have their names: POSIX semaphores and shared memory (sem_open(3), shm_open(3)).

Image: reg_file_entry.carried, ours; the content is a ghost-file-N like that of a deleted file. CRIU takes no notice
of either.

Where the snapshot is restored they may not be: on another machine, after a restart. Then they are made. A file that
is there is used as it is if it is the one that was dumped, or was made in its place, or holds the same; any other
one is refused. glibc makes a semaphore under a name for the moment and then links it to its own, so that its
mapping shows as deleted: it is found by that other name.
"""

from __future__ import annotations

import os
import stat

from .. import log
from ..errors import ImageError, Unsupported
from ..images import schema as pb
from ..linux.call import call
from ..linux.kernel import TMPFS_MAGIC
from . import ghost, origin, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..images.schema import Message
    from .base import BuildContext, DumpContext

FOLDER = b"/dev/shm/"


# ---------------------------------------------------------------------- dump


def concerns(found: paths.Found, name: bytes) -> bool:
    """Is it a file whose content travels with the images although it has a name?"""
    in_folder = name.startswith(FOLDER) and stat.S_ISREG(found.stat.st_mode)
    return in_folder and paths.file_system(found.proc_link) == TMPFS_MAGIC


def add(entry: Message, found: paths.Found, name: bytes, ctx: DumpContext) -> None:
    """Complete the reg_file_entry of a file that is called ``name``: what it holds is written, once for each inode."""
    if not concerns(found, name):
        return
    size = found.stat.st_blocks * 512
    if size > ctx.options.ghost_limit:
        log.info(f"{os.fsdecode(name)}: its {size} bytes are not carried (--ghost-limit): a restore needs the file")
        return
    entry.carried.ghost = ghost.dump(found, ctx)
    entry.carried.origin = origin.of(found.stat)
    several = found.stat.st_nlink > 1 or name != found.target
    for other in other_names(found, name, ctx) if several else ():
        entry.carried.name.append(other)


def other_names(found: paths.Found, name: bytes, ctx: DumpContext) -> list[bytes]:
    """Other names of the file in the directory of ``name``, as absolute ones."""
    root = paths.namespace_root(ctx, found.pid)
    parent = os.path.dirname(name)
    try:
        folder = os.open(paths.below(parent), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        with os.scandir(folder) as entries:
            same = [os.fsencode(one.name) for one in entries if one.inode() == found.stat.st_ino]
    finally:
        os.close(folder)
    names = [os.path.join(parent, one) for one in sorted(same)]
    return [one for one in names if one != name and _is(paths.stat_or_none(root, one), found.stat)]


def _is(here: os.stat_result | None, wanted: os.stat_result) -> bool:
    return here is not None and (here.st_dev, here.st_ino) == (wanted.st_dev, wanted.st_ino)


# ---------------------------------------------------------------------- restore


def ensure(ctx: BuildContext, entry: Message) -> None:
    """See to it that the file of a reg_file_entry is there. Raises Unsupported if another one is in its place."""
    if entry.HasField("carried"):
        names = [pb.get_bytes(entry.name), *entry.carried.name]
        for name in names:
            ctx.once(("carried", entry.mnt_id, name), lambda name=name: _ensure(ctx, entry, name))  # type: ignore[misc]


def hint(entry: Message) -> str:
    """What to say when a file is not there."""
    if pb.get_bytes(entry.name).startswith(FOLDER) and not entry.HasField("carried"):
        return "its content is not in the snapshot: it was too large for the --ghost-limit of the dump"
    return ""


def _ensure(ctx: BuildContext, entry: Message, name: bytes) -> bool:
    if not name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/"):
        raise ImageError("files.img", f"file {entry.id}: carried: name", f"{name!r} is no name in {FOLDER.decode()}")
    path, where = paths.within(ctx, entry.mnt_id, name)
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
    except FileNotFoundError:
        _make(ctx, entry, name, path, where)
        return True
    try:
        _check(ctx, entry, fd, name)
        ctx.memo.setdefault(("carried file", entry.carried.ghost), f"/proc/self/fd/{ctx.keep(os.dup(fd))}")
    finally:
        os.close(fd)
    return False


def _check(ctx: BuildContext, entry: Message, path_fd: int, name: bytes) -> None:
    """Is the file that is there the one that was dumped? It is opened only if it is a regular one."""
    if stat.S_ISREG(os.fstat(path_fd).st_mode):
        fd = ghost.open_quietly(f"/proc/self/fd/{path_fd}")
        try:
            if origin.is_same(fd, entry.carried.origin) or _holds(ctx, entry.carried.ghost, fd):
                return
        finally:
            os.close(fd)
    raise Unsupported(
        f"another file is called {os.fsdecode(name)} now: not the one that was dumped, and with another content",
        hint="remove it if nobody needs it: then the snapshot's is put there",
    )


def _make(ctx: BuildContext, entry: Message, name: bytes, path: bytes, where: int | None) -> None:
    """Make the file whole, and only then let it appear under its name: nobody may see it half done."""
    number = entry.carried.ghost
    target = -100 if where is None else where  # AT_FDCWD
    known = ctx.memo.get(("carried file", number))
    if known is None:
        image, spans = _image(ctx, number)
        folder = os.path.dirname(path) or b"."
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=where)
        try:
            origin.mark(fd, entry.carried.origin)
            ghost.fill(ctx, image, spans, fd)
            known = ctx.memo["carried file", number] = f"/proc/self/fd/{ctx.keep(os.dup(fd))}"
        finally:
            os.close(fd)
    call("linkat", -100, known.encode() + b"\0", target, path + b"\0", ghost.AT_SYMLINK_FOLLOW)
    log.info(f"{os.fsdecode(name)}: made anew")
    ctx.on_failure.add(f"remove {os.fsdecode(name)}", lambda: os.unlink(path, dir_fd=where))


def _image(ctx: BuildContext, number: int) -> tuple[str, list[Any]]:
    image = f"ghost-file-{number:x}"
    spans = list(ctx.images.spans(image, required=True))
    if not spans or not stat.S_ISREG(spans[0].message.mode):
        raise ImageError(f"{image}.img", "mode", "it is not that of a regular file")
    return image, spans


def _holds(ctx: BuildContext, number: int, fd: int) -> bool:
    """Has an open file the content that is stored in a ghost image?"""
    image, spans = _image(ctx, number)
    head = spans[0].message
    size = head.size if head.chunks else spans[0].size
    if os.fstat(fd).st_size != size:
        return False
    stored = [(span.message.off, span) for span in spans[1:]] if head.chunks else [(0, spans[0])]
    source = ctx.images.open(image)
    try:
        for start, end in _pieces([*ghost.data_runs(fd, size), *((at, at + span.size) for at, span in stored)], size):
            wanted = bytearray(end - start)
            for at, span in stored:
                low, high = max(at, start), min(at + span.size, end)
                if low < high:
                    wanted[low - start : high - start] = os.pread(source, high - low, span.offset + low - at)
            if os.pread(fd, end - start, start) != wanted:
                return False
    finally:
        os.close(source)
    return True


def _pieces(runs: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What the runs cover, in pieces that are not too large; a part may come twice."""
    for start, end in runs:
        for low in range(start, min(end, size), ghost.COPY_BYTES):
            yield low, min(low + ghost.COPY_BYTES, end, size)
