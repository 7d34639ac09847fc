"""memfd_create(2): files that live in memory and have no name in any file system.

Image: file_entry.memfd (memfd_file_entry) for each description, memfd.img (memfd_inode_entry) for
each file; the content is a pagemap-shmem-ID whose addresses are offsets in the file. Kernel:
mm/memfd.c, mm/shmem.c

CRIU stores shared anonymous memory in the same way, as a memfd called ``/dev/zero``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from ...errors import ImageError, KernelError, doing
from ...images import schema as pb
from ...images.pages import PAGE_SIZE, PE_PRESENT, PagemapWriter, Pages
from .. import generation, ghost, paths, remap, xattrs
from ..base import MAP_NORESERVE, FileResource, reopen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

# include/uapi/linux/memfd.h, fcntl.h
MFD_ALLOW_SEALING, MFD_HUGETLB, MFD_EXEC = 0x2, 0x4, 0x10
F_SEAL_SEAL, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 0x1, 0x8, 0x10
HUGE_SHIFT = 26
PREFIX = b"/memfd:"
SHARED_ANONYMOUS = b"/dev/zero"
#: Shared memory above this size is not reserved: it may be a sparse area larger than memory.
RESERVED_BYTES_MAX = 1 << 30
#: Flags that fcntl(F_SETFL) can change. Kernel: fs/fcntl.c, SETFL_MASK
SETFL_FLAGS = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME


class Memfd(FileResource):
    """A file in memory: content, seals, and each description of it."""

    FD_TYPE, FIELD = 18, "memfd"
    MODES = (stat.S_IFREG,)
    PRIORITY = 5

    def claims(self, source: SourceFile) -> bool:
        return is_memfd(source.path, os.fsencode(source.link), source.stat)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        inode_id = inode_id_for(ctx, source.path)
        return pb.memfd_file_entry(
            id=source.id,
            flags=source.flags,
            pos=source.pos,
            fown=ctx.fown(source),
            inode_id=inode_id,
        )

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        name = PREFIX + pb.get_bytes(_inode(ctx, entry.inode_id).entry.name)
        given = ctx.inherited.get(os.fsdecode(name))
        if given is not None:
            return os.dup(given)
        if entry.pos >> 63:
            raise ImageError("files.img", f"file {entry.id}: memfd: pos", f"{entry.pos:#x} is beyond all files")
        fd = _open_description(_made(ctx, entry.inode_id), entry.flags)
        try:
            if entry.pos or not entry.flags & os.O_PATH:
                os.lseek(fd, entry.pos, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return fd


# ---------------------------------------------------------------------- dump


def is_memfd(proc_link: str, target: bytes, result: os.stat_result) -> bool:
    """Is the file behind a link of /proc a memfd, or memory shared without a name, hugetlb ones
    included?"""
    if result.st_nlink or not target.endswith(b" (deleted)"):
        return False
    if result.st_dev == _memory_device():
        return not target.startswith(b"/SYSV")
    hugetlb = target.startswith((PREFIX, b"/anon_hugepage"))
    return hugetlb and paths.file_system(proc_link) == paths.HUGETLBFS_MAGIC


_device = -1


def _memory_device() -> int:
    """The device of the file system that only the kernel mounts, where memfds are."""
    global _device
    if _device < 0:
        fd = os.memfd_create("")
        _device = os.fstat(fd).st_dev
        os.close(fd)
    return _device


def file_id_for(ctx: DumpContext, proc_link: str, *, flags: int) -> int:
    """The id of an entry in files.img for a mapped memfd: ``proc_link`` is /proc/PID/map_files/…"""
    inode_id = inode_id_for(ctx, proc_link)
    key = ("file of memfd", inode_id, flags)
    if key not in ctx.memo:
        entry = pb.file_entry(type=pb.fd_types.MEMFD, id=ctx.new_id("file"))
        entry.memfd.id, entry.memfd.flags, entry.memfd.pos = entry.id, flags, 0
        entry.memfd.fown.CopyFrom(remap.no_owner())
        entry.memfd.inode_id = inode_id
        ctx.images.append("files", entry)
        ctx.memo[key] = entry.id
    return int(ctx.memo[key])


def inode_id_for(ctx: DumpContext, proc_link: str) -> int:
    """The number of a memfd in memfd.img; the first call writes its entry and content."""
    result = os.stat(proc_link)
    key = ("memfd", result.st_dev, result.st_ino)
    if key not in ctx.memo:
        ctx.memo[key] = ctx.new_id("memfd")
        fd = os.open(proc_link, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _write_inode(
                ctx,
                fd,
                int(ctx.memo[key]),
                paths.strip_deleted(os.readlink(os.fsencode(proc_link))),
            )
        finally:
            os.close(fd)
    return int(ctx.memo[key])


def _write_inode(ctx: DumpContext, fd: int, inode_id: int, target: bytes) -> None:
    result = os.fstat(fd)
    # CRIU names the content by the inode's number, and the field has 32 bits; ours only has to be
    # unique.
    entry = pb.memfd_inode_entry(
        uid=result.st_uid, gid=result.st_gid, size=result.st_size, shmid=result.st_ino & 0xFFFFFFFF,
        mode=result.st_mode, inode_id=inode_id,
    )  # fmt: skip
    pb.put_bytes(entry, "name", target.removeprefix(PREFIX))
    try:
        entry.seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        entry.seals = F_SEAL_SEAL
    if result.st_dev != _memory_device():
        entry.hugetlb_flag = MFD_HUGETLB | (result.st_blksize.bit_length() - 1) << HUGE_SHIFT
    xattrs.dump(f"/proc/self/fd/{fd}", entry.xattr)
    ctx.images.append("memfd", entry)
    if result.st_size:
        write_content(ctx, fd, entry.shmid, result.st_size)


def write_content(ctx: DumpContext, fd: int, shmid: int, size: int) -> int:
    """Write what is no hole of a file in memory as pagemap-shmem-``shmid``; the number of pages
    stored.

    ``size`` is in bytes. The position of ``fd`` is moved. An all-hole file gets a pagemap without
    entries.
    """
    pages_id = ctx.new_id("pages")
    pagemap = PagemapWriter(ctx.images, f"pagemap-shmem-{shmid}", pages_id)
    for start, end in ghost.data_runs(fd, size):
        assert start % PAGE_SIZE == 0, "a hole in memory ends inside a page"
        padding = -end % PAGE_SIZE
        pagemap.add(start, (end + padding - start) // PAGE_SIZE, PE_PRESENT)
        if ghost.store(ctx.images, f"pages-{pages_id}", fd, start, end - start) != end - start:
            raise ImageError(f"pages-{pages_id}.img", "", "the file shrank while it was read")
        if padding:
            ctx.images.write(f"pages-{pages_id}", bytes(padding))
    pagemap.close()
    ctx.memo["shared pages"] = ctx.memo.get("shared pages", 0) + pagemap.present
    return int(pagemap.present)


# ---------------------------------------------------------------------- restore


class _Inode:
    """A memfd being restored. ``fd`` is the description that memfd_create(2) gave, -1 before it is
    made."""

    __slots__ = ("entry", "fd", "given")

    def __init__(self, entry: Message) -> None:
        self.entry = entry
        self.fd = -1
        self.given = False  # is that description one of the tasks' now?


def open_file(ctx: BuildContext, file_id: int, flags: int) -> int:
    """A descriptor for mapping the memfd that the entry ``file_id`` is about."""
    if file_id not in ctx.files or not hasattr(ctx.files[file_id][1], "inode_id"):
        raise ImageError(
            "files.img", f"file {file_id}", "a memfd of this number is mapped and not there"
        )
    inode = _made(ctx, ctx.files[file_id][1].inode_id)
    if flags & os.O_ACCMODE == os.O_RDWR:
        return os.dup(inode.fd)
    return reopen(inode.fd, flags & os.O_ACCMODE)


def _inode(ctx: BuildContext, inode_id: int) -> _Inode:
    inodes = ctx.once(
        "memfd inodes",
        lambda: {entry.inode_id: _Inode(entry) for entry in ctx.images.read_all("memfd")},
    )
    if inode_id not in inodes:
        raise ImageError("memfd.img", f"inode {inode_id}", "missing")
    found: _Inode = inodes[inode_id]
    _check_inode(found.entry)
    return found


def _check_inode(entry: Message) -> None:
    name = pb.get_bytes(entry.name)
    if b"\0" in name:
        raise ImageError("memfd.img", f"inode {entry.inode_id}: name", f"{name!r} is no name")
    if entry.size >= 1 << 63:
        raise ImageError("memfd.img", f"inode {entry.inode_id}: size", f"{entry.size} bytes")


def _made(ctx: BuildContext, inode_id: int) -> _Inode:
    inode = _inode(ctx, inode_id)
    if inode.fd < 0:
        with doing(f"memfd {inode.entry.name}"):
            inode.fd = ctx.keep(_create(ctx, inode.entry))
            generation.renew(inode.fd, pb.get_bytes(inode.entry.name), ctx)
        if inode.entry.seals & ~F_SEAL_SEAL:
            # Not before everybody has mapped it: F_SEAL_FUTURE_WRITE and F_SEAL_WRITE forbid it
            # afterwards.
            ctx.memo.setdefault("after_mappings", []).append(lambda: _seal(inode))
    return inode


def _create(ctx: BuildContext, entry: Message) -> int:
    flags = os.MFD_CLOEXEC | entry.hugetlb_flag
    if entry.seals != F_SEAL_SEAL:
        flags |= MFD_ALLOW_SEALING
    name = pb.get_bytes(entry.name)
    if name == SHARED_ANONYMOUS and entry.size and not entry.hugetlb_flag:
        fd = _shared_anonymous(entry.size)
    else:
        fd = _memfd_create(name, flags, executable=bool(entry.mode & 0o111))
    try:
        if os.fstat(fd).st_size != entry.size:
            os.ftruncate(fd, entry.size)
        if entry.size:
            read_content(ctx, fd, entry.shmid, entry.size)
        os.fchown(fd, entry.uid, entry.gid)
        if entry.HasField("mode"):
            os.fchmod(fd, stat.S_IMODE(entry.mode))
        xattrs.restore(f"/proc/self/fd/{fd}", entry.xattr)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _shared_anonymous(size: int) -> int:
    """What mmap(2) makes for MAP_SHARED | MAP_ANONYMOUS, as a descriptor: it is reached through our
    own mapping of it."""
    import mmap

    from ...linux.kernel import writable_address

    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    if size > RESERVED_BYTES_MAX:
        flags |= MAP_NORESERVE
    with mmap.mmap(-1, size, flags) as area:
        start = writable_address(area)
        end = start + -(-size // PAGE_SIZE) * PAGE_SIZE
        return os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)


def _memfd_create(name: bytes, flags: int, executable: bool) -> int:
    if executable:
        # vm.memfd_noexec makes others unable to be executed for good.
        # Linux kernel commit 105ff5339f49 ("mm/memfd: add MFD_NOEXEC_SEAL and MFD_EXEC") (in v6.3)
        try:
            return os.memfd_create(os.fsdecode(name), flags | MFD_EXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.memfd_create(os.fsdecode(name), flags)


def read_content(ctx: BuildContext, fd: int, shmid: int, size: int) -> None:
    """Fill a file in memory of ``size`` bytes from pagemap-shmem-``shmid``. Holes stay holes."""
    huge = os.fstat(fd).st_dev != _memory_device()
    with Pages(ctx.images, f"pagemap-shmem-{shmid}") as pages:
        for run in pages.runs():
            count = min(run.nr_pages * PAGE_SIZE, size - run.vaddr)
            if count <= 0:
                raise ImageError(
                    f"pagemap-shmem-{shmid}.img",
                    f"{run.vaddr:#x}",
                    f"outside of a file of {size} bytes",
                )
            if run.fd >= 0:
                done = (_map_in if huge else _write_in)(fd, run.vaddr, run.fd, run.offset, count)
                if not done:
                    raise ImageError(
                        f"pagemap-shmem-{shmid}.img", f"{run.vaddr:#x}", "its pages are truncated"
                    )


def _write_in(fd: int, at: int, source: int, offset: int, count: int) -> bool:
    os.lseek(fd, at, os.SEEK_SET)
    return ghost.copy(source, offset, fd, count) == count


def _map_in(fd: int, at: int, source: int, offset: int, count: int) -> bool:
    # hugetlbfs has no write(2).
    import mmap

    with mmap.mmap(fd, at + count) as area:
        view = memoryview(area)
        try:
            while count:
                got = os.preadv(source, [view[at : at + min(count, ghost.COPY_BYTES)]], offset)
                if not got:
                    return False
                at, offset, count = at + got, offset + got, count - got
        finally:
            view.release()
    return True


def _open_description(inode: _Inode, flags: int) -> int:
    # What memfd_create(2) gave is not counted among the file's writers, so the file may be
    # executed; one that was opened through /proc is. So the first description that can be the
    # former is.
    if flags & os.O_ACCMODE == os.O_RDWR and not inode.given and not flags & os.O_PATH:
        fcntl.fcntl(inode.fd, fcntl.F_SETFL, flags & SETFL_FLAGS)
        if fcntl.fcntl(inode.fd, fcntl.F_GETFL) & ~os.O_CLOEXEC == flags:
            inode.given = True
            return os.dup(inode.fd)
    return reopen(inode.fd, ghost.opening_flags(flags) & ~os.O_NOFOLLOW)


def _seal(inode: _Inode) -> None:
    try:
        fcntl.fcntl(inode.fd, fcntl.F_ADD_SEALS, inode.entry.seals)
    except OSError as error:
        assert error.errno is not None
        hint = "a writable mapping of it is still there" if error.errno == errno.EBUSY else ""
        raise KernelError(f"seal memfd {inode.entry.name}", error.errno, hint=hint) from None


RESOURCE = Memfd()
