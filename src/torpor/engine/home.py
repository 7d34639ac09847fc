"""The pid, mount and IPC namespaces of a tree that Torpor has woken there, as far as they matter to a dump of it.

A copy (restore --own-pids, a clone of a template) has an init that is Torpor's own and no part of the snapshot, and
mounts that are those of the one who made it, with a /proc of its own. So nothing of these namespaces has to be dumped:
what another copy is woken in is the same again. What is not so is refused by name: processes that are not below the
root, mounts that are not found here. What is in the IPC namespace is dumped (resources/ipc_space.py).

Where the root is process 1 itself, it is the only init there is; then the pid namespace is kept like any other
(engine/pid_spaces.py), and with it that there is such a mount namespace, but no IPC namespace. `unshare --pid --fork
--mount-proc` makes the same.

All numbers of processes in the images are those that the tree knows itself by (``SourceTask.vpid``); those that the
kernel tells us in its answers are ours, and are translated.
"""

from __future__ import annotations

import os

from ..errors import TaskGone, TorporError, Unsupported
from ..model.snapshot import INIT_PID
from ..proc import mountinfo
from ..proc import stat as proc_stat
from ..proc import status as proc_status
from ..proc.read import read
from ..proc.tasks import children
from ..resources import devpts, ipc_space, own_shm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ..resources.base import DumpContext

INIT_NAME = b"torpor-init"
MS_PRIVATE, MS_SLAVE = 0x40000, 0x80000  # include/uapi/linux/mount.h
#: The namespaces that a copy has for itself.
KINDS = ("pid", "mnt", "ipc")


