"""Filling large anonymous memory of a stub from outside, by userfaultfd(2).

UFFDIO_COPY makes a page and copies into it at once. A read into fresh memory faults on every page
of 4 KiB and has it zeroed first, which takes half as long again. The stub opens the userfaultfd in
its program; we take it while the stub waits, and the pages come straight from the page cache of the
images. Kernel: fs/userfaultfd.c, mm/userfaultfd.c
"""

from __future__ import annotations

import os

from ..linux import userfault
from ..linux.kernel import pidfd_getfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..remote.program import Program, Ref
    from ..remote.stub import Arena


class Fill:
    """Pieces to be brought into one stub, which waits at its first stop."""

    __slots__ = ("_opened", "_program", "pid", "pieces", "spans")

    def __init__(
        self, pid: int, pieces: list[tuple[int, int, int, int]], spans: list[tuple[int, int]]
    ) -> None:
        """``pieces``: (descriptor of ours, address, bytes, offset); ``spans``: (start, end) of the
        mappings they are in.
        """
        self.pid = pid
        self.pieces = pieces
        self.spans = spans
        self._program: Program | None = None
        self._opened: Ref | None = None

    def emit_open(self, program: Program) -> None:
        """Emit the opening, once the task's own descriptors are in place."""
        self._program = program
        why = "large memory is filled from outside"
        self._opened = program.call("userfaultfd", userfault.FLAGS, why=why)

    def emit_close(self, program: Program) -> None:
        """Emit the end of it, in the same program."""
        assert self._opened is not None
        program.call("close", self._opened, why="userfaultfd")

    def run(self, arena: Arena) -> None:
        """Bring the pages in. Raises KernelError."""
        assert self._program is not None and self._opened is not None
        pidfd = os.pidfd_open(self.pid)
        try:
            fd = pidfd_getfd(pidfd, arena.result(self._program, self._opened.index))
        finally:
            os.close(pidfd)
        try:
            userfault.start(fd)
            for start, end in self.spans:
                userfault.register(fd, start, end)
            for file, address, size, offset in self.pieces:
                userfault.copy_from_file(fd, address, size, file, offset)
            for start, end in self.spans:
                userfault.unregister(fd, start, end)
        finally:
            os.close(fd)
