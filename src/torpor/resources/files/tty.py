"""Terminals: both ends of ptys, /dev/tty, consoles and serial lines, and terminals from outside.

Image: file_entry.tty (tty_file_entry) for a description, tty-info for the terminal behind it,
tty-data for what waits to be read in a pty, a reg_file_entry for the path. Kernel: drivers/tty/

A pty is dumped whole where its master is in the tree. If only the slave is, the terminal is the
shell's that the tree was started from, and a restore connects it to another one (--shell-job,
--inherit-fd). What belongs to a machine, such as the console, is opened again by its path. The
controlling terminal is set by its session's leader: see :func:`emit_session`.

Not seen from outside, and so not kept: output stopped by TCXOFF, a status byte of packet mode that
was not read yet, and what was written to a master whose slave nobody in the tree has or had open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct

from ...errors import TorporError, Unsupported, doing
from ...images import schema as pb
from .. import _tty_ioctl as tty
from ..base import FileResource, unsupported
from . import _tty_build
from ._tty_data import End, Keeper, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

PTY, CONSOLE, VT, CTTY, EXTERNAL, SERIAL = range(1, 7)  # enum TtyType
_REG = 1
#: Numbers that CRIU gives to terminals that are no ptys; those of ptys are 2 * index, the master's
#: 2 * index + 1.
_FIXED_IDS = {CONSOLE: 2004, VT: 2008, CTTY: 2012, SERIAL: 2020, EXTERNAL: 2024}
_LAST_ID = 2046  # the last of CRIU's numbers, those of external terminals being the highest
_FREE_IDS = 1 << 21  # above all that ptys can have
_DEVICE = 0xFFFFFFFF  # stat shows it signed
_SERIAL_MAJORS = {166, 188, 204, 229}  # ttyACM, ttyUSB, ttyAMA and its kind, hvc
_N_TTY = 0


class Kind:
    """What a terminal is: ``type`` of the constants above, ``index`` of a pty, whether it is its
    master.
    """

    __slots__ = ("index", "master", "type")

    def __init__(self, type: int, index: int = -1, master: bool = False) -> None:
        self.type = type
        self.index = index
        self.master = master


def device_type(rdev: int) -> int:
    """Which type of terminal a device number belongs to; 0: it is none."""
    device = os.major(rdev), os.minor(rdev)
    if device == tty.CTTY_DEVICE:
        return CTTY
    if device == tty.CONSOLE_DEVICE:
        return CONSOLE
    if device == tty.MASTER_DEVICE or device[0] == tty.SLAVE_MAJOR:
        return PTY
    if device[0] == tty.TTY_MAJOR:
        return VT if device[1] < tty.FIRST_SERIAL else SERIAL
    return SERIAL if device[0] in _SERIAL_MAJORS else 0


class Pair:
    """A pty as far as it was seen: descriptors of ours for its ends (-1: not held by the tree),
    numbers of its infos.
    """

    __slots__ = ("index", "label", "master", "master_info", "slave", "slave_info")

    def __init__(self, index: int) -> None:
        self.index = index
        self.master = self.slave = -1
        self.master_info = self.slave_info = 0
        self.label = ""

    def see(self, source: SourceFile, fd: int, master: bool) -> None:
        """Another descriptor of it was found."""
        if master:
            self.master = fd
        else:
            self.slave = fd
            self.label = f"fd {source.fd} ({source.link})"


class Tty(FileResource):
    """An open terminal."""

    FD_TYPE, FIELD = 11, "tty"
    MODES = (stat.S_IFCHR,)
    PRIORITY = 20

    def claims(self, source: SourceFile) -> bool:
        return bool(device_type(source.stat.st_rdev)) and not source.flags & os.O_PATH

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        fd = source.borrow()
        hung = tty.hung_up(fd)
        if not hung and device_type(source.stat.st_rdev) != CTTY:
            devices = ctx.memo.setdefault(("tty", "devices"), set())
            devices.add(tty.ask_or(fd, tty.TIOCGDEV, 0) & _DEVICE)
        if hung or _external_key(source, ctx) is not None:
            return
        if tty.ask_or(fd, tty.TIOCGETD, _N_TTY) != _N_TTY:
            raise unsupported(source, "it has a line discipline of its own (PPP, SLIP, …)")
        kind = _kind(source, fd)
        if kind.type == VT:
            _check_virtual(source, fd)
        if kind.type == PTY:
            _pair(ctx, kind.index).see(source, fd, kind.master)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        self.check(source, ctx)
        entry = pb.tty_file_entry(id=source.id, tty_info_id=0, flags=source.flags)
        entry.fown.CopyFrom(ctx.fown(source))
        key = _external_key(source, ctx)
        fd = source.borrow()
        if key is not None:
            kind = Kind(EXTERNAL)
        else:
            entry.regf_id = _path_entry(source, ctx)
            kind = _kind(source, fd)
        entry.tty_info_id = _info_id(source, fd, kind, ctx)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        return _tty_build.terminals(ctx).take(entry)


def _check_virtual(source: SourceFile, fd: int) -> None:
    """Raise Unsupported for what nobody could give back to a virtual terminal: drivers/tty/vt/vt_ioctl.c"""
    key = _tty_build.key_of(source.stat.st_rdev, source.stat.st_dev)
    hint = f"--external {key}, and --inherit-fd fd[N]:{key} at the restore"
    if tty.ask_or(fd, tty.KDGETMODE, 0):
        raise unsupported(source, "it shows graphics, of which the kernel knows nothing", hint=hint)
    if fcntl.ioctl(fd, tty.VT_GETMODE, bytes(tty.VT_MODE_BYTES))[0] == tty.VT_PROCESS:
        raise unsupported(source, "a program is asked before it is switched away from", hint=hint)


def _external_key(source: SourceFile, ctx: DumpContext) -> str | None:
    key = _tty_build.key_of(source.stat.st_rdev, source.stat.st_dev)
    return key if ctx.options.external_value(key) is not None else None


def _kind(source: SourceFile, fd: int) -> Kind:
    rdev = source.stat.st_rdev
    kind = device_type(rdev)
    if kind != PTY:
        return Kind(kind)
    if (os.major(rdev), os.minor(rdev)) == tty.MASTER_DEVICE:
        return Kind(PTY, tty.ask(fd, tty.TIOCGPTN), True)
    return Kind(PTY, os.minor(rdev))


def _pair(ctx: DumpContext, index: int) -> Pair:
    pairs = ctx.memo.setdefault(("tty", "pairs"), {})
    if index not in pairs:
        pairs[index] = Pair(index)
    found: Pair = pairs[index]
    return found


def unheld(leaders: Iterable[tuple[int, int]], ctx: DumpContext) -> list[TorporError]:
    """An error for each session whose controlling terminal nobody in the tree holds: it could not be had back, unless
    that is allowed. ``leaders``: (pid, tty_nr of its stat) of the leaders of sessions.

    For the preflight, after every file was checked.
    """
    if ctx.options.shell_job:
        return []
    devices = ctx.memo.get(("tty", "devices"), ())
    found: list[TorporError] = []
    for pid, number in leaders:
        device = number & _DEVICE
        if not device or device in devices:
            continue
        major, minor = os.major(device), os.minor(device)
        name = f"/dev/pts/{minor}" if major == tty.SLAVE_MAJOR else f"device {major}:{minor}"
        found.append(Unsupported(
            f"task {pid}: no task of the tree has its controlling terminal ({name}) open",
            hint="--shell-job connects the tree to your terminal when it is restored, or to none",
        ))  # fmt: skip
    return found


def unpaired(ctx: DumpContext) -> list[TorporError]:
    """What all files together lack: an error for each pty of which only the slave is in the tree,
    unless that is allowed.

    For the preflight, after every file was checked.
    """
    if ctx.options.shell_job or ctx.options.orphan_pts_master:
        return []
    return [
        Unsupported(
            f"{pair.label}: the terminal's other end is outside of the tree",
            hint="--shell-job connects the tree to your terminal when it is restored; "
            "or start it with `setsid` and without the terminal",
        )
        for pair in ctx.memo.get(("tty", "pairs"), {}).values()
        if pair.slave >= 0 and pair.master < 0
    ]


def _path_entry(source: SourceFile, ctx: DumpContext) -> int:
    """The id of a new reg_file_entry with the path of the terminal."""
    entry = pb.reg_file_entry(
        id=ctx.new_id("file"),
        flags=source.flags,
        pos=0,
        name=source.link.removesuffix(" (deleted)"),
        mode=source.stat.st_mode,
    )
    entry.fown.CopyFrom(pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0))
    ctx.images.append("files", pb.file_entry(type=_REG, id=entry.id, reg=entry))
    number: int = entry.id
    return number


def _info_id(source: SourceFile, fd: int, kind: Kind, ctx: DumpContext) -> int:
    """The number of the terminal's tty_info_entry, which is written when it is met first."""
    hung = tty.hung_up(fd)
    sid, pgrp = (0, 0) if hung else _session(source, fd, kind, ctx)
    if kind.type == CTTY and not sid and not ctx.options.shell_job:
        kind = _behind_ctty(source, fd, kind)
    numbers = ctx.memo.setdefault(("tty", "infos"), {})
    rdev = source.stat.st_rdev
    if hung and kind.type != EXTERNAL:
        key: tuple[object, ...] = ("hung", source.id)
    else:
        key = (
            kind.type,
            kind.index,
            kind.master,
            rdev if kind.type != PTY else 0,
            sid if kind.type == CTTY else 0,
        )
    if key in numbers:
        found: int = numbers[key]
        return found
    wanted = 2 * kind.index + kind.master if kind.type == PTY else _FIXED_IDS[kind.type]
    while wanted in numbers.values():
        wanted = wanted + 2 if kind.type == EXTERNAL and wanted < _LAST_ID else max(wanted + 1, _FREE_IDS)
    numbers[key] = wanted
    entry = _info_entry(source.stat, wanted, kind)
    entry.sid, entry.pgrp = sid, pgrp
    if not hung:
        _settings(fd, entry)  # of an external one they are its owner's, but CRIU insists on them
        if kind.type == PTY:
            pair = _pair(ctx, kind.index)
            setattr(pair, "master_info" if kind.master else "slave_info", wanted)
    ctx.images.append("tty-info", entry)
    return wanted


