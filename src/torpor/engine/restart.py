"""System calls that a dump interrupts: they go on afterwards, and wait for as long as was left of them.

The registers of a stopped thread show how the kernel means to go on with its call (include/linux/errno.h;
arch/x86/kernel/signal.c, arch_do_signal_or_restart()). A restored thread gets the same registers, so that it is again
the kernel that decides when the thread is let go: EINTR if a handler runs, else the call is made again. Three kinds
need more:

* ERESTART_RESTARTBLOCK, from relative sleeps, poll and timed futex waits: when they end is known to the kernel alone,
  in task_struct.restart_block. A BPF program reads it. A restored thread makes the call with what was left and is
  interrupted before it sleeps, so that the kernel writes a new restart block, and goes on by restart_syscall(2) as it
  would have. The images hold what was left: the time between dump and restore does not count.
* EINTR from a call that gives it for any stop, even without a handler (signal(7) has the list). It has done nothing
  yet and goes on as if it had said ERESTARTNOHAND: so a signal that is pending still interrupts it, and we do not.
  After a stop by job control the EINTR is the kernel's own, and stays.
* Of those, epoll_wait(2) and epoll_pwait(2) go on with what is left as their argument; with the whole of it a program
  that is dumped often would never see its time run out. What is left tells the timer on the kernel's stack, which
  has to be read before the thread is stopped. This changes %r10, which belongs to nobody after a call by the C ABI.
  Those whose time lies in memory or in a socket (rt_sigtimedwait, semtimedop, epoll_pwait2, recv) are made again with
  the whole of it: the memory may be a constant that the program uses again and again.

select, pselect6 and ppoll need nothing of this: they write what is left over their argument. Where BPF is refused,
the first kind finds what is left where it was told to leave it (nanosleep's second argument), or waits for its whole
time again.
"""

from __future__ import annotations

import os
import struct
import time

from .. import log
from ..errors import ImageError, KernelError, TaskGone, Unsupported
from ..linux import ptrace
from ..linux.nr import NR
from ..proc import status as proc_status
from ..proc.read import numbers, read
from ..remote import machine
from ..remote.guest import ERESTART_RESTARTBLOCK, ERESTARTNOHAND, ERESTARTNOINTR, ERESTARTSYS, interrupted_call
from ..remote.tracee import SIGTRAP, wait_stop
from . import cpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..images.schema import Message
    from ..linux import bpf
    from ..linux.ptrace import user_regs_struct
    from ..model.snapshot import RestoredThread
    from ..model.source import SourceThread
    from ..remote.stub import Arena

EINTR = 4
NO_CALL = (1 << 64) - 1
PAGE = 4096
SCRATCH_BYTES = 128  # that the restore leaves at the end of the arena, for a time to wait or a siginfo
CODES = (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK)
CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_TAI, TIMER_ABSTIME = 1, 7, 11, 1
FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_CMD_MASK = 0, 9, 0x7F

SLEEPS = (NR["nanosleep"], NR["clock_nanosleep"])
EPOLLS = (NR["epoll_wait"], NR["epoll_pwait"])
#: Calls that answer EINTR to a stop although they have done nothing.
REPEATABLE = {
    NR[name]
    for name in (
        "epoll_wait epoll_pwait epoll_pwait2 rt_sigtimedwait semop semtimedop io_getevents io_pgetevents select "
        "pselect6 ppoll recvfrom recvmsg recvmmsg sendto sendmsg sendmmsg accept accept4 connect read readv pread64 "
        "preadv preadv2 write writev pwrite64 pwritev pwritev2 "
        "io_uring_enter"
    ).split()
}


class Interrupted:
    """A call to go on with: its number, the ERESTART* code; for ERESTART_RESTARTBLOCK what is left, by which clock."""

    __slots__ = ("clock", "code", "left_ns", "number")

    def __init__(self, number: int, code: int) -> None:
        self.number = number
        self.code = code
        self.left_ns = 0
        self.clock = CLOCK_MONOTONIC


