"""Restartable sequences: rseq(2), kernel/rseq.c.

The area itself is memory. A thread that is stopped inside a critical section has to go on at the
section's abort handler: once it has run anything else, our getters for one, the kernel takes it
to have left the section (it clears rseq_cs and changes nothing else). So before running a program
in a thread, the engine asks :func:`abort_address` and puts the answer, if there is one, in place
of the thread's ip, in the registers that it saves and in those that it gives back.

Image: thread_core_entry.rseq_entry, with address 0 where none is registered. rseq_cs_pointer is
for flags that no kernel since v6.1 takes (they kill the thread); it is neither written nor read.
"""

from __future__ import annotations

import struct

from ...errors import Unsupported
from ...linux import ptrace
from ...linux.kernel import read_memory
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

CS_OFFSET = 8  # struct rseq: cpu_id_start, cpu_id, rseq_cs, …
SECTION = struct.Struct(
    "<IIQQQ"
)  # struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip


def abort_address(tid: int, ip: int) -> int | None:
    """Where a thread stopped at ``ip`` has to go on if it is in a critical section, else None."""
    configuration = ptrace.rseq_configuration(tid)
    if configuration is None:
        return None
    (section,) = struct.unpack("<Q", read_memory(tid, configuration[0] + CS_OFFSET, 8))
    if not section:
        return None
    version, _, start, length, abort = SECTION.unpack(read_memory(tid, section, SECTION.size))
    if version != 0:
        raise Unsupported(f"task {tid}: a restartable sequence of version {version}")
    return int(abort) if start <= ip < start + length else None


class RestartableSequences(TaskResource):
    """The rseq registration."""

    PER = "thread"
    ORDER = 32

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        address, size, signature, _ = ptrace.rseq_configuration(thread.tid) or (0, 0, 0, 0)
        entry = core.thread_core.rseq_entry
        entry.rseq_abi_pointer, entry.rseq_abi_size, entry.signature = address, size, signature

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        entry = core.thread_core.rseq_entry
        if entry.rseq_abi_pointer:
            program.call("rseq", entry.rseq_abi_pointer, entry.rseq_abi_size, 0, entry.signature)


RESOURCE = RestartableSequences()
