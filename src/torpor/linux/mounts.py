"""Mounts by descriptor, and mount namespaces of single threads.

Kernel: fs/fsopen.c, fs/namespace.c
"""

from __future__ import annotations

import os

from ..errors import KernelError
from .call import call
from .kernel import name_bytes

CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 2, 4, 8
MOVE_MOUNT_F_EMPTY_PATH = 4
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
AT_FDCWD = -100
_MESSAGE_BYTES = 4096


def make(kind: str, settings: dict[str, str], attributes: int = 0) -> int:
    """A new file system of that kind, as the root of a mount that is not attached anywhere: it ends with the last who
    uses it. ``attributes``: MOUNT_ATTR_*.

    Returns a descriptor. Raises KernelError, with what the kernel's log of the mount says.
    """
    context = call("fsopen", name_bytes(kind), FSOPEN_CLOEXEC)
    try:
        try:
            for key, value in settings.items():
                call("fsconfig", context, FSCONFIG_SET_STRING, name_bytes(key), name_bytes(value), 0)
            call("fsconfig", context, FSCONFIG_CMD_CREATE, None, None, 0)
        except KernelError as error:
            said = _said(context)
            assert error.errno is not None
            raise KernelError(f"fsconfig ({said})" if said else "fsconfig", error.errno) from None
        return call("fsmount", context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def _said(context: int) -> str:
    """What the kernel has to say about a file system that could not be made: lines of a letter and a text."""
    lines = []
    while True:
        try:
            line = os.read(context, _MESSAGE_BYTES)
        except OSError:
            break
        lines.append(line[2:].decode(errors="replace").strip())
    return "; ".join(lines)


def attach(mount: int, path: str) -> None:
    """Mount at ``path`` what :func:`make` has made, in the mount namespace of the calling thread."""
    call("move_mount", mount, b"\0", AT_FDCWD, name_bytes(path), MOVE_MOUNT_F_EMPTY_PATH)


def mount(kind: str, settings: dict[str, str], path: str, attributes: int = 0) -> None:
    """Make a new file system and mount it at ``path``, see :func:`make`. Raises KernelError."""
    made = make(kind, settings, attributes)
    try:
        attach(made, path)
    finally:
        os.close(made)


def bind(source: str, path: str) -> None:
    """Mount the file or directory ``source`` on ``path`` as well, in the mount namespace of the calling thread."""
    call("mount", name_bytes(source), name_bytes(path), None, MS_BIND, None)


def unshare() -> tuple[int, int]:
    """Move the calling thread into a copy of its mount namespace; mounts made in it do not show elsewhere.

    Returns descriptors of the namespace and of the thread's root in it. The thread cannot be used for anything else
    afterwards: it has a working directory, a root and a umask of its own.
    """
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/\0", None, MS_REC | MS_SLAVE, None)
    namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return namespace, os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except BaseException:
        os.close(namespace)
        raise


def enter(namespace: int, root: int) -> None:
    """Move the calling thread into a namespace of :func:`unshare`, for good."""
    call("unshare", CLONE_FS)
    call("setns", namespace, CLONE_NEWNS)
    call("fchdir", root)
    call("chroot", b".\0")
