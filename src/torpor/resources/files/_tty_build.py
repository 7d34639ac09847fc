"""Making terminals anew, in the builder, which itself must never get one as its controlling
terminal: O_NOCTTY always.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time

from ...errors import ImageError, KernelError, Unsupported, doing
from ...linux.kernel import pidfd_getfd
from .. import _tty_ioctl as tty
from .._tty_ioctl import Termios
from ._tty_data import End, pipes, put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ...images.schema import Message
    from ..base import BuildContext

PTY, CONSOLE, VT, CTTY, EXTERNAL, SERIAL = range(1, 7)  # enum TtyType
_NAMES = {
    CONSOLE: "console",
    VT: "virtual terminal",
    CTTY: "/dev/tty",
    EXTERNAL: "external terminal",
    SERIAL: "serial line",
}
_FD_TYPE = 11
_TRIES, _PAUSE_S = 200, 0.005
_OPENABLE = os.O_ACCMODE | os.O_NONBLOCK


def key_of(rdev: int, dev: int) -> str:
    """How --external and --inherit-fd call a terminal: its device number, and that of the file
    system of its node.
    """
    return f"tty[{rdev:x}:{dev:x}]"


def name_of(info: Message) -> str:
    """A terminal in words."""
    return f"pty {info.pty.index}" if info.type == PTY else _NAMES.get(info.type, "terminal")


def open_pair(ptmx: str, index: int, flags: int) -> int:
    """The master of a new pty with the number ``index``, unlocked; Unsupported where it is in use.

    devpts gives out the lowest free number: what comes before the wanted one is held meanwhile. The
    number of a pty that has just been closed is given back a moment after its node is gone
    (drivers/tty/tty_io.c, queue_release_one_tty), which is waited for.
    """
    node = f"{pts_beside(ptmx)}/{index}"
    for _ in range(_TRIES):
        fd = _try_pair(ptmx, index, flags)
        if fd >= 0:
            tty.tell(fd, tty.TIOCSPTLCK, 0)
            return fd
        if os.path.lexists(node):
            break
        time.sleep(_PAUSE_S)
    raise Unsupported(
        f"there is another terminal with the number {index}",
        hint="close it, or restore with namespaces of its own (--own-pids)",
    )


def _try_pair(ptmx: str, index: int, flags: int) -> int:
    held: list[int] = []
    try:
        while True:
            fd = _open_ptmx(ptmx, flags)
            held.append(fd)
            number = tty.ask(fd, tty.TIOCGPTN)
            if number == index:
                return held.pop()
            if number > index:
                return -1
    finally:
        for fd in held:
            os.close(fd)


def _open_ptmx(ptmx: str, flags: int) -> int:
    try:
        return os.open(ptmx, flags & _OPENABLE | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        hint = "raise kernel.pty.max, which bounds the ptys of all copies together"
        raise KernelError(f"opening {ptmx}", errno.ENOSPC, hint=hint) from None


def pts_beside(ptmx: str) -> str:
    """The mount of devpts that a ptmx belongs to."""
    folder = os.path.dirname(ptmx)
    return folder if os.path.basename(folder) == "pts" else f"{folder}/pts"


def ptmx_beside(path: str) -> str:
    """The ptmx of the mount of devpts that a slave's path lies in."""
    folder = os.path.dirname(path)
    inside = f"{folder}/ptmx"
    try:
        usable = os.stat(inside).st_mode & 0o666
    except FileNotFoundError:
        usable = 0
    return inside if usable else "/dev/ptmx"


