"""The one gate to system calls that Python's `os` has not: name and arguments in, result out, errors as KernelError."""

from __future__ import annotations

import ctypes
import errno

from ..errors import KernelError
from .nr import NR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
# c_void_p takes what a system call takes: integers of 64 bits, bytes, ctypes objects by address.
_syscall.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 6

#: Asked before each call when set: may raise in its place. For tests that make every call fail once.
fault: Callable[[str], None] | None = None


def call(name: str, *args: object) -> int:
    """Do the system call ``name``; arguments are ints, bytes (passed by address), ctypes objects or None.

    Returns its result; raises :class:`KernelError` naming the call. EINTR is given back as an error like any other.
    """
    if fault is not None:
        fault(name)
    number = NR.get(name)
    if number is None:
        raise KernelError(name, errno.ENOSYS)
    result: int = _syscall(number, *args, *(None,) * (6 - len(args)))
    if result == -1:
        raise KernelError(name, ctypes.get_errno())
    return result


def try_call(name: str, *args: object) -> int:
    """As :func:`call`, but an error is returned as a negative errno."""
    try:
        return call(name, *args)
    except KernelError as error:
        assert error.errno is not None
        return -error.errno


def buffer(size: int) -> ctypes.Array[ctypes.c_char]:
    """A zeroed buffer of ``size`` bytes for the kernel to fill; ``.raw`` is its content."""
    return ctypes.create_string_buffer(size)


def address_of(thing: object) -> int:
    """The address of a ctypes object or of a writable buffer (mmap, bytearray), which the caller keeps alive."""
    if isinstance(thing, ctypes._SimpleCData | ctypes.Array | ctypes.Structure):
        return ctypes.addressof(thing)
    return ctypes.addressof(ctypes.c_char.from_buffer(thing))  # type: ignore[arg-type]
