"""Regular files, directories, symbolic links and simple devices: whatever is found again by its
name.

Image: file_entry.reg (reg_file_entry); for files without their name remap-fpath and ghost-file-N.
Kernel: fs/open.c

The content of a file is not saved unless it is deleted: a restore wants to find it as it was left,
and checks its size, mode and build id.
"""

from __future__ import annotations

import errno
import os
import stat

from ... import log
from ...errors import ImageError, KernelError, Unsupported, doing
from ...images import schema as pb
from ...proc.elf import Elf
from .. import ghost, paths, remap
from ..base import FileResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

NO_POSITION = (1 << 64) - 1
AT_FDCWD = -100
MEMORY_DEVICES = 1  # major number of /dev/null, zero, full, random, urandom, kmsg
_ELF_HEAD = 4096  # of a program or library: its headers and nearly always its notes
_ELF_MAX = 1 << 20


class Regular(FileResource):
    """A file that is opened by name. Devices are among them if they keep nothing in the open
    description."""

    FD_TYPE, FIELD = 1, "reg"
    MODES = (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
    PRIORITY = 10

    def claims(self, source: SourceFile) -> bool:
        kind = stat.S_IFMT(source.stat.st_mode)
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            return source.link.startswith("/")
        if kind == stat.S_IFBLK or (
            kind == stat.S_IFCHR and os.major(source.stat.st_rdev) == MEMORY_DEVICES
        ):
            return True
        # O_PATH names a thing without opening it, so its kind does not matter.
        return source.link.startswith("/") and bool(source.flags & os.O_PATH)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        paths.locate(_found(source), ctx)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        found = _found(source)
        place = paths.locate(found, ctx)
        entry = _entry(found, place, source.id, source.flags, ctx)
        entry.pos = source.pos & NO_POSITION
        entry.fown.CopyFrom(ctx.fown(source))
        remap.dump(found, place, source.id, ctx)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        if _task_in_name(ctx, entry):
            return os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)  # until there is such a task
        fd = _open(ctx, entry, entry.flags)
        if not entry.flags & os.O_PATH and entry.pos != NO_POSITION and not _given(ctx, entry):
            try:
                os.lseek(fd, entry.pos, os.SEEK_SET)
            except OSError as error:
                # /dev/kmsg and its like know no positions but 0.
                if error.errno not in (errno.ESPIPE, errno.EINVAL) or entry.pos:
                    os.close(fd)
                    raise
        return fd

    def settle_each(
        self, entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext
    ) -> None:
        if not _task_in_name(ctx, entry):
            return
        cloexec = next(os.O_CLOEXEC if flag else 0 for other, _, flag in task.fds if other == fd)
        opened_by, first = ctx.once(("opened late", id(program), entry.id), lambda: (task.pid, fd))
        if first != fd:
            program.call("dup3", first, fd, cloexec)
            return
        if ctx.once(("opened late", entry.id), lambda: opened_by) != opened_by:
            log.warning(f"{entry.name}: tasks shared a description of it, now each has its own")
        # A result can be passed on once, but the number is known: the lowest that the task does not
        # use.
        used = {other for other, _, _ in task.fds}
        number = next(number for number in range(len(used) + 1) if number not in used)
        name = pb.get_bytes(entry.name) + b"\0"
        flags = ghost.opening_flags(entry.flags)
        opened = program.call("openat", AT_FDCWD, name, flags, 0, why="now that the task exists")
        program.call("dup3", opened, fd, cloexec)
        program.call("close", number)
        if entry.pos and not entry.flags & os.O_PATH:
            may_fail = (errno.EINVAL, errno.ESPIPE)
            program.call("lseek", fd, entry.pos, os.SEEK_SET, may_fail=may_fail)


# ---------------------------------------------------------------------- dump


def _found(source: SourceFile) -> paths.Found:
    label = f"fd {source.fd} ({source.link})"
    return paths.Found(source.pid, source.path, os.fsencode(source.link), source.stat, label)