def _info_entry(status: os.stat_result, number: int, kind: Kind) -> Message:
    entry = pb.tty_info_entry(
        id=number,
        type=kind.type,
        locked=False,
        exclusive=False,
        packet_mode=False,
        sid=0,
        pgrp=0,
        rdev=status.st_rdev,
        dev=status.st_dev,
        uid=status.st_uid,
        gid=status.st_gid,
    )
    if kind.type == PTY:
        entry.pty.index = kind.index
    return entry


def _settings(fd: int, entry: Message) -> None:
    entry.exclusive = bool(tty.ask_or(fd, tty.TIOCGEXCL, 0))
    entry.packet_mode = bool(tty.ask_or(fd, tty.TIOCGPKT, 0))
    entry.locked = bool(tty.ask_or(fd, tty.TIOCGPTLCK, 0))
    entry.termios.CopyFrom(tty.termios(fd).entry())
    entry.termios_locked.CopyFrom(tty.termios_locked(fd).entry())
    rows, columns, width, height = tty.winsize(fd)
    entry.winsize.CopyFrom(pb.winsize_entry(ws_row=rows, ws_col=columns, ws_xpixel=width, ws_ypixel=height))


def _behind_ctty(source: SourceFile, fd: int, kind: Kind) -> Kind:
    """A /dev/tty whose session is over is dumped as the slave that it leads to."""
    device = tty.ask(fd, tty.TIOCGDEV)
    if os.major(device) != tty.SLAVE_MAJOR:
        raise unsupported(source, "it leads to a terminal that is not a pty", hint="--shell-job")
    return Kind(PTY, os.minor(device))


