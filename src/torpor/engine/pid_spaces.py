"""The pid namespaces of a tree: which numbers its tasks have in each, from ours inwards.

A task is in one namespace and has a number there and in every one around it. Images go by the numbers that the root of
the tree would use; the others are in ``pid_levels_entry``, which is only written where there is more than one
namespace. Kernel: kernel/pid.c (alloc_pid), kernel/pid_namespace.c, kernel/fork.c (clone_args.set_tid).
"""

from __future__ import annotations

import fcntl
import os

from ..errors import ImageError, KernelError, TaskGone, TorporError, Unsupported
from ..images import schema as pb
from ..model.snapshot import EMPTY_SPACE, HOST_SPACE, RestoredTask, RestoredThread, Snapshot
from ..proc import stat as proc_stat
from ..proc import status as proc_status
from ..proc.read import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..images.schema import Message
    from ..model.source import SourceTask
    from .home import Home

NS_GET_PARENT = 0xB702  # include/uapi/linux/nsfs.h
PID_MAX = 1 << 22
LEVELS_MAX = 33  # MAX_PID_NS_LEVEL and the first one, include/linux/pid_namespace.h
#: CRIU numbers namespaces; the first eight are those of the dumping process, see engine/preflight.py.
FIRST_FREE_ID = 9


# ---------------------------------------------------------------------- dump


class PidSpaces:
    """The pid namespaces below ours, or below that of a copy whose init is none of its tasks (``home``): numbered as
    they are met. ``above``: how many there are above those that are told of.
    """

    def __init__(self, home: Home | None) -> None:
        inside = home is not None and not home.is_root
        self.above = int(inside)
        self._own = home.inodes["pid"] if home is not None and inside else os.stat("/proc/self/ns/pid").st_ino
        self._chains: dict[int, tuple[int, ...]] = {self._own: (HOST_SPACE,)}

    def are_plain(self, pid: int, tids: Iterable[int] = ()) -> bool:
        """Is a live process in the outermost namespace, and will its children be? ``tids``: its other threads."""
        found = {_inode(f"/proc/{pid}/ns/pid"), _inode(f"/proc/{pid}/ns/pid_for_children")}
        found.update(_inode(f"/proc/{pid}/task/{tid}/ns/pid_for_children") for tid in tids)
        return found == {self._own}

    def has_ended_plainly(self, pid: int) -> bool:
        """Has a zombie been in the outermost namespace?"""
        return _inode(f"/proc/{pid}/ns/pid") == self._own

    def chain(self, path: str) -> tuple[int, ...]:
        """The namespaces from the outermost to the one that a file of nsfs stands for."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._chain(fd)
        finally:
            os.close(fd)

    def _chain(self, fd: int) -> tuple[int, ...]:
        inode = os.fstat(fd).st_ino
        if inode not in self._chains:
            try:
                parent = fcntl.ioctl(fd, NS_GET_PARENT)
            except OSError as error:
                raise KernelError("the parent of a pid namespace", error.errno or 0) from None
            try:
                around = self._chain(parent)
            finally:
                os.close(parent)
            self._chains[inode] = (*around, FIRST_FREE_ID - 1 + len(self._chains))
        return self._chains[inode]


def _inode(path: str) -> int:
    """0 for a namespace that has no process yet (pidns_for_children_get() in kernel/pid_namespace.c)."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def check_running(
    tree: dict[int, tuple[int, proc_stat.Stat]], home: Home | None, shell_job: bool
) -> list[TorporError]:
    """Why the pid namespaces of a tree that runs cannot be made again; nothing where they can. ``home``: that of a
    copy, if it is one; ``shell_job``: it may share the session of others.
    """
    from ..model.source import SourceTask
    from . import collect

    root = next(iter(tree))
    spaces = PidSpaces(home)
    try:
        if all(
            spaces.has_ended_plainly(pid) if stat.state in "ZX" else spaces.are_plain(pid, _others(pid, stat))
            for pid, (_, stat) in tree.items()
        ):
            return []
        level = collect.level_of(root)
        tasks = {}
        for pid, (parent, stat) in tree.items():
            if stat.state in "ZX":
                tasks[pid] = SourceTask(pid, parent, stat, proc_status.parse(read(pid, "status")), level)
            else:
                tasks[pid] = collect.running(pid, parent, level)
            if parent:
                tasks[parent].children.append(tasks[pid])
        levels_of(tasks, home, shell_job)
    except (TaskGone, FileNotFoundError):
        return []  # it changes: when it stands still it is looked at again
    except TorporError as error:
        return [error]
    return []


