"""What this kernel can do, asked by doing it. Each probe answers yes or no, or raises OSError for no."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal

from ..errors import KernelError
from . import ptrace
from .call import call, try_call
from .kernel import KCMP_VM, PAGEMAP_SCAN, PM_GUARD, kcmp, writable_address
from .kernel import pagemap_scan as kernel_scan


def knows(name: str, *args: object) -> bool:
    """Is the system call there, whatever it says to these arguments?"""
    return try_call(name, *args) != -errno.ENOSYS


def clone3_set_tid() -> bool:
    """Can a process be made with a chosen pid? Linux kernel commit 49cb2fc42ce4 (in v5.5)."""
    # Too many pids for any nesting of namespaces: EINVAL, where set_tid is known, else E2BIG for the longer struct.
    args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 0, 0, 0, 0, 0, 33, 0)
    return try_call("clone3", ctypes.byref(args), 88) == -errno.EINVAL


def pagemap_scan() -> bool:
    """PAGEMAP_SCAN."""
    # A null argument faults only where the request is known.
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, PAGEMAP_SCAN, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    finally:
        os.close(fd)
    return False


def guard_pages() -> bool:
    """Guard regions that can be made and be seen by PAGEMAP_SCAN."""
    with mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        address = writable_address(area)
        call("madvise", address, 4096, 102)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return bool(kernel_scan(fd, address, address + 4096, anyof=PM_GUARD, wanted=PM_GUARD))
        finally:
            os.close(fd)
            call("madvise", address, 4096, 103)


def in_child(operation: int, *args: int) -> bool:
    """Does a ptrace request work on a stopped child of our own?"""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        ptrace.seize(pid)
        ptrace.interrupt(pid)
        ptrace.wait(pid)
        call("ptrace", operation, pid, *args)
        return True
    except KernelError:
        return False
    finally:
        os.kill(pid, 9)
        ptrace.wait(pid)


def rseq_configuration() -> bool:
    """PTRACE_GET_RSEQ_CONFIGURATION."""
    area = ctypes.create_string_buffer(24)
    return in_child(ptrace.GET_RSEQ_CONFIGURATION, 24, ctypes.addressof(area))


def suspend_seccomp() -> bool:
    """PTRACE_O_SUSPEND_SECCOMP, for this process."""
    return in_child(ptrace.SETOPTIONS, 0, ptrace.O_SUSPEND_SECCOMP)


def seccomp_filters() -> bool:
    """seccomp(2) filters."""
    # SECCOMP_GET_ACTION_AVAIL(SECCOMP_RET_ALLOW)
    return try_call("seccomp", 2, 0, ctypes.byref(ctypes.c_uint32(0x7FFF0000))) == 0


def timer_ids() -> bool:
    """POSIX timers with chosen ids."""
    # PR_TIMER_CREATE_RESTORE_IDS, asked for its state
    return try_call("prctl", 77, 2, 0, 0, 0) >= 0


def map_vdso() -> bool:
    """ARCH_MAP_VDSO_64."""
    # ARCH_MAP_VDSO_64 where there is one already
    return try_call("arch_prctl", 0x2003, 0) == -errno.EEXIST


def mm_map() -> bool:
    """PR_SET_MM_MAP with the structure that we know."""
    # PR_SET_MM_MAP_SIZE
    size = ctypes.c_uint(0)
    return try_call("prctl", 35, 15, ctypes.byref(size), 0, 0) == 0 and size.value == 104


def memfd_hugetlb() -> bool:
    """memfds of huge pages."""
    os.close(os.memfd_create("huge", 4))
    return True


def timerfd() -> bool:
    """TFD_IOC_SET_TICKS."""
    # TFD_IOC_SET_TICKS with a null argument
    fd = call("timerfd_create", 1, 0)
    try:
        fcntl.ioctl(fd, 0x40085400, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    finally:
        os.close(fd)
    return False


def has_kcmp() -> bool:
    """kcmp(2): CONFIG_KCMP."""
    return kcmp(os.getpid(), os.getpid(), KCMP_VM) == 0
