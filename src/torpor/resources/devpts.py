"""The file system of ptys: an instance for one copy alone.

devpts gives out the numbers of its ptys, and the number is the name: /dev/pts/7 is there once. In an instance of its
own every number is free to a copy, whatever other copies have, and it sees no terminals but its own. The instance is
mounted where the tree's ptys had their nodes, in the copy's mount namespace (engine/own_mounts.py).

Kernel: fs/devpts/inode.c, drivers/tty/pty.c
"""

from __future__ import annotations

import os

from ..errors import doing
from ..linux import mounts
from ..proc import mountinfo
from ..proc.read import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .base import BuildContext

SOURCE = "torpor"
_TTY = 11  # fd_types.TTY
_ATTRIBUTES = {b"nosuid": mounts.MOUNT_ATTR_NOSUID, b"noexec": mounts.MOUNT_ATTR_NOEXEC}


def folder(ctx: BuildContext) -> str:
    """Where an instance has to be mounted that is to have all ptys of the tree; "" if it has none, or if some are
    those of whoever wakes it, whose names lead to the instance that is there.
    """
    if all(resource.FD_TYPE != _TTY for resource, _ in ctx.files.values()):
        return ""
    from .files._tty_build import terminals  # few trees have any

    found = terminals(ctx).folder()
    return found if found and _mounted_at(found) is not None else ""


def mount_own(path: str) -> None:
    """Mount a new instance at ``path``, like the one that is there, in the mount namespace of the calling thread.
    Raises KernelError.
    """
    there = _mounted_at(path)
    assert there is not None
    with doing(f"devpts on `{path}`"):
        settings = {"source": SOURCE, **mountinfo.settings(there)}
        attributes = sum(_ATTRIBUTES.get(option, 0) for option in there.options)
        mounts.mount("devpts", settings, path, attributes)
        for one in _mounts():  # some containers have /dev/ptmx like this
            if (one.dev, one.root) == (there.dev, b"/ptmx"):
                mounts.bind(f"{path}/ptmx", os.fsdecode(one.mountpoint))


def is_own(mount: mountinfo.Mount) -> bool:
    """Is it one of :func:`mount_own`?"""
    return (mount.fstype, mount.source) == (b"devpts", SOURCE.encode())


def _mounted_at(path: str) -> mountinfo.Mount | None:
    """The instance that is to be seen at a place."""
    there = [one for one in _mounts() if one.mountpoint == os.fsencode(path)]
    return there[-1] if there and (there[-1].fstype, there[-1].root) == (b"devpts", b"/") else None


def _mounts() -> list[mountinfo.Mount]:
    return mountinfo.parse(read(os.getpid(), "mountinfo"))
