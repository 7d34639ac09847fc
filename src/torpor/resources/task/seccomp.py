"""What system calls a thread may make: seccomp(2), kernel/seccomp.c; and no_new_privs, which it
may depend on.

The kernel shows each thread's filters from the oldest on. Equal beginnings are stored once. When
all threads of a process have the same filters, the main thread brings them to the others with
TSYNC, so that they share them as they most likely did before: a later TSYNC of the program's own
demands that.

The tracer has suspended seccomp (PTRACE_O_SUSPEND_SECCOMP) while this and what follows runs.

Image: thread_core_entry.seccomp_mode, seccomp_filter (index of the newest filter in seccomp.img,
each of which names the one before it as prev) and creds.no_new_privs. With TSYNC the other
threads have no mode.
"""

from __future__ import annotations

import struct

from ...errors import ImageError, Unsupported
from ...images import schema as pb
from ...linux import ptrace
from ..base import TaskResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

    Chain = list[tuple[bytes, int]]  # (struct sock_filter[], flags) of each filter, oldest first

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
MODE_STRICT, MODE_FILTER = 1, 2
SET_MODE_FILTER = 1
FLAG_TSYNC, FLAG_LOG, FLAG_SPEC_ALLOW = 1, 2, 4
# With TSYNC alone a failure is told as the number of the thread that is in the way, which is no
# error. Linux kernel commit 51891498f2da ("seccomp: allow TSYNC and USER_NOTIF together") (in
# v5.7).
FLAG_TSYNC_ESRCH = 16
INSTRUCTION = struct.Struct("<HBBI")
INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS
RETURN_CONSTANT, RET_USER_NOTIF, RET_ACTION = 0x06, 0x7FC00000, 0xFFFF0000


def filters(ctx: DumpContext) -> Message:
    """The seccomp_entry with the filters of all threads dumped so far: seccomp.img, at the end."""
    return ctx.memo.setdefault("seccomp", pb.seccomp_entry())


class Seccomp(TaskResource):
    """Seccomp mode and filters, no_new_privs."""

    PER = "thread"
    ORDER = 85

    def dump(self, thread: Any, run: Any, asked: Any, core: Message, ctx: DumpContext) -> None:
        mode = thread.status.Seccomp or 0
        if mode == MODE_STRICT:
            core.thread_core.seccomp_mode = MODE_STRICT
        if mode != MODE_FILTER:
            return
        chains, shared = _chains_of(thread.task, ctx)
        main = thread.tid == thread.task.pid
        if main or not shared:
            core.thread_core.seccomp_mode = MODE_FILTER
            core.thread_core.seccomp_filter = _store(chains[thread.tid], shared, ctx)

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise ImageError when a filter is missing or malformed."""
        if core.HasField("tc") and core.tc.old_seccomp_mode:
            raise Unsupported(
                "seccomp in an image of the old kind (task_core_entry.old_seccomp_mode)"
            )
        if core.thread_core.seccomp_mode == MODE_FILTER:
            _chain(core.thread_core.seccomp_filter, ctx)

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        own = core.thread_core
        if own.creds.no_new_privs:
            program.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, why="no_new_privs")
        if own.seccomp_mode == MODE_STRICT:
            program.call("prctl", PR_SET_SECCOMP, MODE_STRICT, 0, 0, 0, why="seccomp: strict")
        if own.seccomp_mode == MODE_FILTER:
            # What the mitigation of a filter without this flag has led to is in thread_prctls.py's speculation, and the
            # kernel does not tell the flag.
            mitigated = FLAG_SPEC_ALLOW if own.speculation else 0
            for code, flags in _chain(own.seccomp_filter, ctx):
                _install(program, code, flags | mitigated)


def _install(program: Program, code: bytes, flags: int) -> None:
    instructions = program.put(code)
    header = program.put(
        struct.pack("<H6xQ", len(code) // INSTRUCTION.size, 0)
    )  # struct sock_fprog
    program.pointer(header, 8, instructions)
    if flags & FLAG_TSYNC:
        flags |= FLAG_TSYNC_ESRCH
    program.call("seccomp", SET_MODE_FILTER, flags, header)


def _chains_of(task: Any, ctx: DumpContext) -> tuple[dict[int, Chain], bool]:
    """The filters of all threads; and are they shared: the same ones in each of several threads?"""
    key = ("seccomp", "chains", task.pid)
    if key not in ctx.memo:
        chains = {
            thread.tid: _read(thread.tid)
            for thread in task.threads
            if thread.status.Seccomp == MODE_FILTER
        }
        main = task.threads[0]
        shared = len(task.threads) > 1 and all(
            chains.get(thread.tid) == chains.get(main.tid)
            and thread.status.NoNewPrivs == main.status.NoNewPrivs  # which TSYNC would bring along
            for thread in task.threads
        )
        ctx.memo[key] = chains, shared
    found: tuple[dict[int, Chain], bool] = ctx.memo[key]
    return found


def _read(tid: int) -> Chain:
    chain: Chain = []
    while (code := ptrace.seccomp_filter(tid, len(chain))) is not None:
        for operation, _, _, value in INSTRUCTION.iter_unpack(code):
            if operation == RETURN_CONSTANT and value & RET_ACTION == RET_USER_NOTIF:
                raise Unsupported(
                    f"thread {tid}: a seccomp filter hands system calls to a supervisor",
                    hint="the connection to the supervisor cannot be restored",
                )
        chain.append((code, ptrace.seccomp_flags(tid, len(chain))))
    return chain


def _store(chain: Chain, shared: bool, ctx: DumpContext) -> int:
    entry = filters(ctx)
    numbers: dict[tuple[bytes, int, int], int] = ctx.memo.setdefault(("seccomp", "numbers"), {})
    last = -1
    for code, known_flags in chain:
        flags = known_flags | (FLAG_TSYNC if shared else 0)
        key = (code, flags, last)
        if key not in numbers:
            numbers[key] = len(entry.seccomp_filters)
            added = entry.seccomp_filters.add(filter=code, flags=flags)
            if last >= 0:
                added.prev = last
        last = numbers[key]
    return last


def _chain(index: int, ctx: BuildContext) -> Chain:
    """The filters that end in number ``index``, oldest first."""
    known = ctx.once(("seccomp", "known"), lambda: _load(ctx))
    chain: Chain = []
    while True:
        if not 0 <= index < len(known):
            raise ImageError("seccomp.img", "seccomp_filters", f"there is no filter {index}")
        entry = known[index]
        count, rest = divmod(len(entry.filter), INSTRUCTION.size)
        if rest or not 1 <= count <= INSTRUCTIONS_MAX:
            raise ImageError("seccomp.img", f"filter {index}", f"{len(entry.filter)} bytes")
        if entry.flags & ~(FLAG_TSYNC | FLAG_LOG | FLAG_SPEC_ALLOW):
            raise ImageError("seccomp.img", f"filter {index}", f"flags {entry.flags:#x}")
        chain.append((entry.filter, entry.flags))
        if not entry.HasField("prev"):
            return chain[::-1]
        if entry.prev >= index:
            raise ImageError("seccomp.img", f"filter {index}", f"comes before filter {entry.prev}")
        index = entry.prev


def _load(ctx: BuildContext) -> list[Message]:
    return [found for entry in ctx.images.read_all("seccomp") for found in entry.seccomp_filters]


RESOURCE = Seccomp()
