"""ptrace(2): include/uapi/linux/ptrace.h, arch/x86/include/uapi/asm/ptrace-abi.h.

Only SEIZE-style tracing is used: no signal reaches a task because it was attached to.
"""

from __future__ import annotations

import ctypes
import os

from .call import call
from .kernel import iovec

CONT, KILL, SINGLESTEP, DETACH, SYSCALL = 7, 8, 9, 17, 24
SETOPTIONS, GETEVENTMSG, GETSIGINFO, SETSIGINFO = 0x4200, 0x4201, 0x4202, 0x4203
GETREGSET, SETREGSET, SEIZE, INTERRUPT, LISTEN = 0x4204, 0x4205, 0x4206, 0x4207, 0x4208
PEEKSIGINFO, GETSIGMASK, SETSIGMASK = 0x4209, 0x420A, 0x420B
SECCOMP_GET_FILTER, SECCOMP_GET_METADATA = 0x420C, 0x420D
GET_RSEQ_CONFIGURATION = 0x420F
GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

O_TRACESYSGOOD, O_TRACEFORK, O_TRACEVFORK, O_TRACECLONE = 1, 2, 4, 8
O_TRACEEXEC, O_TRACEEXIT, O_EXITKILL, O_SUSPEND_SECCOMP = 16, 64, 1 << 20, 1 << 21
EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_STOP = 1, 2, 3, 4, 128
PEEKSIGINFO_SHARED = 1
WALL = 0x40000000

NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE = 1, 2, 0x202
XSTATE_BYTES_MAX = 16384
SIGINFO_BYTES = 128


class user_regs_struct(ctypes.Structure):
    """General registers of a 64-bit x86 task, in the kernel's order (216 bytes)."""

    NAMES = (
        "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di orig_ax ip cs flags sp ss fs_base gs_base ds es fs gs"
    ).split()
    _fields_ = [(name, ctypes.c_uint64) for name in NAMES]

    def copy(self) -> user_regs_struct:
        """An independent copy."""
        return user_regs_struct.from_buffer_copy(self)


assert ctypes.sizeof(user_regs_struct) == 216


