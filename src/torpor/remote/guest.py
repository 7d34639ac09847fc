"""Running a program inside a task that is not ours, so that the task survives whatever happens to us.

The code and the frame with the task's registers are written to the unused tail of the task's vDSO (a private copy of
that page; until the registers change, nothing has happened). The program runs in an arena that the task maps for itself
and unmaps again. If the tracer dies at any instant, each stop becomes a signal that the task ignores, an unwritten
program is an empty one, and the code gives back memory, signal mask and registers by itself (machine.S).
"""

from __future__ import annotations

import errno
import os
import struct

from ..errors import TaskGone, Unsupported
from ..linux import ptrace
from ..linux.nr import NR
from . import machine
from .program import Ref, Run
from .tracee import wait_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..linux.ptrace import user_regs_struct
    from .program import Program
    from .tracee import Seized

ALL_SIGNALS = (1 << 64) - 1
PAGE = 4096
IGNORED_BY_DEFAULT = (23, 28, 17)  # SIGURG SIGWINCH SIGCHLD

# include/linux/errno.h: what an interrupted system call's result says about its restart
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516


def interrupted_call(regs: user_regs_struct) -> int:
    """The ERESTART* code (positive) if the task was stopped inside a system call that it is to restart, else 0."""
    code = (1 << 64) - regs.ax
    in_call = regs.orig_ax < 1 << 63
    restarts = (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK)
    return code if in_call and code in restarts else 0


