"""On which NUMA nodes memory is allocated: set_mempolicy(2) of a thread, mbind(2) of its mappings, mm/mempolicy.c.

A thread asks for its own policy. For those of mappings the process is asked mapping by mapping, on machines that can
have several nodes; on others they have no effect. Pages are restored before the policies and moved by them. Nodes that
are not here, or not in the cpuset, leave a policy out. What set_mempolicy_home_node(2) chose cannot be asked.

Image: thread_core_entry.mempolicy, task_core_entry.mempolicies, ours, absent where nothing was chosen.
"""

from __future__ import annotations

import errno
import struct

from ... import log
from ...errors import ImageError
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Data, Program, Ref, Run
    from ..base import BuildContext, DumpContext

    #: (the record, the answer, start and end of the mapping or 0, 0)
    Question = tuple[Ref, Data, int, int]

MPOL_F_ADDR, MPOL_MF_MOVE = 2, 2
NODES_MAX = 1024  # MAX_NUMNODES at most: CONFIG_NODES_SHIFT is 10 at most
NODES = "/sys/devices/system/node"
NO_PAGES = ("vsyscall", "vvar", "vvar_vclock", "vdso")


class MemoryPolicies(TaskResource):
    """The NUMA policies of a thread and, with its main thread, of the mappings."""

    PER = "thread"
    ORDER = 48

    def ask(self, program: Program, thread: Any) -> list[Question]:
        asked = [_ask(program, 0, 0)]
        if thread.tid == thread.task.pid and has_several_nodes():
            vmas = (mapping.vma for mapping in thread.task.mappings if mapping.vma.kind not in NO_PAGES)
            asked += [_ask(program, vma.start, vma.end) for vma in vmas]
        return asked

    def varies(self, thread: Any) -> object:
        if thread.tid != thread.task.pid or not has_several_nodes():
            return None
        return id(thread.task.mappings)  # a list that tasks with the same mappings share, for as long as the dump lasts

    def dump(self, thread: Any, run: Run, asked: list[Question], core: Message, ctx: DumpContext) -> None:
        for call, area, start, end in asked:
            mode, nodes = struct.unpack(f"<i4x{NODES_MAX // 8}s", run.bytes(area))
            if run.result(call) < 0 or not mode:
                continue
            entry = core.tc.mempolicies.add(start=start, end=end) if end else core.thread_core.mempolicy
            entry.mode, entry.nodes = mode, nodes.rstrip(b"\0")

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError for what is no policy; warn of nodes that are not here."""
        for entry in (*core.tc.mempolicies, core.thread_core.mempolicy):
            if len(entry.nodes) > NODES_MAX // 8 or entry.start > entry.end or entry.mode >> 31:
                raise ImageError("core", "mempolicy", f"mode {entry.mode:#x}, {len(entry.nodes)} bytes of nodes")
            wanted = int.from_bytes(entry.nodes, "little")
            if wanted & ~ctx.once("NUMA nodes", _online):
                log.warning(f"NUMA nodes {wanted:#x}, on which memory was to be, are not all here")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        may_fail = (errno.EINVAL, errno.ENOSYS)
        for entry in core.tc.mempolicies:
            length = entry.end - entry.start
            nodes, count = _nodes(entry)
            program.call("mbind", entry.start, length, entry.mode, nodes, count, MPOL_MF_MOVE, may_fail=may_fail)
        if core.thread_core.HasField("mempolicy"):
            nodes, count = _nodes(core.thread_core.mempolicy)
            program.call("set_mempolicy", core.thread_core.mempolicy.mode, nodes, count, may_fail=may_fail)


def has_several_nodes() -> bool:
    """Can this machine have more than one node?"""
    return _mask("possible") > 1


def _online() -> int:
    return _mask("online")


def _mask(name: str) -> int:
    """A list of nodes (``0-1,4``) as a mask; node 0 for a kernel without CONFIG_NUMA."""
    try:
        with open(f"{NODES}/{name}", "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return 1
    mask = 0
    for span in text.split(b","):
        first, _, last = span.partition(b"-")
        mask |= (2 << int(last or first)) - (1 << int(first))
    return mask


def _ask(program: Program, start: int, end: int) -> Question:
    area = program.out(8 + NODES_MAX // 8)
    missing = (errno.ENOSYS, errno.EFAULT, errno.EINVAL)
    flags = MPOL_F_ADDR if end else 0
    call = program.call("get_mempolicy", area, area.at(8), NODES_MAX, start, flags, may_fail=missing)
    return call, area, start, end


def _nodes(entry: Message) -> tuple[bytes | int, int]:
    """The mask of nodes and how many bits it has, one more by the kernel's way of counting (get_nodes())."""
    mask = entry.nodes.ljust(-(-len(entry.nodes) // 8) * 8, b"\0")
    return (mask, 8 * len(mask) + 1) if mask else (0, 0)


RESOURCE = MemoryPolicies()
