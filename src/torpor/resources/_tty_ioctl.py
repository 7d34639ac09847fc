"""Terminals by ioctl: numbers, termios as bytes and as a message, the small questions.

Kernel: drivers/tty/tty_io.c, tty_ioctl.c, tty_jobctrl.c, pty.c; include/uapi/asm-generic/ioctls.h,
termbits.h
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..images import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message

TCSETS, TCGETS2, TCSETS2 = 0x5402, 0x802C542A, 0x402C542B
TIOCEXCL, TIOCSCTTY, TIOCGPGRP, TIOCSPGRP = 0x540C, 0x540E, 0x540F, 0x5410
TIOCSTI, TIOCGWINSZ, TIOCSWINSZ, FIONREAD, TIOCPKT = 0x5412, 0x5413, 0x5414, 0x541B, 0x5420
TIOCGETD, TIOCGSID, TIOCGPTPEER = 0x5424, 0x5429, 0x5441
TIOCGLCKTRMIOS, TIOCSLCKTRMIOS = 0x5456, 0x5457
TIOCGPTN, TIOCSPTLCK, TIOCGDEV = 0x80045430, 0x40045431, 0x80045432
TIOCGPKT, TIOCGPTLCK, TIOCGEXCL = 0x80045438, 0x80045439, 0x80045440
KDGETMODE, VT_GETMODE, VT_MODE_BYTES, VT_PROCESS = 0x4B3B, 0x5601, 8, 1  # uapi/linux/kd.h, vt.h

#: /dev/tty, /dev/console, /dev/ptmx, and the slaves of ptys: Documentation/admin-guide/devices.txt
CTTY_DEVICE, CONSOLE_DEVICE, MASTER_DEVICE = (5, 0), (5, 1), (5, 2)
SLAVE_MAJOR, TTY_MAJOR, FIRST_SERIAL = 136, 4, 64

ICANON, ECHO, IEXTEN, EXTPROC = 0o2, 0o10, 0o100000, 0o200000
VEOF, VMIN, VEOL, VLNEXT, VEOL2 = 4, 6, 11, 15, 16
NCCS = 19

_TERMIOS = struct.Struct(f"<4IB{NCCS}s")
_TERMIOS2 = struct.Struct(f"<4IB{NCCS}s2I")


class Termios:
    """struct termios2. ``cc`` is the NCCS bytes of c_cc; speeds are in bits per second, 0 where
    not known.
    """

    __slots__ = ("cc", "cflag", "iflag", "ispeed", "lflag", "line", "oflag", "ospeed")

    def __init__(
        self,
        iflag: int,
        oflag: int,
        cflag: int,
        lflag: int,
        line: int,
        cc: bytes,
        ispeed: int = 0,
        ospeed: int = 0,
    ) -> None:
        self.iflag, self.oflag, self.cflag, self.lflag = iflag, oflag, cflag, lflag
        self.line, self.cc, self.ispeed, self.ospeed = line, cc, ispeed, ospeed

    @classmethod
    def of_entry(cls, entry: Message) -> Termios:
        """From a termios_entry. One with too few or too large control characters raises
        ValueError.
        """
        cc = bytes(entry.c_cc[:NCCS])
        if len(cc) != NCCS or entry.c_line > 255:
            raise ValueError(f"{len(cc)} control characters, line discipline {entry.c_line}")
        flags = (entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag)
        return cls(*flags, entry.c_line, cc, entry.c_ispeed, entry.c_ospeed)

    def entry(self) -> Message:
        """As a termios_entry."""
        return pb.termios_entry(
            c_iflag=self.iflag,
            c_oflag=self.oflag,
            c_cflag=self.cflag,
            c_lflag=self.lflag,
            c_line=self.line,
            c_ispeed=self.ispeed,
            c_ospeed=self.ospeed,
            c_cc=list(self.cc),
        )

    def apply(self, fd: int) -> None:
        """Set them at once, flushing nothing."""
        flags = (self.iflag, self.oflag, self.cflag, self.lflag, self.line, self.cc)
        if self.ospeed:
            fcntl.ioctl(fd, TCSETS2, _TERMIOS2.pack(*flags, self.ispeed, self.ospeed))
        else:  # CRIU does not store the speeds; those of a pty mean nothing
            fcntl.ioctl(fd, TCSETS, _TERMIOS.pack(*flags))

    def changed(self, **values: Any) -> Termios:
        """A copy with other values."""
        kept = {name: getattr(self, name) for name in self.__slots__}
        return Termios(**{**kept, **values})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Termios) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]


def termios(fd: int) -> Termios:
    """The settings of a terminal; of a pty, asked at either end, those of the slave."""
    return Termios(*_TERMIOS2.unpack(fcntl.ioctl(fd, TCGETS2, bytes(_TERMIOS2.size))))


def termios_locked(fd: int) -> Termios:
    """Which bits of the settings are locked against changes."""
    return Termios(*_TERMIOS.unpack(fcntl.ioctl(fd, TIOCGLCKTRMIOS, bytes(_TERMIOS.size))))


def lock_termios(fd: int, locked: Termios) -> None:
    """Lock settings. Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE."""
    raw = _TERMIOS.pack(locked.iflag, locked.oflag, locked.cflag, locked.lflag, locked.line, locked.cc)
    fcntl.ioctl(fd, TIOCSLCKTRMIOS, raw)


def winsize(fd: int) -> tuple[int, int, int, int]:
    """Rows, columns, width and height in pixels."""
    rows, columns, width, height = struct.unpack("4H", fcntl.ioctl(fd, TIOCGWINSZ, bytes(8)))
    return rows, columns, width, height


def set_winsize(fd: int, rows: int, columns: int, width: int, height: int) -> None:
    """Set the size; the foreground process group gets SIGWINCH if it is another one."""
    fcntl.ioctl(
        fd,
        TIOCSWINSZ,
        struct.pack("4H", rows & 0xFFFF, columns & 0xFFFF, width & 0xFFFF, height & 0xFFFF),
    )


def ask(fd: int, request: int) -> int:
    """The int that an ioctl answers with."""
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def ask_or(fd: int, request: int, otherwise: int) -> int:
    """As :func:`ask`; ``otherwise`` where the terminal has no such thing (ENOTTY)."""
    try:
        return ask(fd, request)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return otherwise


def tell(fd: int, request: int, value: int) -> None:
    """An ioctl that takes an int by address."""
    fcntl.ioctl(fd, request, struct.pack("i", value))


def hung_up(fd: int) -> bool:
    """Is the other end gone for good? Then nearly every ioctl fails with EIO."""
    try:
        ask(fd, FIONREAD)
    except OSError as error:
        if error.errno == errno.EIO:
            return True
        if error.errno not in (errno.ENOTTY, errno.EINVAL):  # a line discipline of another kind may not know of it
            raise
    return False


def open_peer(master: int, flags: int) -> int:
    """The slave of a pty, opened through its master; never as a controlling terminal.

    Linux kernel commit 54ebbfb16034 ("tty: add TIOCGPTPEER ioctl") (in v4.13). What it opens lacks
    O_LARGEFILE, so where the flags have that the slave is opened once more, by its path. And what is asked for
    with O_CLOEXEC shows that as a flag of the description for ever, in fdinfo too.
    """
    plain = flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_NOCTTY
    peer = fcntl.ioctl(master, TIOCGPTPEER, plain)
    os.set_inheritable(peer, False)
    if not flags & 0o100000:
        return peer
    try:
        return os.open(f"/proc/self/fd/{peer}", plain | os.O_CLOEXEC)
    finally:
        os.close(peer)