def _others(pid: int, stat: proc_stat.Stat) -> list[int]:
    """The threads of a process besides its main one."""
    return [int(tid) for tid in os.listdir(f"/proc/{pid}/task") if int(tid) != pid] if stat.num_threads > 1 else []


def levels_of(tasks: dict[int, SourceTask], home: Home | None, shell_job: bool) -> dict[int, Message]:
    """pid → pid_levels_entry of those tasks that need one. Raises Unsupported where no order of births leads there."""
    from . import plan, zombies

    spaces = PidSpaces(home)
    root = tasks[next(iter(tasks))]
    if not shell_job and root.session == root.vpid:  # else that has been refused before
        for task in tasks.values():
            if task.session == plan.OUTSIDE:
                raise Unsupported(
                    f"task {task.pid}: its session leader is outside of its pid namespace",
                    hint="--shell-job dumps the job of a shell",
                )
    if all(
        spaces.has_ended_plainly(task.pid) if task.zombie else spaces.are_plain(task.pid, _tids(task))
        for task in tasks.values()
    ):
        return {}
    for task in tasks.values():
        if task.zombie:
            zombies.check(task.pid, task.own_pid, task.stat.exit_code)
    entries = {pid: _levels(task, spaces) for pid, task in tasks.items()}
    snapshot = Snapshot()
    level = len(entries[root.pid].ns_id) - 1
    snapshot.apart = bool(level)
    for pid, task in tasks.items():
        one = RestoredTask(task.vpid, task.group, task.session)
        one.threads = [RestoredThread(one, thread.vtid, None) for thread in task.threads]
        if task.ppid:
            one.parent = snapshot.tasks[tasks[task.ppid].vpid]
            one.parent.children.append(one)
        else:
            snapshot.root = one
        set_levels(one, entries[pid], level)
        snapshot.tasks[task.vpid] = one
    try:
        plan.add_helpers(snapshot, shell_job=True)
        plan.check_spaces(snapshot)
    except ImageError as error:
        raise Unsupported(f"its pid namespaces and sessions cannot be made again: {error.what}") from None
    return {pid: entry for pid, entry in entries.items() if len(entry.ns_id) > 1 or entry.HasField("children_ns")}


def _tids(task: SourceTask) -> list[int]:
    return [thread.tid for thread in task.threads[1:]]


def _levels(task: SourceTask, spaces: PidSpaces) -> Message:
    status = task.status
    chain = spaces.chain(f"/proc/{task.pid}/ns/pid")
    above = spaces.above
    entry = pb.pid_levels_entry(
        ns_id=chain, pid=status.NSpid[above:], pgid=status.NSpgid[above:], sid=status.NSsid[above:]
    )
    if task.zombie:
        return entry
    for thread in task.threads:
        entry.threads.add(tid=thread.status.NSpid[above:])
    tids = [task.pid, *_tids(task)]
    into = [_children_chain(f"/proc/{task.pid}/task/{tid}/ns/pid_for_children", spaces) for tid in tids]
    if any(one != chain for one in into):
        if len(into) > 1:
            raise Unsupported(
                f"task {task.pid}: it has several threads, and the children of one are born into another pid namespace "
                "(unshare(2) or setns(2))", hint="have the program do that in a process with one thread",
            )  # fmt: skip
        entry.children_ns = into[0][-1]
    return entry


def _children_chain(path: str, spaces: PidSpaces) -> tuple[int, ...]:
    try:
        return spaces.chain(path)
    except FileNotFoundError:
        return (EMPTY_SPACE,)


# ---------------------------------------------------------------------- restore


