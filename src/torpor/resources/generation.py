"""What a woken copy must not share with the others: its generation, the word in which it is told that it was woken.

A program that knows of snapshots has a memfd called ``torpor-guest`` (see model/guest_page.py and
docs/guest-protocol.md); one that only reads a generation counter may have a *generation file* open or mapped, a
regular file with the same content. Both get, before any task runs its first instruction, a page with the counter moved
on, with an id that all pages of one wake-up have in common and no other has, and with the argument of this copy.

Image: the memfd as it is; the entry of a generation file holds its counter in a field of ours
(reg_file_entry.generation).
"""

from __future__ import annotations

import errno
import os
import stat

from .. import log
from ..errors import UsageError
from ..images import schema as pb
from ..model import guest_page
from . import ghost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from ..model.snapshot import Snapshot
    from .base import BuildContext, SourceFile

EVENTFD_FULL = (1 << 64) - 2


def is_guest_page(source: SourceFile) -> bool:
    """Is this open file a memfd of the right name? What is in it is looked at by whoever opens it."""
    return source.link == guest_page.LINK and stat.S_ISREG(source.stat.st_mode) and not source.stat.st_nlink


def wake_id(ctx: BuildContext) -> bytes:
    """The id of this wake-up, the same for the whole tree."""
    return bytes(ctx.once("wake id", lambda: os.urandom(guest_page.ID_BYTES)))


def check(given: bytes) -> None:
    """Raise UsageError for an argument that no page holds."""
    if len(given) > guest_page.ARGUMENT_BYTES:
        size, limit = len(given), guest_page.ARGUMENT_BYTES
        raise UsageError(
            f"an argument of {size} bytes: {limit} at most are handed over", hint="hand over the name of a file"
        )


def argument(ctx: BuildContext) -> bytes:
    """What this copy is given: its own argument, or that of all."""
    return bytes(ctx.memo.get("argument", ctx.options.argument))


class Woken:
    """A guest page that was renewed, and the builder's descriptor of it."""

    __slots__ = ("fd", "page")

    def __init__(self, fd: int, page: guest_page.Page) -> None:
        self.fd = fd
        self.page = page


def woken(ctx: BuildContext) -> list[Woken]:
    """The guest pages that were renewed."""
    found: list[Woken] = ctx.once("guest pages", list)
    return found


def moved(before: int, now: int, ctx: BuildContext) -> None:
    """A process gets another pid than it had: its pages name the new one. Before its program is written."""
    for one in woken(ctx):
        for name, offset in (("pid", guest_page.AT_PID), ("tid", guest_page.AT_TID)):
            if getattr(one.page, name) == before:
                setattr(one.page, name, now)
                os.pwrite(one.fd, guest_page.WORD.pack(now), offset)


def renew(fd: int, name: bytes, ctx: BuildContext) -> None:
    """Make a memfd that has just been filled one of this wake-up, if it is a page of ours at all.

    ``fd`` stays with the builder.
    """
    if name not in (guest_page.NAME, guest_page.FILE_NAME) or not ctx.options.new_generation:
        return
    content = os.pread(fd, guest_page.PAGE_BYTES, 0)
    if not guest_page.is_page(content):
        return  # the name is anybody's to use
    try:
        fresh = guest_page.renewed(content, wake_id(ctx), argument(ctx))
    except ValueError as error:
        # The program's own affair, which does not keep it from being woken; but nobody will tell it.
        log.warning(f"guest page of memfd {os.fsdecode(name)}: {error}: it is left as it was")
        return
    os.pwrite(fd, fresh, 0)
    if name == guest_page.NAME:
        woken(ctx).append(Woken(fd, guest_page.parse(fresh)))


