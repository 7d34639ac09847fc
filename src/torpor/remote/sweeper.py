"""A process that waits for another one to end and then removes a folder: whatever becomes of us.

It is nobody's child, runs the machine until then, and becomes rm(1) in the end. So it has next to no memory, and there
may be one for each of a thousand copies. No signal but SIGKILL ends it.
"""

from __future__ import annotations

import os
import shutil
import struct

from ..errors import KernelError, Unsupported
from ..linux import ptrace
from ..linux.launch import Launcher, SignalsBlocked
from . import machine
from .program import Program
from .stub import elf

PAGE = 4096
ELF_BASE = 0x2000_0000_0000
PR_SET_NAME = 15
POLLIN = 1
AT_EMPTY_PATH = 0x1000
CLONE_VM, CLONE_VFORK = 0x100, 0x4000
ALL_BUT_FATAL = tuple(range(1, 64))
PROCESS_FD, PARENT_FD, ELF_FD = 0, 1, 2


def start(pid: int, folder: str) -> None:
    """Have ``folder`` removed, with all that is in it, when process ``pid`` has ended. Raises KernelError, Unsupported.

    If this raises, nobody will.
    """
    remover = shutil.which("rm", path="/bin:/usr/bin:/sbin:/usr/sbin")
    if remover is None:
        raise Unsupported("there is no rm(1) to remove it in the end", hint="--overlay-keep")
    parent, name = os.path.split(folder)
    kept: list[int] = []
    try:
        kept.append(os.pidfd_open(pid))
        kept.append(os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        kept.append(os.memfd_create("torpor-sweeper", os.MFD_CLOEXEC))
        os.write(kept[2], _image(os.fsencode(remover), os.fsencode(name)))
        _launch(*kept)
    finally:
        for fd in kept:
            os.close(fd)


def _image(remover: bytes, name: bytes) -> bytes:
    """The executable: what the sweeper does."""
    program = Program("sweeper")
    program.call("prctl", PR_SET_NAME, b"torpor-sweeper\0")
    program.call("poll", struct.pack("<ihh", PROCESS_FD, POLLIN, 0), 1, -1, why="until the process ends")
    program.call("fchdir", PARENT_FD)
    argv = program.out(5 * 8)
    for index, word in enumerate((b"rm", b"-rf", b"--", name)):
        program.pointer(argv, 8 * index, program.put(word + b"\0"))
    program.call("execve", remover + b"\0", argv, program.out(8))
    program.place(ELF_BASE + PAGE)
    # movabs $program, %r15
    code = b"\x49\xbf" + struct.pack("<Q", program.base) + machine.STUB
    return elf(ELF_BASE, code, program.compile())


def _launch(process: int, parent: int, image: int) -> None:
    """Execute it in a grandchild, whose parent ends at once. Both have our memory until then."""
    inner = Program("start of the sweeper")
    inner.call("setsid")
    fds = process, parent, image
    above = max(*fds, ELF_FD) + 1
    for target, fd in enumerate(fds):  # first out of one another's way
        inner.call("dup3", fd, above + target, os.O_CLOEXEC)
    inner.call("dup3", above + PROCESS_FD, PROCESS_FD, 0)
    inner.call("dup3", above + PARENT_FD, PARENT_FD, 0)
    inner.call("dup3", above + ELF_FD, ELF_FD, os.O_CLOEXEC)
    inner.call("close_range", ELF_FD + 1, 0xFFFFFFFF, 0, why="nothing else of ours")
    argv = inner.out(16)
    inner.pointer(argv, 0, inner.put(b"torpor-sweeper\0"))
    inner.call("execveat", ELF_FD, b"\0", argv, inner.out(8), AT_EMPTY_PATH, may_fail=ALL_BUT_FATAL)
    inner.call("exit_group", 1)
    outer = Program("parent of the sweeper")
    args = outer.put(struct.pack("<11Q", CLONE_VM | CLONE_VFORK, *(0,) * 10))
    outer.call("clone3", args, 88, child=inner, may_fail=ALL_BUT_FATAL)
    outer.call("exit_group", 0)
    launcher = Launcher(machine.STUB, outer.size + inner.size)
    try:
        outer.place(launcher.data_address)
        inner.place(launcher.data_address + outer.size)
        with SignalsBlocked():
            pid = launcher.clone(outer.compile() + inner.compile(), (), sibling=False, flags=CLONE_VM | CLONE_VFORK)
        if pid < 0:
            raise KernelError("clone3", -pid)
        os.waitpid(pid, ptrace.WALL)
        results = _results(launcher, 0, outer) + _results(launcher, outer.size, inner)
        for call, result in results:
            if result < 0:
                raise KernelError(call, -result)
    finally:
        launcher.close()


def _results(launcher: Launcher, offset: int, program: Program) -> list[tuple[str, int]]:
    """What the calls of a program have given; 0 for those that it has not come to, or not come back from."""
    found = []
    for index, record in enumerate(program.records):
        raw = launcher.read(offset + index * machine.RECORD_BYTES + 8 * machine.RESULT_WORD, 8)
        found.append((str(record), int.from_bytes(raw, "little", signed=True)))
    return found
