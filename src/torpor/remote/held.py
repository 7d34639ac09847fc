"""A stub that is held in its first stop for as long as its maker lives, to be forked any number of times.

It shares its maker's descriptor table, so that what is opened later for one of its children is inherited by that child
all the same. Therefore it cannot execute anything (execve(2) unshares the table): it begins as a copy of the maker's
memory and drops that.
"""

from __future__ import annotations

import errno
import os
import struct

from .. import log
from ..errors import KernelError, TaskGone, TorporError, Unsupported
from ..linux import ptrace
from ..linux.launch import Launcher, SignalsBlocked
from ..proc import status as proc_status
from ..proc.read import read
from ..proc.tasks import children, children_if_alive
from . import machine, stub
from .program import Program
from .tracee import SIGTRAP, Dying, Stop, wait_stop

CLONE_VM, CLONE_FILES, CLONE_PARENT, CLONE_NEWNS, CLONE_NEWPID = 0x100, 0x400, 0x8000, 0x20000, 0x20000000
CLONE_CLEAR_SIGHAND = 0x1_0000_0000
FORKS = (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE)
CLONE_CHILD_SETTID = 0x1000000
COPIES_MAX = 1 << 16
ROOM_BYTES = 1024
READY_MAX = 2
PR_SET_PDEATHSIG, SIGKILL = 1, 9
RSEQ_FLAG_UNREGISTER = 1
SS_DISABLE = 2
POLLIN = 1
WAIT_MS = 10_000  # until it is traced; only if its maker dies in between is that ever too short


def launch(arena: stub.Arena) -> int:
    """Clone a held stub; returns its pid. It is traced, stopped, and runs in the arena; it dies with us.

    Raises KernelError and Unsupported; nothing is left then.
    """
    ready, go = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    pid = 0
    try:
        program = _beginning(arena, ready)
        launcher = Launcher(machine.STUB, program.size)
        program.place(launcher.data_address)
        with SignalsBlocked():
            pid = launcher.clone(program.compile(), (), sibling=False, flags=CLONE_FILES | CLONE_CLEAR_SIGHAND)
        if pid < 0:
            raise KernelError("clone3 of a template", -pid)
        stub.seize(pid)
        os.write(go, b"!")
        _await_end(pid, program)
        _forget_rseq(pid, arena)
        ptrace.set_sigmask(pid, 0)
        launcher.close()
    except BaseException:
        if pid > 0:
            stub.kill([pid])
        raise
    finally:
        os.close(ready)
        os.close(go)
    return pid


def _beginning(arena: stub.Arena, ready: int) -> Program:
    program = Program("start of the template")
    program.call("prctl", PR_SET_PDEATHSIG, SIGKILL, why="until it is traced")
    # Not for ever: if we died before the call above, nobody is left to write.
    program.call("poll", struct.pack("<ihh", ready, POLLIN, 0), 1, WAIT_MS, why="wait until traced")
    program.call("read", ready, program.out(8), 1, 0, transfer=True)
    program.call("sigaltstack", struct.pack("<QIxxxxQ", 0, SS_DISABLE, 0), 0)
    stub.emit_arena(program, arena)
    return program


def _await_end(pid: int, program: Program) -> None:
    """Wait until it has come to the trap at the end of its program. Raises KernelError if it stops on the way."""
    while True:
        stop = wait_stop(pid)
        if stop.event == 0 and stop.signal == SIGTRAP:
            break
        ptrace.resume(pid)
    check_end(pid, program)


def check_end(pid: int, program: Program) -> None:
    """Raise KernelError unless a stub that has stopped is at the end of its program."""
    done = (ptrace.get_regs(pid).r15 - program.base) // machine.RECORD_BYTES
    if done != len(program):
        raise failure(pid, program)


def _forget_rseq(pid: int, arena: stub.Arena) -> None:
    """The kernel must not write to the area that its maker's C library has registered: it will be gone."""
    registered = ptrace.rseq_configuration(pid)
    if registered is None or not registered[0]:
        return
    address, size, signature, _ = registered
    program = Program("end of restartable sequences")
    program.call("rseq", address, size, RSEQ_FLAG_UNREGISTER, signature, may_fail=(errno.EINVAL,))
    run(pid, arena, program)


def failure(pid: int, program: Program) -> TorporError:
    """What went wrong in a held stub that has stopped in the middle of its program."""
    regs = ptrace.get_regs(pid)
    index = (regs.r15 - program.base) // machine.RECORD_BYTES
    if not 0 <= index < len(program):
        return Unsupported("a template went astray", hint="please report this")
    number = (1 << 64) - regs.ax
    # The machine has negated an error that it compared with those that are tolerated.
    number = number if 0 < number < 4096 else regs.ax
    return KernelError(f"template: {program.records[index]}", number)


def run(pid: int, arena: stub.Arena, program: Program) -> None:
    """Run a program in the held stub to its end, which is stopped before and after. Raises KernelError."""
    place = arena.mark()
    arena.load([program])
    stub.start(pid, arena, program)
    _await_end(pid, program)
    arena.rewind(place)