def controlled(slave: int, flags: int) -> int:
    """A /dev/tty that leads to ``slave``, which must not have a session.

    Only who has it as the controlling terminal can open that. So a child takes it for the moment;
    when it ends, a pty is merely given up, and only the child's own group gets SIGHUP
    (drivers/tty/tty_jobctrl.c, disassociate_ctty).
    """
    ready, to_parent, from_parent, go = pipes()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go)
            os.setsid()
            fcntl.ioctl(slave, tty.TIOCSCTTY, 0)
            fd = os.open("/dev/tty", flags & _OPENABLE | os.O_NOCTTY | os.O_CLOEXEC)
            os.write(to_parent, fd.to_bytes(4, "little"))
            os.read(from_parent, 1)
        finally:
            os._exit(0)
    os.close(to_parent)
    os.close(from_parent)
    try:
        answer = os.read(ready, 4)
        if len(answer) != 4:
            raise Unsupported("/dev/tty cannot be opened for a terminal of the tree")
        pidfd = os.pidfd_open(pid)
        try:
            return pidfd_getfd(pidfd, int.from_bytes(answer, "little"))
        finally:
            os.close(pidfd)
    finally:
        os.close(ready)
        os.close(go)
        os.waitpid(pid, 0)


def moved(before: int, now: int, ctx: BuildContext) -> None:
    """A process gets another pid than it had: terminals whose session or foreground group it is. Before its program is
    written.
    """
    if any(resource.FD_TYPE == _FD_TYPE for resource, _ in ctx.files.values()):
        for info in terminals(ctx).infos.values():
            info.sid = now if info.sid == before else info.sid
            info.pgrp = now if info.pgrp == before else info.pgrp


def terminals(ctx: BuildContext) -> Terminals:
    """The terminals of the images, read once."""
    found: Terminals = ctx.once(("tty", "terminals"), lambda: Terminals(ctx))
    return found


