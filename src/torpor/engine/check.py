"""check: what this kernel and these privileges allow, and what would stop the dump of a tree. Asked by trying, not by version."""

from __future__ import annotations

import errno
import os

from ..errors import KernelError, TorporError, doing
from ..linux import kernel, ptrace
from ..linux.call import call, try_call
from ..proc import status as proc_status
from ..proc.read import read
from . import preflight

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..options import Options

CAPABILITIES = {"SYS_ADMIN": 21, "SYS_PTRACE": 19, "CHECKPOINT_RESTORE": 40, "SYS_RESOURCE": 24}
NEEDED = ("SYS_ADMIN", "SYS_PTRACE")


class Finding:
    """One line of a check: what was asked, how it came out, and what that means."""

    __slots__ = ("name", "ok", "required", "text")

    def __init__(self, name: str, ok: bool, text: str, *, required: bool = True) -> None:
        self.name = name
        self.ok = ok
        self.text = text
        self.required = required


def check_task(pid: int, options: Options) -> list[TorporError]:
    """Everything that a dump of the running tree below ``pid`` would refuse; nothing is stopped or changed."""
    with doing("check"):
        try:
            preflight.check_target(pid)
        except TorporError as error:
            return [error]
        return preflight.blockers(pid, options)


def check_kernel(options: Options) -> list[Finding]:
    """What this kernel and this process's privileges allow, a finding for each."""
    held = proc_status.parse(read(os.getpid(), "status")).CapEff
    found = [
        Finding(
            f"CAP_{name}", bool(held >> bit & 1),
            "held" if held >> bit & 1 else _without(name), required=name in NEEDED,
        )
        for name, bit in CAPABILITIES.items()
    ]  # fmt: skip
    for name, (probe, meaning, required) in PROBES.items():
        ok = _ask(probe)
        found.append(Finding(name, ok, meaning if ok else f"missing: {meaning}", required=required))
    return found


def _without(name: str) -> str:
    return {
        "SYS_RESOURCE": "missing: hard limits cannot be raised, oom_score_adj not lowered",
        "CHECKPOINT_RESTORE": "missing: CAP_SYS_ADMIN does in its place",
    }.get(name, "missing: run as root")


def feature(name: str) -> bool:
    """Does this kernel, with this Torpor, have the feature that `check --feature` calls ``name``?"""
    probe = FEATURES.get(name)
    return probe is not None and _ask(probe)


def _ask(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except (OSError, TorporError):
        return False


def _knows(name: str, *args: object) -> bool:
    """Is the system call there, whatever it says to these arguments?"""
    return try_call(name, *args) != -errno.ENOSYS


def _clone3_set_tid() -> bool:
    # Too many pids for any nesting of namespaces: EINVAL, where set_tid is known, else E2BIG for the longer struct.
    import ctypes

    args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 0, 0, 0, 0, 0, 33, 0)
    return try_call("clone3", ctypes.byref(args), 88) == -errno.EINVAL


def _pagemap_scan() -> bool:
    # A null argument faults only where the request is known.
    import fcntl

    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, kernel.PAGEMAP_SCAN, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    finally:
        os.close(fd)
    return False


def _guard_pages() -> bool:
    import mmap

    from ..linux.kernel import writable_address

    with mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        address = writable_address(area)
        return _pagemap_scan() and try_call("madvise", address, 4096, 102) == 0 and try_call("madvise", address, 4096, 103) == 0


def _in_child(operation: int, *args: int) -> bool:
    """Does a ptrace request work on a stopped child of our own?"""
    pid = os.fork()
    if pid == 0:
        import signal

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


def _rseq_configuration() -> bool:
    import ctypes

    area = ctypes.create_string_buffer(24)
    return _in_child(ptrace.GET_RSEQ_CONFIGURATION, 24, ctypes.addressof(area))


def _suspend_seccomp() -> bool:
    return _in_child(ptrace.SETOPTIONS, 0, ptrace.O_SUSPEND_SECCOMP)


def _seccomp_filters() -> bool:
    # SECCOMP_GET_ACTION_AVAIL(SECCOMP_RET_ALLOW)
    import ctypes

    return try_call("seccomp", 2, 0, ctypes.byref(ctypes.c_uint32(0x7FFF0000))) == 0


