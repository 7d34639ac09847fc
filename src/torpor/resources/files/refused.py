"""Open files that cannot be dumped, each by its name and with the reason why. Asked last, after everybody else."""

from __future__ import annotations

import stat

from ...errors import Unsupported
from ...linux import sockets
from .. import devices
from ..base import FileResource, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

_CLOSE = "close it before the dump"
_AGAIN = "the program must be told to close it before the dump and to make it again after the restore"
_GUEST = "snapshot the guest by its own monitor"

#: Link in /proc/PID/fd, or how it begins (``*``) → (what it is and why it is refused, hint). The first one holds.
KNOWN = {
    "/secretmem (deleted)": (
        "memory of memfd_secret(2), which nobody but the task may read",
        "unmap and close it before the dump; keys that it holds should not get into images anyway",
    ),
    "anon_inode:[perf_event]": (
        "perf_event_open(2): a counter of this very machine",
        "detach perf before the dump",
    ),
    "anon_inode:bpf-prog": (
        "a BPF program, which lives in the kernel and not in the task",
        "detach and close it before the dump, and have it loaded again after the restore",
    ),
    "anon_inode:bpf_link": (
        "a link of bpf(2), by which the kernel runs a program",
        "pin it in bpffs and close it, or detach it before the dump and attach it again after the restore",
    ),
    "anon_inode:bpf_iter": ("a walk of a BPF iterator that is under way", "read it to its end and close it"),
    "anon_inode:bpf-map": ("a BPF map that is mapped: which one cannot be seen", "unmap it before the dump"),
    "anon_inode:bpf*": ("an object of bpf(2), which lives in the kernel and not in the task", _AGAIN),
    "anon_inode:btf": (
        "type information for bpf(2), which lives in the kernel and not in the task",
        "close it: what was loaded with it keeps it",
    ),
    "anon_inode:[landlock-ruleset]": (
        "a Landlock ruleset, which the kernel does not show",
        "close it: once it has been put in force it is not needed",
    ),
    "anon_inode:seccomp notify": (
        "the listener of a seccomp filter (SECCOMP_RET_USER_NOTIF): calls may wait for an answer",
        "end the supervised processes first",
    ),
    "anon_inode:kvm-*": ("a virtual machine, whose state only /dev/kvm knows", _GUEST),
    "anon_inode:[fscontext]": (
        "a file system that is being set up (fsopen(2), fspick(2))",
        "wait until it is mounted, and close it",
    ),
    "anon_inode:[vfio*": ("a device passed through (VFIO)", _GUEST),
    "anon_inode:[iommufd]": ("a device passed through (iommufd)", _GUEST),
    "anon_inode:sync_file": ("a fence of a graphics driver", "run the program without hardware acceleration"),
    "anon_inode:dmabuf": ("a buffer shared with a device", "run the program without hardware acceleration"),
    "/dmabuf:*": ("a buffer shared with a device", "run the program without hardware acceleration"),
    "anon_inode:[lease]": ("a lease of a graphics driver", "run the program without hardware acceleration"),
    "anon_inode:*": ("a kind of file that Torpor does not know", _CLOSE),
}
#: Address families of sockets (include/linux/socket.h) → (what it is, hint)
FAMILIES = {
    15: ("a socket of the kernel's key management (AF_KEY)", _AGAIN),
    21: ("a socket of reliable datagrams (RDS)", _CLOSE),
    29: ("a CAN socket", _AGAIN),
    30: ("a TIPC socket", _CLOSE),
    31: ("a Bluetooth socket", "disconnect before the dump"),
    38: ("a socket of the kernel's cryptography (AF_ALG)", "run the program without AF_ALG, or close it"),
    43: ("an SMC socket", "run the program over TCP (without smc_run)"),
    44: ("an AF_XDP socket, which shares memory with a network card", _AGAIN),
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


def known(link: str) -> tuple[str, str] | None:
    """(what it is and why it is refused, hint) by what a link of /proc shows."""
    for pattern, what in KNOWN.items():
        if link == pattern or (pattern[-1] == "*" and link.startswith(pattern[:-1])):
            return what
    return None


def reason(source: SourceFile) -> Unsupported:
    """Why a description that nobody takes cannot be dumped."""
    if stat.S_ISSOCK(source.stat.st_mode):
        number = sockets.family(source.borrow()) if source.link.startswith("socket:[") else 0
        what, hint = FAMILIES.get(number, (f"a socket of address family {number}", _CLOSE))
        return unsupported(source, f"{what}: sockets of this kind are not supported yet", hint=hint)
    if stat.S_ISCHR(source.stat.st_mode):
        return _device(source)
    named = known(source.link)
    if named is not None:
        return unsupported(source, named[0], hint=named[1])
    if stat.S_ISDIR(source.stat.st_mode):
        return unsupported(source, "a directory of a file system that is mounted nowhere", hint=_CLOSE)
    return unsupported(source, "a kind of file that Torpor does not know", hint=_CLOSE)


def _device(source: SourceFile) -> Unsupported:
    what, hint = devices.keeper(source.stat.st_rdev)
    return unsupported(source, f"{what}: its driver keeps what cannot be seen from outside", hint=hint)


RESOURCE = Refused()