class Guest:
    """The place inside one process where programs of ours run, one thread at a time."""

    def __init__(
        self, pid: int, vpid: int, mem_fd: int, rooms: Sequence[int], signals_in_use: int, seized: Seized
    ) -> None:
        """``vpid`` is the pid as the task itself sees it, ``mem_fd`` is /proc/PID/mem, ``rooms`` the ends of mappings
        of code in whose last page there may be room, the best first; ``signals_in_use`` a mask of the signals that are
        caught or pending. Raises Unsupported when there is no room.
        """
        self.pid = pid
        self.vpid = vpid
        self.unclean = False
        self.mem_fd = mem_fd
        self.seized = seized
        self.signal = next(
            (n for n in IGNORED_BY_DEFAULT if not signals_in_use >> (n - 1) & 1), IGNORED_BY_DEFAULT[0]
        )
        self._blocked = ALL_SIGNALS & ~(1 << (self.signal - 1))
        self.code = self._find_room(rooms)
        #: Where the task stops: its arena is there, the program has run, it has left the arena.
        self.stops = [self.code + place for place in machine.GUEST_STOPS]
        self.called = self.code + machine.GUEST_CALLED

    def _find_room(self, rooms: Sequence[int]) -> int:
        for end in rooms:
            page = os.pread(self.mem_fd, PAGE, end - PAGE)
            stale = page.find(machine.GUEST)
            if stale >= 0:  # left by a dump that was killed; whoever ran it has long left it
                return end - PAGE + stale
            start = (len(page.rstrip(b"\0")) + 31) // 16 * 16
            if start + machine.GUEST_BYTES <= PAGE:
                return end - PAGE + start
        raise Unsupported(
            f"task {self.pid}: no room to run in: neither its vDSO nor any other code of it ends in unused bytes",
            hint=f"{machine.GUEST_BYTES} bytes are needed; was the vDSO unmapped?",
        )

    def pause(self, vtid: int, program: Program) -> None:
        """Have ``program``, to be run by the thread ``vtid``, stop here for a look at what it has done so far."""
        program.call("tgkill", self.vpid, vtid, self.signal, why="a stop for the tracer, if it lives")

    def run(
        self, tid: int, vtid: int, program: Program, regs: user_regs_struct, sigmask: int,
        look: Callable[[Run], object] | None = None,
    ) -> Run:  # fmt: skip
        """Run ``program`` in the stopped thread ``tid``; afterwards it is stopped as before, with ``regs`` and
        ``sigmask``. ``look`` is called at each :meth:`pause` with the results so far.

        Raises TaskGone if it dies on the way. After any other error the thread is left to find its way back by itself
        when it is let go.
        """
        size = -(-program.size // PAGE) * PAGE
        self._write_frame(vtid, size, regs, sigmask)
        start = regs.copy()
        start.ip, start.orig_ax = self.code, ALL_SIGNALS
        self.unclean = True
        # In this order, and at the end in the opposite one: without us the code blocks signals itself and gives the
        # mask back, whereas a mask that was changed before would stay changed.
        ptrace.set_regs(tid, start)
        ptrace.set_sigmask(tid, self._blocked)
        arena, ran, left = self.stops
        now = self._resume(tid, (arena, left))
        memory, reached = b"", 0
        if now.bp:
            if program.base != now.bx or not program.image:
                program.place(now.bx)
                program.image = program.compile()
            os.pwrite(self.mem_fd, program.image, now.bx)
            while (there := self._resume(tid, (ran, self.called))).ip == self.called:
                if look is not None:
                    look(Run(program, os.pread(self.mem_fd, program.size, now.bx)))
            reached = there.r15
            memory = os.pread(self.mem_fd, program.size, now.bx)
            self._resume(tid, (left,))
        ptrace.set_sigmask(tid, sigmask)
        ptrace.set_regs(tid, regs)
        self.unclean = False
        if not memory:
            raise Unsupported(f"task {tid}: it cannot map {size} bytes for a moment", hint="RLIMIT_AS reached?")
        run = Run(program, memory)
        at = (reached - now.bx) // machine.RECORD_BYTES
        if at < len(program):
            result = run.result(Ref(at))
            name = errno.errorcode.get(-result, str(-result))
            hint = "is it confined by seccomp, and are we?" if -result in (errno.EPERM, errno.ENOSYS) else ""
            raise Unsupported(f"task {tid}: {program.records[at]}: {name}", hint=hint)
        return run

    def _resume(self, tid: int, places: Sequence[int]) -> user_regs_struct:
        """Let it go on to its next stop, which is at one of ``places``; returns its registers there."""
        ptrace.resume(tid)
        while True:
            try:
                stop = wait_stop(tid)
            except TaskGone:
                self.seized.forget(tid)
                raise
            if stop.event == 0 and stop.signal == self.signal:
                regs = ptrace.get_regs(tid)
                if regs.ip in places:
                    return regs
            if stop.event == 0 and stop.signal in (4, 5, 7, 8, 11):
                raise Unsupported(f"task {tid}: signal {stop.signal} while running a program in it")
            if stop.event == 0:
                # SIGSTOP can come through, and one like ours from somebody else; the task gets it when it is let go.
                self.seized.redeliver.append((tid, stop.signal))
            ptrace.resume(tid)

    def _write_frame(self, vtid: int, arena_bytes: int, regs: user_regs_struct, sigmask: int) -> None:
        ip, ax = regs.ip, regs.ax
        code = interrupted_call(regs)
        if code:
            # What the kernel does on the way out, done by hand: step back onto the syscall instruction.
            ip -= 2
            ax = NR["restart_syscall"] if code == ERESTART_RESTARTBLOCK else regs.orig_ax
        values = [getattr(regs, name) for name in machine.REGISTERS]
        values[machine.REGISTERS.index("ax")] = ax
        head = (self.vpid, vtid, self.signal, arena_bytes, sigmask, regs.flags, regs.sp, ip, self._blocked)
        frame = struct.pack(f"<{machine.FRAME_WORDS}Q", *head, *values)
        os.pwrite(self.mem_fd, machine.GUEST + frame, self.code)

    def leave(self) -> None:
        """Remove the code, unless a thread still needs it to find its way back."""
        if not self.unclean:
            os.pwrite(self.mem_fd, bytes(machine.GUEST_BYTES), self.code)
