"""An open file seen as a dump sees it, and taken through the images, all in one process.

For tests of ``resources/files``: dump, encode, decode, restore, without a task that is stopped or a stub that is filled.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator

from torpor.images import schema as pb
from torpor.images.store import ImageReader, ImageWriter
from torpor.resources import FileKinds
from torpor.resources.base import BuildContext, DumpContext, FileResource, SourceFile
from torpor.resources.fown import emit
from torpor.remote.program import Program
from torpor.undo import Undo

from . import inprocess


class Options:
    """The options that files ask for, at their defaults."""

    def __init__(self, **values: object) -> None:
        self.file_validation = "filesize"
        self.skip_file_rwx_check = False
        self.ghost_limit = 1 << 20
        self.link_remap = False
        self.evasive_devices = False
        self.external: list[str] = []
        self.inherit_fd: list[tuple[int, str]] = []
        self.__dict__.update(values)


class Task:
    """As much of a SourceTask as files ask for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.threads: list[object] = []


def source_of(fd: int, file_id: int = 1) -> SourceFile:
    """One of our own descriptors, as a dump would see it."""
    path = f"/proc/self/fd/{fd}"
    return SourceFile(os.getpid(), fd, os.readlink(path), os.stat(path), lambda: fd, file_id)


class Trip:
    """The way of some open files through the images in ``folder``. Close what it makes with :meth:`close`."""

    def __init__(self, folder: str) -> None:
        self.dir_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.writer = ImageWriter(self.dir_fd)
        self.dumped = DumpContext(Options(), self.writer)
        self.task = Task(os.getpid())
        self.dumped.tasks[os.getpid()] = self.task
        self.kinds = FileKinds()
        self.build = BuildContext(Options(), ImageReader(self.dir_fd), Undo())
        self.made: list[int] = []

    def dump(self, fd: int) -> int:
        """Dump one of our descriptors; gives its file id."""
        source = source_of(fd, self.dumped.new_id("file"))
        resource = self.kinds.find(source)
        resource.check(source, self.dumped)
        whole = pb.file_entry(type=resource.FD_TYPE, id=source.id)
        getattr(whole, resource.FIELD).CopyFrom(resource.dump(source, self.dumped))
        self.writer.append("files", whole)
        return source.id

    def load(self) -> None:
        """Finish the images and read them back."""
        self.writer.commit()
        self.writer.close()
        for whole in self.build.images.files():
            resource = self.kinds.by_type[whole.type]
            self.build.files[whole.id] = (resource, getattr(whole, resource.FIELD))

    def entry(self, file_id: int) -> tuple[FileResource, object]:
        """The resource and entry of a file, as read from the images."""
        return self.build.files[file_id]

    def restore(self, file_id: int) -> int:
        """A new descriptor for it. What only a task can do is not done."""
        resource, entry = self.entry(file_id)
        fd = resource.restore(entry, self.build)
        self.made.append(fd)
        return fd

    def settle(self, file_id: int, fd: int) -> Program:
        """Do in this process what the task does that has it as ``fd``; gives the program."""
        resource, entry = self.entry(file_id)
        program = Program()
        resource.settle(entry, fd, program, self.build)
        if "fown" in entry.DESCRIPTOR.fields_by_name:
            emit(entry.fown, fd, program, entry.flags)
        inprocess.run(program)
        return program

    def close(self) -> None:
        """Close everything that was made on the way."""
        self.dumped.close()
        self.writer.close()
        for fd in (*self.made, *self.build.kept, self.dir_fd, self.task.pidfd):
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def trip(folder: str) -> Iterator[Trip]:
    """A Trip that is closed at the end."""
    made = Trip(folder)
    try:
        yield made
    finally:
        made.close()


def fdinfo(fd: int) -> bytes:
    """/proc/self/fdinfo of it, without what no restore can keep (inode and kernel ids)."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        lines = file.read().splitlines()
    return b"\n".join(line for line in lines if not line.startswith((b"ino:", b"eventfd-id:")))


def fcntl_state(fd: int) -> tuple[object, ...]:
    """What fcntl(2) tells of a description: flags, signal, owner and the owner's ids."""
    owner = struct.unpack("ii", fcntl.fcntl(fd, 16, bytes(8)))
    uids = struct.unpack("II", fcntl.fcntl(fd, 17, bytes(8)))
    return fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, 11), owner, uids
