"""Processes that have ended and that nobody has waited for: their stubs end in the same way.

No signal of its own namespace ends the init of a pid namespace, nor one from outside but SIGKILL; the others that end
one it earns by a fault, which ends it only while nobody traces it. So its stub is killed, or let go on instructions
that are no good. Kernel: kernel/signal.c, sig_task_ignored(), get_signal() and force_sig_info_to_task().
"""

from __future__ import annotations

import contextlib
import os
import struct
import time

from ..errors import TaskGone, Unsupported
from ..images import schema as pb
from ..linux import ptrace
from ..model.snapshot import INIT_PID
from ..proc import stat as proc_stat
from ..proc.read import read
from ..remote import machine
from ..remote.tracee import SIGTRAP, wait_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.snapshot import RestoredTask
    from ..remote import stub
    from ..remote.program import Program

SIGKILL, SIGSYS = 9, 31
RLIMIT_CORE = 4
PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_SYSCALL_USER_DISPATCH = 4, 15, 59
PR_SYS_DISPATCH_ON = 1
PATIENCE_S = 10.0  # from a fault to the end of whoever makes it


def signal_of(status: int) -> int:
    """The signal that has ended a process with this status, 0 if it has ended by itself."""
    return status & 0x7F


def is_init(task: RestoredTask) -> bool:
    """Has it been the init of a pid namespace, and been ended by a signal? It cannot do that alone."""
    return task.zombie and task.own_pid == INIT_PID and bool(signal_of(task.core.tc.exit_code))


def check(pid: int, own_pid: int, status: int) -> None:
    """Raise Unsupported for a zombie that cannot be made again. ``own_pid``: its number in its own namespace."""
    number = signal_of(status)
    if own_pid == INIT_PID and number not in (0, SIGKILL, *machine.FAULT_AT):
        raise Unsupported(
            f"task {pid}: it was the init of a pid namespace and was ended by signal {number}, which ends none",
            hint="let its parent wait for it before the dump",
        )


def emit_end(task: RestoredTask, program: Program, code: int) -> None:
    """Emit the end of a zombie; ``code`` is where the machine lies. One that cannot end alone stops once more."""
    status = task.core.tc.exit_code
    program.call("prctl", PR_SET_NAME, pb.get_bytes(task.core.tc.comm) + b"\0", why="name")
    program.call("setrlimit", RLIMIT_CORE, struct.pack("<QQ", 0, 0), why="no core dump")
    program.call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0, why="nor one for a program that takes them")
    if not is_init(task):
        if signal_of(status):
            program.call("tgkill", task.own_pid, task.own_pid, signal_of(status), why="end as it ended")
        program.call("exit_group", status >> 8 & 0xFF)
        return
    if signal_of(status) == SIGSYS:
        code_bytes = len(machine.STUB)
        program.call(
            "prctl", PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, code, code_bytes, 0, why="no call elsewhere"
        )
    program.call("tgkill", task.own_pid, task.own_pid, SIGTRAP, why="wait for its end")


def end_init(task: RestoredTask, arena: stub.Arena) -> None:
    """End the stub of an init, which is at its last stop. Raises Unsupported if it does not end."""
    pid, number = task.live_pid, signal_of(task.core.tc.exit_code)
    if number == SIGKILL:
        os.kill(pid, SIGKILL)
        with contextlib.suppress(TaskGone):
            while True:
                wait_stop(pid)
        return
    regs = ptrace.get_regs(pid)
    regs.ip, regs.orig_ax = arena.fault(number), (1 << 64) - 1
    ptrace.set_regs(pid, regs)
    ptrace.detach(pid)
    deadline = time.monotonic() + PATIENCE_S
    while proc_stat.parse(read(pid, "stat")).state not in "ZX":
        if time.monotonic() > deadline:
            os.kill(pid, SIGKILL)
            raise Unsupported(f"task {task.pid}: signal {number} has not ended it", hint="please report this")
        time.sleep(0.0005)
