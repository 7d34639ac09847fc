"""System V semaphores and message queues.

Image: ipcns-sem-N (ipc_sem_entry, with SEM_UNDO in a field of ours) and ipcns-msg-N (ipc_msg_entry), as for a
namespace of its own. Kernel: ipc/sem.c, ipc/msg.c

Tasks hold no descriptors of them, so that nobody can say which ones they will use. Stored is what they are known to
have used: sets of which they have something to give back when they end (SEM_UNDO) or which they were the last to
change, queues that they were the last to send to or to receive from, segments that they have made or were the last to
attach or detach; and of an IPC namespace that is the tree's (ipc_space.py) all. They outlive the tasks: at a restore
those that are there are used as they are, and the others are made, with the identifier that they had.

When a task ends the kernel takes its adjustments back. So a restore in the same system does again what was undone:
who held a semaphore takes it, and must be able to.
"""

from __future__ import annotations

import array
import errno
import os
import struct

from .. import limits, log
from ..errors import ImageError, KernelError, Unsupported, doing
from ..images import schema as pb
from ..images.payload import join_queue, split_queue
from ..linux.call import address_of, buffer, call
from ..linux.kernel import prctl
from ..proc.read import read_system
from . import ipc_space

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, TypeAlias

    from ..images.schema import Message
    from ..linux.sem_undo import Reader
    from ..proc import sysvipc
    from .base import BuildContext, DumpContext

    #: (pid in the images, number of the semaphore, adjustment)
    Undone: TypeAlias = tuple[int, int, int]

#: The number that all images have for the IPC namespace of the host: engine/preflight.py.
HOST_IPC = 3
IPC_CREAT, IPC_EXCL, IPC_NOWAIT, IPC_RMID, IPC_SET, IPC_STAT = 0o1000, 0o2000, 0o4000, 0, 1, 2
GETPID, GETALL, SETALL, SEM_UNDO = 11, 13, 17, 0x1000
MSG_COPY, MSG_NOERROR = 0o40000, 0o10000
PR_SET_DUMPABLE = 4
SEM_VALUE_MAX = 32767
_TRIES = 20
#: struct semid64_ds, msqid64_ds, shmid64_ds: where uid, gid, mode and the bytes that a queue may hold lie in it
STAT_BYTES, _UID, _GID, _MODE, _QBYTES = 256, 4, 8, 20, 88


# -------------------------------------------------------------------------------------------- dump


def check(pids: Iterable[int], ctx: DumpContext) -> None:
    """Raise Unsupported for what the tasks are known to use and cannot be dumped; nothing is frozen yet."""
    ipc_space.within(ctx, lambda: _check(set(pids), ctx))


def _check(pids: set[int], ctx: DumpContext) -> None:
    for inode, name in ipc_space.queues().items() if ipc_space.is_whole(ctx) else ():
        if inode not in ctx.memo.get("open queues", ()):
            raise Unsupported(
                f"message queue /{name} is in its IPC namespace, and no task has it open: it would be lost",
                hint="have it open at the dump, or remove it (mq_unlink(3))",
            )
    for row in _used_queues(pids, ctx):
        if row.cbytes > limits.MESSAGE_BYTES_MAX // 2:
            raise Unsupported(
                f"System V message queue {row.msqid}: {row.cbytes} bytes of messages wait in it",
                hint="receive some of them first",
            )
        if row.qnum:
            try:
                _copy_message(row.msqid, 0, 1)
            except KernelError as error:
                if error.errno != errno.ENOSYS:
                    continue
                raise Unsupported(
                    f"System V message queue {row.msqid}: its messages cannot be read without taking them out",
                    hint="it needs a kernel with CONFIG_CHECKPOINT_RESTORE",
                ) from None


def finish(ctx: DumpContext) -> None:
    """Write the semaphores and queues that the tasks are known to use, all of which are stopped."""
    ipc_space.within(ctx, lambda: _finish(ctx))


def _finish(ctx: DumpContext) -> None:
    pids = {task.pid for task in ctx.tasks.values() if not task.zombie}
    rows = {row.semid: row for row in _sets()}
    undo = _undo(ctx, {semid: row.nsems for semid, row in rows.items()}) if rows else {}
    for semid, row in rows.items():
        if ipc_space.is_whole(ctx) or semid in undo or _changed_by(row, pids):
            with doing(f"System V semaphores {semid}"):
                _write_set(row, undo.get(semid, []), ctx)
    for queue in _used_queues(pids, ctx):
        with doing(f"System V message queue {queue.msqid}"):
            _write_queue(queue, ctx)
    known = [row for row in segments() if ipc_space.is_whole(ctx) or {row.cpid, row.lpid} & pids]
    if known:
        from .memory import sysv

        sysv.write_rest(known, ctx)