def _session(source: SourceFile, fd: int, kind: Kind, ctx: DumpContext) -> tuple[int, int]:
    """Session and foreground process group of a terminal, as the tree numbers them; (0, 0) where
    it has none.

    Only a master tells an outsider (TIOCGSID); of other terminals those tasks do whose controlling
    terminal it is.
    """
    sid = pgrp = 0
    if kind.master:
        sid, pgrp = tty.ask_or(fd, tty.TIOCGSID, 0), tty.ask_or(fd, tty.TIOCGPGRP, 0)
    else:
        device = tty.ask_or(fd, tty.TIOCGDEV, 0) & _DEVICE
        for task in ctx.tasks.values():
            if not task.zombie and device and task.stat.tty_nr & _DEVICE == device:
                sid, pgrp = task.stat.session, task.stat.tpgid
                break
    if sid <= 0:
        return 0, 0
    leader = ctx.tasks.get(sid)
    if leader is None:
        if ctx.options.shell_job or kind.type == EXTERNAL:
            return 0, 0
        raise unsupported(
            source,
            f"it is the terminal of session {sid}, whose leader is outside of the tree",
            hint="--shell-job connects the tree to your terminal when it is restored",
        )
    group = next((task.group for task in ctx.tasks.values() if task.stat.pgrp == pgrp), 0)
    return leader.vpid, group


class Unread:
    """What waited in the ptys of the tree, taken out of them while the tasks are stopped."""

    def __init__(self, keeper: Keeper | None) -> None:
        self._keeper = keeper

    def put_back(self) -> None:
        """The tasks go on: put everything back. Does nothing the second time."""
        self._release(put_back=True)

    def forget(self) -> None:
        """The tasks are gone."""
        self._release(put_back=False)

    def _release(self, *, put_back: bool) -> None:
        if self._keeper is not None:
            self._keeper.release(put_back=put_back)
            self._keeper = None


