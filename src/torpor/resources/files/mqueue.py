"""POSIX message queues: mq_open(3).

Image: file_entry.mq (mq_file_entry) for each description, ours; the queue itself, with the messages that wait in it,
is in the first of them. Kernel: ipc/mqueue.c

A queue outlives the tasks. If the very same one is there at a restore it is used with what it holds by then;
otherwise it is made. Messages are read from the kernel's memory (linux/mqueue_messages.py): nothing is taken out.
"""

from __future__ import annotations

import errno
import os
import stat

from ... import limits
from ...errors import ImageError, KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux import mqueue as mq
from ...linux.kernel import file_system
from ...proc import mqueue as text
from .. import fown, origin
from ..base import FileResource, make_group, reopen, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...linux.mqueue_messages import Reader
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext, SourceFile

SIZE = 80  # of every queue as a file: FILENT_SIZE in ipc/mqueue.c
_TRIES = 5
_NAME_MAX = 255


class MessageQueue(FileResource):
    """An open description of a queue."""

    FD_TYPE, FIELD = 1010, "mq"
    MODES = (stat.S_IFREG,)
    PRIORITY = 4

    def claims(self, source: SourceFile) -> bool:
        if source.stat.st_size != SIZE or not source.link.startswith("/") or source.flags & os.O_PATH:
            return False
        fd = source.borrow()
        return file_system(fd) == mq.MQUEUE_MAGIC

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        ctx.memo.setdefault("open queues", set()).add(source.stat.st_ino)
        fd = reopen_source(source)
        try:
            seen = text.parse(os.pread(fd, SIZE, 0))
            _check(source, seen, mq.attributes(fd)[2], ctx)
        finally:
            os.close(fd)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        entry = pb.mq_file_entry(id=source.id, flags=source.flags, pos=source.pos, fown=ctx.fown(source))
        result = source.stat
        key = ("mq", result.st_dev, result.st_ino)
        if key not in ctx.memo:
            ctx.memo[key] = ctx.new_id("mq")
            entry.queue.CopyFrom(_queue(source, ctx))
        entry.queue_id = ctx.memo[key]
        link = os.fsencode(source.link)
        if link.count(b"/") > 1:
            pb.put_bytes(entry, "path", link if result.st_nlink else link.removesuffix(b" (deleted)"))
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        def make() -> dict[int, int]:
            queue = queue_of(ctx, entry.queue_id)
            with doing(f"message queue /{os.fsdecode(pb.get_bytes(queue.name))}"):
                return make_group(ctx, lambda: _make(ctx, entry.queue_id, queue))

        made: dict[int, int] = ctx.once(("mq", entry.queue_id), make)
        return made.pop(entry.id)

    def settle_each(self, entry: Message, fd: int, task: Any, program: Program, ctx: BuildContext) -> None:
        queue = queue_of(ctx, entry.queue_id)
        if queue.HasField("notify"):
            # For task/mq_notify.py: (table of descriptors, task) → queue → a descriptor of it, struct sigevent
            wanted = queue.notify
            asked = ctx.memo.setdefault("mq notify", {}).setdefault((task.ids.files_id, wanted.pid), {})
            asked.setdefault(entry.queue_id, (fd, mq.sigevent(wanted.value, wanted.signo, wanted.notify)))


# ---------------------------------------------------------------------- dump


