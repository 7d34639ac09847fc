"""What a pager hears from others: the restoring process, which hands the tasks' memory over, and dumps, which ask it to
come to an end.

A pager listens at an abstract unix address, by which others find it: ``torpor-pager-N``. A message holds a word and
numbers of processes; the answer says whether the memory of one of them is still being brought in. If so, and the word
is "hurry", the pager does.
"""

from __future__ import annotations

import os
import select
import struct
import time

from ..errors import KernelError, TaskGone, Unsupported
from ..linux import sockets
from ..proc import smaps as proc_smaps
from ..proc.read import read, read_system
from . import journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .journal import Journal
    from .pager import Pager
    from .pending import Piece

NAME = b"\0torpor-pager-"
HURRY, QUESTION = b"hurry", b"question"
YES, NO, READY, RELEASE = b"y", b"n", b"r", b"g"
MESSAGE_BYTES_MAX = 1 << 16
ANSWER_MS = 2000
ASK_AGAIN_S = 0.005
USERFAULTFD = "anon_inode:[userfaultfd]"


class Abandoned(Exception):
    """The restoring process has given up, or has ended."""


class Wanted:
    """The pager's end of things. ``control`` is a socket to the restoring process, ``listener`` one for others."""

    def __init__(
        self, control: int, listener: int, spaces: list[tuple[list[Piece], list[tuple[int, int]]]], *, lazy: bool
    ) -> None:
        """``spaces``: for each address space that will be handed over, what is to be brought in, and the (start, end)
        of the mappings that are registered.
        """
        self.control = control
        self.listener = listener
        self.spaces = spaces
        self.lazy = lazy

    def receive(self, pager: Pager) -> None:
        """Take over the address spaces. Raises Abandoned."""
        for pieces, spans in self.spaces:
            with sockets.Socket(self.control) as sock:
                data, control, _, _ = sock.recvmsg(1, 64, sockets.MSG_CMSG_CLOEXEC)
            if not data or not control:
                raise Abandoned
            fd, pidfd, pagemap_fd = struct.unpack("=iii", control[0][2][:12])
            pager.add(fd, pidfd, pagemap_fd, pieces, spans)
        pager.write()
        os.write(self.control, READY)

    def await_release(self, book: Journal) -> None:
        """Wait until the tasks are let go, which the journal then says. Raises Abandoned."""
        if not book.receive(journal.RELEASED, self.control):
            raise Abandoned

    def asked(self, pager: Pager) -> bool:
        """Answer somebody who has connected; are we to hurry?"""
        peer = sockets.accept(self.listener)
        try:
            if not _is_trusted(peer) or not readable(peer, ANSWER_MS):
                return False
            word, *numbers = os.read(peer, MESSAGE_BYTES_MAX).split()
            pids = set(map(int, numbers))
            # Of the children of tasks nobody knows the number.
            ours = any(space.pidfd < 0 or pid_of(space.pidfd) in pids for space in pager.spaces.values())
            os.write(peer, YES if ours else NO)
            return ours and word == HURRY
        except (OSError, ValueError):
            return False
        finally:
            os.close(peer)


def _is_trusted(fd: int) -> bool:
    with sockets.Socket(fd) as sock:
        credentials = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("=iII", credentials)
    return uid in (0, os.geteuid())


def listen(number: int) -> int:
    """The socket at which a pager is found; ``number`` is of its choosing. Raises KernelError."""
    fd = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    try:
        sockets.bind(fd, NAME + b"%d" % number)
        sockets.listen(fd, 64)
    except BaseException:
        os.close(fd)
        raise
    return fd


def settle(processes: Callable[[], Collection[int]]) -> None:
    """Wait until no pager has to bring in memory of any of these processes; it is told to hurry. Raises Unsupported."""
    for name in _pagers():
        pids = processes()
        while _has_one_of(name, HURRY, pids):
            time.sleep(ASK_AGAIN_S)


def is_served(pid: int) -> bool:
    """Does a pager bring in memory of the process? Raises Unsupported."""
    return any(_has_one_of(name, QUESTION, [pid]) for name in _pagers())


def _pagers() -> list[bytes]:
    """The addresses of all pagers."""
    lines = read_system("net/unix")
    mark = b"@" + NAME[1:]
    if mark not in lines:
        return []
    return sorted({b"\0" + line.rsplit(b"@", 1)[1] for line in lines.splitlines() if b" " + mark in line})


def _has_one_of(name: bytes, word: bytes, pids: Collection[int]) -> bool:
    """Ask one pager. One that is gone has nothing."""
    fd = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    try:
        sockets.connect(fd, name)
        if not _is_trusted(fd):
            return False
        os.write(fd, b" ".join([word, *(b"%d" % pid for pid in pids)]))
        if not readable(fd, 5 * ANSWER_MS):
            raise Unsupported(f"the pager {os.fsdecode(name[1:])} does not answer", hint="is it stopped?")
        return os.read(fd, 1) == YES
    except (KernelError, ConnectionError):
        return False  # nobody listens any more, or a pager has died before it could answer
    finally:
        os.close(fd)


def readable(fd: int, timeout_ms: int | None = None) -> bool:
    """Wait until there is something to be read from a descriptor, or its end. select(2) knows small numbers only."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_ms))


def is_userfaultfd(fd: int) -> bool:
    """Is this descriptor of ours open, and one of those?"""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == USERFAULTFD
    except OSError:
        return False


def pid_of(pidfd: int) -> int:
    """The process that a pidfd stands for, -1 when it has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb", buffering=0) as file:
        for line in file.read().splitlines():
            if line.startswith(b"Pid:"):
                return int(line[4:])
    return -1


def mappings_with(flag: str, pidfd: int) -> list[tuple[int, int]]:
    """The (start, end) of a process's mappings with a flag of smaps; none of a process that nobody knows (-1)."""
    pid = pid_of(pidfd) if pidfd >= 0 else -1
    if pid <= 0:
        return []
    try:
        return [(start, end) for start, end, names in proc_smaps.parse_flags(read(pid, "smaps")) if flag in names]
    except (TaskGone, OSError):
        return []


def without(start: int, end: int, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of [start, end) that lie in none of ``spans``, which are ascending."""
    found = []
    for low, high in spans:
        if low >= end:
            break
        if start < low:
            found.append((start, low))
        start = max(start, high)
    return [*found, (start, end)] if start < end else found
