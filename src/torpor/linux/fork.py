"""fork(2) with a descriptor table in common: what one opens, receives or closes, the other has or has not."""

from __future__ import annotations

import ctypes
import signal

from ..errors import KernelError
from .call import call
from .nr import NR

CLONE_FILES, CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID = 0x400, 0x1000000, 0x200000
PR_SET_NAME, PR_GET_TID_ADDRESS = 15, 40

# PyDLL: unlike CDLL it does not let go of the interpreter, which has to be ours when the child begins.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long]


def fork_sharing_files() -> int:
    """Fork; returns 0 in the child and its pid in the parent. To be used while there is but one thread.

    Raises KernelError.
    """
    here = ctypes.c_uint64()
    call("prctl", PR_GET_TID_ADDRESS, ctypes.byref(here), 0, 0, 0)
    flags = CLONE_FILES | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID  # as the C library's own fork does it
    args = (ctypes.c_uint64 * 11)(flags, 0, here.value, 0, int(signal.SIGCHLD), 0, 0, 0, 0, 0, 0)
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid: int = _syscall(NR["clone3"], ctypes.addressof(args), ctypes.sizeof(args))
    number = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise KernelError("clone3", number)
    return pid


def set_name(name: bytes) -> None:
    """How the process is called in lists of processes."""
    call("prctl", PR_SET_NAME, name + b"\0", 0, 0, 0)
