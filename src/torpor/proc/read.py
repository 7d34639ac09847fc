"""Reading /proc: the one place in this package that touches the file system.

A descriptor of the directory is kept from the first use on, so that reading goes on after a
change of root or of mount namespace, and shows the processes of the PID namespace we started in.
"""

from __future__ import annotations

import os

from ..errors import TaskGone

# The kernel hands out tables (maps, mountinfo) a page at a time, however large the buffer is, and
# single records (stat, status) whole if they fit in it.
_CHUNK = 1 << 16

_root = -1


def root() -> int:
    """Return the descriptor of /proc that everything here goes through; close-on-exec, opened on
    first use.
    """
    global _root
    if _root < 0:
        use_root("/proc")
    return _root


def use_root(path: str) -> None:
    """Read another procfs from now on. Raises OSError where ``path`` is no directory."""
    global _root
    fresh = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if _root >= 0:
        os.close(_root)
    _root = fresh


def read(pid: int, name: str) -> bytes:
    """Return the content of ``/proc/pid/name``.

    ``name`` may contain slashes (``fdinfo/3``, ``task/42/children``). Raises TaskGone when the
    task has ended (or has no memory any more, where that is what the file shows), OSError with
    the full path for anything else.
    """
    try:
        fd = os.open(f"{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root())
        try:
            return _read_all(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _explain(error, pid, name) from None


def read_system(name: str) -> bytes:
    """Return the content of ``/proc/name``, a file of the whole system. Raises OSError."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root())
        try:
            return _read_all(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _with_path(error, f"/proc/{name}") from None


def link(pid: int, name: str) -> bytes:
    """Return the target of the link ``/proc/pid/name`` (``exe``, ``fd/3``, ``ns/net``).

    Raises as :func:`read` does.
    """
    try:
        return os.readlink(os.fsencode(f"{pid}/{name}"), dir_fd=root())
    except OSError as error:
        raise _explain(error, pid, name) from None


def names(pid: int, name: str) -> list[str]:
    """Return the entries of the directory ``/proc/pid/name``, in the kernel's order.

    Raises as :func:`read` does.
    """
    try:
        fd = os.open(f"{pid}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root())
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _explain(error, pid, name) from None


def numbers(pid: int, name: str) -> list[int]:
    """Return the entries of a directory of numbers (``task``, ``fd``), sorted.

    Raises as :func:`read` does.
    """
    return sorted(map(int, names(pid, name)))


def open_file(pid: int, name: str, flags: int = os.O_RDONLY) -> int:
    """Open ``/proc/pid/name`` and return a close-on-exec descriptor.

    Raises as :func:`read` does.
    """
    try:
        return os.open(f"{pid}/{name}", flags | os.O_CLOEXEC, dir_fd=root())
    except OSError as error:
        raise _explain(error, pid, name) from None


def alive(pid: int) -> bool:
    """Tell whether a task with this number exists; a zombie does."""
    try:
        os.stat(str(pid), dir_fd=root())
    except FileNotFoundError:
        return False
    return True


def pids() -> list[int]:
    """Return the numbers of all processes that /proc shows, sorted."""
    # A directory is read from its start only through a description of its own; the kept one is
    # O_PATH.
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root())
    try:
        return sorted(int(name) for name in os.listdir(fd) if name.isdigit())
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    first = os.read(fd, _CHUNK)
    chunks = [first]
    while chunk := os.read(fd, _CHUNK):
        chunks.append(chunk)
    return first if len(chunks) == 1 else b"".join(chunks)


def _explain(error: OSError, pid: int, name: str) -> Exception:
    # A file of a task that ended while it was open gives ESRCH; one opened later gives ENOENT, as
    # does a file that this kernel does not have and a descriptor that is not open.
    if isinstance(error, ProcessLookupError) or (
        isinstance(error, FileNotFoundError) and not alive(pid)
    ):
        return TaskGone(f"task {pid} is gone")
    return _with_path(error, f"/proc/{pid}/{name}")


def _with_path(error: OSError, path: str) -> OSError:
    return OSError(error.errno, error.strerror, path)
