"""Directories that a copy sees through an overlay of its own: what it writes there nobody else sees.

The lower layer is the directory as it is. What the copy writes goes to the upper one, which lies in a tmpfs that ends
with the copy, or in a new folder at a place that the caller names; that one is removed by a sweeper (remote/sweeper.py)
when the copy has ended, unless it is to be kept. The overlays are mounted in the copy's mount namespace (annex.py)
before anything is opened there.

The kernel copies a file into the upper layer when it is first opened for writing, and who opened it before, to read
it, goes on seeing the lower one. So files that the snapshot has open for writing are copied before anything is opened.

Kernel: fs/overlayfs (params.c for the parameters, copy_up.c)
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from .. import log
from ..errors import KernelError, Unsupported, UsageError, doing
from ..images import schema as pb
from ..linux import mounts
from ..proc import mountinfo
from ..proc.read import read
from ..resources.base import VMA_FILE_PRIVATE, VMA_FILE_SHARED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..images.schema import Message
    from ..model.snapshot import Snapshot
    from ..options import Options
    from ..resources.base import BuildContext

SOURCE = "torpor"  # how the mounts are called in mountinfo
NAME_BYTES = 6
OPENED = "opened for writing"  # a key of ctx.memo: what opened_for_writing() gives
#: Of names, what the kernel takes apart in a list of layers; such ones are said by descriptor.
SPECIAL = frozenset("\\:,\n")


class Wanted:
    """What is asked for: ``dirs`` to be overlaid; ``upper``: the place for what is written, "" for a tmpfs of ``size``
    bytes (0: as many as the kernel gives one by itself); ``keep`` the folder at that place.
    """

    __slots__ = ("dirs", "keep", "size", "upper")

    def __init__(self, dirs: Iterable[str] = (), *, upper: str = "", size: int = 0, keep: bool = False) -> None:
        """Raises UsageError for what does not go together."""
        self.dirs = tuple(dirs)
        self.upper, self.size, self.keep = upper, size, keep
        if not self.dirs and (upper or size or keep):
            raise UsageError("an upper layer of which directory?", hint="--overlay DIR")
        if upper and size:
            raise UsageError(
                "--overlay-size is for a tmpfs, and --overlay-upper names another place",
                hint="limit the file system there, or leave out one of them",
            )
        if keep and not upper:
            raise UsageError("a tmpfs ends with the copy: nothing is left to be kept", hint="--overlay-upper PATH")

    @classmethod
    def of(cls, options: Options) -> Wanted:
        """What the options of a restore ask for."""
        size, keep = options.overlay_size, options.overlay_keep
        return cls(options.overlay, upper=options.overlay_upper, size=size, keep=keep)

    def __bool__(self) -> bool:
        return bool(self.dirs)


class Overlays:
    """The overlays of one copy. ``folder`` is where what the copy writes is found, "" for a tmpfs."""

    def __init__(self, wanted: Wanted, snapshot: Snapshot, ctx: BuildContext) -> None:
        """Prepare them. Raises UsageError, Unsupported and KernelError; all of it is taken back by
        ``ctx.on_failure``.
        """
        self.wanted = wanted
        self.ctx = ctx
        self.folder = ""
        self.dirs = places(wanted.dirs)
        ids = ctx.once(OPENED, lambda: opened_for_writing(snapshot))
        #: The names of those in them.
        self._written = {self._name(one) for one in ids} - {b""}
        #: Their numbers in the images, of which a file may have several.
        self._copied = {one for one in ctx.files if self._name(one) in self._written} if self._written else set()
        if wanted.upper:
            self._make_folder(os.path.realpath(wanted.upper))
        for path in self.dirs:
            ctx.notes.append(f"{path}: under an overlay; what is written goes to {self.folder or 'a tmpfs'}")

    def _make_folder(self, place: str) -> None:
        with doing(f"upper layer in `{self.wanted.upper}`"):
            inside = next((path for path in self.dirs if is_within(path, place)), "")
            if inside:
                raise UsageError(f"it lies in {inside}, the lower layer", hint="name a place outside of it")
            folder = os.path.join(place, f"{SOURCE}-{os.urandom(NAME_BYTES).hex()}")
            self.ctx.on_failure.add(f"folder {folder}", lambda: _remove(folder))
            os.mkdir(folder, 0o700)
            self.folder = folder

    def mount(self) -> None:
        """Make and mount them: in the annex, for layers have to be seen through mounts that are there."""
        layers = self._open_layers()
        made: list[tuple[str, int]] = []
        try:
            for number, path in enumerate(self.dirs, 1):
                with doing(f"overlay on `{path}`"):
                    made.append((path, self._make(path, layers, str(number))))
            for path, mount in made:  # not before: one may lie in another
                with doing(f"overlay on `{path}`"):
                    mounts.attach(mount, path)
        finally:
            for _, mount in made:
                os.close(mount)
            os.close(layers)

    def _open_layers(self) -> int:
        """A descriptor of the directory that is to hold the upper layers."""
        if self.folder:
            return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with doing("tmpfs of an overlay"):
            settings = {"source": SOURCE, "mode": "0700"}
            if self.wanted.size:
                settings["size"] = str(self.wanted.size)
            return mounts.make("tmpfs", settings)

    def _make(self, path: str, layers: int, name: str) -> int:
        """A descriptor of the overlay on ``path``, not mounted yet, with its other layers in a directory ``name``."""
        lower = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.mkdir(name, 0o700, dir_fd=layers)
            os.symlink(path, f"{name}/lower", dir_fd=layers)  # for people
            for layer in ("upper", "work"):
                os.mkdir(f"{name}/{layer}", 0o700, dir_fd=layers)
            _be_like(lower, layers, f"{name}/upper")
            where = f"{self.folder}/{name}"
            if not self.folder or SPECIAL & set(where):
                where = f"/proc/self/fd/{layers}/{name}"
            return mounts.make("overlay", {
                "source": SOURCE,
                "lowerdir": f"/proc/self/fd/{lower}" if SPECIAL & set(path) else path,
                "upperdir": f"{where}/upper", "workdir": f"{where}/work",
            })  # fmt: skip
        except KernelError as error:
            if error.errno == errno.EINVAL and not error.hint:
                error.hint = f"can {path}, and the place for what is written, be layers of an overlay at all?"
            raise
        finally:
            os.close(lower)

    # --------------------------------------------------------------------------------- what is in them

    def covers(self, name: bytes) -> bool:
        """Is a file of that name seen through one of the overlays?"""
        return any(is_within(path, os.fsdecode(name)) for path in self.dirs)

    def has(self, file_id: int) -> bool:
        """The same for a file of the images."""
        entry = self.ctx.files[file_id][1] if file_id in self.ctx.files else None
        return entry is not None and "name" in entry.DESCRIPTOR.fields_by_name and self.covers(pb.get_bytes(entry.name))

    def concerns(self, entry: Message) -> bool:
        """Is this vma_entry memory that changes with a file in them? Private memory: where the file is copied."""
        if entry.status & VMA_FILE_SHARED:
            return self.has(entry.shmid)
        return bool(entry.status & VMA_FILE_PRIVATE) and entry.shmid in self._copied

    def _name(self, file_id: int) -> bytes:
        """The name of a file of the images, b"" if it is not seen through one of the overlays."""
        return pb.get_bytes(self.ctx.files[file_id][1].name) if self.has(file_id) else b""

    def copy_up(self) -> None:
        """In the annex, before anything is opened there: have the files copied that are open for writing."""
        for name in sorted(self._written):
            with doing(f"file {os.fsdecode(name)}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if stat.S_ISREG(os.lstat(name).st_mode):
                    os.close(os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC))

    def watch(self, pid: int) -> None:
        """Have the folder removed when process ``pid``, our view of it, has ended. Raises KernelError, Unsupported."""
        if self.folder and not self.wanted.keep:
            from ..remote import sweeper

            with doing(f"sweeper of {self.folder}"):
                sweeper.start(pid, self.folder)
        elif self.folder:
            log.info(f"what process {pid} writes is kept in {self.folder}")


def places(dirs: Iterable[str]) -> list[str]:
    """The directories by their real names, the outer before the inner, without those that are in another one anyway.

    Raises UsageError for what is no directory, and Unsupported where a mount below would be hidden.
    """
    real: dict[str, str] = {}
    for path in dirs:
        with doing(f"overlay on `{path}`"):
            try:
                real[os.path.realpath(path, strict=True)] = path
                if not stat.S_ISDIR(os.stat(path).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            except OSError as error:
                raise UsageError(error.strerror or str(error)) from None
            if os.path.realpath(path) == "/":
                raise UsageError("all names begin there", hint="name the directories that are written to")
    points = {os.fsdecode(one.mountpoint) for one in mountinfo.parse(read(os.getpid(), "mountinfo"))}
    found: list[str] = []
    for path in sorted(real, key=len):
        if path in points or not any(is_within(outer, path) for outer in found):
            found.append(path)
    hidden = sorted(point for point in points - set(found) if any(is_within(path, point) for path in found))
    if hidden:
        outer = next(path for path in reversed(found) if is_within(path, hidden[0]))
        raise Unsupported(
            f"overlay on `{real[outer]}`: the mount on {hidden[0]} would be hidden by it",
            hint=f"--overlay {hidden[0]} as well, or unmount it",
        )
    return found


def opened_for_writing(snapshot: Snapshot) -> set[int]:
    """The numbers of files that are open for writing, or mapped by a descriptor that was."""
    found = {entry.id for entry in snapshot.files.values() if entry.HasField("reg") and _writes(entry.reg.flags)}
    for layout in {id(task.mm): task.mm for task in snapshot.tasks.values() if task.alive}.values():
        mapped = (entry for entry in layout.vmas if entry.status & (VMA_FILE_SHARED | VMA_FILE_PRIVATE))
        found.update(entry.shmid for entry in mapped if _writes(entry.fdflags))
    return found


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def is_within(outer: str, path: str) -> bool:
    """Is ``path`` the directory ``outer`` or something in it? Both are absolute and normal."""
    return path == outer or path.startswith(f"{outer}/")


def _be_like(lower: int, layers: int, name: str) -> None:
    """The overlay's own directory is the upper one: give it owner, mode and attributes of the lower one."""
    upper = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layers)
    try:
        like = os.fstat(lower)
        os.fchown(upper, like.st_uid, like.st_gid)
        os.fchmod(upper, stat.S_IMODE(like.st_mode))
        for attribute in os.listxattr(lower):
            if not attribute.startswith("trusted.overlay."):
                try:
                    os.setxattr(upper, attribute, os.getxattr(lower, attribute))
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
                        raise
        os.utime(upper, ns=(like.st_atime_ns, like.st_mtime_ns))
    finally:
        os.close(upper)


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=not os.path.lexists(folder))
