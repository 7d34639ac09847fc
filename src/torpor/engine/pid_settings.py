"""What a pid namespace has for itself besides its processes: the number given last, and the limit of numbers.

A program sees them in /proc/sys/kernel/ns_last_pid and pid_max, whose content depends on who reads; and the former in
the number of the next child: one that is given again too soon is taken for a process that is gone. The first
namespace's are the machine's own. Image: pidns-ID.img, in fields of ours. Kernel: kernel/pid_sysctl.h and
pid_ns_ctl_handler() in kernel/pid_namespace.c.
"""

from __future__ import annotations

import errno
import functools
import os

from .. import log
from ..errors import ImageError, KernelError
from ..images import schema as pb
from ..linux.call import call
from ..linux.launch import aside
from ..resources.apart import apart
from .home import MS_PRIVATE, MS_SLAVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..images.schema import Message
    from ..images.store import ImageReader, ImageWriter
    from ..model.snapshot import RestoredTask, Snapshot
    from ..model.source import SourceTask
    from ..remote.program import Program
    from ..resources.base import BuildContext

CLONE_NEWPID = 0x20000000
WALL = 0x40000000
FIRST_PID, RESERVED_PIDS = 1, 300
PID_MAX_LIMIT = 1 << 22  # what a new namespace has
KEY = ("last pid",)
LAST, LIMIT = "/proc/sys/kernel/ns_last_pid", "/proc/sys/kernel/pid_max"


# ---------------------------------------------------------------------- dump


def dump(tasks: dict[int, SourceTask], levels: dict[int, Message], mounts: int, writer: ImageWriter) -> None:
    """Write the settings of all namespaces from the root's inwards. ``levels``: those of pid_spaces.levels_of().

    ``mounts``: how ours propagate to the mount namespace that the tree has with a /proc of its own; 0: it has none.
    """
    if not levels:
        return
    root = next(iter(tasks))
    depth = len(levels[root].ns_id) - 1 if root in levels else 0
    seen: dict[int, Message] = {}
    for pid, entry in levels.items():
        if len(entry.ns_id) - 1 >= max(depth, 1) and not tasks[pid].zombie and entry.ns_id[-1] not in seen:
            seen[entry.ns_id[-1]] = _look(pid)
    if mounts:
        seen[levels[root].ns_id[-1]].mounts = mounts
    for number, settings in seen.items():
        if settings.ListFields():
            writer.write_one(f"pidns-{number}", settings)


def _look(pid: int) -> Message:
    found = pb.pidns_entry()

    def look(own_limit: bool) -> None:
        found.last_pid = max(int(_read(LAST)), 0)  # -1 where all had a number of somebody's choice
        if own_limit:
            found.pid_max = int(_read(LIMIT))

    try:
        _inside(pid, look)
    except FileNotFoundError as error:  # a kernel without CONFIG_CHECKPOINT_RESTORE
        log.info(f"task {pid}: what its pid namespace counts is not kept: {error}")
    return found


# ---------------------------------------------------------------------- restore


def load(reader: ImageReader, snapshot: Snapshot) -> None:
    """Fill in what images say of the namespaces. Raises ImageError."""
    spaces = {task.space: len(task.spaces) for task in snapshot.tasks.values()}
    for number in sorted(spaces):
        for entry in reader.read_all(f"pidns-{number}"):
            _check(f"pidns-{number}.img", entry)
            snapshot.settings[number] = entry
    own = snapshot.settings.get(snapshot.root.space)
    if own is not None and snapshot.apart:
        snapshot.mounts = own.mounts


def _check(image: str, entry: Message) -> None:
    if entry.mounts not in (0, MS_PRIVATE, MS_SLAVE):
        raise ImageError(image, "mounts", f"{entry.mounts:#x} is no way to propagate")
    if entry.HasField("pid_max") and not RESERVED_PIDS < entry.pid_max <= PID_MAX_LIMIT:
        raise ImageError(image, "pid_max", f"{entry.pid_max} cannot be")
    if entry.last_pid >= PID_MAX_LIMIT:
        raise ImageError(image, "last_pid", f"{entry.last_pid} is no process id")


def first_tasks(snapshot: Snapshot) -> dict[int, RestoredTask]:
    """id of a namespace that has settings → the task that sees to them. Ours is not touched."""
    found: dict[int, RestoredTask] = {}
    for task in snapshot.tasks.values():
        ours = task.space == snapshot.root.space and not snapshot.apart
        if task.alive and task.space in snapshot.settings and not ours:
            found.setdefault(task.space, task)
    return found


def prepare(ctx: BuildContext) -> None:
    """Open the file that stubs write to: it is about the namespace of whoever writes."""
    try:
        ctx.once(KEY, lambda: ctx.keep(os.open(LAST, os.O_WRONLY | os.O_CLOEXEC)))
    except OSError as error:
        log.warning(f"{LAST}: {error.strerror}: pid namespaces begin to count anew")


def emit(settings: Message, program: Program, ctx: BuildContext) -> None:
    """Emit, in a task of a namespace, the setting of the number given last. No stub's birth changes it any more."""
    if settings.HasField("last_pid") and KEY in ctx.memo:
        text = b"%d" % settings.last_pid
        # At its beginning: others have written there before (sysctl_writes_strict).
        program.call("pwrite64", ctx.memo[KEY], text, len(text), 0, may_fail=(errno.EPERM,), why="the pid given last")


def restore(snapshot: Snapshot) -> None:
    """Set the limits that the namespaces had, now that all tasks are there. What the kernel does not allow is told."""
    for number, task in first_tasks(snapshot).items():
        settings = snapshot.settings[number]
        if settings.HasField("pid_max") and settings.pid_max != PID_MAX_LIMIT:
            try:
                _inside(task.live_pid, functools.partial(_set_limit, settings.pid_max))
            except OSError as error:
                log.warning(f"task {task.pid}: its pid namespace has another limit of pids than it had: {error}")


def _set_limit(limit: int, own_limit: bool) -> None:
    if not own_limit:
        raise KernelError(LIMIT, errno.EOPNOTSUPP)
    _write(LIMIT, limit)


# ---------------------------------------------------------------------- both


def _inside(pid: int, action: Callable[[bool], None]) -> None:
    """Have a process in the pid namespace of ``pid`` call ``action(own_limit)``. It gets a number that is free there,
    which does not change what number is next.

    ``own_limit``: the namespace has a limit of its own. Since Linux kernel commit 7863dcc72d0f ("pid: allow pid_max to
    be set per pid namespace") (in v6.14); before it the file is everybody's, and the same one.
    """
    assert os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino, "our own is not to be changed"
    fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        limit = os.open(LIMIT, os.O_RDONLY | os.O_CLOEXEC)
        try:

            def enter() -> None:
                call("setns", fd, CLONE_NEWPID)
                _numbered(lambda: action(os.stat(LIMIT).st_ino != os.fstat(limit).st_ino))

            apart(enter)
        finally:
            os.close(limit)
    finally:
        os.close(fd)


def _numbered(action: Callable[[], None]) -> None:
    failure: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:
            failure.append(error)

    for number in range(RESERVED_PIDS, FIRST_PID, -1):  # no limit can be lower
        try:
            child = aside(act, number)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            continue
        os.waitpid(child, WALL)
        break
    else:
        raise KernelError(f"clone3 with a pid up to {RESERVED_PIDS}", errno.EEXIST)
    if failure:
        raise failure[0]


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 32)
    finally:
        os.close(fd)


def _write(path: str, number: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % number)
    finally:
        os.close(fd)


