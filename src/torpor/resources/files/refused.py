"""Open files that cannot be dumped, each by its name and with the reason why. Asked last, after
everybody else."""

from __future__ import annotations

import os
import stat

from ...errors import Unsupported
from ...linux import sockets
from ..base import FileResource, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

_CLOSE = "close it before the dump"
_OTHERS = (
    "the program must be told to close it before the dump and to make it again after the restore"
)

#: Link in /proc/PID/fd, or how it begins (``*``) → (what it is and why it is refused, hint). The
# first one holds.
KNOWN = {
    "/secretmem (deleted)": (
        "memory of memfd_secret(2), which nobody but the task may read",
        _CLOSE,
    ),
    "anon_inode:[io_uring]": (
        "io_uring: requests may be under way that cannot be seen from outside",
        _OTHERS,
    ),
    "anon_inode:[userfaultfd]": (
        "userfaultfd: the ranges that it serves are not supported yet",
        _CLOSE,
    ),
    "anon_inode:[perf_event]": (
        "perf_event_open(2): a counter of this very machine",
        "detach perf before the dump",
    ),
    "anon_inode:bpf-map": ("a BPF map: its content is not supported yet", _CLOSE),
    "anon_inode:bpf-prog": (
        "a BPF program, which lives in the kernel and not in the task",
        _OTHERS,
    ),
    "anon_inode:bpf*": (
        "an object of bpf(2), which lives in the kernel and not in the task",
        _OTHERS,
    ),
    "anon_inode:btf": (
        "type information for bpf(2), which lives in the kernel and not in the task",
        _OTHERS,
    ),
    "anon_inode:[landlock-ruleset]": ("a Landlock ruleset, which the kernel does not show", _CLOSE),
    "anon_inode:seccomp notify": (
        "the listener of a seccomp filter (SECCOMP_RET_USER_NOTIF): calls may wait for an answer",
        "end the supervised processes first",
    ),
    "anon_inode:kvm-*": (
        "a virtual machine, whose state only /dev/kvm knows",
        "snapshot the guest by its own monitor",
    ),
    "anon_inode:[fscontext]": ("a file system that is being set up (fsopen(2), fspick(2))", _CLOSE),
    "anon_inode:[vfio*": ("a device passed through (VFIO)", _OTHERS),
    "anon_inode:sync_file": ("a fence of a graphics driver", _OTHERS),
    "anon_inode:dmabuf": ("a buffer shared with a device", _OTHERS),
    "anon_inode:*": ("a kind of file that Torpor does not know", _CLOSE),
}
#: Address families of sockets: include/linux/socket.h
FAMILIES = {
    2: "an IPv4 socket",
    10: "an IPv6 socket",
    16: "a netlink socket",
    17: "a packet socket",
    29: "a CAN socket",
    30: "a TIPC socket",
    31: "a Bluetooth socket",
    38: "a socket of the kernel's cryptography (AF_ALG)",
    40: "a socket between a virtual machine and its host (AF_VSOCK)",
    44: "an AF_XDP socket",
}

#: Devices whose open descriptions hold state that nobody but the driver can see: (major, minor or
# -1 for all) → name. : Documentation/admin-guide/devices.txt
DEVICES = {
    (10, 200): "a network tunnel (/dev/net/tun)",
    (10, 229): "a connection to a FUSE file system (/dev/fuse)",
    (10, 232): "virtual machines (/dev/kvm)",
    (10, 130): "a watchdog",
    (10, 135): "the real-time clock",
    (10, 223): "a virtual input device (/dev/uinput)",
    (13, -1): "an input device",
    (29, -1): "a frame buffer",
    (108, -1): "a PPP connection (/dev/ppp)",
    (116, -1): "a sound device",
    (195, -1): "a GPU (nvidia)",
    (226, -1): "a GPU (/dev/dri)",
}


class Refused(FileResource):
    """What no other resource takes."""

    LINKS = ("/secretmem (deleted)",)  # ahead of what else begins with a slash
    MODES = (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        0,
    )
    PRIORITY = 100

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        raise reason(source)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        raise reason(source)

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        raise AssertionError("nothing of this kind is in any image")


def reason(source: SourceFile) -> Unsupported:
    """Why a description that nobody takes cannot be dumped."""
    if stat.S_ISSOCK(source.stat.st_mode):
        number = sockets.family(source.borrow()) if source.link.startswith("socket:[") else 0
        what = FAMILIES.get(number, f"a socket of address family {number}")
        return unsupported(source, f"{what}: sockets of this kind are not supported yet", hint=_CLOSE)
    if stat.S_ISCHR(source.stat.st_mode):
        return _device(source)
    for pattern, (what, hint) in KNOWN.items():
        if source.link == pattern or (pattern[-1] == "*" and source.link.startswith(pattern[:-1])):
            return unsupported(source, what, hint=hint)
    if stat.S_ISDIR(source.stat.st_mode):
        return unsupported(
            source, "a directory of a file system that is mounted nowhere", hint=_CLOSE
        )
    return unsupported(source, "a kind of file that Torpor does not know", hint=_CLOSE)


def _device(source: SourceFile) -> Unsupported:
    major, minor = os.major(source.stat.st_rdev), os.minor(source.stat.st_rdev)
    known = DEVICES.get((major, minor)) or DEVICES.get((major, -1))
    what = known or f"character device {major}:{minor}"
    return unsupported(
        source, f"{what}: its driver keeps what cannot be seen from outside", hint=_CLOSE
    )


RESOURCE = Refused()
