"""Memory that a userfaultfd of the process serves (files/userfaultfd.py): registered when nothing touches it any more.

Kernel: fs/userfaultfd.c
"""

from __future__ import annotations

import struct

from ...linux import userfault
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

MADV_POPULATE_READ = 22


class UserfaultRanges(TaskResource):
    """After what the kernel itself writes into memory (tid address, rseq), while the task has still its rights."""

    ORDER = 50

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        """Done with the descriptor."""

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        for fd, entry in ctx.memo.get(("userfault ranges", thread.task.pid), {}).values():
            for one in entry.ranges:
                for start, length in _pairs(one.zeros):
                    program.call("madvise", start, length, MADV_POPULATE_READ, why="empty, but there")
                request = struct.pack("=QQQQ", one.start, one.end - one.start, one.mode, 0)
                program.call("ioctl", fd, userfault.IOC_REGISTER, request, why="userfaultfd")
                for start, length in _pairs(one.guarded):
                    request = struct.pack("=QQQ", start, length, userfault.WRITEPROTECT_MODE_WP)
                    program.call("ioctl", fd, userfault.IOC_WRITEPROTECT, request, why="write-protected")


def _pairs(words: Any) -> list[tuple[int, int]]:
    return list(zip(words[::2], words[1::2], strict=False))


RESOURCE = UserfaultRanges()
