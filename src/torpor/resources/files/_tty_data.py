"""What waits in a pty to be read: taken out at a dump, and put into a pty.

The kernel shows these bytes to nobody but a reader, so a dump takes them out, and puts them back
where the tasks go on. That is done by a process of its own, the :class:`Keeper`: should the dump
be killed, the keeper puts the bytes back.

Bytes are put in by TIOCSTI, which passes them to the line discipline at once (a write to the other
end would go through a work queue), while the settings are such that nothing is echoed, translated
or taken for a signal.

The form of the bytes is that of typing: for a terminal that gathers lines, a line that was ended
by the EOF character is followed by it, and such characters inside of a line are quoted by LNEXT.
Kernel: drivers/tty/n_tty.c
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal

from ...errors import TorporError
from .. import _tty_ioctl as tty
from .._tty_ioctl import ICANON, IEXTEN, VEOF, VEOL, VEOL2, VLNEXT, Termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: N_TTY_BUF_SIZE less one: what the line discipline holds. More waits unprocessed in front of it.
LINE_BYTES_MAX = 4095
#: An end: the buffers in front of the line discipline hold 64 KiB at most (TTYB_DEFAULT_MEM_LIMIT).
UNREAD_BYTES_MAX = 1 << 18


class End:
    """One end of a pty: ``fd`` is a descriptor for it, ``info_id`` its number in the images."""

    __slots__ = ("fd", "info_id", "is_master", "master")

    def __init__(self, info_id: int, fd: int, master: int, is_master: bool) -> None:
        self.info_id = info_id
        self.fd = fd
        self.master = master
        self.is_master = is_master


def pipes() -> tuple[int, int, int, int]:
    """Two pipes, to talk with a child: from the child, to the parent, from the parent, to the child."""
    from_child, to_parent = os.pipe2(os.O_CLOEXEC)
    try:
        from_parent, to_child = os.pipe2(os.O_CLOEXEC)
    except BaseException:
        os.close(from_child)
        os.close(to_parent)
        raise
    return from_child, to_parent, from_parent, to_child


class Keeper:
    """Takes out the unread bytes of some ends and keeps them until it is told what to do.

    ``taken`` is info id → bytes. :meth:`release` ends it.
    """

    def __init__(self, ends: list[End]) -> None:
        from_child, to_parent, from_parent, to_child = pipes()
        self.taken: dict[int, bytes] = {}
        self._ends = ends
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(to_child)
                os.close(from_child)
                _keep(ends, to_parent, from_parent)
            finally:
                os._exit(0)
        os.close(to_parent)
        os.close(from_parent)
        self._command = to_child
        try:
            for end in ends:
                data = _receive(from_child)
                if data:
                    self.taken[end.info_id] = data
        except BaseException:
            self.release(put_back=True)
            raise
        finally:
            os.close(from_child)

    def release(self, *, put_back: bool) -> None:
        """End the keeper, after it has put everything back where that is wished."""
        if self._pid:
            try:
                os.write(self._command, b"p" if put_back else b"f")
            except BrokenPipeError:
                pass
            os.close(self._command)
            _, status = os.waitpid(self._pid, 0)
            self._pid = 0
            if status and put_back:  # it was killed, so this process does it
                _put_back([(end, self.taken.get(end.info_id, b"")) for end in self._ends])


def _keep(ends: list[End], out: int, commands: int) -> None:
    """The keeper's life. No signal meant for the dump's process group may end it."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGPIPE,
        signal.SIGTTOU,
    ):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    taken: list[tuple[End, bytearray]] = []
    forget = False
    try:
        for end in ends:
            data = bytearray()
            taken.append((end, data))
            take(end, data)
            message = len(data).to_bytes(4, "little") + data
            while message:
                message = message[os.write(out, message) :]
        os.close(out)
        forget = os.read(commands, 1) == b"f"
    finally:
        if not forget:
            _put_back(taken)


def _put_back(taken: Sequence[tuple[End, bytes | bytearray]]) -> None:
    for end, data in taken:
        if data:
            put(end, bytes(data), tty.termios(end.master))


def _receive(fd: int) -> bytes:
    size = int.from_bytes(_read_exactly(fd, 4), "little")
    return _read_exactly(fd, size)


