"""The pid file of a restore."""

from __future__ import annotations

import os

from ..errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..options import Options
    from ..undo import Undo


def write(options: Options, pid: int, undo: Undo) -> None:
    """Create ``options.pidfile`` (relative to the work directory) with the pid in it.

    Raises UsageError when there is such a file already.
    """
    path = os.path.join(options.work_dir or options.images_dir, options.pidfile)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"pidfile `{path}`: {error.strerror}") from None
    undo.add(f"pidfile {path}", lambda: os.unlink(path))
    try:
        os.write(fd, str(pid).encode())
    finally:
        os.close(fd)
