"""timerfd_create(2): a timer behind a file descriptor.

Image: file_entry.tfd (timerfd_entry); the value is the time left, for absolute timers too. Kernel:
fs/timerfd.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from ...errors import ImageError, KernelError
from ...images import schema as pb
from ...linux.call import buffer, call
from ...proc import fdinfo, fdinfo_kinds
from ...proc.read import read
from ..base import FileResource
from ..fown import set_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400  # _IOW('T', 0, u64), include/uapi/linux/timerfd.h
CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM = 8, 9
#: Alarm clocks show the time of the clock that they are an alarm for.
_SHOWN_BY = {CLOCK_REALTIME_ALARM: time.CLOCK_REALTIME, CLOCK_BOOTTIME_ALARM: time.CLOCK_BOOTTIME}
_NS = 1_000_000_000


class Timerfd(FileResource):
    """A timer: its clock, the time left, its period, the expirations that nobody has read yet."""

    FD_TYPE, FIELD = 17, "tfd"
    LINKS = ("anon_inode:[timerfd]",)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        seen = fdinfo_kinds.timerfd(source.fdinfo)
        if seen.ticks and seen.it_value == (0, 0) and seen.it_interval != (0, 0):
            seen = _bring_up_to_date(source.borrow())
        (seconds, nanoseconds), (every_s, every_ns) = seen.it_value, seen.it_interval
        return pb.timerfd_entry(
            id=source.id, flags=source.flags, fown=ctx.fown(source),
            clockid=seen.clockid, ticks=seen.ticks, settime_flags=seen.settime_flags,
            vsec=seconds, vnsec=nanoseconds, isec=every_s, insec=every_ns,
        )  # fmt: skip

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        fd = call("timerfd_create", entry.clockid, os.O_CLOEXEC)
        try:
            set_flags(fd, entry.flags)
            try:
                call("timerfd_settime", fd, entry.settime_flags, _itimerspec(entry), None)
            except KernelError as error:
                # ECANCELED: the clock was set right now. The timer runs all the same.
                if error.errno != errno.ECANCELED:
                    raise
            if entry.ticks:
                fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("=Q", entry.ticks))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def settle(self, entry: Message, fd: int, program: Program, ctx: BuildContext) -> None:
        # The time that the restore takes is not to count. An absolute timer goes by its clock,
        # which does not wait.
        if entry.settime_flags & TFD_TIMER_ABSTIME or not (entry.vsec or entry.vnsec):
            return
        program.call(
            "timerfd_settime", fd, entry.settime_flags, _itimerspec(entry), 0, why="timerfd starts"
        )
        if entry.ticks:
            ticks = struct.pack("=Q", entry.ticks)
            program.call("ioctl", fd, TFD_IOC_SET_TICKS, ticks, why="expirations not read yet")


def _bring_up_to_date(fd: int) -> fdinfo_kinds.Timerfd:
    """Count the expirations of a periodic timer and start it again, as a read(2) would.

    Once it has expired, a periodic timer stands still until somebody asks, and fdinfo does not: it
    shows one expiration and no time left, whatever has become due since.
    """
    spec = buffer(32)
    call("timerfd_gettime", fd, spec)
    _, _, seconds, nanoseconds = struct.unpack("=4q", spec.raw)
    seen = fdinfo_kinds.timerfd(fdinfo.parse(read(os.getpid(), f"fdinfo/{fd}")))
    if seen.it_value != (0, 0):
        return seen
    # Expired again in between: then it is due at once, which no time left would not say.
    return seen._replace(it_value=max((seconds, nanoseconds), (0, 1)))


def _itimerspec(entry: Message) -> bytes:
    """struct itimerspec: the interval, then the value, from now on or of the clock."""
    words = (entry.isec, entry.insec, entry.vsec, entry.vnsec)
    if max(words) >> 63:
        raise ImageError("files.img", f"file {entry.id}: tfd", "a time beyond all clocks")
    if not entry.settime_flags & TFD_TIMER_ABSTIME or not (entry.vsec or entry.vnsec):
        return struct.pack("=4q", *words)
    now = time.clock_gettime_ns(_SHOWN_BY.get(entry.clockid, entry.clockid))
    seconds, nanoseconds = divmod(now + entry.vsec * _NS + entry.vnsec, _NS)
    return struct.pack("=4q", entry.isec, entry.insec, min(seconds, (1 << 63) - 1), nanoseconds)


RESOURCE = Timerfd()
