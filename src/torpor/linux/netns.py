"""Network namespaces of the calling thread: setns(2), unshare(2), and the loopback interface."""

from __future__ import annotations

import fcntl
import os
import struct

from ..errors import KernelError, TaskGone
from .call import call

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
IFREQ = struct.Struct("16sh22x")


def own() -> int:
    """A descriptor for the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter(fd: int) -> None:
    """Move the calling thread into a network namespace. Raises KernelError."""
    call("setns", fd, CLONE_NEWNET)


def of(pid: int) -> int:
    """A descriptor for that of another process. Raises TaskGone and KernelError."""
    try:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise TaskGone(f"task {pid} is gone") from None
    except OSError as error:
        raise KernelError(f"open the network namespace of task {pid}", error.errno or 0) from None


class Visit:
    """The calling thread is in the network namespace ``fd``, which is taken over, until :meth:`end`.

    ``inode`` is that of the namespace; ``elsewhere`` tells whether it is another one than before, ``home`` is the
    inode of that. Raises KernelError.
    """

    __slots__ = ("_back", "elsewhere", "fd", "home", "inode")

    def __init__(self, fd: int) -> None:
        self.fd, self._back = fd, -1
        try:
            self._back = own()
            self.inode, self.home = os.fstat(fd).st_ino, os.fstat(self._back).st_ino
            self.elsewhere = self.inode != self.home
            if self.elsewhere:
                enter(fd)
        except BaseException:
            self._close()
            raise

    def away(self) -> _Away:
        """A context in which the thread is where it was before."""
        return _Away(self)

    def reopen_home(self) -> int:
        """A descriptor for the namespace that the thread was in before."""
        return os.open(f"/proc/self/fd/{self._back}", os.O_RDONLY | os.O_CLOEXEC)

    def end(self) -> None:
        """Go back."""
        try:
            if self.elsewhere:
                enter(self._back)
        finally:
            self._close()

    def _close(self) -> None:
        for fd in (self.fd, self._back):
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class _Away:
    def __init__(self, visit: Visit) -> None:
        self._visit = visit

    def __enter__(self) -> None:
        if self._visit.elsewhere:
            enter(self._visit._back)

    def __exit__(self, *_: object) -> None:
        if self._visit.elsewhere:
            enter(self._visit.fd)


def make() -> int:
    """A descriptor for a new one, in which nothing is set up; the calling thread stays where it is.

    Raises KernelError.
    """
    back = own()
    try:
        call("unshare", CLONE_NEWNET)
        try:
            return own()
        finally:
            enter(back)
    finally:
        os.close(back)


def unshare() -> None:
    """Move the calling thread into a new one, in which the loopback interface is up. Raises KernelError."""
    call("unshare", CLONE_NEWNET)
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        _, flags = IFREQ.unpack(fcntl.ioctl(any_socket, SIOCGIFFLAGS, IFREQ.pack(b"lo", 0)))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, IFREQ.pack(b"lo", flags | IFF_UP))
