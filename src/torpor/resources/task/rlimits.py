"""Resource limits: prlimit64(2), kernel/sys.c.

They are narrowed late, since many calls of a restore would not fit into them. A hard limit above
our own can only be given with CAP_SYS_RESOURCE; without it that is said before anything is
created.

Image: task_core_entry.rlimits, all 16 in the order of their numbers.
"""

from __future__ import annotations

import struct

from ...errors import ImageError, Unsupported
from ...proc import limits
from ...proc.limits import RLIM_INFINITY
from ...proc.read import read
from ..base import TaskResource
from ._own import CAP_SYS_RESOURCE, capable, own_limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

NAMES = (
    "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO "
    "RTTIME"
).split()


class ResourceLimits(TaskResource):
    """The resource limits."""

    ORDER = 80

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        found = limits.parse(read(thread.task.pid, "limits"))
        for number in range(len(NAMES)):
            soft, hard = found[number]
            core.tc.rlimits.rlimits.add(cur=soft, max=hard)

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for impossible limits, Unsupported for hard ones that we cannot give."""
        entries = core.tc.rlimits.rlimits
        if len(entries) > len(NAMES):
            raise ImageError(
                "core", "tc.rlimits", f"{len(entries)} entries, there are {len(NAMES)}"
            )
        own = None if capable(ctx, CAP_SYS_RESOURCE) else own_limits(ctx)
        for number, entry in enumerate(entries):
            if entry.cur > entry.max:
                raise ImageError(
                    "core", f"tc.rlimits {NAMES[number]}", "soft limit above the hard one"
                )
            if own is not None and entry.max > own[number][1]:
                raise Unsupported(
                    f"RLIMIT_{NAMES[number]} {_show(entry.max)} is above our own hard limit "
                    f"{_show(own[number][1])}",
                    hint="give us that limit, or CAP_SYS_RESOURCE",
                )

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = own_limits(ctx)
        for number, entry in enumerate(core.tc.rlimits.rlimits):
            if (entry.cur, entry.max) == own[number]:
                continue  # it has been born with that
            limit = struct.pack("<QQ", entry.cur, entry.max)
            program.call("prlimit64", 0, number, limit, 0, why=NAMES[number])


def _show(value: int) -> str:
    return "unlimited" if value == RLIM_INFINITY else str(value)


RESOURCE = ResourceLimits()