def file_id_for(ctx: DumpContext, pid: int, proc_link: str, *, flags: int = 0) -> int:
    """The id of an entry in files.img for what a link of /proc shows: exe, cwd, root, map_files/…,
    or a FIFO's fd/N.

    One entry serves all who ask for the same file with the same flags. ``pid`` is the task whose
    mounts the name is seen in. Raises Unsupported when the file cannot be found again.
    """
    result = os.stat(proc_link)
    target = os.readlink(os.fsencode(proc_link))
    key = ("file of link", result.st_dev, result.st_ino, target, flags)
    if key not in ctx.memo:
        label = f"{proc_link.rpartition('/')[2]} ({os.fsdecode(target)})"
        found = paths.Found(pid, proc_link, target, result, label)
        place = paths.locate(found, ctx)
        if place.how == paths.LIVE_TASK:
            raise found.refuse(
                "it is in /proc, about a task of the tree, which has to be there first"
            )
        file_id = ctx.new_id("file")
        whole = pb.file_entry(type=pb.fd_types.REG, id=file_id)
        whole.reg.CopyFrom(_entry(found, place, file_id, flags, ctx))
        whole.reg.pos = 0
        whole.reg.fown.CopyFrom(remap.no_owner())
        ctx.images.append("files", whole)
        remap.dump(found, place, file_id, ctx)
        ctx.memo[key] = file_id
    return int(ctx.memo[key])


def _entry(
    found: paths.Found, place: paths.Place, file_id: int, flags: int, ctx: DumpContext
) -> Message:
    entry = pb.reg_file_entry(id=file_id, flags=flags, mode=found.stat.st_mode)
    pb.put_bytes(entry, "name", place.name)
    if place.how == paths.EXTERNAL:
        entry.ext = True
        return entry
    # A log grows; whoever only appends does not mind.
    appends = flags & os.O_ACCMODE == os.O_WRONLY and flags & os.O_APPEND
    if stat.S_ISREG(found.stat.st_mode) and not appends:
        entry.size = found.stat.st_size
        if ctx.options.file_validation == "buildid" and found.stat.st_size > 64:
            entry.build_id.extend(_words(build_id(found.proc_link)))
    return entry


def build_id(path: str) -> bytes:
    """The GNU build id of a 64-bit ELF file, b"" where there is none."""
    try:
        fd = ghost.open_quietly(path)
    except OSError:
        return b""
    try:
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if key not in _build_ids:
            if len(_build_ids) >= _BUILD_IDS_MAX:
                _build_ids.clear()
            _build_ids[key] = _read_build_id(fd)
        return _build_ids[key]
    except OSError:
        return b""
    finally:
        os.close(fd)


#: Of files seen by this process: what identifies a file and its state → its build id
_build_ids: dict[tuple[int, ...], bytes] = {}
_BUILD_IDS_MAX = 4096


def _read_build_id(fd: int) -> bytes:
    for size in (_ELF_HEAD, _ELF_MAX):
        image = os.pread(fd, size, 0)
        if image[:4] != b"\x7fELF":
            return b""
        try:
            return Elf(image).build_id() or b""
        except ValueError:
            continue
    return b""


def _words(data: bytes) -> list[int]:
    padded = data + bytes(-len(data) % 4)
    return [int.from_bytes(padded[at : at + 4], "little") for at in range(0, len(padded), 4)]


# ---------------------------------------------------------------------- restore


def _task_in_name(ctx: BuildContext, entry: Message) -> bool:
    """Is it a file of /proc about a task that is being restored? Nobody can open it before that
    task exists."""
    name = pb.get_bytes(entry.name)
    if not name.startswith(b"/proc/") or not name[6:7].isdigit():
        return False
    tasks = ctx.once("pids", lambda: _pids(ctx))
    return name.split(b"/")[2] in tasks and remap.remap_of(ctx, entry.id) is None


def _pids(ctx: BuildContext) -> set[bytes]:
    entries = ctx.images.read_all("pstree")
    return {b"%d" % pid for entry in entries for pid in (entry.pid, *entry.threads)}