def _read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, size)
        if not part:
            raise TorporError("what waits in a pty could not be taken out of it")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def take(end: End, taken: bytearray) -> None:
    """Move the unread bytes of one end to ``taken``. ``end.fd`` of a slave must be a description
    of our own, not blocking.
    """
    if end.is_master:
        packets = tty.ask(end.fd, tty.TIOCGPKT)
        if not tty.ask(end.fd, tty.FIONREAD) and not readable(end.fd):
            return
        if packets:  # else each read begins with a byte about the state of the terminal
            tty.tell(end.fd, tty.TIOCPKT, 0)
        try:
            _take_raw(end.fd, taken)
        finally:
            if packets:
                tty.tell(end.fd, tty.TIOCPKT, 1)
        return
    settings = tty.termios(end.fd)
    if settings.lflag & ICANON:
        _take_lines(end.fd, settings, taken)
    else:
        _take_raw(end.fd, taken)


def readable(fd: int) -> bool:
    """Is there something to read? Asking also lets the kernel process what has just arrived
    (n_tty_poll).
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(what & select.POLLIN for _, what in poll.poll(0))


def _take_raw(fd: int, taken: bytearray) -> None:
    while len(taken) < UNREAD_BYTES_MAX:
        readable(fd)
        waiting = tty.ask(fd, tty.FIONREAD)
        if waiting <= 0:
            break
        taken += os.read(fd, waiting)


def _take_lines(fd: int, settings: Termios, taken: bytearray) -> None:
    """All complete lines as they are, then what is typed so far of the next one."""
    while len(taken) < UNREAD_BYTES_MAX and readable(fd):
        try:
            line = os.read(fd, LINE_BYTES_MAX + 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EIO):
                break
            raise
        taken += typed(line, settings)
    # A line that is not ended can be read only where lines do not matter. That setting loses
    # nothing once all complete lines are gone; it would lose their ends (n_tty_set_termios).
    rest = bytearray()
    settings.changed(lflag=settings.lflag & ~ICANON).apply(fd)
    try:
        _take_raw(fd, rest)
    finally:
        settings.apply(fd)
        taken += quoted(rest, settings)


def typed(line: bytes, settings: Termios) -> bytes:
    """What is to be typed so that one read gives ``line``."""
    ends = {10, settings.cc[VEOL], settings.cc[VEOL2]} - {0} | {10}
    if line and line[-1] in ends:
        return quoted(line[:-1], settings) + line[-1:]
    return quoted(line, settings) + bytes([settings.cc[VEOF]])


def quoted(text: bytes | bytearray, settings: Termios) -> bytes:
    """``text`` with LNEXT before each character that would end a line, where there is an LNEXT."""
    quote = settings.cc[VLNEXT]
    if not settings.lflag & IEXTEN or not quote:
        return bytes(text)
    special = ({10, quote} | {settings.cc[index] for index in (VEOF, VEOL, VEOL2)}) - {0}
    if special.isdisjoint(text):
        return bytes(text)
    return b"".join(bytes([quote, byte]) if byte in special else bytes([byte]) for byte in text)


def silent(settings: Termios) -> Termios:
    """Settings under which typed bytes have no effect but to be there; ICANON must not differ
    (it would lose them).
    """
    cc = bytearray(tty.NCCS)
    lflag = settings.lflag & (ICANON | tty.EXTPROC)
    if lflag & ICANON:
        lflag |= settings.lflag & IEXTEN
        for index in (VEOF, VEOL, VEOL2, VLNEXT):
            cc[index] = settings.cc[index]
    else:
        cc[tty.VMIN] = 1
    return settings.changed(iflag=0, lflag=lflag, cc=bytes(cc))


def put(end: End, data: bytes, settings: Termios) -> None:
    """Put ``data`` into one end so that it can be read there; ``settings`` are those the pty has
    afterwards.
    """
    if end.is_master:
        _type(end.fd, data)
        return
    packets = tty.ask(end.master, tty.TIOCGPKT)
    if packets:  # the reader of packets would be told of the settings in between
        tty.tell(end.master, tty.TIOCPKT, 0)
    try:
        silent(settings).apply(end.fd)
        rest = _type(end.fd, data)
        settings.apply(end.fd)
    finally:
        if packets:
            tty.tell(end.master, tty.TIOCPKT, 1)
    if rest:
        _write(end.master, rest)


def _type(fd: int, data: bytes) -> bytes:
    """Type as much as the line discipline holds; returns the rest. Needs CAP_SYS_ADMIN."""
    for byte in data[:LINE_BYTES_MAX]:
        fcntl.ioctl(fd, tty.TIOCSTI, bytes([byte]))
    return data[LINE_BYTES_MAX:]


def _write(fd: int, data: bytes) -> None:
    """What the line discipline had no room for waits in front of it, as it did before."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data and poll.poll(0):
        # Of more than one byte a part might be written and the rest waited for.
        data = data[os.write(fd, data[:1]) :]
