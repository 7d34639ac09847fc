"""The pager: brings the memory of restored tasks in from the images, when it is touched and in the background.

::

    restoring process ── (ends)          task ── its memory, registered with a userfaultfd that it does not hold
    pager ── guard                       both hold the userfaultfds: they have one descriptor table

The tasks run while most of their memory is still in the images. Whoever touches a page that is not there waits in the
kernel until the pager has made it. What the program does to its memory meanwhile (fork, mremap, munmap, madvise) waits
until the pager has taken note: pages that the program has dropped are never brought in again.

The kernel gives out zeros, and says nothing, once nobody holds a userfaultfd any more. So there are two processes. When
the pager dies, its guard, which has the same descriptors and the journal of all that happened (engine/journal.py),
starts another one; when the guard dies, the pager does. If bringing in is not possible any more (the images were cut
short), the tasks are killed, and the memory of their children is made to kill whoever touches it.

Kernel: fs/userfaultfd.c, mm/userfaultfd.c
"""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import time

from .. import log
from ..linux import userfault
from ..linux.fork import fork_sharing_files, set_name
from ..linux.kernel import GuardRegions
from . import journal, paging
from .pending import Pending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .journal import Journal
    from .pending import Piece

PAGE = 4096
FAULT_BYTES = 64 << 10  # brought in for one page that is touched
FAULT_BYTES_MAX = 1 << 20  # … where a program goes through its memory from one end to the other
FILL_BYTES = 512 << 10  # at once in the background: whoever touches a page meanwhile waits for it
IDLE_MS, CHILDREN_MS = 500, 50  # how often to look whether tasks, and their children, are still there
FAILURES_MAX = 3
MOVED_MAX = 64  # of an address space, how many places it is worth to remember
MEMORY_WAIT_S = 0.02


class Lost(Exception):
    """Memory can never be brought in any more."""


class Retry(Exception):
    """There are events to be read before anything else can be done."""


class Space:
    """An address space that is not complete."""

    __slots__ = (
        "end", "fd", "guards", "moved", "number", "pagemap_fd", "pending", "pidfd", "start", "window", "window_end",
    )  # fmt: skip

    def __init__(self, number: int, fd: int, pidfd: int, pagemap_fd: int, pending: Pending) -> None:
        """``pidfd`` and ``pagemap_fd`` are -1 for the children of tasks: nobody says which process it is."""
        self.number = number
        self.fd = fd
        self.pidfd = pidfd
        self.pagemap_fd = pagemap_fd
        self.pending = pending
        self.guards = GuardRegions(pagemap_fd) if pagemap_fd >= 0 else None
        #: (start, end) of where the program has moved something
        self.moved: list[tuple[int, int]] = []
        #: Where somebody may be waiting.
        self.start, self.end = 1 << 63, 0
        self.window, self.window_end = FAULT_BYTES, 0

    def cover(self, start: int, end: int) -> None:
        """Memory between may be waited for."""
        self.start, self.end = min(self.start, start), max(self.end, end)

    def state(self) -> tuple[Any, ...]:
        """What another pager has to know."""
        return (
            self.number, self.fd, self.pidfd, self.pagemap_fd, self.start, self.end, self.pending.pieces, self.moved,
        )  # fmt: skip

    def wake(self) -> None:
        """Let everybody try again."""
        if self.start < self.end:
            userfault.wake(self.fd, self.start, self.end)


