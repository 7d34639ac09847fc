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
from .. import carried, devices, generation, ghost, paths, remap
from ..base import FileResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

NO_POSITION = (1 << 64) - 1
AT_FDCWD = -100
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
        if kind == stat.S_IFBLK or (kind == stat.S_IFCHR and devices.is_stateless(source.stat.st_rdev)):
            return True
        # O_PATH names a thing without opening it, so its kind does not matter.
        return source.link.startswith("/") and bool(source.flags & os.O_PATH)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        paths.locate(_found(source), ctx)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        found = _found(source)
        place = paths.locate(found, ctx)
        entry = _entry(found, place, source.id, source.flags, ctx, source.pos & NO_POSITION, ctx.fown(source))
        remap.dump(found, place, source.id, ctx)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        fd = _open_again(ctx, entry)
        if fd < 0:
            if _task_in_name(ctx, entry):
                ctx.memo["opened late"] = True
                return os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)  # until there is such a task
            fd = _open(ctx, entry, entry.flags)
            _note(ctx, entry)
        if not entry.flags & os.O_PATH and entry.pos != NO_POSITION and not (ctx.inherited and _given(ctx, entry)):
            try:
                os.lseek(fd, entry.pos, os.SEEK_SET)
            except OSError as error:
                # /dev/kmsg and its like know no positions but 0.
                if error.errno not in (errno.ESPIPE, errno.EINVAL) or entry.pos:
                    os.close(fd)
                    raise
        return fd

    def settles_each(self, ctx: BuildContext) -> bool:
        return "opened late" in ctx.memo

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
    found = _found_link(pid, proc_link)
    key = ("file of link", found.stat.st_dev, found.stat.st_ino, found.target, flags)
    if key not in ctx.memo:
        place = paths.locate(found, ctx)
        if place.how == paths.LIVE_TASK:
            raise found.refuse(
                "it is in /proc, about a task of the tree, which has to be there first"
            )
        file_id = ctx.new_id("file")
        whole = pb.file_entry(type=pb.fd_types.REG, id=file_id)
        whole.reg.CopyFrom(_entry(found, place, file_id, flags, ctx, 0, remap.no_owner()))
        ctx.images.append("files", whole)
        remap.dump(found, place, file_id, ctx)
        ctx.memo[key] = file_id
    return int(ctx.memo[key])


def check_link(ctx: DumpContext, pid: int, proc_link: str) -> None:
    """Raise Unsupported when :func:`file_id_for` would; nothing is frozen yet."""
    try:
        found = _found_link(pid, proc_link)
    except FileNotFoundError:
        return  # gone meanwhile
    paths.locate(found, ctx)


def _found_link(pid: int, proc_link: str) -> paths.Found:
    target = os.readlink(os.fsencode(proc_link))
    label = f"{proc_link.rpartition('/')[2]} ({os.fsdecode(target)})"
    return paths.Found(pid, proc_link, target, os.stat(proc_link), label)


def _entry(
    found: paths.Found, place: paths.Place, file_id: int, flags: int, ctx: DumpContext, pos: int, owner: Message
) -> Message:
    entry = pb.reg_file_entry(id=file_id, flags=flags, mode=found.stat.st_mode, pos=pos, fown=owner)
    pb.put_bytes(entry, "name", place.name)
    if place.how == paths.EXTERNAL:
        entry.ext = True
        return entry
    if place.how == paths.NAMED:
        carried.add(entry, found, place.name, ctx)
    # A log grows; whoever only appends does not mind.
    appends = flags & os.O_ACCMODE == os.O_WRONLY and flags & os.O_APPEND
    if stat.S_ISREG(found.stat.st_mode) and not appends:
        entry.size = found.stat.st_size
        counter = generation.counter_of(found.proc_link, found.stat)
        if counter is not None:
            entry.generation = counter
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
    if entry.name[:6] not in ("/proc/", b"/proc/"):
        return False
    name = pb.get_bytes(entry.name)
    if not name[6:7].isdigit():
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
    with doing(lambda: f"file {os.fsdecode(name)}"):
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
        renewed = generation.stand_in(entry, flags, ctx)
        if renewed is not None:
            return renewed
        stand_in = remap.remap_of(ctx, entry.id)
        if stand_in is not None:
            fd = remap.open_remapped(ctx, entry, flags, *stand_in)
        else:
            carried.ensure(ctx, entry)
            fd = _open_by_name(ctx, entry, name, flags)
        try:
            _check(ctx, entry, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _same(entry: Message) -> tuple[object, ...]:
    """What a file is looked at for: entries in which this is the same are opened in the same way."""
    return entry.name, entry.mnt_id, entry.flags, entry.mode, entry.size


def _note(ctx: BuildContext, entry: Message) -> None:
    """A file with nothing special about it has been opened and looked at: other entries about it need not be."""
    special = entry.ext or entry.build_id or entry.HasField("carried") or entry.HasField("generation")
    if not special and not ctx.inherited and remap.remap_of(ctx, entry.id) is None:
        path, where = paths.within(ctx, entry.mnt_id, pb.get_bytes(entry.name))
        ctx.once("opened by name", dict)[_same(entry)] = path, ghost.opening_flags(entry.flags), where


def _open_again(ctx: BuildContext, entry: Message) -> int:
    """Open a file as one of its name was opened before; -1 if none was, or something else stands in for this one."""
    opened = ctx.memo.get("opened by name")
    how = None if opened is None else opened.get(_same(entry))
    if how is None or entry.id in ctx.memo["remaps"].by_file:
        return -1
    path, flags, where = how
    try:
        return os.open(path, flags, dir_fd=where)
    except OSError:
        return -1  # the way that tells why


def _given(ctx: BuildContext, entry: Message) -> int | None:
    """The descriptor that --inherit-fd gave for this file."""
    if not ctx.inherited:
        return None
    name = os.fsdecode(pb.get_bytes(entry.name))
    given: int | None = ctx.inherited.get(name)
    if given is None and not entry.ext:
        given = ctx.inherited.get(name[1:] or ".")
    return given


def _open_by_name(ctx: BuildContext, entry: Message, name: bytes, flags: int) -> int:
    path, where = paths.within(ctx, entry.mnt_id, name)
    flags = ghost.opening_flags(flags)
    try:
        if entry.HasField("mode"):
            # Before it is opened: a FIFO in its place would block us, a device might do anything.
            key = ("mode here", entry.mnt_id, name, flags & os.O_NOFOLLOW)
            here = ctx.memo.get(key)
            if here is None:
                here = os.stat(path, dir_fd=where, follow_symlinks=not flags & os.O_NOFOLLOW).st_mode
                ctx.memo[key] = here
            if stat.S_IFMT(here) != stat.S_IFMT(entry.mode):
                raise Unsupported(f"its mode is {here:#o} now, and was {entry.mode:#o}: another kind of file")
        return os.open(path, flags, dir_fd=where)
    except OSError as error:
        assert error.errno is not None
        hint = ""
        if error.errno == errno.ENOENT:
            hint = carried.hint(entry) or "the restore needs the files that the tasks had open"
        raise KernelError("open", error.errno, hint=hint) from None


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
