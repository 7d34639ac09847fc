"""Programs that know of snapshots: told before one is taken, waited for, and told how it came out.

The protocol is docs/guest-protocol.md. All of this happens while everything runs: a program that does not answer costs
a failed dump and nothing else. What a page says is checked, and a signal is sent only to who has a handler for it.

While a page is in our hands its memfd is locked (flock(2)), by a description of our own: a program that waits for us
and can take the lock knows that we are no more.
"""

from __future__ import annotations

import fcntl
import os
import select
import time

from .. import log
from ..errors import KernelError, TaskGone, TorporError, Unsupported, doing
from ..linux.call import try_call
from ..linux.kernel import read_memory
from ..linux.nr import NR
from ..model import guest_page
from ..model.guest_page import ABANDONED, PREPARE, READY, REFUSED, RESUMED
from ..proc import status as proc_status
from ..proc.read import numbers, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from ..options import Options

POLL_S, POLL_MAX_S = 0.0005, 0.01


class Guest:
    """One program with a page. ``fd``: our description of the page, which holds the lock."""

    __slots__ = ("fd", "page", "pid", "pidfd")

    def __init__(self, pid: int, fd: int, page: guest_page.Page) -> None:
        self.pid = pid
        self.fd = fd
        self.page = page
        self.pidfd = os.pidfd_open(pid)

    def close(self) -> None:
        """Give the page back."""
        os.close(self.fd)
        os.close(self.pidfd)

    def ended(self, wait_s: float = 0) -> bool:
        """Has the program ended, or does it within so many seconds?"""
        return bool(select.select([self.pidfd], [], [], wait_s)[0])

    def state(self) -> int:
        """The state word as it is now."""
        return int(guest_page.WORD.unpack(os.pread(self.fd, 4, guest_page.AT_STATE))[0])

    def put(self, offset: int, value: int) -> None:
        """Write a word of the page."""
        os.pwrite(self.fd, guest_page.WORD.pack(value), offset)

    def text(self) -> str:
        """What the program has written about its error, or about what it is doing."""
        try:
            return guest_page.parse(os.pread(self.fd, guest_page.PAGE_BYTES, 0)).text
        except ValueError as error:
            return f"its page is damaged: {error}"

    def tell(self) -> None:
        """Send the signal that the page asks for, if any. Raises Unsupported where it would do harm."""
        number = self.page.signal
        if not number:
            return
        status = proc_status.parse(read(self.pid, "status"))
        if not (status.SigCgt | status.SigBlk) >> (number - 1) & 1 and not self._awaits(number):
            raise Unsupported(
                f"guest: signal {number}, by which it wants to be told, would end it or do nothing",
                hint="the program has to install its handler before it asks for the signal",
            )
        if self.page.tid:
            sent = try_call("tgkill", self.pid, self._thread(), number)
        else:
            sent = try_call("kill", self.pid, number)
        if sent < 0:
            raise TaskGone("it ended")

    def _awaits(self, number: int) -> bool:
        """Is one of its threads in sigwait(3) for the signal? It is not blocked then (kernel/signal.c,
        do_sigtimedwait()), nor does it end anybody.
        """
        for tid in numbers(self.pid, "task"):
            words = read(self.pid, f"task/{tid}/syscall").split()
            if words[0] == b"%d" % NR["rt_sigtimedwait"]:
                try:
                    wanted = read_memory(self.pid, int(words[1], 16), 8)
                except KernelError:
                    continue  # it has gone on, or never meant it
                if int.from_bytes(wanted, "little") >> (number - 1) & 1:
                    return True
        return False

    def _thread(self) -> int:
        """The thread that wants to be told, as we see it."""
        for tid in numbers(self.pid, "task"):
            if proc_status.parse(read(self.pid, f"task/{tid}/status")).NSpid[-1] == self.page.tid:
                return tid
        raise Unsupported(f"guest: it has no thread {self.page.tid}, which is the one that it wants to be told")


