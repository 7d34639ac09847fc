"""check: what this kernel and these privileges allow, and what would stop the dump of a tree."""

from __future__ import annotations

import errno
import os

from ..errors import TorporError, doing
from ..linux import kerndat, kernel
from ..linux.call import try_call
from ..proc import status as proc_status
from ..proc.read import read
from ..resources import inet_probe, tun_link
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


def _fdinfo_lock() -> bool:
    import fcntl

    fd = os.memfd_create("lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return b"lock:" in read(os.getpid(), f"fdinfo/{fd}")
    finally:
        os.close(fd)


def _exists(path: str) -> Callable[[], bool]:
    return lambda: os.path.exists(path)


#: name → (probe, what it is for, is it required)
PROBES: dict[str, tuple[Callable[[], bool], str, bool]] = {
    "kcmp": (kerndat.has_kcmp, "which descriptors share an open file", True),
    "pidfd_getfd": (lambda: kerndat.knows("pidfd_getfd", -1, 0, 0), "looking at a task's open files", True),
    "clone3_set_tid": (kerndat.clone3_set_tid, "restoring with the same process ids", True),
    "mm_map": (kerndat.mm_map, "restoring where code, heap and arguments lie", True),
    "map_vdso": (kerndat.map_vdso, "placing the vDSO", True),
    "pagemap_scan": (kerndat.pagemap_scan, "finding the pages of a task at once", False),
    "get_rseq_conf": (kerndat.rseq_configuration, "programs of glibc 2.35 and newer", True),
    "seccomp_suspend": (kerndat.suspend_seccomp, "tasks under seccomp", False),
    "seccomp_filters": (kerndat.seccomp_filters, "restoring seccomp filters", False),
    "timer_cr_ids": (kerndat.timer_ids, "POSIX timers with the same ids at once", False),
    "guard_pages": (kerndat.guard_pages, "guard regions", False),
    "map_files": (_exists("/proc/self/map_files"), "deleted and shared mapped files", True),
    "children": (_exists(f"/proc/self/task/{os.getpid()}/children"), "walking the process tree", True),
}

#: The names of CRIU's `check --feature` that say something about what Torpor does.
FEATURES: dict[str, Callable[[], bool]] = {
    "aio_remap": lambda: kerndat.knows("io_setup", 0, 0),
    "fdinfo_lock": _fdinfo_lock,
    "seccomp_suspend": kerndat.suspend_seccomp,
    "seccomp_filters": kerndat.seccomp_filters,
    "loginuid": _exists("/proc/self/loginuid"),
    "can_map_vdso": kerndat.map_vdso,
    "kcmp_epoll": lambda: try_call("kcmp", os.getpid(), os.getpid(), kernel.KCMP_EPOLL_TFD, 0, 0) != -errno.EINVAL,
    "clone3_set_tid": kerndat.clone3_set_tid,
    "ns_pid": lambda: len(proc_status.parse(read(os.getpid(), "status")).NSpid) > 0,
    "memfd_hugetlb": kerndat.memfd_hugetlb,
    "get_rseq_conf": kerndat.rseq_configuration,
    "pagemap_scan": kerndat.pagemap_scan,
    "pagemap_scan_guard_pages": kerndat.guard_pages,
    "timer_cr_ids": kerndat.timer_ids,
    "timerfd": kerndat.timerfd,
    "mnt_id": lambda: b"mnt_id:" in read(os.getpid(), "fdinfo/0"),
    "openat2": lambda: kerndat.knows("openat2", -1, b"\0", 0, 0),
    "tcp_half_closed": inet_probe.half_closed,
    "net_diag_raw": inet_probe.raw,
    "ipv6_freebind": inet_probe.six_freebind,
    "sockopt_buf_lock": inet_probe.buffer_lock,
    "network_lock_nftables": inet_probe.nftables_lock,
    "has_ipt_legacy": inet_probe.iptables,
    "tun": tun_link.possible,
    "cgroupns": _exists("/proc/self/ns/cgroup"),
    "external_net_ns": _exists("/proc/self/ns/net"),
}