def reopen_source(source: SourceFile) -> int:
    """A description of our own for the queue behind a task's descriptor, to be read."""
    return os.open(source.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _in_tree(pid: int, ctx: DumpContext) -> bool:
    return pid in ctx.tasks or pid in ctx.memo.get("pids", ())


def _check(source: SourceFile, seen: text.Queue, waiting: int, ctx: DumpContext) -> None:
    if seen.notify == mq.SIGEV_THREAD and _in_tree(seen.notify_pid, ctx):
        raise unsupported(
            source, "mq_notify(3) with SIGEV_THREAD: whom the kernel is to tell cannot be seen from outside",
            hint="use SIGEV_SIGNAL, or ask for no notification during the dump",
        )  # fmt: skip
    if seen.qsize > limits.MESSAGE_BYTES_MAX // 2:
        raise unsupported(source, f"{seen.qsize} bytes of messages wait in it", hint="receive some of them first")
    from ...linux import mqueue_messages

    if (waiting or (seen.notify == mq.SIGEV_SIGNAL and seen.notify_pid)) and not mqueue_messages.possible():
        what = f"{waiting} messages wait in it, which" if waiting else "its notification (mq_notify(3))"
        raise unsupported(
            source, f"{what} can be seen in the kernel's memory only, which we may not read",
            hint="run with CAP_BPF and CAP_PERFMON, on a kernel with BTF (5.14 or later)",
        )  # fmt: skip


def _queue(source: SourceFile, ctx: DumpContext) -> Message:
    result = source.stat
    name = os.fsencode(source.link)
    if not result.st_nlink:
        name = name.removesuffix(b" (deleted)")
    fd = reopen_source(source)
    try:
        maxmsg, msgsize, waiting = mq.attributes(fd)
        queue = pb.mq_queue_entry(
            uid=result.st_uid, gid=result.st_gid, mode=stat.S_IMODE(result.st_mode), maxmsg=maxmsg, msgsize=msgsize,
            origin=origin.of(result),
        )  # fmt: skip
        pb.put_bytes(queue, "name", name.rpartition(b"/")[2])
        if not result.st_nlink:
            queue.unlinked = True
        seen = text.parse(os.pread(fd, SIZE, 0))
        _check(source, seen, waiting, ctx)
        owner = ctx.tasks.get(seen.notify_pid)
        if waiting or seen.qsize or owner is not None:
            _read_kernel(source, fd, queue, owner.vpid if owner is not None else 0)
        return queue
    finally:
        os.close(fd)


def _read_kernel(source: SourceFile, fd: int, queue: Message, told: int) -> None:
    """Messages, and the notification of the task ``told`` (0: none). Others may be using the queue meanwhile."""
    from ...linux.mqueue_messages import Reader

    reader = Reader()
    try:
        for _ in range(_TRIES):
            messages = _messages(reader, fd)
            if messages is not None:
                break
        else:
            raise unsupported(source, "others use the queue so much that its messages cannot be read", hint="try again")
        for priority, body in messages:
            queue.message.add(priority=priority, text=body)
        seen = text.parse(os.pread(fd, SIZE, 0))
        if told:
            value = reader.notify_value(fd) if seen.notify == mq.SIGEV_SIGNAL else 0
            queue.notify.CopyFrom(
                pb.mq_notify_entry(pid=told, notify=seen.notify, signo=seen.signo, value=value)
            )
    finally:
        reader.close()


def _messages(reader: Reader, fd: int) -> list[tuple[int, bytes]] | None:
    """The messages; None if the queue was changed meanwhile."""
    before = mq.attributes(fd)[2], text.parse(os.pread(fd, SIZE, 0)).qsize
    try:
        found = reader.messages(fd, before[0])
        again = reader.messages(fd, before[0])
    except ValueError:
        return None
    after = mq.attributes(fd)[2], text.parse(os.pread(fd, SIZE, 0)).qsize
    same = found == again and before == after == (len(found), sum(len(body) for _, body in found))
    return found if same else None


# ---------------------------------------------------------------------- restore


def queue_of(ctx: BuildContext, queue_id: int) -> Message:
    """The queue of that number. Raises ImageError."""
    for resource, entry in ctx.files.values():
        if isinstance(resource, MessageQueue) and entry.queue_id == queue_id and entry.HasField("queue"):
            _check_entry(entry)
            return entry.queue
    raise ImageError("files.img", f"message queue {queue_id}", "it is open and not there")


def _check_entry(entry: Message) -> None:
    queue, field = entry.queue, f"file {entry.id}: mq: queue"
    name = pb.get_bytes(queue.name)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name or len(name) > _NAME_MAX:
        raise ImageError("files.img", f"{field}: name", f"{name!r} is no name of a queue")
    if not 0 < queue.maxmsg < 1 << 31 or not 0 < queue.msgsize < 1 << 31 or len(queue.message) > queue.maxmsg:
        sizes = f"{queue.maxmsg} messages of {queue.msgsize} bytes, {len(queue.message)} wait"
        raise ImageError("files.img", f"{field}: maxmsg, msgsize", sizes)
    if any(len(one.text) > queue.msgsize or one.priority >= 32768 for one in queue.message):
        raise ImageError("files.img", f"{field}: message", "larger than the queue takes")


def _make(ctx: BuildContext, queue_id: int, queue: Message) -> dict[int, int]:
    """Open all descriptions of a queue, which is made if it is not there; their descriptors by file id."""
    users = [one for kind, one in ctx.files.values() if isinstance(kind, MessageQueue) and one.queue_id == queue_id]
    name = pb.get_bytes(queue.name)
    made: dict[int, int] = {}
    anchor = -1
    if not queue.unlinked:
        anchor = _present(name, queue)
    fresh = anchor < 0
    if fresh:
        name, anchor = _create(ctx, name, queue)
    try:
        if fresh:
            _fill(anchor, queue)
        for user in users:
            made[user.id] = _open(user, name, anchor)
    except BaseException:
        for fd in made.values():
            os.close(fd)
        raise
    finally:
        os.close(anchor)
        if queue.unlinked:
            mq.unlink(name)
    return made


def _present(name: bytes, queue: Message) -> int:
    """The queue of that name, -1 where there is none. Raises Unsupported if it is not the one that was dumped."""
    try:
        fd = mq.mq_open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return -1
        raise
    try:
        here = os.fstat(fd)
        if origin.of(here) == queue.origin:
            return fd
        maxmsg, msgsize, waiting = mq.attributes(fd)
        size = text.parse(os.pread(fd, SIZE, 0)).qsize
        found = maxmsg, msgsize, here.st_uid, here.st_gid, stat.S_IMODE(here.st_mode), waiting, size
        bytes_wanted = sum(len(one.text) for one in queue.message)
        wanted = (
            queue.maxmsg, queue.msgsize, queue.uid, queue.gid, queue.mode, len(queue.message), bytes_wanted,
        )  # fmt: skip
        if found != wanted:
            raise Unsupported(
                f"another queue has its name: at most {maxmsg} messages of {msgsize} bytes, owner {here.st_uid}:"
                f"{here.st_gid}, mode {stat.S_IMODE(here.st_mode):#o}, {waiting} messages of {size} bytes wait; it was "
                f"{queue.maxmsg} of {queue.msgsize}, {queue.uid}:{queue.gid}, {queue.mode:#o}, "
                f"{len(queue.message)} of {bytes_wanted}",
                hint="remove it if nobody needs it (mq_unlink, or rm where the mqueue file system is mounted)",
            )
        return fd
    except BaseException:
        os.close(fd)
        raise


def _create(ctx: BuildContext, name: bytes, queue: Message) -> tuple[bytes, int]:
    """Make the queue; its name (another one if it is to have none and that one is taken) and a descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
    number = 0
    while True:
        try:
            fd = mq.mq_open(name, flags, 0o600, (queue.maxmsg, queue.msgsize))
            break
        except KernelError as error:
            if error.errno == errno.EEXIST and queue.unlinked and number < 1 << 16:
                name = b"%s.%x.torpor" % (pb.get_bytes(queue.name)[:230], number)
                number += 1
                continue
            assert error.errno is not None
            raise KernelError("mq_open", error.errno, hint=_hint(error.errno, queue)) from None
    if not queue.unlinked:
        ctx.on_failure.add(f"remove message queue /{os.fsdecode(name)}", lambda: mq.unlink(name))
    return name, fd


def _hint(number: int, queue: Message) -> str:
    return {
        errno.EINVAL: f"sysctl fs.mqueue.msg_max={queue.maxmsg} fs.mqueue.msgsize_max={queue.msgsize} at least",
        errno.EMFILE: "raise the limit of bytes in message queues (ulimit -q)",
        errno.ENOSPC: "raise the number of queues, sysctl fs.mqueue.queues_max",
    }.get(number, "")


def _fill(fd: int, queue: Message) -> None:
    for one in queue.message:
        mq.send(fd, one.text, one.priority)
    os.fchown(fd, queue.uid, queue.gid)
    os.fchmod(fd, stat.S_IMODE(queue.mode))


def _open(entry: Message, name: bytes, anchor: int) -> int:
    if entry.pos >> 63:
        raise ImageError("files.img", f"file {entry.id}: mq: pos", f"{entry.pos:#x} is beyond all files")
    flags = entry.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | os.O_CLOEXEC
    if not entry.flags & fown.O_LARGEFILE:
        fd = mq.mq_open(name, flags)
    else:  # it was opened by open(2), by the name that it has on a mounted file system
        path = pb.get_bytes(entry.path)
        try:
            same = os.path.isabs(path) and os.path.samestat(os.stat(path), os.fstat(anchor))
        except OSError:
            same = False
        fd = os.open(path, flags) if same else reopen(anchor, flags)
    try:
        fown.set_flags(fd, entry.flags)
        if entry.pos:
            os.lseek(fd, entry.pos, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


RESOURCE = MessageQueue()