def announce(snapshot: Snapshot, ctx: BuildContext) -> None:
    """Once all files are built: make the eventfds readable by which programs notice a wake-up.

    Raises UsageError where there is an argument and nobody to take it.
    """
    for page in (one.page for one in woken(ctx)):
        task = next((task for task in snapshot.tasks.values() if task.own_pid == page.pid), None)
        if task is None or not task.alive or page.eventfd < 0:
            continue
        file_id = next((file_id for fd, file_id, _ in task.fds if fd == page.eventfd), None)
        entry = snapshot.files.get(file_id) if file_id is not None else None
        if entry is None or not entry.HasField("efd"):
            log.warning(f"guest of task {page.pid}: fd {page.eventfd} is no eventfd: it is not told there")
        elif entry.efd.counter < EVENTFD_FULL:
            os.eventfd_write(ctx.built[entry.id], 1)
    if argument(ctx) and not woken(ctx):
        raise UsageError(
            "there is an argument for the woken program, and none that takes one",
            hint="a program takes arguments by torpor.guest, or as docs/guest-protocol.md says",
        )


# --------------------------------------------------------------------------- generation files


def counter_of(path: str, result: os.stat_result) -> int | None:
    """The counter of a generation file, None where the file is no such thing. ``path`` may be a link of /proc."""
    if result.st_size != guest_page.PAGE_BYTES:
        return None
    try:
        fd = ghost.open_quietly(path)
    except OSError:
        return None
    try:
        content = os.pread(fd, guest_page.PAGE_BYTES, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    return guest_page.WORD.unpack_from(content)[0] if guest_page.is_page(content) else None


def stand_in(entry: Message, flags: int, ctx: BuildContext) -> int | None:
    """A description, opened with ``flags``, of what the woken tree has in place of a generation file; None where the
    entry is about another file or the file itself is wanted.

    There is one for each file; all tasks of the tree share it, and nobody else.
    """
    if not entry.HasField("generation") or not ctx.options.new_generation:
        return None
    fd = ctx.once(("generation file", pb.get_bytes(entry.name)), lambda: ctx.keep(_make(entry, ctx)))
    return os.open(f"/proc/self/fd/{fd}", flags & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK) | os.O_CLOEXEC)


def is_renewed(ctx: BuildContext, file_id: int) -> bool:
    """Is this the entry of a generation file, in place of which each woken tree has something of its own?"""
    if file_id not in ctx.files or not ctx.options.new_generation:
        return False
    entry = ctx.files[file_id][1]
    return "generation" in entry.DESCRIPTOR.fields_by_name and bool(entry.HasField("generation"))


def _make(entry: Message, ctx: BuildContext) -> int:
    page = guest_page.Page()
    page.generation, page.id = guest_page.following(entry.generation), wake_id(ctx)
    page.state = guest_page.RESTORED
    fd = os.memfd_create(os.fsdecode(guest_page.FILE_NAME), os.MFD_CLOEXEC)
    os.pwrite(fd, guest_page.build(page), 0)
    os.fchmod(fd, entry.mode & 0o777 if entry.HasField("mode") else 0o444)
    return fd


def create(path: str) -> None:
    """Make a generation file at ``path``, readable by all. Raises OSError; there is no half-made one then."""
    page = guest_page.Page()
    page.id = os.urandom(guest_page.ID_BYTES)
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)
        os.write(fd, guest_page.build(page))
        os.link(temporary, path)  # not rename(2): a file that programs have mapped is not to be replaced
    finally:
        os.close(fd)
        os.unlink(temporary)


# --------------------------------------------------------------------------- signals


def signal_for(thread: Any, ctx: BuildContext) -> list[tuple[int, bool]]:
    """(signal, to the thread alone) of what a RestoredThread is to be told with."""
    task = thread.task
    main = thread.tid == task.pid
    found = []
    for page in (one.page for one in ctx.memo.get("guest pages", ())):
        if page.pid != task.own_pid or not page.signal:
            continue
        if thread.own_tid == page.tid or (main and not page.tid):
            found.append((page.signal, bool(page.tid)))
    return found


#: errno with which a full queue of signals answers: the program is then told by its page alone.
QUEUE_FULL = errno.EAGAIN