def _undo(ctx: DumpContext, sizes: dict[int, int]) -> dict[int, list[Undone]]:
    """The adjustments of all tasks by semid."""
    from ..linux import sem_undo

    try:
        reader = sem_undo.Reader()
    except (KernelError, Unsupported) as error:
        log.warning(f"whether tasks have SEM_UNDO adjustments cannot be seen, and they are taken to have none: {error}")
        return {}
    found: dict[int, list[Undone]] = {}
    owners: dict[int, Any] = {0: None}  # list → the task that it was met at
    try:
        for task in ctx.tasks.values():
            main = reader.list_of(task.pid) if not task.zombie else 0
            for thread in task.threads:
                which = main if thread.tid == task.pid else reader.list_of(thread.tid)
                known = owners.setdefault(which, task)
                if not which or (known is task and which == main and thread.tid != task.pid):
                    continue
                _take_list(reader, which, sizes, task, found, sole=known is task and which == main)
    except ValueError as error:
        raise Unsupported(f"the SEM_UNDO adjustments of the tasks cannot be read: {error}") from None
    finally:
        reader.close()
    return found


def _take_list(
    reader: Reader, which: int, sizes: dict[int, int], task: Any, found: dict[int, list[Undone]], *, sole: bool
) -> None:
    adjustments = reader.adjustments(which, sizes)
    if adjustments and not sole:
        raise Unsupported(
            f"task {task.pid}: SEM_UNDO adjustments of threads apart, or shared by processes (CLONE_SYSVSEM)",
            hint="release the semaphores before the dump",
        )
    for semid, number, value in adjustments:
        found.setdefault(semid, []).append((task.vpid, number, value))


def _sets() -> list[sysvipc.Sem]:
    from ..proc import sysvipc

    return sysvipc.parse_sem(read_system("sysvipc/sem"))


def segments() -> list[sysvipc.Shm]:
    """All segments of shared memory of our IPC namespace."""
    from ..proc import sysvipc

    return sysvipc.parse_shm(read_system("sysvipc/shm"))


def _queues() -> list[sysvipc.Msg]:
    from ..proc import sysvipc

    return sysvipc.parse_msg(read_system("sysvipc/msg"))


def _changed_by(row: sysvipc.Sem, pids: set[int]) -> bool:
    try:
        return any(call("semctl", row.semid, number, GETPID, 0) in pids for number in range(row.nsems))
    except KernelError:
        return False  # removed meanwhile, or not for us to see


def _used_queues(pids: set[int], ctx: DumpContext) -> list[sysvipc.Msg]:
    return [row for row in _queues() if ipc_space.is_whole(ctx) or {row.lspid, row.lrpid} & pids]


def desc_of(row: Any, number: int) -> Message:
    """What all kinds of objects have in common, for the images. ``row``: that of /proc/sysvipc."""
    return pb.ipc_desc_entry(
        key=row.key & 0xFFFFFFFF, uid=row.uid, gid=row.gid, cuid=row.cuid, cgid=row.cgid, mode=row.perms, id=number
    )


def _write_set(row: sysvipc.Sem, undo: list[Undone], ctx: DumpContext) -> None:
    entry = pb.ipc_sem_entry(nsems=row.nsems)
    entry.desc.CopyFrom(desc_of(row, row.semid))
    for pid, number, value in undo:
        entry.undo.add(pid=pid, number=number, adjust=value)
    ctx.images.append(f"ipcns-sem-{HOST_IPC}", entry, _values(row.semid, row.nsems).tobytes())


def _values(semid: int, count: int) -> array.array[int]:
    area = array.array("H", bytes(2 * count))
    call("semctl", semid, 0, GETALL, address_of(area))
    return area


def _write_queue(row: sysvipc.Msg, ctx: DumpContext) -> None:
    # Others may be using the queue at this moment: what one pass finds is one order of messages that was there.
    messages: list[tuple[int, bytes]] = []
    while True:
        try:
            messages.append(_copy_message(row.msqid, len(messages), row.cbytes + (1 << 16)))
        except KernelError as error:
            if error.errno != errno.ENOMSG:
                raise
            break
    area = buffer(STAT_BYTES)
    call("msgctl", row.msqid, IPC_STAT, area)
    entry = pb.ipc_msg_entry(qbytes=struct.unpack_from("<Q", area, _QBYTES)[0], qnum=len(messages))
    entry.desc.CopyFrom(desc_of(row, row.msqid))
    ctx.images.append(f"ipcns-msg-{HOST_IPC}", entry, join_queue(messages))