class Init:
    """An init that is made ahead of the copy it is for."""

    __slots__ = ("goes", "pid", "slot")

    def __init__(self, pid: int, slot: int) -> None:
        self.pid = pid
        #: Address of 8 bytes for it alone.
        self.slot = slot
        #: Was it let go since it was born?
        self.goes = False


class Inits:
    """Inits of pid namespaces, cloned by a held stub whose memory they share: none needs any of its own.

    Two are kept ready, so that whoever takes one does not wait for its namespaces to be made; and the first of them
    forks the root meanwhile, if the next copy is expected to want nothing that has to be done before.
    """

    def __init__(self, holder: int, arena: stub.Arena, root: int) -> None:
        """``root``: the number that roots have in their namespaces."""
        self._holder = holder
        self._slots = arena.reserve(8 * COPIES_MAX)
        self._room = arena.reserve(ROOM_BYTES)
        self._by_pid: dict[int, int] = {}
        self._arena = arena
        self._root = root
        self._begin = Program("init of the pid namespace")
        stub.emit_proc(self._begin)
        #: The root shares its maker's descriptors until it is told to go on: they are those of its copy then.
        self._fork = stub.init_program(root, None, stub.emit_proc, CLONE_FILES)
        self._clone = Program("template")
        flags = CLONE_VM | CLONE_FILES | CLONE_PARENT | CLONE_NEWPID | CLONE_NEWNS
        args = self._clone.put(struct.pack("<11Q", flags, *(0,) * 10))
        self._clone.call("clone3", args, 88, child=self._begin, why=self._begin.name)
        arena.load([self._begin, self._fork, self._clone])
        self._ordered = False
        self._runs = False  # the held stub, on a program of ours
        self._forks = False  # do those that go fork a root?
        self._ready: list[Init] = []

    @property
    def ready(self) -> list[int]:
        """The pids of those that are kept ready."""
        return [one.pid for one in self._ready]

    def close(self) -> None:
        """End those that nobody has taken."""
        try:
            self.prepare()
        except TorporError:
            pass  # the held stub has ended
        while self._ready:
            self._end(self._ready.pop())
        if _has_ended(self._holder):
            stub.kill(self._strays())

    def _end(self, one: Init) -> None:
        """End one that nobody has taken, and its root, which may be born at this moment."""
        stub.kill([one.pid], lambda: children_if_alive(one.pid))

    def _strays(self) -> list[int]:
        """Children of ours that the held stub has cloned and that we have not heard of: they have its arena."""
        arena = os.fstat(self._arena.fd)
        shown = b"%02x:%02x %d " % (os.major(arena.st_dev), os.minor(arena.st_dev), arena.st_ino)
        found = []
        for pid in children(os.getpid()):
            if pid == self._holder:
                continue
            try:
                traced = proc_status.parse(read(pid, "status")).TracerPid == os.getpid()
                if traced and shown in read(pid, "maps"):
                    found.append(pid)
            except (TaskGone, OSError):
                continue
        return found

    def order(self) -> None:
        """Have another one cloned, meanwhile. Raises KernelError."""
        if not self._ordered and len(self._ready) < READY_MAX:
            self._start(self._clone)
            self._ordered = True

    def prepare(self, *, wait: bool = True) -> None:
        """Take in the one that was ordered, unless that would be to ``wait``. Raises KernelError."""
        if self._ordered and (wait or ptrace.is_waitable(self._holder)):
            self._ordered = False
            pid = self._welcome(self._clone)
            # Whoever had that number before has ended, and does not need his bytes any more.
            slot = self._by_pid.setdefault(pid, len(self._by_pid))
            self._ready.append(Init(pid, self._slots + 8 * slot))

    def _prepare_early(self, *, wait: bool) -> None:
        """As prepare(), for a copy to come, which will have another one ordered if there was no room for this one."""
        try:
            self.prepare(wait=wait)
        except TorporError as error:
            log.info(f"no init for the next copy yet: {error}")

    def keep_ready(self) -> None:
        """Have two there, and the first of them at work, if any was ever taken. Raises KernelError."""
        if self._by_pid:
            self.advance()
            self._prepare_early(wait=False)

    def advance(self) -> None:
        """Have the first at work, and another one cloned, meanwhile. Raises KernelError."""
        self._prepare_early(wait=not self._ready)
        if self._ready and not self._ready[0].goes:
            try:
                self._go(self._ready[0])
            except TorporError as error:
                log.info(f"an init that was kept ready is none: {error}")
                self._end(self._ready.pop(0))
        self.order()

    def _go(self, one: Init) -> None:
        if self._forks:
            code = self._arena.code + len(machine.STUB)
            stub.start_init(one.pid, self._fork, code, self._root, one.slot)
        else:
            ptrace.resume(one.pid)
        one.goes = True

    def take(self) -> tuple[int, int]:
        """(pid, address of 8 bytes for its use alone) of one that waits for a program. Raises KernelError and
        Unsupported.
        """
        one, _ = self._take(forks=False)
        return one.pid, one.slot

    def take_forked(self) -> tuple[int, int]:
        """(pid, pid of the root) of one that was let go after it had forked a root, which is stopped at its birth.
        Raises KernelError and Unsupported.
        """
        one, root = self._take(forks=True)
        return one.pid, root

    def _take(self, *, forks: bool) -> tuple[Init, int]:
        if forks != self._forks:
            self._forks = forks
            for one in [one for one in self._ready if one.goes]:
                self._ready.remove(one)
                self._end(one)
        early = bool(self._ready) and self._ready[0].goes
        if not self._ready:
            self._prepare_early(wait=True)
        if not self._ready:
            self.order()
            self.prepare()
        one = self._ready.pop(0)
        try:
            if not one.goes:
                self._go(one)
            if one.slot >= self._slots + 8 * COPIES_MAX:
                raise Unsupported(f"a template gives no more than {COPIES_MAX} copies a number of their own")
            if forks:
                return one, self._await_fork(one.pid)
            _await_end(one.pid, self._begin)
        except BaseException as error:
            self._end(one)
            if early and isinstance(error, TorporError):  # it failed when there was no copy to fail
                return self._take(forks=forks)
            raise
        return one, 0

    def _await_fork(self, pid: int) -> int:
        """The pid of the root that an init forks, which is let go."""
        try:
            while wait_stop(pid).event not in FORKS:
                ptrace.resume(pid)
        except Dying:
            raise
        except TaskGone:
            raise self._fork_failed() from None
        root = ptrace.event_message(pid)
        wait_stop(root)
        ptrace.detach(pid)  # from here on it waits for the root
        return root

    def _fork_failed(self) -> TorporError:
        """Why an init has ended before it had forked a root."""
        for index, record in enumerate(self._fork.records):
            number = -self._arena.result(self._fork, index)
            if number > 0 and not record.may_fail >> number & 1:
                if record.name == "clone3":
                    return stub.clone_error(number, [self._root])
                return KernelError(f"{self._fork.name}: {record}", number)
        return Unsupported(f"{self._fork.name}: it has ended")

    def bear(self, clear_tid_address: int) -> int:
        """Have the held stub clone a child of ours with any pid and no init, which is to go on with the program that
        will be placed next; returns its pid. It is stopped at its birth. Raises KernelError.

        ``clear_tid_address``: where the C library keeps the thread's number, which the kernel sets as in its fork().
        """
        root = Program("root")
        root.place(self._arena.base + self._arena.mark())
        return self._bear(root, CLONE_CHILD_SETTID if clear_tid_address else 0, clear_tid_address)

    def bear_init(self, root: Program) -> int:
        """As :meth:`bear`, for the init of a new pid namespace, in a new mount namespace; it goes on with ``root``."""
        return self._bear(root, CLONE_NEWPID | CLONE_NEWNS, 0)

    def _bear(self, root: Program, flags: int, child_tid: int) -> int:
        self.prepare()
        clone = Program("template")
        args = clone.put(struct.pack("<11Q", CLONE_PARENT | flags, 0, child_tid, *(0,) * 8))
        clone.call("clone3", args, 88, child=root, why="a copy")
        clone.place(self._room)
        self._arena.write(clone)
        self._start(clone)
        return self._welcome(clone)

    def _start(self, program: Program) -> None:
        stub.start(self._holder, self._arena, program)
        self._runs = True

    def _wait(self) -> Stop:
        stop = wait_stop(self._holder)
        self._runs = False
        return stop

    def _welcome(self, program: Program) -> int:
        """The pid of what the held stub clones, which is stopped at its birth. After an error there is none."""
        newborn, forked = 0, False
        try:
            stop = self._wait()
            if stop.event == 0:
                raise failure(self._holder, program)
            forked = True
            newborn = ptrace.event_message(self._holder)
            wait_stop(newborn)
            ptrace.resume(self._holder)
            self._runs = True
            self._wait()
            check_end(self._holder, program)
        except BaseException:
            self._recover(newborn, forked)
            raise
        return newborn

    def _recover(self, newborn: int, forked: bool) -> None:
        """Have the held stub stopped again, wherever it is, and end what it has cloned."""
        if self._runs:
            ptrace.interrupt(self._holder)
            forked |= self._wait().event in FORKS
        if forked and not newborn:
            newborn = ptrace.event_message(self._holder)
        if newborn:
            stub.kill([newborn])


def _has_ended(pid: int) -> bool:
    """Has it ended, or been killed?"""
    try:
        seen = proc_status.parse(read(pid, "status"))
    except TaskGone:
        return True
    return seen.State in "ZX" or bool((seen.SigPnd | seen.ShdPnd) >> (SIGKILL - 1) & 1)