class Terminals:
    """All terminals of the images. Those of one pty are made together, when the first of them is
    asked for.
    """

    def __init__(self, ctx: BuildContext) -> None:
        self.ctx = ctx
        self.infos: dict[int, Message] = {info.id: info for info in ctx.images.read_all("tty-info")}
        self.data: dict[int, bytes] = {}
        for one in ctx.images.read_all("tty-data"):
            self.data[one.tty_id] = self.data.get(one.tty_id, b"") + one.data
        self.files: list[Any] = [entry for resource, entry in ctx.files.values() if resource.FD_TYPE == _FD_TYPE]
        self._made: dict[int, int] = {}
        self._outside: set[int] = set()
        for number, info in self.infos.items():
            self._check(number, info)

    @staticmethod
    def _check(number: int, info: Message) -> None:
        place = f"entry with id {number}"
        if info.type == PTY and (not info.HasField("pty") or info.pty.index >= 1 << 20):
            raise ImageError("tty-info.img", place, "a pty without a sensible index")
        # Settings of an external one are its owner's, and CRIU stores none that make sense.
        for field in ("termios", "termios_locked") if info.type != EXTERNAL else ():
            if info.HasField(field):
                try:
                    Termios.of_entry(getattr(info, field))
                except ValueError as error:
                    raise ImageError("tty-info.img", f"{place}: {field}", str(error)) from None

    def take(self, entry: Message) -> int:
        """The descriptor of one tty_file_entry; its terminal is made if it is not there yet."""
        if entry.id not in self._made:
            info = self._info(entry)
            with doing(name_of(info)):
                self._make(entry, info)
        return self._made.pop(entry.id)

    def controlling(self, pid: int) -> tuple[int, bool]:
        """The builder's descriptor of the terminal whose session ``pid`` leads, a master if there is one; -1: none.
        And whether it is lent by the caller.
        """
        best, lent = -1, False
        for entry in self.files:
            info = self._info(entry)
            if info.sid != pid or not pid or entry.id in self._outside or info.type == CTTY:
                continue
            fd = self.ctx.built.get(entry.id, -1)
            if fd >= 0 and os.isatty(fd) and (best < 0 or is_master(info)):
                best, lent = fd, self._given(info) >= 0
        return best, lent

    def foreground(self, pid: int) -> int:
        """The foreground process group of the session that ``pid`` leads; 0: none."""
        return next((int(info.pgrp) for info in self.infos.values() if info.sid == pid and info.pgrp), 0)

    def folder(self) -> str:
        """The directory that all ptys have their nodes in, if each of them is made here; "" if there are none or some
        terminal is somebody else's.
        """
        folders = set()
        for entry in self.files:
            info = self._info(entry)
            if info.type == EXTERNAL or self._given(info) >= 0 or (info.type == CTTY and not self._behind(info)):
                return ""
            if info.type != PTY:
                continue
            if is_master(info):
                folders.add(pts_beside(self._path(entry, "/dev/ptmx")))
            elif self._master_file(info.pty.index) is not None or not info.HasField("termios"):
                folders.add(os.path.dirname(self._path(entry, "/dev/pts/0")))
            else:
                return ""
        return folders.pop() if len(folders) == 1 else ""

    def _behind(self, info: Message) -> list[Message]:
        """The terminals that a /dev/tty may lead to."""
        return [i for i in self.infos.values() if i.type in (PTY, EXTERNAL) and i.sid and i.sid == info.sid]

    def _info(self, entry: Message) -> Message:
        info = self.infos.get(entry.tty_info_id)
        if info is None:
            raise ImageError("tty-info.img", "", f"no terminal {entry.tty_info_id}, which file {entry.id} is")
        return info

    def _path(self, entry: Message, otherwise: str) -> str:
        if entry.regf_id in self.ctx.files:
            return str(self.ctx.files[entry.regf_id][1].name)
        return otherwise

    def _put(self, entry: Message, fd: int) -> None:
        # Low numbers are those of the tasks.
        if fd < self.ctx.first_free_fd:
            moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.ctx.first_free_fd)
            os.close(fd)
            fd = moved
        self._made[entry.id] = fd

    def _make(self, entry: Message, info: Message) -> None:
        given = self._given(info)
        if given >= 0 or info.type == EXTERNAL:
            self._put(entry, self._connect(given, entry, info))
        elif info.type == CTTY:
            self._make_ctty(entry, info)
        elif info.type != PTY:
            self._put(entry, self._device(entry, info))
        elif not is_master(info) and not info.HasField("termios"):
            self._put(entry, self._hung(entry, info))
        elif self._is_ours(info.pty.index):
            self._make_pair(info.pty.index)
        else:
            self._put(entry, self._callers_terminal(entry, info))

    # --- ptys

    def _make_ctty(self, entry: Message, info: Message) -> None:
        behind = self._behind(info)
        given = next((fd for fd in map(self._given, behind) if fd >= 0), -1)
        if given >= 0:
            self._put(entry, controlled(given, entry.flags))
        elif behind and behind[0].type == EXTERNAL:
            self._put(entry, self._connect(given, entry, behind[0]))  # which says what is missing
        elif behind and self._is_ours(behind[0].pty.index):
            self._make_pair(behind[0].pty.index)
        else:
            self._put(entry, self._ctty_of_caller(entry, info))

    def _is_ours(self, index: int) -> bool:
        """Is the whole pty made here, or is its master outside?"""
        options = self.ctx.options
        return self._master_file(index) is not None or (options.orphan_pts_master and options.notify is not None)

    def _master_file(self, index: int) -> Message | None:
        for entry in self.files:
            info = self._info(entry)
            if info.type == PTY and info.pty.index == index and is_master(info):
                return entry
        return None

    def _make_pair(self, index: int) -> None:
        """Make a pty with all that is open of it."""
        mine = [
            (entry, info)
            for entry in self.files
            if (info := self._info(entry)).type == PTY and info.pty.index == index and info.HasField("termios")
        ]
        slaves = [(entry, info) for entry, info in mine if not is_master(info)]
        owner = self._master_file(index)
        if owner is not None:
            master = open_pair(self._path(owner, "/dev/ptmx"), index, owner.flags)
            self._put(owner, master)
            master = self._made[owner.id]
        else:
            master = open_pair(ptmx_beside(self._path(slaves[0][0], "/dev/pts/0")), index, os.O_RDWR)
            master = self.ctx.keep(master)
            self.ctx.memo.setdefault("orphan pts masters", []).append(master)
        for entry, _ in slaves:
            self._put(entry, tty.open_peer(master, entry.flags))
        infos = [
            info
            for info in self.infos.values()
            if info.type == PTY and info.pty.index == index and info.HasField("termios")
        ]
        own = next((i for i in infos if not is_master(i)), None)
        controlled_by = {info.sid for info in infos if info.sid}
        peer = -1
        if own is not None or controlled_by:
            peer = tty.open_peer(master, os.O_RDWR | os.O_NONBLOCK)
        try:
            self._dress(master, peer, infos, self._mode(slaves))
            for entry in self.files:
                info = self._info(entry)
                if info.type == CTTY and info.sid in controlled_by and self._given(info) < 0:
                    self._put(entry, controlled(peer, entry.flags))
        finally:
            if peer >= 0:
                os.close(peer)
        self._lock(master, slaves, infos)

    def _mode(self, slaves: list[tuple[Message, Message]]) -> int:
        """Permissions of the slave's node, -1 where the images do not tell."""
        for entry, _ in slaves:
            reg = self.ctx.files.get(entry.regf_id)
            if reg is not None and reg[1].HasField("mode"):
                return int(reg[1].mode) & 0o7777
        return -1

    def _dress(self, master: int, peer: int, infos: list[Message], mode: int) -> None:
        """Settings, size, owner and unread bytes. ``peer`` is a slave of our own or -1."""
        told = min(infos, key=is_master, default=None)
        if told is None:
            return
        settings = Termios.of_entry(told.termios)
        settings.apply(master)
        for info in infos:
            data = self.data.get(info.id, b"")
            if is_master(info):
                if data:
                    put(End(info.id, master, master, True), data, settings)
            elif peer >= 0:
                if info.HasField("uid"):
                    os.fchown(peer, info.uid, info.gid)
                if mode >= 0:
                    os.fchmod(peer, mode)
                if data:
                    put(End(info.id, peer, master, False), data, settings)
        if told.HasField("winsize"):
            size = told.winsize
            tty.set_winsize(master, size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel)
        if told.HasField("termios_locked"):
            locked = Termios.of_entry(told.termios_locked)
            if locked != tty.termios_locked(master):
                tty.lock_termios(master, locked)

    @staticmethod
    def _set_packets(master: int, info: Message) -> None:
        if info.packet_mode:
            tty.tell(master, tty.TIOCPKT, 1)
        if info.exclusive:
            fcntl.ioctl(master, tty.TIOCEXCL)
        tty.tell(master, tty.TIOCSPTLCK, int(info.locked))

    def _lock(self, master: int, slaves: list[tuple[Message, Message]], infos: list[Message]) -> None:
        """What makes opening or setting harder comes last."""
        for entry, info in slaves:
            if info.exclusive:
                fcntl.ioctl(self._made[entry.id], tty.TIOCEXCL)
                break
        for info in infos:
            if is_master(info):
                self._set_packets(master, info)

    def _hung(self, entry: Message, info: Message) -> int:
        """A slave whose master has been closed; of its number only the path tells, so another
        one will do.
        """
        try:
            master = open_pair("/dev/ptmx", info.pty.index, os.O_RDWR)
        except Unsupported:
            master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            tty.tell(master, tty.TIOCSPTLCK, 0)
        try:
            return tty.open_peer(master, entry.flags)
        finally:
            os.close(master)

    # --- terminals that are there already

    def _given(self, info: Message) -> int:
        """A descriptor that the caller gave for this terminal, by its numbers or its path; or -1."""
        lent = self.ctx.inherited
        names = [key_of(info.rdev, info.dev)]
        for entry in self.files:
            if entry.tty_info_id == info.id and (path := self._path(entry, "")):
                names += [path.removeprefix("/"), path]
        return next((fd for fd in (lent.get(name, -1) for name in names) if fd >= 0), -1)

    def _connect(self, given: int, entry: Message, info: Message) -> int:
        if given < 0:
            key = key_of(info.rdev, info.dev)
            raise Unsupported("it is outside of the tree", hint=f"--inherit-fd fd[N]:{key} with a terminal as N")
        fd = _another(given, entry.flags)
        self._adapt(fd, info, lambda: os.dup(given))
        return fd

    def _callers_terminal(self, entry: Message, info: Message) -> int:
        """The terminal of who restores, for a tree that was a job of a shell (--shell-job)."""
        key = key_of(info.rdev, info.dev)
        hint = f"--shell-job with a terminal as standard input, or --inherit-fd fd[N]:{key}"
        if not self.ctx.options.shell_job:
            raise Unsupported("its other end was outside of the tree", hint=hint)
        own = next((fd for fd in (0, 1, 2) if os.isatty(fd)), -1)
        if own < 0:
            raise Unsupported("it is to be connected to your terminal, but there is none", hint=hint)
        self._outside.add(entry.id)
        fd = _another(own, entry.flags)
        self._adapt(fd, info, lambda: os.dup(own))
        return fd

    def _ctty_of_caller(self, entry: Message, info: Message) -> int:
        if not self.ctx.options.shell_job:
            raise Unsupported("the terminal of its session is not in the images", hint="--shell-job")
        self._outside.add(entry.id)
        try:
            return os.open("/dev/tty", entry.flags & _OPENABLE | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return self._callers_terminal(entry, info)

    def _adapt(self, fd: int, info: Message, again: Callable[[], int]) -> None:
        """Give a terminal from outside the settings that the program made; its size is its own.

        ``again`` opens another description of it, for taking that back if the restore fails.
        """
        if info.type == EXTERNAL or not info.HasField("termios") or not os.isatty(fd):
            return
        before, after = tty.termios(fd), Termios.of_entry(info.termios)
        if not after.ospeed:
            after = after.changed(ispeed=before.ispeed, ospeed=before.ospeed)
        if before != after:
            self.ctx.on_failure.add("terminal settings", lambda: _set_quietly(again(), before))
            _set_quietly(os.dup(fd), after)

    def _device(self, entry: Message, info: Message) -> int:
        """A terminal that belongs to the machine, opened again by its path."""
        path = self._path(entry, "")
        key = key_of(info.rdev, info.dev)
        hint = f"--external {key} at the dump, --inherit-fd fd[N]:{key} now: another is given to it"
        if not path:
            raise Unsupported("the images do not tell its path", hint=hint)
        flags = entry.flags & _OPENABLE | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = os.open(path, flags)
        except OSError as error:
            raise Unsupported(f"{path} cannot be opened: {error.strerror}", hint=hint) from None
        if os.fstat(fd).st_rdev != info.rdev:
            os.close(fd)
            raise Unsupported(f"{path} is another device than it was", hint=hint)
        if info.type != CONSOLE:
            try:
                self._adapt(fd, info, lambda: os.open(path, flags | os.O_NONBLOCK))
            except BaseException:
                os.close(fd)
                raise
        return fd


def is_master(info: Message) -> bool:
    """Is this the master of a pty? Its device is that of ptmx."""
    rdev: int = info.rdev
    return (os.major(rdev), os.minor(rdev)) == tty.MASTER_DEVICE


def _another(fd: int, flags: int) -> int:
    """Another description of a terminal; the same one where it cannot be opened."""
    if not os.isatty(fd):
        return os.dup(fd)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags & _OPENABLE | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)


def _set_quietly(fd: int, settings: Termios) -> None:
    """Change settings, even in the background where SIGTTOU would stop us; closes ``fd``."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        settings.apply(fd)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        os.close(fd)
