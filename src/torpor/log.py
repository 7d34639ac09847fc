"""Log lines in CRIU's grammar: ``(00.012345) eventfd: …``, seconds since the start of the operation.

One process runs one operation at a time, so there is one sink. Levels are CRIU's: 0 messages, 1 errors, 2 warnings, 3
info, 4 debug.
"""

from __future__ import annotations

import os
import time

ERROR, WARNING, INFO, DEBUG = 1, 2, 3, 4

_start = time.monotonic()
_level = WARNING
_fd = -1


def open_log(fd: int, level: int = WARNING) -> None:
    """Send lines of ``level`` and more important to ``fd`` (-1: nowhere); restarts the clock."""
    global _fd, _level, _start
    _fd, _level, _start = fd, level, time.monotonic()


def descriptor() -> int:
    """Where lines go; -1: nowhere."""
    return _fd


def keep_for_long() -> int:
    """For a process that outlives the operation: the descriptor that the log still goes to.

    It is a file's. Whoever reads a pipe would wait for its end, so from now on the system's log gets what would go
    there.
    """
    global _fd
    import stat

    if _fd >= 0 and not stat.S_ISREG(os.fstat(_fd).st_mode):
        _fd = _system_log()
    return _fd


def _system_log() -> int:
    """A socket to syslogd (RFC 3164), -1 if there is none."""
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        sock.connect("/dev/log")
    except OSError:
        sock.close()
        return -1
    return sock.detach()


def enabled(level: int) -> bool:
    """Would a line of this level be written? Ask before an expensive message is made."""
    return _fd >= 0 and level <= _level


def _write(level: int, text: str) -> None:
    if not enabled(level):
        return
    prefix = {ERROR: "Error: ", WARNING: "Warn: "}.get(level, "")
    try:
        os.write(_fd, f"({time.monotonic() - _start:09.6f}) {prefix}{text}\n".encode(errors="replace"))
    except OSError:
        pass  # a full disk must not turn a log line into a failed operation


def error(text: str) -> None:
    """Why the operation fails."""
    _write(ERROR, text)


def warning(text: str) -> None:
    """Something the reader should know although the operation goes on."""
    _write(WARNING, text)


def info(text: str) -> None:
    """One line per phase, with its numbers."""
    _write(INFO, text)


def debug(text: str) -> None:
    """Everything else."""
    _write(DEBUG, text)
