"""The descriptors of a task as the kernel itself has them: a whole table in one walk, by a program of bpf.py.

It is an iterator over files (kernel/bpf/task_iter.c). What it tells, /proc tells as well, in three files a descriptor
(fd/N, a stat through it, fdinfo/N) and with kcmp(2); but each of these is made by the kernel to be looked at, and costs
twenty times as much. Addresses in the kernel are for telling objects apart, and go nowhere else.
"""

from __future__ import annotations

import os
import struct
from collections import namedtuple

from . import bpf, btf

PATH_BYTES = 320  # a program's stack has 512 bytes
ITERATOR = "bpf_iter_task_file()"
FIELDS = {
    "files": "task_struct.files",
    "table": "files_struct.fdt",
    "cloexec": "fdtable.close_on_exec",
    "path": "file.f_path",
    "flags": "file.f_flags",
    "pos": "file.f_pos",
    "inode": "file.f_inode",
    "locks": "inode.i_flctx",
    "owner": "file.f_owner",
    # An owner that knows its file is pointed to (include/linux/fs.h, "file: reclaim 24 bytes from f_owner", in v6.12).
    # Before, it is a part of the file.
    "owner's file": "fown_struct.file?",
    "owner's pid": "fown_struct.pid",
    "owner's signal": "fown_struct.signum",
    "private": "file.private_data",
    "count": "eventfd_ctx.count",
    "event flags": "eventfd_ctx.flags",
}
#: What the program writes of each file, in front of the link.
HEAD = struct.Struct("<QQQqQQQIIIIq")
PLACES = {
    "task": 0, "file": 8, "inode": 16, "pos": 24, "owner": 32, "locks": 40, "count": 48,
    "fd": 56, "flags": 60, "cloexec": 64, "event flags": 68, "path": 72,
}  # fmt: skip

#: An open file, seen through the descriptor ``fd``. ``flags`` are those of the description, where O_CLOEXEC means
#: nothing; ``cloexec`` is the descriptor's. ``file`` and ``inode`` are equal for the same object. ``owner``: 0 if
#: nobody is told of events; ``locks``: 0 if there never was a lock on the inode. ``count`` and ``event_flags`` are an
#: eventfd's, and mean nothing for other files. ``link`` is what /proc/PID/fd/N reads as, None if it is too long.
OpenFile = namedtuple("OpenFile", "task file inode pos owner locks count fd flags cloexec event_flags link")


class TaskFiles:
    """Reads descriptor tables. Has one descriptor, until :meth:`close`."""

    def __init__(self) -> None:
        """Raises KernelError where BPF is refused, Unsupported where the kernel does not describe its types."""
        answers = btf.lookup([ITERATOR, *FIELDS.values()])
        at = {name: answers[question] for name, question in FIELDS.items()}
        self._program = bpf.load(answers[ITERATOR], bpf.files_program(at, PLACES, HEAD.size, PATH_BYTES))

    def read(self, pid: int) -> list[OpenFile] | None:
        """What is open in a task, by number; None if this kernel does not show it or nothing is open.

        Raises KernelError.
        """
        data = bpf.walk(self._program, pid)
        found: list[OpenFile] = []
        at, end, unpack, make = 0, len(data), HEAD.unpack_from, tuple.__new__
        while at < end:
            *values, size = unpack(data, at)
            at += HEAD.size
            link = None
            if size > 0:
                link = data[at : at + size - 1].decode("utf-8", "surrogateescape")
                at += size
            found.append(make(OpenFile, (*values, link)))
        # Before v6.1 the walk cannot be told a task, and has all of them: Linux kernel commit f0d74c4da1f0 ("bpf:
        # Parameterize task iterators.").
        return found if len({one.task for one in found}) == 1 else None

    def close(self) -> None:
        """Drop the program."""
        os.close(self._program)