def _timer_ids() -> bool:
    # PR_TIMER_CREATE_RESTORE_IDS, asked for its state
    return try_call("prctl", 77, 2, 0, 0, 0) >= 0


def _map_vdso() -> bool:
    # ARCH_MAP_VDSO_64 where there is one already
    return try_call("arch_prctl", 0x2003, 0) == -errno.EEXIST


def _mm_map() -> bool:
    # PR_SET_MM_MAP_SIZE
    import ctypes

    size = ctypes.c_uint(0)
    return try_call("prctl", 35, 15, ctypes.byref(size), 0, 0) == 0 and size.value == 104


def _fdinfo_lock() -> bool:
    import fcntl

    fd = os.memfd_create("lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return b"lock:" in read(os.getpid(), f"fdinfo/{fd}")
    finally:
        os.close(fd)


def _memfd_hugetlb() -> bool:
    os.close(os.memfd_create("huge", 4))
    return True


def _exists(path: str) -> Callable[[], bool]:
    return lambda: os.path.exists(path)


def _timerfd() -> bool:
    # TFD_IOC_SET_TICKS with a null argument
    import fcntl

    fd = call("timerfd_create", 1, 0)
    try:
        fcntl.ioctl(fd, 0x40085400, 0)
    except OSError as error:
        return error.errno == errno.EFAULT
    finally:
        os.close(fd)
    return False


def _kcmp() -> bool:
    return kernel.kcmp(os.getpid(), os.getpid(), kernel.KCMP_VM) == 0


#: name → (probe, what it is for, is it required)
PROBES: dict[str, tuple[Callable[[], bool], str, bool]] = {
    "kcmp": (_kcmp, "which descriptors share an open file", True),
    "pidfd_getfd": (lambda: _knows("pidfd_getfd", -1, 0, 0), "looking at a task's open files", True),
    "clone3_set_tid": (_clone3_set_tid, "restoring with the same process ids", True),
    "mm_map": (_mm_map, "restoring where code, heap and arguments lie", True),
    "map_vdso": (_map_vdso, "placing the vDSO", True),
    "pagemap_scan": (_pagemap_scan, "finding the pages of a task", True),
    "get_rseq_conf": (_rseq_configuration, "programs of glibc 2.35 and newer", True),
    "seccomp_suspend": (_suspend_seccomp, "tasks under seccomp", False),
    "seccomp_filters": (_seccomp_filters, "restoring seccomp filters", False),
    "timer_cr_ids": (_timer_ids, "POSIX timers with the same ids at once", False),
    "guard_pages": (_guard_pages, "guard regions", False),
    "map_files": (_exists("/proc/self/map_files"), "deleted and shared mapped files", True),
    "children": (_exists(f"/proc/self/task/{os.getpid()}/children"), "walking the process tree", True),
}

#: The names of CRIU's `check --feature` that say something about what Torpor does.
FEATURES: dict[str, Callable[[], bool]] = {
    "aio_remap": lambda: _knows("io_setup", 0, 0),
    "fdinfo_lock": _fdinfo_lock,
    "seccomp_suspend": _suspend_seccomp,
    "seccomp_filters": _seccomp_filters,
    "loginuid": _exists("/proc/self/loginuid"),
    "can_map_vdso": _map_vdso,
    "kcmp_epoll": lambda: try_call("kcmp", os.getpid(), os.getpid(), kernel.KCMP_EPOLL_TFD, 0, 0) != -errno.EINVAL,
    "clone3_set_tid": _clone3_set_tid,
    "ns_pid": lambda: len(proc_status.parse(read(os.getpid(), "status")).NSpid) > 0,
    "memfd_hugetlb": _memfd_hugetlb,
    "get_rseq_conf": _rseq_configuration,
    "pagemap_scan": _pagemap_scan,
    "pagemap_scan_guard_pages": _guard_pages,
    "timer_cr_ids": _timer_ids,
    "timerfd": _timerfd,
    "mnt_id": lambda: b"mnt_id:" in read(os.getpid(), "fdinfo/0"),
    "openat2": lambda: _knows("openat2", -1, b"\0", 0, 0),
}
