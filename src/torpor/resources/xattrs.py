"""Extended attributes of files that are carried along: deleted ones and memfds. xattr(7); access control lists and file
capabilities are such, too.

Image: xattr_entry, ours, in ghost_file_entry and memfd_inode_entry.
"""

from __future__ import annotations

import errno
import os

from .. import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What a security module writes by itself: another machine's labels, and signatures of a file that is made anew.
LABELS = ("security.selinux", "security.SMACK64", "security.apparmor", "security.ima", "security.evm")


def dump(path: str, entries: Any) -> None:
    """Add an entry for each attribute of the file behind ``path``."""
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
            raise
        return  # the file system has none
    for name in names:
        if name not in LABELS:
            entries.add(name=os.fsencode(name), value=os.getxattr(path, name))


def restore(path: str, entries: Any) -> None:
    """Set them; it comes after chown(2), which takes file capabilities away. What is refused is left out."""
    for entry in entries:
        try:
            os.setxattr(path, bytes(entry.name), bytes(entry.value))
        except (OSError, ValueError) as error:
            log.warning(f"{path}: attribute {entry.name!r} is not set: {error}")
