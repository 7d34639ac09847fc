"""epoll(7): a set of watched descriptors.

Image: file_entry.epfd (eventpoll_file_entry), one eventpoll_tfd_entry for each watch. Kernel:
fs/eventpoll.c.

The kernel knows a watch by the open file description and the number of the descriptor by which it
was added. The number may stand for something else by now, or for nothing, while the file lives on
under another one: ``tfd`` is a number by which the task has the file now, as CRIU writes it,
``number`` (ours) the one that it was added by.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct

from ...errors import ImageError, KernelError
from ...images import schema as pb
from ...limits import FD_MAX
from ...linux.call import call
from ...linux.kernel import KCMP_EPOLL_TFD
from ...proc import fdinfo_watches
from ...proc.read import numbers
from ..base import FileResource, unsupported
from ..fown import set_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...images.schema import Message
    from ...proc.fdinfo_watches import EpollTarget
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

EPOLL_CTL_ADD = 1
EPOLLERR, EPOLLHUP = 0x8, 0x10  # the kernel adds them to whatever is asked for
#: EP_PRIVATE_BITS, EPOLLWAKEUP to EPOLLET: how to watch. All that is left of a EPOLLONESHOT watch
#: that has fired.
PRIVATE_BITS = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31
EPOLLONESHOT = 1 << 30
#: _IOR/_IOW(0x8A, 2/1, struct epoll_params), include/uapi/linux/eventpoll.h (since v6.9)
EPIOCGPARAMS, EPIOCSPARAMS = 0x80088A02, 0x40088A01


class Eventpoll(FileResource):
    """The watches are added by a task that holds both it and what it watches."""

    FD_TYPE, FIELD = 7, "epfd"
    LINKS = ("anon_inode:[eventpoll]",)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        entry = pb.eventpoll_file_entry(id=source.id, flags=source.flags, fown=ctx.fown(source))
        params = _busy_poll(source.borrow())
        if params:
            entry.busy_poll = params
        for target, fd, number in _find_all(source):
            watch = entry.tfd.add(
                id=0, tfd=fd, events=target.events, data=target.data,
                dev=target.sdev, inode=target.ino, pos=target.pos & (1 << 64) - 1,
            )  # fmt: skip
            if number != fd:
                watch.number = number
            if not target.events & ~PRIVATE_BITS:
                watch.ready = _readiness(source, fd, ctx)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        fd = call("epoll_create1", os.O_CLOEXEC)
        try:
            set_flags(fd, entry.flags)
            if entry.busy_poll:
                fcntl.ioctl(fd, EPIOCSPARAMS, struct.pack("=Q", entry.busy_poll))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        spent = [watch for watch in entry.tfd if not watch.events & ~PRIVATE_BITS]
        live = [watch for watch in entry.tfd if watch.events & ~PRIVATE_BITS]
        late: dict[int, list[Callable[[Program], None]]] = ctx.memo.get(("late fds", program.name), {})
        for watch in spent:
            # Watched for what it is ready for just now, and that taken: so it has fired, and
            # watches no more.
            _add(watch, watch.events | watch.ready, fd, program)
        if any(watch.ready for watch in spent):
            events = program.out(12 * len(spent))
            program.call("epoll_pwait", fd, events, len(spent), 0, 0, 8, why="EPOLLONESHOT, spent")
        for watch in live:
            if watch.tfd in late:
                # Whoever makes the file adds it.
                late[watch.tfd].append(functools.partial(_add, watch, watch.events, fd))
            else:
                _add(watch, watch.events, fd, program)


# --------------------------------------------------------------------------------------------- dump


def _busy_poll(fd: int) -> int:
    """struct epoll_params as a number; 0 where nothing was set or the kernel has none."""
    params = bytearray(8)
    try:
        fcntl.ioctl(fd, EPIOCGPARAMS, params)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY):
            return 0
        raise
    return int.from_bytes(params, "little")


def _find_all(source: SourceFile) -> list[tuple[EpollTarget, int, int]]:
    """(watch, a number by which the task has the file, the number to add it by) for all watches."""
    targets = fdinfo_watches.epoll(source.fdinfo)
    if not targets:
        return []
    open_now = set(numbers(source.holder, "fd"))
    taken = open_now | {target.tfd for target in targets}
    seen: dict[int, int] = {}
    found: list[tuple[EpollTarget, int, int]] = []
    used: set[int] = set()
    for target in targets:
        # Several watches may have been added by one number that stood for several files in turn.
        offset = seen.get(target.tfd, 0)
        seen[target.tfd] = offset + 1
        fd = _holder(source, target, offset, open_now)
        number = target.tfd
        if fd != number and (number in open_now or number in used):
            # By this number it cannot be added again. As before, no number will ever match it.
            number = next(free for free in range(len(taken) + 1) if free not in taken)
            taken.add(number)
        used.add(number)
        found.append((target, fd, number))
    return found


def _holder(source: SourceFile, target: EpollTarget, offset: int, open_now: set[int]) -> int:
    if target.tfd in open_now and _is_target(source, target, offset, target.tfd):
        return target.tfd
    for fd in sorted(open_now):
        try:
            status = os.stat(f"/proc/{source.holder}/fd/{fd}")
        except OSError:
            continue
        if status.st_ino == target.ino and _is_target(source, target, offset, fd):
            return fd
    raise unsupported(
        source,
        f"it watches a file that was added as fd {target.tfd} and that task {source.holder} has"
        " closed since",
        hint="the file is held by another process; remove the watch before the file is closed",
    )


def _is_target(source: SourceFile, target: EpollTarget, offset: int, fd: int) -> bool:
    slot = struct.pack("=3I", source.fd, target.tfd, offset)  # struct kcmp_epoll_slot
    try:
        return call("kcmp", source.holder, source.pid, KCMP_EPOLL_TFD, fd, slot) == 0
    except KernelError as error:
        if error.errno == errno.EBADF:
            return False
        raise


def _readiness(source: SourceFile, fd: int, ctx: DumpContext) -> int:
    """The events that the task's ``fd`` is ready for, as poll(2) and epoll(7) call them alike."""
    import select

    task = ctx.tasks.get(source.holder)
    if task is None:
        return 0
    poll = select.poll()
    poll.register(ctx.borrow(task, fd), select.POLLIN | select.POLLPRI | select.POLLOUT)
    for _, events in poll.poll(0):
        return events & (select.POLLIN | select.POLLPRI | select.POLLOUT)
    return 0


# ------------------------------------------------------------------------------------------ restore


def _add(watch: Message, events: int, fd: int, program: Program) -> None:
    number = watch.number if watch.HasField("number") else watch.tfd
    if watch.tfd >= FD_MAX or number >= FD_MAX:
        raise ImageError(
            "files.img", "epfd: tfd", f"{max(watch.tfd, number)} is no file descriptor"
        )
    if number != watch.tfd:
        program.call(
            "dup3", watch.tfd, number, os.O_CLOEXEC, why="the number that it was watched by"
        )
    event = struct.pack("=IQ", events, watch.data)  # struct epoll_event is packed on x86-64
    program.call("epoll_ctl", fd, EPOLL_CTL_ADD, number, event, why="epoll watch")
    if number != watch.tfd:
        program.call("close", number)


RESOURCE = Eventpoll()