def _copy_message(msqid: int, index: int, size: int) -> tuple[int, bytes]:
    """The message number ``index`` of a queue, which stays where it is; cut off at ``size`` bytes."""
    area = buffer(8 + size)
    count = call("msgrcv", msqid, area, size, index, IPC_NOWAIT | MSG_COPY | MSG_NOERROR)
    return struct.unpack_from("<q", area)[0], area.raw[8 : 8 + count]


# ----------------------------------------------------------------------------------------- restore


class Adjustment:
    """What a task is to have of a semaphore: ``fresh`` if the set was made by us, with the value that goes with it."""

    __slots__ = ("adjust", "fresh", "number", "semid")

    def __init__(self, semid: int, number: int, adjust: int, fresh: bool) -> None:
        self.semid = semid
        self.number = number
        self.adjust = adjust
        self.fresh = fresh

    def operations(self) -> bytes:
        """struct sembuf, one or two, done at once: a change of the value by -adjust that is undone when the task ends.

        In a fresh set the value is as it was with that: the other one makes up for it.
        """
        change = struct.pack("<Hhh", self.number, -self.adjust, SEM_UNDO | IPC_NOWAIT)
        if not self.fresh:
            return change
        back = struct.pack("<Hhh", self.number, self.adjust, IPC_NOWAIT)
        return back + change if self.adjust > 0 else change + back


def prepare(ctx: BuildContext) -> None:
    """See to it that all semaphores and queues are there. Raises Unsupported where others are in their places."""
    undo: dict[int, list[Adjustment]] = ctx.memo.setdefault("sem undo", {})
    image = f"ipcns-sem-{HOST_IPC}"
    for entry, payload in ctx.images.iter_with_payload(image) if ctx.images.has(image) else ():
        semid = entry.desc.id
        with doing(f"System V semaphores {semid}"):
            _check_undo(entry, image)
            fresh = _make_set(entry, payload, ctx)
            for one in entry.undo:
                undo.setdefault(one.pid, []).append(Adjustment(semid, one.number, one.adjust, fresh))
    image = f"ipcns-msg-{HOST_IPC}"
    for entry, payload in ctx.images.iter_with_payload(image) if ctx.images.has(image) else ():
        with doing(f"System V message queue {entry.desc.id}"):
            _make_queue(entry, split_queue(payload, image, f"queue {entry.desc.id}"), ctx)


def prepare_rest(ctx: BuildContext) -> None:
    """As prepare(), for segments that no task has attached; to be called when the others are there."""
    if ctx.images.has(f"ipcns-shm-{HOST_IPC}"):
        from .memory import sysv

        sysv.prepare_rest(ctx)


def _check_undo(entry: Message, image: str) -> None:
    for one in entry.undo:
        if one.number >= entry.nsems or not 0 < abs(one.adjust) <= SEM_VALUE_MAX + 1:
            why = f"semaphore {one.number} of {entry.nsems}, by {one.adjust}"
            raise ImageError(f"{image}.img", f"set {entry.desc.id}: undo", why)


def _make_set(entry: Message, payload: bytes, ctx: BuildContext) -> bool:
    """Was the set missing and has been made?"""
    desc = entry.desc
    rows = _sets()
    present = next((row for row in rows if row.semid == desc.id), None)
    if present is not None:
        if (present.key & 0xFFFFFFFF, present.nsems) != (desc.key, entry.nsems):
            raise Unsupported(
                f"another set has this identifier (key {present.key:#x}, {present.nsems} semaphores)",
                hint=f"remove it if nobody needs it: ipcrm -s {desc.id}",
            )
        _check_values(entry)
        return False
    _check_key(desc, [row.key for row in rows], "-S")
    _create("sem", desc, lambda flags: as_creator(desc.cuid, desc.cgid, "semget", signed(desc.key), entry.nsems, flags))
    ctx.on_failure.add(f"remove semaphores {desc.id}", lambda: call("semctl", desc.id, 0, IPC_RMID, 0))
    values = array.array("H", payload[: 2 * entry.nsems])
    if any(value > SEM_VALUE_MAX for value in values):
        raise ImageError(f"ipcns-sem-{HOST_IPC}.img", f"set {desc.id}", "a value beyond all semaphores")
    call("semctl", desc.id, 0, SETALL, address_of(values))
    area = buffer(STAT_BYTES)
    call("semctl", desc.id, 0, IPC_STAT, address_of(area))
    pack_owner(area, desc)
    call("semctl", desc.id, 0, IPC_SET, address_of(area))
    return True


