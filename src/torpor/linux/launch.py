"""clone3(2) whose child shares our memory and enters machine code: fork would copy page tables for nothing."""

from __future__ import annotations

import ctypes
import mmap
import signal

from .kernel import writable_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CLONE_VM, CLONE_PARENT = 0x100, 0x8000

# clone3(args, size) and go on: the parent returns its result, the child enters the code (4th argument) with the third
# in %r15. It never touches the stack that it shares with us.
#   mov r10, rcx; mov eax, 435; syscall; test rax, rax; jnz 1f; mov r15, rdx; jmp r10; 1: ret
_LAUNCH = bytes.fromhex("4989ca b8b3010000 0f05 4885c0 7506 4989d7 41ffe2 c3")
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

    def clone(self, data: bytes, set_tid: Sequence[int], *, sibling: bool) -> int:
        """Put ``data`` in place and clone; the child starts at the code with %r15 at the data.

        ``set_tid``: the pids it must have, innermost namespace first. Returns its pid or a negative errno. Call it with
        signals blocked.
        """
        self._area[self._code_bytes : self._code_bytes + len(data)] = data
        tids = (ctypes.c_int * len(set_tid))(*set_tid)
        flags = CLONE_VM | (CLONE_PARENT if sibling else 0)
        exit_signal = 0 if sibling else int(signal.SIGCHLD)
        args = (ctypes.c_uint64 * 11)(
            flags, 0, 0, 0, exit_signal, 0, 0, 0, ctypes.addressof(tids), len(set_tid), 0
        )  # struct clone_args, include/uapi/linux/sched.h
        return self._launch(ctypes.addressof(args), 88, self.data_address, self._address)

    def close(self) -> None:
        """Unmap it: the child has a memory of its own now."""
        self._area.close()