def finish(ctx: DumpContext) -> Unread:
    """After all files: refuse ptys with half of them missing, write what waits in the others to
    tty-data.

    From then on the bytes are kept by a process of their own: call one of the methods of what is
    returned, :meth:`put_back` if anything fails. Should this process die, they are put back as
    well.
    """
    alive = [task for task in ctx.tasks.values() if not task.zombie]
    leaders = [(task.pid, task.stat.tty_nr) for task in alive if task.stat.session == task.pid]
    for error in [*unpaired(ctx), *unheld(leaders, ctx)]:
        raise error
    ends: list[End] = []
    for pair in ctx.memo.get(("tty", "pairs"), {}).values():
        if pair.master >= 0:
            with doing(f"pty {pair.index}"):
                ends += _ends(pair, ctx)
    if not ends:
        return Unread(None)
    keeper = Keeper(ends)
    unread = Unread(keeper)
    try:
        for number, data in keeper.taken.items():
            ctx.images.append("tty-data", pb.tty_data_entry(tty_id=number, data=data))
    except BaseException:
        unread.put_back()
        raise
    if not keeper.taken:
        unread.forget()
    return unread


def _ends(pair: Pair, ctx: DumpContext) -> list[End]:
    """The ends of a pty that something may wait in."""
    found: list[End] = []
    slave = _own_slave(pair, ctx)
    if slave >= 0:
        if not pair.slave_info:
            _add_slave_info(pair, slave, ctx)
        elif os.fstat(slave).st_dev != os.fstat(pair.slave).st_dev:
            raise Unsupported(f"there are two terminals /dev/pts/{pair.index}, of different mounts of devpts")
        # Part of a line is not seen before it is read.
        if tty.termios(slave).lflag & tty.ICANON or readable(slave):
            found.append(End(pair.slave_info, slave, pair.master, False))
    # Nobody can read from a master that is open for writing only.
    write_only = fcntl.fcntl(pair.master, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    if not write_only and readable(pair.master) and tty.ask(pair.master, tty.FIONREAD):
        found.append(End(pair.master_info, pair.master, pair.master, True))
    return found


def _own_slave(pair: Pair, ctx: DumpContext) -> int:
    """A description of our own of a pty's slave, not blocking; -1 where none may be opened.

    Opening a slave and closing it again is seen at the master where nobody else has it open: it
    reads EIO from then on. So only a slave that the tree holds, or that was open once and is
    closed, is opened.
    """
    poll = select.poll()
    poll.register(pair.master, 0)
    closed = any(what & select.POLLHUP for _, what in poll.poll(0))
    if pair.slave < 0 and not closed:
        return -1
    locked = tty.ask(pair.master, tty.TIOCGPTLCK)
    if locked:
        tty.tell(pair.master, tty.TIOCSPTLCK, 0)
    try:
        slave = tty.open_peer(pair.master, os.O_RDWR | os.O_NONBLOCK)
    finally:
        if locked:
            tty.tell(pair.master, tty.TIOCSPTLCK, 1)
    ctx.adopt(slave)
    return slave


def _add_slave_info(pair: Pair, slave: int, ctx: DumpContext) -> None:
    """A slave that no descriptor of the tree leads to: its info tells that it was open once."""
    pair.slave_info = 2 * pair.index
    entry = _info_entry(os.fstat(slave), pair.slave_info, Kind(PTY, pair.index))
    _settings(slave, entry)
    ctx.images.append("tty-info", entry)


def emit_session(pid: int, program: Program, ctx: BuildContext) -> None:
    """Emit the call that gives a session its controlling terminal. ``pid`` is the task's number in
    the images.

    To be done by the session's leader, after its setsid(2) and before the other members are
    cloned: they get the terminal by inheritance only (kernel/fork.c, copy_signal). It uses the
    builder's descriptor. For other tasks nothing is emitted.
    """
    fd, lent = _tty_build.terminals(ctx).controlling(pid)
    if fd >= 0:
        # What the caller lends is taken from another session, as CRIU does it: tiocsctty() in drivers/tty/tty_jobctrl.c
        program.call("ioctl", fd, tty.TIOCSCTTY, int(lent), why="controlling terminal")


def emit_foreground(pid: int, program: Program, ctx: BuildContext, seen: Callable[[int], int] = int) -> None:
    """Emit the call that makes a process group that of the foreground.

    To be done by the session's leader, once all members have joined their groups. Its own group is
    in the foreground until then, so that SIGTTOU does not come into it. ``seen``: how the task sees a group.
    """
    terminals = _tty_build.terminals(ctx)
    fd, _ = terminals.controlling(pid)
    group = terminals.foreground(pid)
    if fd >= 0 and group:
        # A group that has ended by now, in images of CRIU, leaves the leader's in the foreground.
        gone = (errno.ESRCH, errno.EPERM)
        program.call("ioctl", fd, tty.TIOCSPGRP, struct.pack("<i", seen(group)), may_fail=gone, why="foreground")


RESOURCE = Tty()