class Guests:
    """The guests of one dump, as a context: whatever ends it, none is left waiting."""

    def __init__(self, holders: Sequence[tuple[int, int]], options: Options) -> None:
        """``holders``: (pid, descriptor) of all pages that were seen in the tree."""
        self.holders = holders
        self.options = options
        self.guests: list[Guest] = []
        self.outcome = ABANDONED

    def __enter__(self) -> Guests:
        try:
            self._open()
            self._prepare()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> None:
        seen: set[tuple[int, int, int]] = set()
        for pid, number in self.holders:
            with doing(f"task {pid}"), doing(f"fd {number} (guest page)"):
                try:
                    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # closed meanwhile, or gone
                result = os.fstat(fd)
                key = (pid, result.st_dev, result.st_ino)
                guest = None
                try:
                    guest = _guest(pid, fd) if key not in seen else None
                    if guest is not None:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self.guests.append(guest)
                except BlockingIOError:
                    raise Unsupported("somebody else takes a snapshot of it, or it has locked the page") from None
                finally:
                    if guest is None:
                        os.close(fd)
                    elif guest not in self.guests:
                        guest.close()
                seen.add(key)

    def _prepare(self) -> None:
        limit_s = self.options.guest_timeout
        for guest in self.guests:
            with doing(f"task {guest.pid}"):
                guest.put(guest_page.AT_TEXT_SIZE, 0)
                guest.put(guest_page.AT_LIMIT_MS, min(limit_s * 1000, 0xFFFFFFFF))
                guest.put(guest_page.AT_STATE, PREPARE)
                guest.tell()
        started = time.monotonic()
        for guest in self.guests:
            with doing(f"task {guest.pid}"), doing("guest"):
                self._wait(guest, started + limit_s if limit_s else float("inf"))
        if self.guests:
            log.info(f"guests: {len(self.guests)} ready in {(time.monotonic() - started) * 1e3:.1f} ms")

    def _wait(self, guest: Guest, deadline: float) -> None:
        nap = POLL_S
        while (state := guest.state()) != READY:
            if state == REFUSED:
                raise Unsupported(guest.text() or "it refuses to be dumped and does not say why")
            if time.monotonic() > deadline:
                where = guest.text()
                raise Unsupported(
                    f"it was not ready within {self.options.guest_timeout} s" + (f": {where}" if where else ""),
                    hint="--guest-timeout gives it more, --no-guest does not ask it",
                )
            if guest.ended(nap):
                raise TaskGone("it ended")
            nap = min(nap * 1.5, POLL_MAX_S)

    def check_frozen(self) -> None:
        """Everything stands still: are all still as ready as they were? Raises Unsupported."""
        for guest in self.guests:
            if guest.state() != READY:
                error = Unsupported("guest: it has stopped waiting for the snapshot")
                error.context.insert(0, f"task {guest.pid}")
                raise error

    def taken(self) -> None:
        """There is a snapshot: whoever goes on is to be told so."""
        self.outcome = RESUMED
        if not (self.options.leave_running or self.options.leave_stopped):
            for guest in self.guests:
                guest.close()
            self.guests.clear()

    def _close(self) -> None:
        """Tell those that wait, or will: they go on. All pages are given back."""
        for guest in self.guests:
            try:
                if guest.state() in (PREPARE, READY):
                    guest.put(guest_page.AT_STATE, self.outcome)
                    guest.tell()
            except (TorporError, OSError) as error:
                log.debug(f"guest of task {guest.pid}: {error}")  # it is gone, or will see the lock
            guest.close()
        self.guests.clear()


def at_point(pid: int) -> bool:
    """Does this process wait to be snapshotted (torpor.guest.snapshot_point(), word `point` of its page)?"""
    for number in numbers(pid, "fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}") != guest_page.LINK:
                continue
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            page = guest_page.parse(os.pread(fd, guest_page.PAGE_BYTES, 0))
        except ValueError:
            continue
        finally:
            os.close(fd)
        if page.point and page.pid == proc_status.parse(read(pid, "status")).NSpid[-1]:
            return True
    return False


def _guest(pid: int, fd: int) -> Guest | None:
    """The guest behind a page, None where that is not this task or it cannot answer. Raises Unsupported for a damaged
    page.
    """
    content = os.pread(fd, guest_page.PAGE_BYTES, 0)
    if not guest_page.is_page(content):
        return None
    try:
        page = guest_page.parse(content)
    except ValueError as error:
        raise Unsupported(str(error), hint="--no-guest dumps it without asking it") from None
    status = proc_status.parse(read(pid, "status"))
    if page.pid != status.NSpid[-1]:
        return None  # it has come to the page by fork(2)
    if status.State in ("T", "t"):
        log.warning(f"task {pid}: guest: it is stopped and is not asked")
        return None
    return Guest(pid, fd, page)
