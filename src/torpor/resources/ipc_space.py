"""The IPC namespace of a copy.

System V objects and POSIX message queues have identifiers and names, of which a namespace has each but once. So a copy
whose snapshot has any gets a namespace for itself, with the settings of ours, in which they are as they were; nobody
outside has a part in them. Of such a namespace all is dumped, used or not: what is in it is the tree's.

Kernel: ipc/namespace.c. setns(2) and unshare(2) let go of the caller's SEM_UNDO adjustments (exit_sem()): so who enters
is never a thread that may have any, but a child (apart.py) or a thread made for the purpose (engine/annex.py).
"""

from __future__ import annotations

import errno
import os

from ..errors import KernelError, doing
from ..linux import mounts
from ..linux.call import call
from ..proc import mountinfo
from ..proc.read import read
from .base import VMA_SYSVIPC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ..model.snapshot import Snapshot
    from .base import BuildContext

    T = TypeVar("T")

CLONE_NEWIPC = 0x08000000
SOURCE = "torpor"
IMAGES = ("ipcns-shm-", "ipcns-sem-", "ipcns-msg-")
SETTINGS = (
    "kernel/shmmax", "kernel/shmall", "kernel/shmmni", "kernel/shm_rmid_forced", "kernel/msgmax", "kernel/msgmnb",
    "kernel/msgmni", "kernel/sem", "fs/mqueue/queues_max", "fs/mqueue/msg_max", "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default", "fs/mqueue/msgsize_default",
)  # fmt: skip


class IpcSpace:
    """One that is not the caller's; ``fd`` is a descriptor of somebody else's for it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def run(self, action: Callable[[], T]) -> T:
        """What ``action()`` gives or raises in there."""

        def inside() -> T:
            enter(self.fd)
            return action()

        from .apart import apart  # few trees have any

        found: T = apart(inside)
        return found


def within(ctx: Any, action: Callable[[], T]) -> T:
    """What ``action()`` gives or raises where the System V objects are that a dump or a restore is about."""
    space = ctx.memo.get("ipc space")
    return action() if space is None else space.run(action)


def is_whole(ctx: Any) -> bool:
    """Is all that is in the namespace the tree's?"""
    return "ipc space" in ctx.memo


def is_used(snapshot: Snapshot, ctx: BuildContext) -> bool:
    """Has the tree anything that a copy needs a namespace for?"""
    return (
        any(name.startswith(IMAGES) for name in ctx.images.names())
        or any(entry.HasField("mq") for entry in snapshot.files.values())
        or any(vma.status & VMA_SYSVIPC for task in snapshot.tasks.values() if task.alive for vma in task.mm.vmas)
    )


def enter(fd: int) -> None:
    """Move the calling thread there. Raises KernelError."""
    call("setns", fd, CLONE_NEWIPC)


def unshare() -> int:
    """Move the calling thread into a new namespace with the settings of the old one; a descriptor for it. Raises
    KernelError.
    """
    wanted = _settings()
    call("unshare", CLONE_NEWIPC)
    for name, value in _settings().items():
        if value != wanted[name]:
            with doing(f"{name} of the IPC namespace"), open(f"/proc/sys/{name}", "wb", buffering=0) as file:
                file.write(wanted[name])
    return os.open("/proc/thread-self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)


def _settings() -> dict[str, bytes]:
    found = {}
    for name in SETTINGS:
        try:
            with open(f"/proc/sys/{name}", "rb", buffering=0) as file:
                found[name] = file.read()
        except FileNotFoundError:
            continue  # a kernel without POSIX message queues
    return found


def queues() -> dict[int, str]:
    """Inode → name of all POSIX message queues in the namespace of the calling thread. Raises KernelError."""
    try:
        mount = mounts.make("mqueue", {})
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return {}  # a kernel without them
        raise
    try:
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
    try:
        with os.scandir(folder) as found:
            return {one.inode(): one.name for one in found}
    finally:
        os.close(folder)


def mount_queues() -> None:
    """Where the queues of the old namespace are mounted, mount those of the one that the calling thread is in now."""
    for one in mountinfo.parse(read(os.getpid(), "mountinfo")):
        if (one.fstype, one.root) != (b"mqueue", b"/"):
            continue
        path = os.fsdecode(one.mountpoint)
        with doing(f"message queues on `{path}`"):
            mounts.mount("mqueue", {"source": SOURCE}, path)


def is_own(mount: mountinfo.Mount) -> bool:
    """Is it one of :func:`mount_queues`?"""
    return (mount.fstype, mount.source) == (b"mqueue", SOURCE.encode())