def load(snapshot: Snapshot, entries: Sequence[Message], root_ids: Message | None) -> None:
    """Fill in what images say of pid namespaces. ``entries``: the pstree_entry of each task, in their order;
    ``root_ids``: the task_kobj_ids_entry of the dumping process. Raises ImageError.
    """
    first = entries[0].levels
    level = len(first.ns_id) - 1 if entries[0].HasField("levels") else 0
    snapshot.between = max(level - 1, 0)
    parents: dict[int, int] = {}
    for index, (entry, task) in enumerate(zip(entries, snapshot.tasks.values(), strict=True)):
        if not entry.HasField("levels"):
            task.spaces = (first.ns_id[level] if level else HOST_SPACE,)
            continue
        place = f"entry {index}: levels"
        _check_levels(entry, task, place, level, first.ns_id[: level + 1] or [HOST_SPACE])
        for around, inner in zip(entry.levels.ns_id, entry.levels.ns_id[1:], strict=False):
            if parents.setdefault(inner, around) != around or inner in (HOST_SPACE, EMPTY_SPACE):
                raise ImageError("pstree.img", f"{place}.ns_id", f"namespace {inner} is in two places")
        set_levels(task, entry.levels, level)
        if level:
            snapshot.outer[task.pid] = entry.levels.pid[0]
            snapshot.outer.update(
                (thread.tid, one.tid[0]) for thread, one in zip(task.threads, entry.levels.threads, strict=False)
            )
    ids = snapshot.root.ids
    if ids is not None and root_ids is not None and ids.HasField("pid_ns_id") and root_ids.HasField("pid_ns_id"):
        snapshot.apart = ids.pid_ns_id != root_ids.pid_ns_id
    else:
        snapshot.apart = bool(level)


def _check_levels(entry: Message, task: RestoredTask, place: str, level: int, chain: Sequence[int]) -> None:
    levels = entry.levels
    count = len(levels.ns_id)
    if not level < count <= LEVELS_MAX or list(levels.ns_id[: level + 1]) != list(chain):
        raise ImageError("pstree.img", f"{place}.ns_id", "it is in no namespace below that of the root")
    rows: list[tuple[str, Sequence[int], int, int]] = [
        ("pid", levels.pid, entry.pid, 1), ("pgid", levels.pgid, entry.pgid, 0), ("sid", levels.sid, entry.sid, 0),
    ]  # fmt: skip
    if levels.threads:
        if len(levels.threads) != len(task.threads):
            raise ImageError("pstree.img", f"{place}.threads", f"{len(levels.threads)} of {len(task.threads)} threads")
        rows += [
            ("threads", one.tid, thread.tid, 1) for one, thread in zip(levels.threads, task.threads, strict=True)
        ]
    for name, numbers, own, least in rows:
        if len(numbers) != count or numbers[level] != own or not all(least <= one < PID_MAX for one in numbers):
            raise ImageError("pstree.img", f"{place}.{name}", f"{list(numbers)} are not the numbers of {own}")


def set_levels(task: RestoredTask, levels: Message, level: int) -> None:
    """Take over the numbers from namespace ``level`` inwards."""
    task.numbers, task.spaces = tuple(levels.pid[level:]), tuple(levels.ns_id[level:])
    task.groups, task.sessions = tuple(levels.pgid[level:]), tuple(levels.sid[level:])
    if levels.HasField("children_ns"):
        task.children_space = levels.children_ns
    for thread, one in zip(task.threads, levels.threads, strict=False):
        thread.numbers = tuple(one.tid[level:])
    if task.threads and not levels.threads:
        task.threads[0].numbers = task.numbers


def choose_outer(snapshot: Snapshot, alive: Callable[[int], bool], note: Callable[[str], object]) -> None:
    """Keep the numbers that the tasks had outside of their namespace if all of them are free; else any will do, for the
    tasks cannot see them. Nor can they see what was between (docs/adr/0014-pid-namespaces.md).
    """
    if snapshot.between:
        note(
            f"pid namespaces: {snapshot.between} between that of the tree and that of its dump will not be made: "
            "the tree has no numbers of them"
        )
    taken = sorted(number for number in set(snapshot.outer.values()) if alive(number))
    if taken:
        note(f"pid namespace: outside of it the tasks get other numbers than they had: {taken[0]} is in use")
        snapshot.outer.clear()


def set_tid(snapshot: Snapshot, tid: int, numbers: Sequence[int]) -> list[int]:
    """clone_args.set_tid for a task or thread of the images: the innermost number first."""
    outer = [snapshot.outer[tid]] if tid in snapshot.outer else []
    return [*reversed(numbers), *outer]