# ------------------------------------------------------------------------------------------ dump


class Restarts:
    """What one dump learns about the calls that it interrupts."""

    def __init__(self) -> None:
        self._reader: _WaitReader | None = None
        self._refused = False
        #: Thread in epoll_wait → (its voluntary switches, when its time is over by our CLOCK_MONOTONIC).
        self._seen: dict[int, tuple[int, int]] = {}
        self._calls: dict[int, Interrupted] = {}

    def look(self, pids: Iterable[int]) -> None:
        """Before the tree is stopped: find out what cannot be seen afterwards, and get ready to read the rest."""
        for pid in pids:
            try:
                for tid in numbers(pid, "task"):
                    number, *args = _current_call(read(pid, f"task/{tid}/syscall"))
                    if _waits_for_a_while(number, args):
                        self._wait_of(tid, number)
            except (TaskGone, OSError):
                continue  # it ended, or is not to be looked at

    def _wait_of(self, tid: int, number: int) -> None:
        reader = self._get_reader()
        if reader is None or number not in EPOLLS:
            return
        wait = reader.read(tid)
        if wait is not None and wait.deadline:
            self._seen[tid] = wait.switches, wait.deadline - wait.record.monotonic + time.monotonic_ns()

    def _get_reader(self) -> _WaitReader | None:
        if self._reader is None and not self._refused:
            try:
                self._reader = _WaitReader()
            except (KernelError, Unsupported) as error:
                log.info(f"interrupted calls: what is left of them cannot be read: {error}")
                self._refused = True
        return self._reader

    def close(self) -> None:
        """Give back what was needed for reading."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def mend(self, thread: SourceThread) -> None:
        """Take back the EINTR of a thread just stopped, so that nobody sees it, whatever becomes of the dump."""
        regs = thread.regs
        if regs.ax == _error(EINTR) and regs.orig_ax in REPEATABLE and not _stopped_before(thread):
            regs.ax = _error(ERESTARTNOHAND)
            if regs.orig_ax in EPOLLS:
                self._shorten(thread)
            ptrace.set_regs(thread.tid, regs)

    def settle(self, thread: SourceThread) -> None:
        """Note the call that a stopped thread is in, before anything runs in the thread."""
        code = interrupted_call(thread.regs)
        if not code:
            return
        interrupted = Interrupted(thread.regs.orig_ax, code)
        if code == ERESTART_RESTARTBLOCK:
            self._measure(thread, interrupted)
        if interrupted.number != NR["restart_syscall"]:
            self._calls[thread.tid] = interrupted

    def _shorten(self, thread: SourceThread) -> None:
        """Have an epoll_wait made again with what is left, if it is the one that was seen."""
        seen = self._seen.get(thread.tid)
        if seen is None:
            return
        status = proc_status.parse(read(thread.task.pid, f"task/{thread.tid}/status"))
        switches = int(status.line("voluntary_ctxt_switches") or 0)
        if switches == seen[0] + 1:  # the one more is into the stop
            left_ms = -(-max(0, seen[1] - time.monotonic_ns()) // 1_000_000)
            thread.regs.r10 = min(left_ms, thread.regs.r10 & 0x7FFFFFFF)

    def _measure(self, thread: SourceThread, interrupted: Interrupted) -> None:
        """Fill in what a restart block says; without that the call is to be made again as it was."""
        reader = self._get_reader()
        wait = reader.read(thread.tid) if reader is not None else None
        interrupted.code = ERESTARTNOHAND
        if wait is not None:
            wait.explain(thread.regs, interrupted)
        if interrupted.code != ERESTART_RESTARTBLOCK and interrupted.number in SLEEPS:
            _read_rest(thread, interrupted)

    def dump(self, thread: SourceThread, core: Message) -> user_regs_struct:
        """Fill in thread_core.interrupted; returns registers for those who do not know it: the call is made again."""
        regs = thread.regs.copy()
        interrupted = self._calls.get(thread.tid)
        if interrupted is None:
            if interrupted_call(regs):
                regs.ax = _error(EINTR)
            return regs
        regs.ax = interrupted.number
        regs.ip -= 2
        entry = core.thread_core.interrupted
        entry.call = interrupted.number
        entry.code = interrupted.code
        if interrupted.code == ERESTART_RESTARTBLOCK:
            entry.left_ns = interrupted.left_ns
            entry.clock = interrupted.clock
        return regs


def _read_rest(thread: SourceThread, interrupted: Interrupted) -> None:
    """What is left of a sleep that has been asked to say so when it is interrupted."""
    regs = thread.regs
    plain = interrupted.number == NR["nanosleep"]
    address = regs.si if plain else regs.r10
    try:
        data = os.pread(thread.task.mem_fd, 16, address) if address else b""
    except OSError:
        return  # unmapped in the meantime
    if len(data) == 16:
        seconds, nanoseconds = struct.unpack("<qq", data)
        interrupted.left_ns = max(1, seconds * 1_000_000_000 + nanoseconds)
        interrupted.clock = CLOCK_MONOTONIC if plain else (regs.di & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)
        interrupted.code = ERESTART_RESTARTBLOCK


def _error(number: int) -> int:
    return (1 << 64) - number


def _current_call(text: bytes) -> list[int]:
    """The number and the six arguments in /proc/PID/syscall; [-1] for a task that runs or waits for something else."""
    words = text.split()
    return [int(word, 0) for word in words[:7]] if len(words) >= 9 else [-1]


def _waits_for_a_while(number: int, args: list[int]) -> bool:
    """Is it a wait with an end, of which nothing but the kernel knows when that is?"""
    if number == NR["nanosleep"] or number == NR["restart_syscall"]:
        return True
    if number == NR["clock_nanosleep"]:
        return not args[1] & TIMER_ABSTIME
    if number == NR["futex"]:
        return args[1] & FUTEX_CMD_MASK == FUTEX_WAIT and args[3] != 0
    if number == NR["poll"]:
        return 0 < args[2] & 0xFFFFFFFF < 1 << 31
    return number in EPOLLS and 0 < args[3] & 0xFFFFFFFF < 1 << 31


def _stopped_before(thread: SourceThread) -> bool:
    """Was it interrupted by job control, not by us?

    A call that has put a signal mask in force for its time is made again in any case, under that mask.
    """
    return thread.stop.by_group and thread.status.SigBlk == thread.sigmask


class _WaitReader:
    """Reads what the kernel knows about a thread's wait."""

    QUESTIONS = {
        "iterator": "bpf_iter_task()",
        "block": "task_struct.restart_block",
        "stack": "task_struct.thread.sp",
        "switches": "task_struct.nvcsw",
        "uaddr": "restart_block.futex.uaddr",
        "val": "restart_block.futex.val",
        "ufds": "restart_block.poll.ufds",
        "nfds": "restart_block.poll.nfds",
        "has_timeout": "restart_block.poll.has_timeout",
        "tv_sec": "restart_block.poll.tv_sec|restart_block.poll.end_time.tv_sec",
        "tv_nsec": "restart_block.poll.tv_nsec|restart_block.poll.end_time.tv_nsec",
        "time": "restart_block.futex.time",
        "clockid": "restart_block.nanosleep.clockid",
        "expires": "restart_block.nanosleep.expires",
        "timer_task": "hrtimer_sleeper.task",
        "timer_hard": "hrtimer_sleeper.timer.node.expires",
        "timer_soft": "hrtimer_sleeper.timer._softexpires",
        "timer_function": "hrtimer_sleeper.timer.function",
    }
    BLOCK_BYTES = 64
    STACK_BYTES = 1024  # the timer lies within the first 400; the rest is for other compilers

    def __init__(self) -> None:
        from ..linux import bpf, btf

        answers = btf.lookup(list(self.QUESTIONS.values()))
        self.at = {name: answers[question] for name, question in self.QUESTIONS.items()}
        places = [
            bpf.Place(self.at["block"], self.BLOCK_BYTES),
            bpf.Place(self.at["switches"], 8),
            bpf.Place(0, self.STACK_BYTES, through=(self.at["stack"],)),
        ]
        self._tasks = bpf.TaskReader(self.at["iterator"], places)

    def read(self, tid: int) -> _Wait | None:
        """One thread's wait; None if it cannot be had."""
        try:
            record = self._tasks.read(tid)
        except OSError as error:
            log.info(f"thread {tid}: what is left of its call cannot be read: {error}")
            return None
        return _Wait(record, self.at) if record is not None else None

    def close(self) -> None:
        self._tasks.close()


