"""The bare process that a task is made from: cloned with the pid wanted, running nothing but the machine.

The first one of a tree is cloned here and executes a tiny ELF file made on the spot; all others are forked by their
parents' programs. Everything that they run lies in one memory file, the arena, which is mapped into all of them at the
same address and into this process, so that programs and results are plain memory to both sides.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import struct
import time

from ..errors import KernelError, TaskGone, Unsupported
from ..linux import kernel, ptrace
from ..linux.launch import Launcher, SignalsBlocked
from ..proc.read import numbers
from . import machine
from .program import Program
from .tracee import wait_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

PAGE = 4096
AT_EMPTY_PATH = 0x1000
KILL_TIMEOUT_S = 10.0  # only an uninterruptible wait can take that long
F_SETFD = 2
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
CLOSE_RANGE_UNSHARE = 2
CLONE_VM, CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x100, 0x80, 0x20000, 0x8000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
OPTIONS = (
    ptrace.O_EXITKILL | ptrace.O_TRACESYSGOOD | ptrace.O_TRACEFORK | ptrace.O_TRACEVFORK | ptrace.O_TRACECLONE
    | ptrace.O_TRACEEXEC
)  # fmt: skip


class Arena:
    """The memory file that all stubs share. ``base`` is where it lies in them; the first page is the machine's code."""

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = -(-size // PAGE) * PAGE + PAGE
        self.fd = os.memfd_create("torpor-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size)
            self.memory = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        code = machine.STUB + machine.INIT + machine.FAULTS
        self.memory[: len(code)] = code
        self._next = PAGE

    @property
    def code(self) -> int:
        """Where the machine lies."""
        return self.base

    @property
    def failed_at(self) -> int:
        """The instruction pointer of a stub whose program failed: behind the trap."""
        return self.base + len(machine.STUB)

    def fault(self, signal: int) -> int:
        """Where the instructions lie that earn a task a signal, one of machine.FAULT_AT."""
        return self.base + len(machine.STUB) + len(machine.INIT) + machine.FAULT_AT[signal]

    def mark(self) -> int:
        """Where the next program will lie, for :meth:`rewind`."""
        return self._next

    def rewind(self, mark: int) -> None:
        """Forget the programs that were placed since."""
        self._next = mark

    def reserve(self, size: int) -> int:
        """The address of ``size`` bytes for other things than programs."""
        address = self.base + self._next
        self._next += -(-size // 64) * 64
        return address

    def place(self, program: Program) -> None:
        """Give a program its address."""
        program.place(self.base + self._next)
        self._next += (program.size + 63) // 64 * 64
        if self._next > self.size:
            raise AssertionError("the arena is too small")

    def load(self, programs: Collection[Program]) -> None:
        """Place the programs, which may name one another, and write them."""
        for program in programs:
            self.place(program)
        for program in programs:
            self.write(program)

    def content(self, mark: int) -> bytes:
        """All programs that were placed since :meth:`mark`, as they are now."""
        return self.memory[mark : self._next]

    def put(self, mark: int, content: bytes) -> None:
        """Put programs back that lay there before."""
        self._next = mark + len(content)
        self.memory[mark : self._next] = content

    def write(self, program: Program) -> None:
        """Put a placed program into the arena."""
        content = program.compile()
        start = program.base - self.base
        self.memory[start : start + len(content)] = content

    def read(self, program: Program) -> bytes:
        """The program as it is now, results included."""
        start = program.base - self.base
        return self.memory[start : start + program.size]

    def result(self, program: Program, index: int) -> int:
        """The result of one record of a program that has run past it."""
        place = program.base - self.base + index * machine.RECORD_BYTES + 8 * machine.RESULT_WORD
        value: int = struct.unpack_from("<q", self.memory, place)[0]
        return value

    def close(self) -> None:
        """Unmap and close it here; stubs unmap it themselves."""
        self.memory.close()
        os.close(self.fd)


def elf(base: int, code: bytes, data: bytes) -> bytes:
    """An executable: ``code`` at ``base``, ``data`` writable on the page behind it."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base, 64, 0, 0, 64, 56, 3, 0, 0, 0
    )  # e_ident, ET_EXEC, EM_X86_64, version, entry, phoff, shoff, flags, sizes
    segments = (
        struct.pack("<IIQQQQQQ", 1, 5, PAGE, base, base, len(code), len(code), PAGE),
        struct.pack("<IIQQQQQQ", 1, 6, 2 * PAGE, base + PAGE, base + PAGE, len(data), len(data), PAGE),
        struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16),  # GNU_STACK: not executable
    )
    image = (header + b"".join(segments)).ljust(PAGE, b"\0")
    return (image + code.ljust(PAGE, b"\0") + data).ljust(3 * PAGE, b"\0")


def launch(
    set_tid: Sequence[int], arena: Arena, keep: Sequence[int], *, sibling: bool = False,
    clock_offsets: bytes = b"", own_pids: bool = False, propagation: int = MS_SLAVE,
    mounts: tuple[int, int, int] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Clone and start the first stub; returns (its pid as we see it, the address of its init code: ``start_init``).

    ``set_tid`` are the pids it must have, innermost namespace first; ``keep`` the descriptors that it keeps in spite of
    their close-on-exec flag; ``sibling`` makes it a child of our parent. ``clock_offsets`` is what
    /proc/self/timens_offsets is to hold in a time namespace of its own. ``own_pids``: it is process 1 of a new pid
    namespace, with ``propagation`` (MS_SLAVE, MS_PRIVATE) in a mount namespace of its own where it sees a /proc of
    that; it has a copy of our mounts unless ``mounts`` says which: descriptors as for emit_entry(). It is traced by us,
    is killed when we die, and is stopped with the arena mapped. Raises KernelError (EEXIST: the pid is taken).
    """
    bootstrap = Program("bootstrap of the stub")
    emit_arena(bootstrap, arena)
    elf_base = arena.base - 16 * PAGE
    bootstrap.place(elf_base + PAGE)
    # The entry's first instruction makes %r15 point at the bootstrap: movabs $bootstrap, %r15.
    code = b"\x49\xbf" + struct.pack("<Q", elf_base + PAGE) + machine.STUB
    trap = elf_base + len(code)
    elf_fd = os.memfd_create("torpor-stub", os.MFD_CLOEXEC)
    try:
        ready, go = os.pipe2(os.O_CLOEXEC)
    except BaseException:
        os.close(elf_fd)
        raise
    try:
        try:
            os.write(elf_fd, elf(elf_base, code + machine.INIT, bootstrap.compile()))
            propagation = propagation if own_pids else 0
            start = _exec_program(ready, go, elf_fd, arena.fd, keep, clock_offsets, propagation, mounts)
        except BaseException:
            os.close(go)
            raise
        namespaces = CLONE_NEWPID * own_pids | CLONE_NEWNS * bool(propagation)
        pid = _clone(set_tid, start, go, sibling, namespaces)
        try:
            _await_bootstrap(pid, elf_base, trap)
        except BaseException:
            kill([pid])
            raise
    finally:
        for fd in (elf_fd, ready):
            os.close(fd)
    return pid, trap


def emit_arena(program: Program, arena: Arena) -> None:
    """Emit the mapping of the arena, where nothing may be yet."""
    program.call("mmap", arena.base, PAGE, 5, 0x100001, arena.fd, 0, why="code of the arena")
    program.call("mmap", arena.base + PAGE, arena.size - PAGE, 3, 0x100001, arena.fd, PAGE, why="programs")


def _exec_program(
    ready: int, go: int, elf_fd: int, arena_fd: int, keep: Sequence[int], clock_offsets: bytes, propagation: int,
    mounts: tuple[int, int, int] | None,
) -> Program:  # fmt: skip
    program = Program("start of the stub")
    # Ends here, in a trap that kills it, if we die before we trace it: the pipe gives end of file then.
    program.call("close", go, why="our end of the pipe")
    program.call("read", ready, program.out(8), 1, 0, transfer=True, why="wait until traced")
    if mounts is not None:
        emit_entry(program, *mounts)
    if propagation:
        emit_proc(program, propagation)
    if clock_offsets:
        program.call("unshare", CLONE_NEWTIME)
        fd = program.call("openat", -100, b"/proc/self/timens_offsets\0", os.O_WRONLY | os.O_CLOEXEC)
        program.call("write", fd, clock_offsets, len(clock_offsets))
    program.calls("fcntl", [(fd, F_SETFD, 0) for fd in (*keep, arena_fd)])
    name = program.put(b"torpor-stub\0")
    argv = program.out(16)
    program.pointer(argv, 0, name)
    program.call("execveat", elf_fd, b"\0", argv, program.out(8), AT_EMPTY_PATH)
    return program


def emit_entry(program: Program, namespace: int, root: int, ipc: int = -1) -> None:
    """Emit the move into a mount namespace, and to the directory ``root`` in it as the root, and into the IPC namespace
    ``ipc``, unless that is -1; all are descriptors.
    """
    program.call("setns", namespace, CLONE_NEWNS, why="a mount namespace of its own")
    program.call("fchdir", root)
    program.call("chroot", b".\0")
    if ipc >= 0:
        program.call("setns", ipc, CLONE_NEWIPC, why="an IPC namespace of its own")


def emit_proc(program: Program, propagation: int = MS_SLAVE) -> None:
    """Emit the mount of a /proc for the pid namespace that the caller is in, in its own mount namespace."""
    program.call("mount", 0, b"/\0", 0, MS_REC | propagation, 0, why="mounts made here do not show elsewhere")
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    program.call("mount", b"proc\0", b"/proc\0", b"proc\0", flags, 0, may_fail=(errno.ENOENT,), why="of these pids")


def init_program(
    root: int | Sequence[int], program: Program | None, prelude: Callable[[Program], None] | None = None, flags: int = 0
) -> Program:
    """What an init does before it waits: fork the root, which goes on with ``program`` as process ``root``; as to
    emit_clone().

    ``prelude`` emits what comes before.
    """
    init = Program("init of the pid namespace")
    if prelude is not None:
        prelude(init)
    init.call("prctl", PR_SET_NAME, b"torpor-init\0", why="name")
    emit_clone(init, flags, signal.SIGCHLD, root, program)
    init.call("close_range", 0, 0xFFFFFFFF, CLOSE_RANGE_UNSHARE, why="nothing of what the tree has open")
    return init


def emit_clone(
    program: Program, flags: int, exit_signal: int, tid: int | Sequence[int], child: Program | None
) -> None:  # fmt: skip
    """Emit the birth of a stub with the number ``tid`` in its pid namespace, which goes on with ``child``; None: it is
    told with what.

    Several numbers are those in the namespaces around it, its own first.
    """
    tids = (tid,) if isinstance(tid, int) else tid
    args = program.put(struct.pack("<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, len(tids), 0))
    program.pointer(args, 64, program.put(struct.pack(f"<{len(tids)}i", *tids)))
    program.call("clone3", args, 88, child=child, why=child.name if child is not None else f"process {tids[0]}")


def _clone(set_tid: Sequence[int], program: Program, go: int, sibling: bool, namespaces: int) -> int:
    """clone3 with our memory shared until it executes; seize it; let it go."""
    launcher = Launcher(machine.STUB, program.size)
    program.place(launcher.data_address)
    pid = 0
    with SignalsBlocked():
        try:
            pid = launcher.clone(program.compile(), set_tid, sibling=sibling, flags=CLONE_VM | namespaces)
            if pid < 0:
                raise clone_error(-pid, set_tid)
            seize(pid)
            os.write(go, b"!")
            _await_exec(pid)
        except BaseException:
            if pid > 0:
                kill([pid])
            raise
        finally:
            os.close(go)
    launcher.close()
    return pid


def seize(pid: int) -> None:
    """Trace the stub and all that it will fork; its tasks' seccomp filters are not for what the machine does."""
    try:
        ptrace.seize(pid, OPTIONS | ptrace.O_SUSPEND_SECCOMP)
    except KernelError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        ptrace.seize(pid, OPTIONS)


def clone_error(number: int, set_tid: Sequence[int]) -> KernelError:
    """The error of a failed clone3, with the reason that set_tid most likely gives."""
    if not set_tid:
        return KernelError("clone3 into a new pid namespace", number)
    pid = set_tid[-1]  # the namespaces inside are fresh
    hints = {
        errno.EEXIST: f"process id {pid} is in use; end that process or restore with --own-pids",
        errno.EINVAL: f"process id {pid} may be above /proc/sys/kernel/pid_max",
        errno.EPERM: "setting process ids needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
    }
    return KernelError(f"clone3 with pid {pid}", number, hint=hints.get(number, ""))


def _await_exec(pid: int) -> None:
    """Wait until it has a memory of its own."""
    while True:
        stop = wait_stop(pid)
        if stop.event == ptrace.EVENT_EXEC:
            return
        if stop.event == 0 and stop.signal == signal.SIGTRAP:
            raise Unsupported(
                "the first stub could not be started", hint="is memfd execution allowed (vm.memfd_noexec)?"
            )
        ptrace.resume(pid, stop.signal if stop.event == 0 else 0)


def _await_bootstrap(pid: int, elf_base: int, trap: int) -> None:
    ptrace.set_sigmask(pid, 0)
    ptrace.resume(pid)
    stop = wait_stop(pid)
    regs = ptrace.get_regs(pid)
    record = (regs.r15 - elf_base - PAGE) // machine.RECORD_BYTES
    if stop.signal != signal.SIGTRAP or regs.ip != trap or record != 2:
        raise Unsupported(f"the stub's arena could not be mapped (step {record}, signal {stop.signal})")


def start(pid: int, arena: Arena, program: Program) -> None:
    """Set a stopped stub going on a program in the arena."""
    regs = ptrace.get_regs(pid)
    regs.ip, regs.r15, regs.orig_ax = arena.code, program.base, (1 << 64) - 1
    ptrace.set_regs(pid, regs)
    ptrace.resume(pid)


def start_init(
    pid: int, program: Program, code: int, child: int, scratch: int, unmap: tuple[int, int] = (0, 0)
) -> None:
    """Set a stopped stub going as the init of its pid namespace (machine.INIT at ``code``): after its program it waits.

    It ends when ``child``, a number in that namespace, has ended. ``scratch``: the address of 8 bytes for it
    alone; ``unmap``: (address, bytes) that it gives back before it waits.
    """
    regs = ptrace.get_regs(pid)
    regs.ip, regs.r15, regs.orig_ax = code, program.base, (1 << 64) - 1
    regs.bx, regs.r12, regs.r13, regs.r14 = child, scratch, *unmap
    ptrace.set_regs(pid, regs)
    ptrace.resume(pid)


def kill(pids: Sequence[int], strays: Callable[[], Collection[int]] | None = None) -> None:
    """Kill stubs and take their exits. ``pids`` may hold threads as well. ``strays`` finds those that were born
    meanwhile, which are killed too: while one is not reaped, the init of its pid namespace does not end.

    A thread that was born a moment ago is our tracee too, without our having heard of it: while it is not reaped its
    process does not end. So all threads are looked for, and waited for in whatever order they end.
    """
    waiting = set(pids)
    for pid in reversed(pids):
        waiting.update(_threads(pid))
        _send_kill(pid)
    known = set(waiting)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        ended = {tid for tid in waiting if take_exit(tid)}
        waiting -= ended
        if ended:
            continue
        born = [pid for pid in strays() if pid not in known] if strays is not None else []
        for pid in born:
            _send_kill(pid)
        late = {*born, *(tid for pid in (*pids, *born) for tid in _threads(pid))} - known
        known |= late
        waiting |= late
        if not waiting:
            return
        for pid in pids:
            take_exit(pid)  # orphans that have come to us: the init of their pid namespace waits for them
            if pid in waiting:
                _send_kill(pid)
        time.sleep(0.0005)


def take_exits(pids: Collection[int]) -> None:
    """Wait for the ends of those that are children of ours; they have been killed."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    left = [pid for pid in pids if not take_exit(pid)]
    while left and time.monotonic() < deadline:
        time.sleep(0.0005)
        left = [pid for pid in left if not take_exit(pid)]


def _send_kill(pid: int) -> None:
    with contextlib.suppress(OSError):  # it is done again and again
        os.kill(pid, signal.SIGKILL)


def _threads(pid: int) -> list[int]:
    try:
        return numbers(pid, "task")
    except (TaskGone, OSError):
        return []


def take_exit(tid: int) -> bool:
    """Has it ended, and been reaped by this, or is it no child or tracee of ours any more?"""
    try:
        pid, status = ptrace.wait(tid, os.WNOHANG)
    except ChildProcessError:
        return True
    return pid != 0 and not os.WIFSTOPPED(status)


def become_subreaper() -> bool:
    """Be the one to whom orphans among our descendants come; were we before?"""
    before = kernel.is_subreaper()
    if not before:
        kernel.prctl(PR_SET_CHILD_SUBREAPER, 1)
    return before


def resign_as_subreaper() -> None:
    """Be it no longer."""
    kernel.prctl(PR_SET_CHILD_SUBREAPER, 0)
