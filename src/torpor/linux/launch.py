"""clone3(2) whose child shares our memory: fork would copy page tables for nothing, and locks that other threads hold.

A fork by hand of a process with several threads copies the interpreter's and the allocator's locks as they are at the
moment, and nobody in the child ever gives them back.
"""

from __future__ import annotations

import ctypes
import mmap
import signal

from ..errors import KernelError
from .kernel import writable_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CLONE_VM, CLONE_FILES, CLONE_VFORK, CLONE_PARENT = 0x100, 0x400, 0x4000, 0x8000

# clone3(args, size) and go on: the parent returns its result, the child enters the code (4th argument) with the third
# in %r15. It never touches the stack that it shares with us.
#   mov r10, rcx; mov eax, 435; syscall; test rax, rax; jnz 1f; mov r15, rdx; jmp r10; 1: ret
_LAUNCH = bytes.fromhex("4989ca b8b3010000 0f05 4885c0 7506 4989d7 41ffe2 c3")
# clone3(args, size), and while we wait the child calls the 3rd argument and ends. It runs deeper in the stack than this
# frame, which we find untouched when we go on.
#   push rbx; mov rbx, rdx; mov eax, 435; syscall; test rax, rax; jnz 1f
#   call rbx; xor edi, edi; mov eax, 231; syscall; 1: pop rbx; ret
_ASIDE = bytes.fromhex("53 4889d3 b8b3010000 0f05 4885c0 750b ffd3 31ff b8e7000000 0f05 5b c3")
_ALIGN = 64


class SignalsBlocked:
    """While it lasts no signal is handled: a handler of ours must not run in a child that shares our stack."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


class Launcher:
    """Executable memory of ours with ``code`` and room for ``data_bytes``; it must outlive the child's use of it."""

    def __init__(self, code: bytes, data_bytes: int) -> None:
        self._code_bytes = -(-(len(code) + len(_LAUNCH)) // _ALIGN) * _ALIGN
        size = self._code_bytes + data_bytes
        self._area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
        self._area[: len(code)] = code
        self._area[len(code) : len(code) + len(_LAUNCH)] = _LAUNCH
        self._address = writable_address(self._area)
        kind = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        self._launch: Callable[[int, int, int, int], int] = kind(self._address + len(code))

    @property
    def data_address(self) -> int:
        """Where the data lies."""
        return self._address + self._code_bytes

    def clone(self, data: bytes, set_tid: Sequence[int], *, sibling: bool, flags: int = CLONE_VM) -> int:
        """Put ``data`` in place and clone; the child starts at the code with %r15 at the data.

        ``set_tid``: the pids it must have, innermost namespace first; ``flags``: CLONE_* besides what ``sibling`` asks
        for. Returns its pid or a negative errno. Call it with signals blocked.
        """
        self._area[self._code_bytes : self._code_bytes + len(data)] = data
        tids = (ctypes.c_int * len(set_tid))(*set_tid)
        flags |= CLONE_PARENT if sibling else 0
        exit_signal = 0 if sibling else int(signal.SIGCHLD)
        args = (ctypes.c_uint64 * 11)(
            flags, 0, 0, 0, exit_signal, 0, 0, 0, ctypes.addressof(tids) if set_tid else 0, len(set_tid), 0
        )  # struct clone_args, include/uapi/linux/sched.h
        return self._launch(ctypes.addressof(args), 88, self.data_address, self._address)

    def read(self, offset: int, size: int) -> bytes:
        """Part of the data as it is now."""
        return self._area[self._code_bytes + offset : self._code_bytes + offset + size]

    def close(self) -> None:
        """Unmap it: the child has a memory of its own now."""
        self._area.close()


_aside: list[tuple[mmap.mmap, Callable[[int, int, object], int]]] = []


def aside(action: Callable[[], object], pid: int) -> int:
    """Call ``action()``, which must not raise, in a child with our memory and descriptors; returns the child's pid.

    It has ended then, and is to be reaped with __WALL: no signal tells of it. What it does to its credentials, root and
    working directory is its own. ``pid`` is the one it must have, 0 for any. Raises KernelError.
    """
    if not _aside:
        area = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
        area[: len(_ASIDE)] = _ASIDE
        kind = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p)
        _aside.append((area, kind(writable_address(area))))
    number = ctypes.c_int(pid)
    chosen = (ctypes.addressof(number), 1) if pid else (0, 0)
    args = (ctypes.c_uint64 * 11)(CLONE_VM | CLONE_FILES | CLONE_VFORK, 0, 0, 0, 0, 0, 0, 0, *chosen, 0)
    callback = ctypes.CFUNCTYPE(None)(action)
    with SignalsBlocked():
        child = _aside[0][1](ctypes.addressof(args), 88, callback)
    if child < 0:
        raise KernelError("clone3", -child)
    return child
