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

PAGE = 4096
FIRST_BYTES = 16 << 10

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from ..model.snapshot import RestoredTask
    from ..remote.program import Program, Ref
    from ..remote.stub import Arena
    from .mapped import Handle

    #: (descriptor of ours, address, bytes, offset)
    Piece: TypeAlias = tuple[int, int, int, int]
    #: (start, end) of a mapping
    Span: TypeAlias = tuple[int, int]


class Fill:
    """Pieces to be brought into one stub, which waits at its first stop."""

    __slots__ = ("_opened", "_program", "mapped", "mapped_spans", "pieces", "spans")

    def __init__(
        self, pieces: list[Piece], spans: list[Span], mapped: list[Piece], mapped_spans: list[Span]
    ) -> None:
        """``pieces``, which lie in the mappings ``spans``, are brought in while the stub waits; ``mapped``, in
        ``mapped_spans``, are left to a pager (engine/mapped.py).
        """
        self.pieces = pieces
        self.spans = spans
        self.mapped = mapped
        self.mapped_spans = mapped_spans
        self._program: Program | None = None
        self._opened: Ref | None = None

    def emit_open(self, program: Program) -> None:
        """Emit the opening, once the task's own descriptors are in place."""
        self._program = program
        why = "large memory is filled from outside"
        self._opened = program.call("userfaultfd", userfault.FLAGS, why=why)

    def opened(self, arena: Arena) -> int:
        """The number of the descriptor that the stub's program has opened."""
        assert self._program is not None and self._opened is not None
        return arena.result(self._program, self._opened.index)

    def emit_close(self, program: Program) -> None:
        """Emit the end of it, in the same program."""
        assert self._opened is not None
        program.call("close", self._opened, why="userfaultfd")

    def explain(self, task: str, *, lazy: bool) -> Iterator[str]:
        """What a pager will bring in, a line a mapping."""
        then = "when it is touched" if lazy else "when it is touched, and in the background"
        for start, end in self.mapped_spans:
            size = sum(piece[2] for piece in self.mapped if start <= piece[1] < end)
            yield f"{task}: mapping {start:x}-{end:x}: {size >> 10} KiB are brought in {then}"

    def run(self, arena: Arena, task: RestoredTask, pager: Handle | None) -> None:
        """Bring the pages into the task's stub, and hand it over to ``pager``. Raises KernelError."""
        pid = task.live_pid
        pidfd = os.pidfd_open(pid)
        try:
            fd = pidfd_getfd(pidfd, self.opened(arena))
        finally:
            os.close(pidfd)
        try:
            userfault.start(fd, userfault.EVENTS if self.mapped else 0)
            for start, end in self.spans:
                userfault.register(fd, start, end)
            for file, address, size, offset in self.pieces:
                userfault.copy_from_file(fd, address, size, file, offset)
            for start, end in self.spans:
                userfault.unregister(fd, start, end)
            if self.mapped:
                assert pager is not None
                for start, end in self.mapped_spans:
                    userfault.register(fd, start, end)
                for file, address, size, offset in self._first_needed(task):
                    userfault.copy_from_file(fd, address, size, file, offset)
                pager.hand_over(fd, pid)
        finally:
            os.close(fd)

    def _first_needed(self, task: RestoredTask) -> Iterator[Piece]:
        """What of the mapped pieces every thread will touch at once: its stack and what it has for itself.

        A pager that finds them there leaves them alone.
        """
        spans = set()
        for thread in task.threads:
            regs = thread.core.thread_info.gpregs
            for place in (regs.sp, regs.fs_base):
                spans.add((place - FIRST_BYTES & -PAGE, place + FIRST_BYTES & -PAGE))
        last = 0
        for low, high in sorted(spans):
            low = max(low, last)
            last = max(high, last)
            for file, address, size, offset in self.mapped:
                start, end = max(low, address), min(high, address + size)
                if start < end:
                    yield file, start, end - start, offset + start - address