class _Wait:
    """What was read about one thread."""

    def __init__(self, record: bpf.TaskRecord, at: dict[str, int]) -> None:
        self.record = record
        self._at = at
        self._block, switches, stack = record.fields
        self.switches: int = struct.unpack("<Q", switches)[0]
        self.deadline = self._find_timer(stack)

    def _find_timer(self, stack: bytes) -> int:
        """When the struct hrtimer_sleeper on the kernel's stack ends the wait, by CLOCK_MONOTONIC; 0: there is none.

        kernel/time/sleep_timeout.c, schedule_hrtimeout_range_clock()
        """
        at = self._at
        needle = struct.pack("<Q", self.record.address)
        found = stack.find(needle)
        while found >= 0:
            start = found - at["timer_task"]
            if start >= 0 and not start % 8:
                hard, soft, function = (
                    struct.unpack_from("<q", stack, start + at[name])[0]
                    for name in ("timer_hard", "timer_soft", "timer_function")
                )
                slack = hard - soft
                if function < 0 and soft > 0 and 0 <= slack < 10_000_000_000:  # a kernel address is negative
                    return int(soft)
            found = stack.find(needle, found + 1)
        return 0

    def _value(self, name: str, form: str) -> int:
        return int(struct.unpack_from(f"<{form}", self._block, self._at[name])[0])

    def explain(self, regs: user_regs_struct, interrupted: Interrupted) -> None:
        """Fill in what is left of the call, and which one it is: one that was restarted before does not say so."""
        number = self._number_of(regs)
        if interrupted.number not in (number, NR["restart_syscall"]):
            return
        interrupted.number = number
        now = self.record.monotonic
        if number == NR["poll"]:
            if not self._value("has_timeout", "i"):
                return
            deadline = self._value("tv_sec", "q") * 1_000_000_000 + self._value("tv_nsec", "q")
        elif number == NR["futex"]:
            if regs.si & FUTEX_CMD_MASK != FUTEX_WAIT:
                return  # a point in time, which the call made again has as its argument
            deadline = self._value("time", "Q")
        else:
            interrupted.clock = self._value("clockid", "i")
            deadline = self._value("expires", "Q")
            if interrupted.clock == CLOCK_BOOTTIME:
                now = self.record.boottime
            elif interrupted.clock == CLOCK_TAI:
                now = time.clock_gettime_ns(CLOCK_TAI)
            elif interrupted.clock != CLOCK_MONOTONIC:
                return  # by the time that processors have run for, or by a clock that wakes the machine
        interrupted.left_ns = max(1, deadline - now)
        interrupted.code = ERESTART_RESTARTBLOCK

    def _number_of(self, regs: user_regs_struct) -> int:
        """The block holds arguments of its call, and they are still in the registers."""
        if regs.orig_ax != NR["restart_syscall"]:
            return int(regs.orig_ax)
        if self._value("ufds", "Q") == regs.di and self._value("nfds", "I") == regs.si:
            return NR["poll"]
        if self._value("uaddr", "Q") == regs.di and self._value("val", "I") == regs.dx & 0xFFFFFFFF:
            return NR["futex"]
        by_clock = self._value("clockid", "i") != CLOCK_MONOTONIC or regs.di == CLOCK_MONOTONIC or regs.di == 0
        return NR["clock_nanosleep"] if by_clock else NR["nanosleep"]


