"""Round trips of open files within the test's own process: dump, write images, read them, restore.

Unlike most of the kit this is built on Torpor's own contexts: it stands in for the engine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

from torpor.images import schema as pb
from torpor.images.store import ImageReader, ImageWriter
from torpor.linux.nr import NR
from torpor.options import Options
from torpor.proc import fdinfo
from torpor.proc.read import read
from torpor.remote.machine import RECORD_WORDS
from torpor.remote.program import Program
from torpor.resources import FileKinds
from torpor.resources.base import BuildContext, DumpContext, SourceFile
from torpor.undo import Undo

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class OwnFile(SourceFile):
    """One of our own descriptors as a source."""

    @property
    def flags(self) -> int:
        return fdinfo.parse(read(self.pid, f"fdinfo/{self.fd}")).flags & ~os.O_CLOEXEC

    @property
    def pos(self) -> int:
        return fdinfo.parse(read(self.pid, f"fdinfo/{self.fd}")).pos


def source(fd: int, number: int = 0) -> OwnFile:
    path = f"/proc/self/fd/{fd}"
    return OwnFile(os.getpid(), fd, os.readlink(path), os.stat(path), lambda: fd, number)


class Bench:
    """A dump of some of our own files, then their restore. A context manager that closes all; where a child ends
    without that (:func:`in_child`) the folders are removed at least.
    """

    folders: ClassVar[list[tuple[int, tempfile.TemporaryDirectory[str]]]] = []

    def __init__(self, **options: object) -> None:
        self.options = Options(**options)
        self.folder = tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm")
        self.folders.append((os.getpid(), self.folder))
        self.dir_fd = os.open(self.folder.name, os.O_RDONLY | os.O_DIRECTORY)
        self.writer = ImageWriter(self.dir_fd)
        self.dumping = DumpContext(self.options, self.writer)
        self.kinds = FileKinds()
        self.building: Any = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.dumping.close()
        if self.building is not None:
            for fd in self.building.kept:
                os.close(fd)
        os.close(self.dir_fd)
        self.folder.cleanup()

    @classmethod
    def clean(cls) -> None:
        """Remove the folders that this process has made."""
        for pid, folder in cls.folders:
            if pid == os.getpid():
                folder.cleanup()

    def check(self, fd: int) -> None:
        one = source(fd)
        self.kinds.find(one).check(one, self.dumping)

    def dump(self, fd: int) -> int:
        """Dump one of our descriptors as a description of its own; its file id."""
        one = source(fd, self.dumping.new_id("file"))
        resource = self.kinds.find(one)
        entry = pb.file_entry(type=resource.FD_TYPE, id=one.id)
        getattr(entry, resource.FIELD).CopyFrom(resource.dump(one, self.dumping))
        self.writer.append("files", entry)
        return one.id

    def commit(self, **options: object) -> Any:
        """Put the images in place and get ready to restore; a BuildContext."""
        self.writer.commit()
        reader = ImageReader(self.dir_fd)
        undo = Undo()
        self.building = BuildContext(self.options.replace(**options), reader, undo)
        self.building.first_free_fd = 200
        for entry in reader.files():
            resource = self.kinds.of_type(entry.type)
            self.building.files[entry.id] = (resource, getattr(entry, resource.FIELD))
        return self.building

    def build(self, file_id: int) -> int:
        fd: int = self.building.build(file_id)
        return fd

    def task(self, *fds: tuple[int, int]) -> Any:
        """A stand-in for a RestoredTask (ours) that holds the (fd, file id)s."""
        return SimpleNamespace(pid=os.getpid(), fds=[(fd, number, False) for fd, number in fds])


def seen(fd: int) -> dict[str, object]:
    """What a task can see of one of its descriptors, by other means than the resources use."""
    found = os.fstat(fd)
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = dict(line.rstrip().split(":\t", 1) for line in file if ":\t" in line)
    return {
        "link": os.readlink(f"/proc/self/fd/{fd}"),
        "flags": int(lines["flags"], 8) & ~os.O_CLOEXEC,
        "pos": int(lines["pos"]),
        "mode": found.st_mode,
        "owner": (found.st_uid, found.st_gid),
        "size": found.st_size,
        "names": found.st_nlink,
        "device": found.st_rdev,
    }


def run_here(program: Program) -> list[int]:
    """Do the calls of a program in this process, as the machine would; their results."""
    area = ctypes.create_string_buffer(max(program.size, 8))
    program.place(ctypes.addressof(area))
    area[: program.size] = program.compile()
    results = []
    for index, record in enumerate(program.records):
        at = index * RECORD_WORDS * 8
        words = struct.unpack_from(f"<{RECORD_WORDS}Q", area, at)
        assert words[0] == NR[record.name] + 1
        result = _libc.syscall(ctypes.c_long(words[0] - 1), *map(ctypes.c_void_p, words[1:7]))
        if result == -1:
            result = -ctypes.get_errno()
            tolerated = words[9] >> -result & 1
            assert tolerated, f"{record}: {errno.errorcode[-result]}"
        if words[8]:
            ctypes.c_int64.from_address(words[8]).value = result
        results.append(result)
    return results


def in_child(work: Callable[[], object]) -> None:
    """Run ``work`` in a forked child; fails with its error if it raises one."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            Bench.clean()
            os._exit(0)
        except BaseException as error:
            import traceback

            os.write(write_end, "".join(traceback.format_exception(error)).encode()[-60000:])
            Bench.clean()
            os._exit(1)
    os.close(write_end)
    text = b""
    while chunk := os.read(read_end, 1 << 16):
        text += chunk
    os.close(read_end)
    _, status = os.waitpid(pid, 0)
    assert status == 0, text.decode()


def alone_after(prepare: Callable[[], object]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A decorator: the test runs in a forked child, after ``prepare`` has."""

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            prepare()
            test()

        def run() -> None:
            in_child(work)

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return decorate
