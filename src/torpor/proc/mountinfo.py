r"""/proc/PID/mountinfo: the mounts below a task's root.

Kernel: fs/proc_namespace.c, show_mountinfo().

Space, tab, newline and backslash are escaped as ``\ooo`` in all names, ``#`` in sources too.
"""

from __future__ import annotations

import os

from .record import Record

_DELETED = b"//deleted"


class Mount(Record):
    """One mount.

    ``root`` is the path within the file system that is mounted, ``deleted`` tells that it has
    been removed there. ``mountpoint`` is relative to the root of the task. ``options`` are those
    of the mount, ``super_options`` those of the file system; the latter keep their escapes, since
    each file system has rules of its own (:func:`unescape`). Groups are 0 where the mount is in
    none.
    """

    mnt_id: int
    parent_id: int
    dev: tuple[int, int]
    root: bytes
    deleted: bool
    mountpoint: bytes
    options: tuple[bytes, ...]
    shared: int
    master: int
    propagate_from: int
    unbindable: bool
    fstype: bytes
    source: bytes
    super_options: bytes


def parse(data: bytes) -> list[Mount]:
    """Parse the file, in the kernel's order.

    Raises ValueError when it is not what the kernel writes.
    """
    mounts: list[Mount] = []
    line = b""
    try:
        for line in data.split(b"\n"):
            if line:
                mounts.append(_mount(line))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"mountinfo: cannot read {line!r}: {error}") from None
    return mounts


def unescape(text: bytes) -> bytes:
    """Undo escapes of the form backslash and three octal digits."""
    if b"\\" not in text:
        return text
    first, *rest = text.split(b"\\")
    plain = [first]
    for part in rest:
        digits = part[:3]
        if len(digits) == 3 and digits.translate(None, b"01234567") == b"" and digits < b"400":
            plain += (bytes((int(digits, 8),)), part[3:])
        else:
            plain += (b"\\", part)
    return b"".join(plain)


def settings(mount: Mount) -> dict[str, str]:
    """Those options of a mount's file system that have a value."""
    words = (os.fsdecode(word).partition("=") for word in mount.super_options.split(b","))
    return {name: value for name, _, value in words if value}


def _mount(line: bytes) -> Mount:
    # The kernel escapes spaces before the separator; behind it options may hold anything.
    left, right = line.split(b" - ", 1)
    mnt_id, parent_id, dev, root, mountpoint, options, *optional = left.split(b" ")
    fstype, source, super_options = right.split(b" ", 2)
    major, minor = dev.split(b":")
    shared = master = propagate_from = 0
    unbindable = False
    for field in optional:
        tag, _, group = field.partition(b":")
        if tag == b"shared":
            shared = int(group)
        elif tag == b"master":
            master = int(group)
        elif tag == b"propagate_from":
            propagate_from = int(group)
        elif tag == b"unbindable":
            unbindable = True
        # Others may come: proc(5) asks readers to skip them.
    deleted = root.endswith(_DELETED)
    return Mount(
        int(mnt_id),
        int(parent_id),
        (int(major), int(minor)),
        unescape(root[: -len(_DELETED)] if deleted else root),
        deleted,
        unescape(mountpoint),
        tuple(options.split(b",")),
        shared,
        master,
        propagate_from,
        unbindable,
        unescape(fstype),
        unescape(source),
        super_options,
    )