# --------------------------------------------------------------------------------------- restore


def is_to_be_rebuilt(core: Message) -> bool:
    """Is a restart block to be written once the thread has everything else?"""
    entry = core.thread_core.interrupted
    return bool(entry.code == ERESTART_RESTARTBLOCK and entry.left_ns)


def rebuild(thread: RestoredThread, arena: Arena) -> bool:
    """Have the kernel write the restart block of a thread's call; the thread is stopped before and after. Is it done?

    The arena must be mapped.
    """
    entry, tid = thread.core.thread_core.interrupted, thread.live_tid
    if not is_to_be_rebuilt(thread.core):
        return False
    regs = cpu.restored_regs(thread.core, thread.image)
    scratch = put_in_scratch(arena, struct.pack("<QQ", *divmod(entry.left_ns, 1_000_000_000)))
    call = ptrace.get_regs(tid)
    call.ip = arena.code + machine.STUB.index(b"\x0f\x05")
    call.ax, call.orig_ax = entry.call, NO_CALL
    call.di, call.si, call.dx, call.r10, call.r8, call.r9 = regs.di, regs.si, regs.dx, regs.r10, regs.r8, regs.r9
    if entry.call in SLEEPS:
        rest = regs.si if entry.call == NR["nanosleep"] else regs.r10
        call.ax, call.di, call.si, call.dx, call.r10 = NR["clock_nanosleep"], entry.clock, 0, scratch, rest
    elif entry.call == NR["poll"]:
        call.dx = min(-(-entry.left_ns // 1_000_000), 0x7FFFFFFF)
    elif entry.call == NR["futex"] and regs.si & FUTEX_CMD_MASK == FUTEX_WAIT:
        call.r10 = scratch
    else:
        return False
    return _begin(tid, call)


def put_in_scratch(arena: Arena, content: bytes) -> int:
    """Place bytes where a stub that is past its program can read them; gives their address there."""
    place = arena.size - PAGE - SCRATCH_BYTES  # of the last page nothing is mapped after the memory has been cleared
    arena.memory[place : place + len(content)] = content
    return arena.base + place


def _begin(tid: int, call: user_regs_struct) -> bool:
    """Make a call that has to wait, and interrupt it before it does. Is it to be gone on with by restart_syscall(2)?"""
    ptrace.set_regs(tid, call)
    ptrace.resume(tid, request=ptrace.SYSCALL)
    while wait_stop(tid).signal != SIGTRAP | 0x80:
        ptrace.resume(tid, request=ptrace.SYSCALL)
    ptrace.interrupt(tid)
    ptrace.resume(tid)
    while wait_stop(tid).event != ptrace.EVENT_STOP:
        ptrace.resume(tid)
    return bool(ptrace.get_regs(tid).ax == _error(ERESTART_RESTARTBLOCK))


def resume(core: Message, image: str, regs: user_regs_struct, *, rebuilt: bool) -> None:
    """Set the registers of the image so that the kernel goes on with the interrupted call when the thread is let go."""
    if not core.thread_core.HasField("interrupted"):
        return
    entry = core.thread_core.interrupted
    if entry.code not in CODES or entry.call != regs.ax or entry.call >= 1 << 31:
        raise ImageError(image, "thread_core.interrupted", f"call {entry.call}, code {entry.code}")
    # Without a restart block the call is made again, by the same rule: unless a handler runs.
    code = ERESTARTNOHAND if entry.code == ERESTART_RESTARTBLOCK and not rebuilt else entry.code
    regs.ax, regs.orig_ax = _error(code), entry.call
    regs.ip += 2