def open_file(ctx: BuildContext, file_id: int, flags: int) -> int:
    """A new description of the file ``file_id``, opened with ``flags`` in place of those in its
    entry."""
    if file_id not in ctx.files or not hasattr(ctx.files[file_id][1], "name"):
        raise ImageError(
            "files.img", f"file {file_id}", "a file of this number is needed and not there"
        )
    return _open(ctx, ctx.files[file_id][1], flags)


def _open(ctx: BuildContext, entry: Message, flags: int) -> int:
    name = pb.get_bytes(entry.name)
    with doing(f"file {os.fsdecode(name)}"):
        given = _given(ctx, entry)
        if given is not None and not entry.ext:
            return os.dup(given)
        if given is not None:
            return os.open(f"/proc/self/fd/{given}", ghost.opening_flags(flags) & ~os.O_NOFOLLOW)
        if entry.ext:
            raise Unsupported(
                "an external file was not given", hint=f"--inherit-fd fd[N]:{os.fsdecode(name)}"
            )
        if not name.startswith(b"/"):
            raise ImageError("files.img", f"file {entry.id}", "its name is not absolute")
        stand_in = remap.remap_of(ctx, entry.id)
        if stand_in is not None:
            fd = remap.open_remapped(ctx, entry, flags, *stand_in)
        else:
            fd = _open_by_name(ctx, entry, name, flags)
        try:
            _check(ctx, entry, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _given(ctx: BuildContext, entry: Message) -> int | None:
    """The descriptor that --inherit-fd gave for this file."""
    name = os.fsdecode(pb.get_bytes(entry.name))
    if entry.ext:
        return ctx.inherited.get(name)
    return ctx.inherited.get(name[1:] or ".", ctx.inherited.get(name))


def _open_by_name(ctx: BuildContext, entry: Message, name: bytes, flags: int) -> int:
    root = ctx.memo.get(("mount root", entry.mnt_id))
    where, path = (None, name) if root is None else (root, paths.below(name))
    flags = ghost.opening_flags(flags)
    try:
        if entry.HasField("mode"):
            # Before it is opened: a FIFO in its place would block us, a device might do anything.
            here = os.stat(path, dir_fd=where, follow_symlinks=not flags & os.O_NOFOLLOW)
            _check_kind(entry, here)
        return os.open(path, flags, dir_fd=where)
    except OSError as error:
        assert error.errno is not None
        hint = (
            "the restore needs the files that the tasks had open"
            if error.errno == errno.ENOENT
            else ""
        )
        raise KernelError("open", error.errno, hint=hint) from None


def _check_kind(entry: Message, here: os.stat_result) -> None:
    if stat.S_IFMT(here.st_mode) != stat.S_IFMT(entry.mode):
        raise Unsupported(
            f"its mode is {here.st_mode:#o} now, and was {entry.mode:#o}: another kind of file"
        )


def _check(ctx: BuildContext, entry: Message, fd: int) -> None:
    """Is it the file that was dumped? Raises Unsupported; asked once for each entry."""
    key = ("checked", entry.id)
    if key in ctx.memo:
        return
    here = os.fstat(fd)
    if entry.HasField("size") and here.st_size != entry.size:
        raise Unsupported(
            f"it has {here.st_size} bytes now, and had {entry.size} when it was dumped",
            hint="restore the file as it was",
        )
    if entry.HasField("mode"):
        mask = ~0o777 if ctx.options.skip_file_rwx_check else ~0
        if here.st_mode & mask != entry.mode & mask:
            raise Unsupported(
                f"its mode is {here.st_mode:#o} now, and was {entry.mode:#o} when it was dumped",
                hint="--skip-file-rwx-check if only the permissions differ",
            )
    if entry.build_id and ctx.options.file_validation == "buildid":
        found = _words(build_id(f"/proc/self/fd/{fd}"))
        if found and found != list(entry.build_id):
            raise Unsupported("it is another build of the program than the one that was dumped")
    ctx.memo[key] = True


RESOURCE = Regular()