def _check_values(entry: Message) -> None:
    """Can the tasks take again what they had?"""
    values = _values(entry.desc.id, entry.nsems)
    for one in entry.undo:
        left = values[one.number] - one.adjust
        if not 0 <= left <= SEM_VALUE_MAX:
            raise Unsupported(
                f"task {one.pid} held semaphore {one.number} (SEM_UNDO {one.adjust:+d}), and its value is "
                f"{values[one.number]} now: somebody else has it",
                hint="wait until it is released",
            )
        values[one.number] = left


def _make_queue(entry: Message, messages: list[tuple[int, bytes]], ctx: BuildContext) -> None:
    desc = entry.desc
    rows = _queues()
    present = next((row for row in rows if row.msqid == desc.id), None)
    if present is not None:
        if present.key & 0xFFFFFFFF != desc.key:
            raise Unsupported(
                f"another queue has this identifier (key {present.key:#x})",
                hint=f"remove it if nobody needs it: ipcrm -q {desc.id}",
            )
        return
    _check_key(desc, [row.key for row in rows], "-Q")
    _create("msg", desc, lambda flags: as_creator(desc.cuid, desc.cgid, "msgget", signed(desc.key), flags))
    ctx.on_failure.add(f"remove message queue {desc.id}", lambda: call("msgctl", desc.id, IPC_RMID, None))
    area = buffer(STAT_BYTES)
    call("msgctl", desc.id, IPC_STAT, area)
    before = struct.unpack_from("<Q", area, _QBYTES)[0]
    pack_owner(area, desc)
    struct.pack_into("<Q", area, _QBYTES, entry.qbytes)
    try:
        call("msgctl", desc.id, IPC_SET, area)
    except KernelError as error:
        if error.errno != errno.EPERM or entry.qbytes <= before:
            raise
        raise Unsupported(
            f"it took {entry.qbytes} bytes of messages, and here a queue takes {before}",
            hint=f"sysctl kernel.msgmnb={entry.qbytes}",
        ) from None
    for kind, text in messages:
        try:
            call("msgsnd", desc.id, struct.pack("<q", kind) + text, len(text), IPC_NOWAIT)
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            raise KernelError("msgsnd", errno.EINVAL, hint=f"sysctl kernel.msgmax={len(text)}") from None


def _check_key(desc: Message, keys: list[int], option: str) -> None:
    if desc.key and any(key & 0xFFFFFFFF == desc.key for key in keys):
        raise Unsupported(
            f"another one has its key {desc.key:#x}", hint=f"remove it if nobody needs it: ipcrm {option} {desc.key:#x}"
        )


def signed(key: int) -> int:
    """A key as the calls take it."""
    return key if key < 1 << 31 else key - (1 << 32)


def pack_owner(area: Any, desc: Message) -> None:
    """Put owner and mode into what IPC_SET is given: they lie alike in all kinds."""
    for at, value in ((_UID, desc.uid), (_GID, desc.gid), (_MODE, desc.mode & 0o777)):
        struct.pack_into("<I", area, at, value)


def _create(kind: str, desc: Message, get: Any) -> None:
    """Make an object with the identifier that it had. Kernel: ipc/util.c, ipc_idr_alloc()"""
    for _ in range(_TRIES):
        with open(f"/proc/sys/kernel/{kind}_next_id", "w") as file:
            file.write(str(desc.id))
        number = get(IPC_CREAT | IPC_EXCL | desc.mode & 0o777)
        if number == desc.id:
            return
        # Somebody else's came in between, or the slot is occupied.
        if kind == "sem":
            call("semctl", number, 0, IPC_RMID, 0)
        else:
            call("msgctl", number, IPC_RMID, None)
    letter = "s" if kind == "sem" else "q"
    raise Unsupported("its identifier cannot be had", hint=f"another one may be in its slot: ipcs -{letter}")


def as_creator(uid: int, gid: int, name: str, *args: int) -> int:
    """A call as another user: the creator of an object cannot be changed afterwards."""
    if not uid and not gid:
        return call(name, *args)
    own_uid, own_gid = os.geteuid(), os.getegid()
    try:
        os.setegid(gid)
        os.seteuid(uid)
        return call(name, *args)
    finally:
        os.seteuid(own_uid)
        os.setegid(own_gid)
        prctl(PR_SET_DUMPABLE, 1)  # a change of credentials cleared it
