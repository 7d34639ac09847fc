"""Whether mappings still to be made will be locked: mlockall(MCL_FUTURE), mm/mlock.c.

Nothing tells but the kernel's memory (mm_struct.def_flags), which BPF looks at where anything of a process is locked.
Restored when its memory is complete, and while the task still has the right to it.

Image: task_core_entry.mlockall, ours: MCL_FUTURE, with MCL_ONFAULT.
"""

from __future__ import annotations

from ... import log
from ...errors import ImageError, KernelError, Unsupported
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

MCL_FUTURE, MCL_ONFAULT = 2, 4
VM_LOCKED, VM_LOCKONFAULT = 0x2000, 0x80000  # include/linux/mm.h


class LockedFuture(TaskResource):
    """MCL_FUTURE."""

    ORDER = 81

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        if not int((thread.status.line("VmLck") or "0").split()[0]):
            return
        try:
            flags = _default_flags(thread.tid)
        except (KernelError, Unsupported) as error:
            log.warning(f"task {thread.tid}: whether new mappings are locked (MCL_FUTURE) cannot be seen: {error}")
            return
        if flags & VM_LOCKED:
            core.tc.mlockall = MCL_FUTURE | (MCL_ONFAULT if flags & VM_LOCKONFAULT else 0)

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for anything else, which might lock what is there."""
        if core.tc.mlockall not in (0, MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT):
            raise ImageError("core", "tc.mlockall", f"{core.tc.mlockall:#x}")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if core.tc.mlockall:
            program.call("mlockall", core.tc.mlockall, why="what will be mapped is locked")


def _default_flags(pid: int) -> int:
    """The flags that a mapping of the process is born with. Raises KernelError, or Unsupported."""
    from ...linux import bpf, btf

    at = btf.lookup(["task_struct.mm", "mm_struct.def_flags", "bpf_iter_task()"])
    place = bpf.Place(at["mm_struct.def_flags"], 8, through=(at["task_struct.mm"],))
    record = bpf.read_once(at["bpf_iter_task()"], [place], pid)
    if record is None:
        raise Unsupported("BPF does not find it")
    return int.from_bytes(record.fields[0], "little")


RESOURCE = LockedFuture()