class Home:
    """The namespaces. ``init`` is the number of their init as we see it; ``is_root``: that is the root of the tree."""

    __slots__ = ("init", "inodes", "is_root")

    def __init__(self, init: int, inodes: dict[str, int], *, is_root: bool = False) -> None:
        self.init = init
        self.is_root = is_root
        #: kind → inode of /proc/PID/ns/KIND
        self.inodes = inodes

    def settle(self, ctx: DumpContext) -> None:
        """Have a dump see the tree as it sees itself."""
        ctx.proc = f"/proc/{self.init}/root/proc"
        ctx.memo["home"] = self
        ctx.number = lambda pid: self.number(pid, ctx)
        fd = os.open(f"/proc/{self.init}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        ctx.adopt(fd)
        ctx.memo["namespace root", self.inodes["mnt"]] = fd
        if not self.is_root and self.inodes["ipc"] != _inode(os.getpid(), "ipc"):
            ipc_fd = os.open(f"/proc/{self.init}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
            ctx.adopt(ipc_fd)
            ctx.memo["ipc space"] = ipc_space.IpcSpace(ipc_fd)

    def number(self, pid: int, ctx: DumpContext) -> int:
        """The number in the namespace of what is ``pid`` to us: a thread, a process group, a session; 0 if it is not in
        there. One that is gone may have made a socket, and has its number from the restore that it was there for.
        """
        for task in ctx.tasks.values():
            for ours, theirs in (
                (task.pid, task.vpid), (task.stat.pgrp, task.group), (task.stat.session, task.session),
                *((thread.tid, thread.vtid) for thread in task.threads),
            ):  # fmt: skip
                if ours == pid:
                    return int(theirs)
        try:
            inside = _inode(pid, "pid") == self.inodes["pid"]
            return proc_status.parse(read(pid, "status")).NSpid[-1] if inside else 0
        except (TaskGone, OSError):
            return pid

    def troubles(self, tree: Collection[int]) -> Iterator[TorporError]:
        """What in the namespaces would not be there again."""
        for pid in children(self.init):
            if pid not in tree and _is_alive(pid):
                yield Unsupported(
                    f"process {pid} is in its pid namespace, and not below it: its parent has ended",
                    hint="end it before the dump",
                )
        here = [_shown(mount) for mount in _mounts(os.getpid())]
        own_proc = False
        for mount in _mounts(self.init):
            if _shown(mount) in here:
                here.remove(_shown(mount))
            elif (mount.mountpoint, mount.fstype, mount.root) == (b"/proc", b"proc", b"/") and not own_proc:
                own_proc = True
            elif own_shm.is_own(mount):
                yield from own_shm.troubles(self.init, tree)
            elif not devpts.is_own(mount) and not ipc_space.is_own(mount):  # all that is in those is the tree's
                yield _refused(mount)
        if self.is_root:
            try:
                self.propagation()
            except Unsupported as error:
                yield error

    def propagation(self) -> int:
        """What mounts made here do there: MS_SLAVE, they show, or MS_PRIVATE. Raises Unsupported for any other way."""
        groups = {_shown(mount): mount.shared or mount.master for mount in _mounts(os.getpid())}
        theirs = _mounts(self.init)
        if not any(mount.shared or mount.master for mount in theirs):
            return MS_PRIVATE
        for mount in theirs:
            if mount.mountpoint == b"/proc" or mount.mountpoint.startswith(b"/proc/"):
                continue  # hidden, or above what hides it
            if mount.shared or mount.master != groups.get(_shown(mount), 0):
                raise Unsupported(
                    f"{os.fsdecode(mount.mountpoint)}: mounts propagate to its mount namespace in a way of its own",
                    hint="have it made with mounts that are all private, or all slaves (unshare --propagation)",
                )
        return MS_SLAVE


def find(pid: int) -> Home | None:
    """The namespaces of a tree with this root, if they are as Torpor makes them and we are in those around; else
    None.
    """
    ours = proc_status.parse(read(os.getpid(), "status")).NSpid
    status = proc_status.parse(read(pid, "status"))
    if len(status.NSpid) != len(ours) + 1:
        return None
    try:
        if status.NSpid[-1] == INIT_PID:
            inodes = {kind: _inode(pid, kind) for kind in KINDS}
            return Home(pid, inodes, is_root=True) if _has_own_proc(pid, inodes) else None
        if not status.PPid:
            return None
        init = proc_status.parse(read(status.PPid, "status"))
        inodes = {kind: _inode(pid, kind) for kind in KINDS}
        alike = inodes == {kind: _inode(status.PPid, kind) for kind in KINDS}
    except (TaskGone, OSError):
        return None
    is_init = init.Name == INIT_NAME and len(init.NSpid) == len(status.NSpid) and init.NSpid[-1] == INIT_PID
    return Home(status.PPid, inodes) if is_init and alike else None


def _has_own_proc(pid: int, inodes: dict[str, int]) -> bool:
    """Does it see a /proc of its pid namespace, in a mount namespace that is not ours?"""
    if inodes["mnt"] == _inode(os.getpid(), "mnt"):
        return False
    try:
        return os.stat(f"/proc/{pid}/root/proc/{INIT_PID}/ns/pid").st_ino == inodes["pid"]
    except OSError:
        return False


def _mounts(pid: int) -> list[mountinfo.Mount]:
    return mountinfo.parse(read(pid, "mountinfo"))


def _inode(pid: int, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def _is_alive(pid: int) -> bool:
    try:
        return proc_stat.parse(read(pid, "stat")).state not in "ZX"
    except TaskGone:
        return False


def _shown(mount: mountinfo.Mount) -> tuple[object, ...]:
    """What makes two mounts the same to whoever finds files by their names."""
    return mount.dev, mount.root, mount.mountpoint, mount.options


def _refused(mount: mountinfo.Mount) -> Unsupported:
    where = os.fsdecode(mount.mountpoint)
    if (mount.fstype, mount.source) == (b"overlay", b"torpor"):
        return Unsupported(
            f"it sees {where} through an overlay of its own, and what it has written there would be lost",
            hint="dump a copy that was made without --overlay",
        )
    kind = mount.fstype.decode(errors="replace")
    return Unsupported(f"{where} ({kind}) is mounted in its mount namespace, and not so here", hint="unmount it")