class Pager:
    """What is known of all address spaces, and what is done about it."""

    def __init__(self, book: Journal, files: list[tuple[int, int]], *, lazy: bool) -> None:
        """``files``: (descriptor, bytes) of the pages files, by the numbers that pieces have; ``lazy``: bring in
        nothing but what is touched.
        """
        self.book = book
        self.files = files
        self.lazy = lazy
        self.spaces: dict[int, Space] = {}
        self._sources: dict[int, int] = {}  # number of a file → address at which it is mapped
        self._next = 1
        self._recent = 0  # number of the address space where a page was waited for last

    # ---------------------------------------------------------------------------- what is known

    def add(self, fd: int, pidfd: int, pagemap_fd: int, pieces: list[Piece], spans: list[tuple[int, int]]) -> None:
        """Take charge of a task's memory."""
        space = self._space(self._next, fd, pidfd, pagemap_fd, Pending(pieces))
        for start, end in spans:
            space.cover(start, end)
        self._next += 1

    def _space(self, number: int, fd: int, pidfd: int, pagemap_fd: int, pending: Pending) -> Space:
        space = self.spaces[number] = Space(number, fd, pidfd, pagemap_fd, pending)
        return space

    def write(self, closing: list[int] | None = None) -> None:
        """Have it known to whoever comes after us. ``closing``: descriptors that are about to be closed."""
        self.book.write((self._next, closing or [], [space.state() for space in self.spaces.values()]))

    def recall(self) -> None:
        """Know what the pager before us knew. It may have brought in more than it says: that does no harm."""
        state, events = self.book.read()
        self._next, closing, spaces = state
        for number, fd, pidfd, pagemap_fd, start, end, pieces, moved in spaces:
            space = self._space(number, fd, pidfd, pagemap_fd, Pending(pieces))
            space.cover(start, end)
            space.moved = moved
        child = None
        for number, message in events:
            child = self._note(self.spaces[number], message) if number in self.spaces else None
        if child is not None:
            self._wipe(*child)
        for fd in closing:
            if paging.is_userfaultfd(fd):
                os.close(fd)
        self.write()
        for space in self.spaces.values():
            space.wake()  # the pager before us may have taken their questions with it

    def _note(self, space: Space, message: bytes) -> tuple[Space, Space] | None:
        """What a program has done to its memory. For a fork, returns parent and child."""
        event = message[0]
        if event == userfault.EVENT_FORK:
            fd = struct.unpack_from("<I", message, 8)[0]
            child = self._space(self._next, fd, -1, -1, space.pending.copy())
            child.cover(space.start, space.end)
            child.moved = list(space.moved)
            self._next += 1
            return space, child
        if event == userfault.EVENT_REMAP:
            old, new, size = struct.unpack_from("<QQQ", message, 8)
            space.pending.move(old, new, size)
            space.cover(new, new + size)
            space.moved.append((new, new + size))
            if len(space.moved) > MOVED_MAX:
                space.moved = [(min(start for start, _ in space.moved), max(end for _, end in space.moved))]
        elif event == userfault.EVENT_REMOVE:
            space.pending.drop(*struct.unpack_from("<QQ", message, 8))
        elif event == userfault.EVENT_UNMAP:
            self._unmapped(space, *struct.unpack_from("<QQ", message, 8))
        return None

    @staticmethod
    def _unmapped(space: Space, start: int, end: int) -> None:
        """Threads tell of what they did in any order: what was moved here after it was unmapped stays."""
        stays: list[tuple[int, int]] = []
        if any(low < end and start < high for low, high in space.moved):
            stays = paging.mappings_with("um", space.pidfd)
        for low, high in paging.without(start, end, stays):
            space.pending.drop(low, high)

    def _wipe(self, parent: Space, child: Space) -> None:
        """A child does not get what its parent has for itself (MADV_WIPEONFORK). The parent waits in fork(2)."""
        for start, end in paging.mappings_with("wf", parent.pidfd):
            if self.book.full:
                self.write()
            self.book.add(child.number, struct.pack("<B7xQQ8x", userfault.EVENT_REMOVE, start, end))
            child.pending.drop(start, end)

    # --------------------------------------------------------------------------- what is to do

    def drain(self, space: Space) -> list[int]:
        """Read all that an address space has to say; returns the addresses that are waited for."""
        waiting: list[int] = []
        while True:
            if self.book.full:
                self.write()
            try:
                message = self.book.take(space.fd, space.number)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    log.warning(f"pager: a fork has to wait: {os.strerror(error.errno)}")
                    time.sleep(MEMORY_WAIT_S)
                    return waiting
                raise
            if message is None:
                return waiting
            if message[0] == userfault.EVENT_PAGEFAULT:
                waiting.append(struct.unpack_from("<Q", message, 16)[0] & -PAGE)
            else:
                child = self._note(space, message)
                if child is not None:
                    self._wipe(*child)

    def answer(self, space: Space) -> None:
        """Read what an address space has to say and bring in what is waited for."""
        waiting = self.drain(space)
        if waiting:
            self._recent = space.number
        while waiting and space.number in self.spaces:
            address = waiting.pop()
            try:
                self._bring_page(space, address)
            except Retry:
                waiting.append(address)
                os.sched_yield()
                waiting += self.drain(space)

    def _bring_page(self, space: Space, address: int) -> None:
        """Bring in a page and those around it. Raises Retry."""
        piece = space.pending.at(address)
        if piece is None:
            # Never there, or dropped by the program; or it has come in the meantime.
            _, number = userfault.make_empty(space.fd, address, PAGE)
            if number == errno.EAGAIN:
                raise Retry
            userfault.wake(space.fd, address, address + PAGE)
            return
        goes_on = space.window_end == address
        space.window = min(space.window * 2, FAULT_BYTES_MAX) if goes_on else FAULT_BYTES
        start = address if goes_on else address & -space.window
        start, end = max(piece[0], start), min(piece[1], start + space.window)
        space.window_end = end
        self.bring(space, start, end)
        if space.pending.at(address) is None:
            userfault.wake(space.fd, address, address + PAGE)

    def bring(self, space: Space, start: int, end: int) -> None:
        """Bring in what is missing in [start, end). Raises Retry, and Lost."""
        for piece in space.pending.between(start, end):
            self._read(piece)
        if space.guards is not None:  # looked for as late as can be: making one tells nobody (ADR 0009)
            for low, high in space.guards.between(start, end):
                space.pending.drop(low, high)  # whoever makes a guard region drops what was there
        for piece in space.pending.between(start, end):
            self._copy(space, piece)

    def _read(self, piece: Piece) -> None:
        """Have the images' pages in memory, so that to copy them does not wait for the disk."""
        start, end, file, offset = piece
        userfault.populate(self._source(file) + offset, end - start)

    def _copy(self, space: Space, piece: Piece) -> None:
        start, end, file, offset = piece
        source = self._source(file) + offset - start
        needed = offset + end - start
        self._check_file(file, needed)
        limit = end
        while start < end and space.number in self.spaces:
            done, number = userfault.copy(space.fd, start, source + start, limit - start)
            if done:
                self._check_file(file, needed)
                userfault.wake(space.fd, start, start + done)
            elif number == errno.EAGAIN:
                raise Retry
            elif number == errno.ESRCH:
                self.forget(space)
                return
            elif number == errno.ENOMEM:
                time.sleep(MEMORY_WAIT_S)
                raise Retry
            elif number == errno.ENOENT and limit - start > PAGE:
                limit = start + ((limit - start) // 2 & -PAGE)  # not one mapping, or not all of it is mapped
                continue
            elif number in (errno.EEXIST, errno.ENOENT):
                done = PAGE
            else:
                raise Lost(f"{self._name(file)} cannot be read: {os.strerror(number)}")
            space.pending.drop(start, start + done)
            start += done
            limit = end

    def _source(self, file: int) -> int:
        if file not in self._sources:
            self._sources[file] = userfault.map_file(*self.files[file])
        return self._sources[file]

    def _check_file(self, file: int, needed: int) -> None:
        """The kernel fills up the last page of a file that was cut short with zeros."""
        size = os.fstat(self.files[file][0]).st_size
        if size < needed:
            raise Lost(f"{self._name(file)} has {size} bytes, {needed} are needed: it was cut short")

    def _name(self, file: int) -> str:
        return os.readlink(f"/proc/self/fd/{self.files[file][0]}")

    def fill(self) -> None:
        """Bring in some of what nobody has asked for yet: behind what was asked for last."""
        space = self.spaces.get(self._recent) or next(iter(self.spaces.values()))
        if not space.pending:
            return
        start, end, _, _ = space.pending.next_from(space.window_end)
        end = min(end, start + FILL_BYTES)
        try:
            self.bring(space, start, end)
            space.window_end = end
        except Retry:
            self.answer(space)

    def tidy(self, *, look: bool) -> None:
        """Forget the address spaces that are complete; ``look``: and those that are gone."""
        done = [
            space
            for space in self.spaces.values()
            if not space.pending or (look and not userfault.has_memory(space.fd))
        ]
        if done:
            self.forget(*done)

    def forget(self, *spaces: Space) -> None:
        """Let go of address spaces: from now on the kernel alone looks after them."""
        for space in spaces:
            log.debug(f"pager: address space {space.number}: {len(space.pending.pieces)} pieces are left")
            del self.spaces[space.number]
        # Nothing is opened in between: if we die here, these numbers are still theirs, or nobody's.
        self.write(closing=[space.fd for space in spaces])
        for space in spaces:
            os.close(space.fd)
        self.write()

    @property
    def has_children(self) -> bool:
        """Are there address spaces of whose end nobody would tell?"""
        return any(space.pidfd < 0 for space in self.spaces.values())

    def give_up(self, why: str) -> None:
        """End the tasks, and have their children end when they touch what is missing."""
        for space in list(self.spaces.values()):
            if space.pidfd >= 0:
                log.error(f"pager: {why}: task {paging.pid_of(space.pidfd)} is killed")
                try:
                    signal.pidfd_send_signal(space.pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            elif userfault.has_memory(space.fd):
                log.error(f"pager: {why}: a child of a restored task is killed when it touches memory that is missing")
        # Again and again: they may fork meanwhile.
        while left := [one for one in self.spaces.values() if one.pending and userfault.has_memory(one.fd)]:
            for space in left:
                self._poison(space)
        if self.spaces:
            self.forget(*self.spaces.values())

    def _poison(self, space: Space) -> None:
        """Whoever touches what is missing gets SIGBUS; where the kernel cannot do that, he waits."""
        while space.pending and userfault.has_memory(space.fd):
            start, end, _, _ = space.pending.pieces[0]
            done, number = userfault.poison(space.fd, start, end - start)
            if not done and number in (errno.EEXIST, errno.ENOENT):
                done = PAGE
            space.pending.drop(start, start + done)
            if not done:
                time.sleep(MEMORY_WAIT_S)
                self.drain(space)
        space.wake()


# ------------------------------------------------------------------------------------- the processes


class Pair:
    """What pager and guard have in common."""

    def __init__(self, book: Journal, files: list[tuple[int, int]], wanted: paging.Wanted) -> None:
        self.book = book
        self.files = files
        self.wanted = wanted
        self.guard_pid = 0
        #: A pidfd of the guard; -1: there is none. Each of the two may be the parent of the other and is then collected
        #: by somebody else: pidfds are opened by the process itself, or by its parent.
        self.guard_fd = -1

    def run_guard(self, pager_fd: int) -> None:
        """See to it that there is a pager until everything is done. ``pager_fd``: a pidfd of the one there is."""
        set_name(b"torpor-guard")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self._guard(pager_fd)
        except Exception as error:
            log.error(f"pager: its guard: {error!r}: whoever touches memory that is missing waits for ever")
            while True:
                signal.pause()  # rather than let go of the userfaultfds: then they would read zeros

    def _guard(self, pager_fd: int) -> None:
        while True:
            pid = paging.pid_of(pager_fd)
            _await_end(pager_fd)
            if self.book.flag(journal.FINISHED):
                return
            if self.book.flag(journal.FAILURES) >= FAILURES_MAX:
                self._recalled().give_up("it has failed again and again")
                self.book.set(journal.FINISHED)
                return
            log.warning(f"pager: process {pid} has died: another one takes over")
            if self.guard_pid != os.getpid():
                self.guard_pid = os.getpid()
                self.guard_fd = os.pidfd_open(self.guard_pid)
            pid = fork_sharing_files()
            if pid == 0:
                os._exit(self.run_pager())
            pager_fd = os.pidfd_open(pid)

    def _recalled(self) -> Pager:
        pager = Pager(self.book, self.files, lazy=self.wanted.lazy)
        pager.recall()
        return pager

    def run_pager(self) -> int:
        """Serve until everything is done; returns the status to end with."""
        set_name(b"torpor-pager")
        signal.signal(signal.SIGTERM, lambda *_: self.book.set(journal.HURRY))
        try:
            self._serve()
        except Exception as error:
            import traceback

            log.error(f"pager: {error!r}\n{traceback.format_exc()}")
            self.book.set(journal.FAILURES, self.book.flag(journal.FAILURES) + 1)
            return 1
        self.book.set(journal.FINISHED)
        return 0

    def _serve(self) -> None:
        pager = self._recalled()
        try:
            _Service(self, pager).run()
        except Lost as error:
            pager.give_up(str(error))
        except paging.Abandoned:
            pass  # the restore has failed, and with it went the tasks


class _Service:
    """A pager at work."""

    def __init__(self, pair: Pair, pager: Pager) -> None:
        self.pair = pair
        self.book = pair.book
        self.pager = pager
        self.poller = select.poll()
        self.polled: set[int] = set()
        self.own_fd = os.pidfd_open(os.getpid())
        self._watch_guard()
        self.started = time.monotonic()
        self.looked = 0.0

    def run(self) -> None:
        wanted, book = self.pair.wanted, self.book
        if not book.flag(journal.RELEASED) and not self.pager.spaces:
            wanted.receive(self.pager)
        self.poller.register(wanted.listener, select.POLLIN)
        if not book.flag(journal.RELEASED):
            self.poller.register(wanted.control, select.POLLIN)
        while self.pager.spaces:
            self._turn()
        if not book.flag(journal.RELEASED):
            wanted.await_release(book)
        log.info(f"pager: everything is in place after {time.monotonic() - self.started:.3f} s")

    def _turn(self) -> None:
        pager, book = self.pager, self.book
        busy = not pager.lazy or book.flag(journal.HURRY)
        self._poll_spaces()
        idle_ms = CHILDREN_MS if pager.has_children else IDLE_MS
        for fd, _ in self.poller.poll(0 if busy else idle_ms):
            self._ready(fd)
        now = time.monotonic()
        look = now - self.looked > idle_ms / 1000
        if look:
            self.looked = now
        pager.tidy(look=look)
        if busy and pager.spaces:
            pager.fill()
            pager.tidy(look=False)

    def _poll_spaces(self) -> None:
        wanted = {space.fd for space in self.pager.spaces.values()}
        if wanted == self.polled:
            return
        for fd in self.polled - wanted:
            self.poller.unregister(fd)
        for fd in wanted - self.polled:
            self.poller.register(fd, select.POLLIN)
        self.polled = wanted

    def _ready(self, fd: int) -> None:
        wanted = self.pair.wanted
        if fd == wanted.listener:
            if wanted.asked(self.pager):
                self.book.set(journal.HURRY)
        elif fd == self.pair.guard_fd:
            self._new_guard()
        elif fd == wanted.control:
            self.poller.unregister(fd)
            wanted.await_release(self.book)
        else:
            for space in list(self.pager.spaces.values()):
                if space.fd == fd:
                    self.pager.answer(space)

    def _new_guard(self) -> None:
        pair = self.pair
        log.warning(f"pager: its guard, process {pair.guard_pid}, has died: there is a new one")
        self.poller.unregister(pair.guard_fd)
        os.close(pair.guard_fd)
        pair.guard_fd = -1
        self._watch_guard()

    def _watch_guard(self) -> None:
        """Hear of the end of the guard, which is started if there is none."""
        pair = self.pair
        if pair.guard_fd < 0:
            pid = fork_sharing_files()
            if pid == 0:
                pair.run_guard(self.own_fd)
                os._exit(0)
            pair.guard_pid, pair.guard_fd = pid, os.pidfd_open(pid)
        self.poller.register(pair.guard_fd, select.POLLIN)


def _await_end(pidfd: int) -> None:
    """Wait for the end of a process that may or may not be our child, and close its pidfd."""
    paging.readable(pidfd)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        pass
    os.close(pidfd)