class peeksiginfo_args(ctypes.Structure):
    """PTRACE_PEEKSIGINFO's argument."""

    _fields_ = [("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32)]


def seize(tid: int, options: int = 0) -> None:
    """Become the tracer of ``tid`` without stopping it."""
    call("ptrace", SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask ``tid`` to stop; wait for it with :func:`wait`."""
    call("ptrace", INTERRUPT, tid, 0, 0)


def resume(tid: int, signal: int = 0, request: int = CONT) -> None:
    """Let a stopped task go on (request CONT, SYSCALL, SINGLESTEP or LISTEN), delivering ``signal``."""
    call("ptrace", request, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let go of a stopped task, delivering ``signal``."""
    call("ptrace", DETACH, tid, 0, signal)


def set_options(tid: int, options: int) -> None:
    """Change the options of a stopped task."""
    call("ptrace", SETOPTIONS, tid, 0, options)


def event_message(tid: int) -> int:
    """The message of the last event stop: a new child's pid, an exit status."""
    value = ctypes.c_ulong()
    call("ptrace", GETEVENTMSG, tid, 0, ctypes.byref(value))
    return value.value


def wait(tid: int, flags: int = 0) -> tuple[int, int]:
    """waitpid(2) for any kind of child or tracee: (pid, status)."""
    return os.waitpid(tid, WALL | flags)


def wait_any() -> int:
    """Wait until any child or tracee of ours can be waited for, and leave it so; its pid, 0 if there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOWAIT | WALL)
    except ChildProcessError:
        return 0
    return found.si_pid if found is not None else 0


def is_waitable(pid: int) -> bool:
    """Could a child or tracee of ours be waited for without blocking?"""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG | WALL) is not None
    except ChildProcessError:
        return True


def _regset(request: int, tid: int, kind: int, area: object, size: int) -> int:
    vector = iovec(ctypes.addressof(area), size)  # type: ignore[arg-type]
    call("ptrace", request, tid, kind, ctypes.byref(vector))
    return int(vector.len)


def get_regs(tid: int) -> user_regs_struct:
    """General registers of a stopped task."""
    regs = user_regs_struct()
    if _regset(GETREGSET, tid, NT_PRSTATUS, regs, 216) != 216:
        from ..errors import Unsupported

        raise Unsupported(f"task {tid} runs 32-bit code", hint="only 64-bit tasks can be dumped")
    return regs


def set_regs(tid: int, regs: user_regs_struct) -> None:
    """Set the general registers of a stopped task."""
    _regset(SETREGSET, tid, NT_PRSTATUS, regs, 216)


def get_xstate(tid: int) -> bytes:
    """The extended state (XSAVE, uncompacted) of a stopped task, as many bytes as the kernel has."""
    area = ctypes.create_string_buffer(XSTATE_BYTES_MAX)
    size = _regset(GETREGSET, tid, NT_X86_XSTATE, area, XSTATE_BYTES_MAX)
    return area.raw[:size]


def set_xstate(tid: int, state: bytes) -> None:
    """Set the extended state of a stopped task."""
    area = ctypes.create_string_buffer(state, len(state))
    _regset(SETREGSET, tid, NT_X86_XSTATE, area, len(state))


def get_sigmask(tid: int) -> int:
    """The blocked signals of a stopped task as a 64-bit mask (bit n-1 is signal n)."""
    mask = ctypes.c_uint64()
    call("ptrace", GETSIGMASK, tid, 8, ctypes.byref(mask))
    return mask.value


def set_sigmask(tid: int, mask: int) -> None:
    """Set the blocked signals of a stopped task."""
    value = ctypes.c_uint64(mask)
    call("ptrace", SETSIGMASK, tid, 8, ctypes.byref(value))


def pending_signals(tid: int, *, shared: bool) -> list[bytes]:
    """The siginfo (128 bytes each) of what is pending for the thread or, ``shared``, for its process; oldest first."""
    found: list[bytes] = []
    batch = 32
    area = ctypes.create_string_buffer(batch * SIGINFO_BYTES)
    while True:
        args = peeksiginfo_args(len(found), PEEKSIGINFO_SHARED if shared else 0, batch)
        count = call("ptrace", PEEKSIGINFO, tid, ctypes.byref(args), ctypes.addressof(area))
        found += [area.raw[i * SIGINFO_BYTES : (i + 1) * SIGINFO_BYTES] for i in range(count)]
        if count < batch:
            return found


def siginfo(tid: int) -> bytes:
    """The siginfo of the stop that the task is in."""
    area = ctypes.create_string_buffer(SIGINFO_BYTES)
    call("ptrace", GETSIGINFO, tid, 0, ctypes.addressof(area))
    return area.raw


def rseq_configuration(tid: int) -> tuple[int, int, int, int] | None:
    """(address, size, signature, flags) of the registered rseq area, or None.

    Linux kernel commit 90f093fa8ea4 ("rseq, ptrace: Add PTRACE_GET_RSEQ_CONFIGURATION request") (in v5.13).
    """
    import struct

    area = ctypes.create_string_buffer(24)
    call("ptrace", GET_RSEQ_CONFIGURATION, tid, 24, ctypes.addressof(area))
    address, size, signature, flags, _ = struct.unpack("<QIIII", area.raw)
    return (address, size, signature, flags) if address else None


def syscall_user_dispatch(tid: int) -> tuple[int, int, int, int]:
    """(mode, selector, offset, length) of syscall user dispatch; mode 0 is off, or the kernel does not tell.

    Linux kernel commit 3f67987cdc09 ("ptrace: Provide set/get interface for syscall user dispatch") (in v6.4).
    """
    import errno

    from ..errors import KernelError

    area = (ctypes.c_uint64 * 4)()
    try:
        call("ptrace", GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, ctypes.addressof(area))
    except KernelError as error:
        if error.errno != errno.EIO:  # there is no such request
            raise
    return area[0], area[1], area[2], area[3]


def seccomp_filter(tid: int, index: int) -> bytes | None:
    """The ``index``-th seccomp filter (0 is the one installed first) as struct sock_filter[], or None past the end."""
    import errno

    from ..errors import KernelError

    try:
        length = call("ptrace", SECCOMP_GET_FILTER, tid, index, 0)
        area = ctypes.create_string_buffer(length * 8)
        call("ptrace", SECCOMP_GET_FILTER, tid, index, ctypes.addressof(area))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return area.raw


def seccomp_flags(tid: int, index: int) -> int:
    """The flags (SECCOMP_FILTER_FLAG_*) that the ``index``-th filter was installed with, as far as the kernel tells."""
    area = (ctypes.c_uint64 * 2)(index, 0)
    call("ptrace", SECCOMP_GET_METADATA, tid, 16, ctypes.addressof(area))
    return int(area[1])
