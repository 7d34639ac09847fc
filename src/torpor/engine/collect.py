"""Finding all tasks of a tree and stopping them; comparing what they share."""

from __future__ import annotations

import functools
import os

from .. import log
from ..errors import TaskGone, Unsupported, doing
from ..linux import ptrace
from ..linux.kernel import KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_VM, kcmp
from ..model.source import Mapping, SourceTask, SourceThread
from ..proc import maps as proc_maps
from ..proc import smaps as proc_smaps
from ..proc import stat as proc_stat
from ..proc import status as proc_status
from ..proc.read import numbers, read
from ..remote.guest import Guest
from ..remote.tracee import Seized, Stop
from ..resources.task import rseq

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

PF_IO_WORKER = 0x10  # include/linux/sched.h
SHARED_KINDS = {"vm": KCMP_VM, "files": KCMP_FILES, "fs": KCMP_FS, "sighand": KCMP_SIGHAND}


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process, in the order in which they were made."""
    found: list[int] = []
    for tid in numbers(pid, "task"):
        try:
            found += [int(word) for word in read(pid, f"task/{tid}/children").split()]
        except (TaskGone, FileNotFoundError):
            continue  # a thread that has just ended
    return sorted(found, key=lambda child: _start_time(child)) if len(found) > 1 else found


def _start_time(pid: int) -> tuple[int, int]:
    try:
        return proc_stat.parse(read(pid, "stat")).starttime, pid
    except TaskGone:
        return 1 << 62, pid


def look(pid: int) -> dict[int, tuple[int, proc_stat.Stat]]:
    """pid → (parent, stat) of a tree that is left running. It may change at any time."""
    found: dict[int, tuple[int, proc_stat.Stat]] = {}
    queue = [(pid, 0)]
    while queue:
        child, parent = queue.pop()
        try:
            found[child] = (parent, proc_stat.parse(read(child, "stat")))
            queue += [(grandchild, child) for grandchild in children_of(child) if grandchild not in found]
        except TaskGone:
            if child == pid:
                raise
    return found


def freeze(root: int, seized: Seized) -> dict[int, SourceTask]:
    """Stop the tree below and with ``root``; pid → task, parents before children.

    Passes are made until one finds nothing new: a task that was still running may have forked, and children of a task
    that ends go to another one of the tree.
    """
    tasks: dict[int, SourceTask] = {}
    level = level_of(root)
    _freeze_process(root, 0, tasks, seized, level)
    if root not in tasks:
        raise TaskGone(f"task {root} is gone")
    while True:
        before = len(tasks)
        for task in list(tasks.values()):
            if task.zombie:
                continue
            for child in children_of(task.pid):
                if child not in tasks:
                    with doing(f"task {child}"):
                        _freeze_process(child, task.pid, tasks, seized, level)
        if len(tasks) == before:
            break
    for task in tasks.values():
        if task.ppid:
            tasks[task.ppid].children.append(task)
    return tasks


def level_of(pid: int) -> int:
    """How many pid namespaces below ours a process is."""
    return len(proc_status.parse(read(pid, "status")).NSpid) - 1


def _freeze_process(pid: int, ppid: int, tasks: dict[int, SourceTask], seized: Seized, level: int) -> None:
    try:
        stat = proc_stat.parse(read(pid, "stat"))
        if stat.state in "ZX" and stat.num_threads <= 1:
            tasks[pid] = SourceTask(pid, ppid, stat, proc_status.parse(read(pid, "status")), level)
            return
        while fresh := [tid for tid in numbers(pid, "task") if tid not in seized.stops and not _is_worker(pid, tid)]:
            if not seized.seize(fresh) and not proc_alive_threads(pid, fresh):
                break
        tids = [tid for tid in numbers(pid, "task") if tid in seized.stops]
        if tids and pid not in tids:
            raise Unsupported(
                "its main thread has ended while other threads go on", hint="such a process cannot be restored"
            )
        stat = proc_stat.parse(read(pid, "stat"))
        task = SourceTask(pid, ppid, stat, proc_status.parse(read(pid, "status")), level)
        if not tids:  # it ended while it was being stopped
            tasks[pid] = task
            return
        tids.remove(pid)
        for tid in (pid, *tids):
            task.threads.append(_thread(task, tid, seized))
        tasks[pid] = task
    except TaskGone:
        if pid in seized.stops:
            raise
        # It ended in the meantime: a zombie now, or gone altogether.
        try:
            stat = proc_stat.parse(read(pid, "stat"))
            tasks[pid] = SourceTask(pid, ppid, stat, proc_status.parse(read(pid, "status")), level)
        except TaskGone:
            log.debug(f"task {pid} ended while the tree was being stopped")


def _is_worker(pid: int, tid: int) -> bool:
    """Is it a thread that the kernel has made in the process for io_uring? It never runs the program.

    Traced and stopped, it would leave requests undone. Its name says it first, for it is cheaper to read than its
    flags.
    """
    if tid == pid:
        return False
    try:
        if not read(pid, f"task/{tid}/comm").startswith(b"iou-"):
            return False
        return bool(proc_stat.parse(read(pid, f"task/{tid}/stat")).flags & PF_IO_WORKER)
    except (TaskGone, FileNotFoundError):
        return False


def running(pid: int, ppid: int, level: int = -1) -> SourceTask:
    """A task that was not stopped, as far as it can be seen so: without registers and signal masks."""
    stat, status = proc_stat.parse(read(pid, "stat")), proc_status.parse(read(pid, "status"))
    task = SourceTask(pid, ppid, stat, status, level)
    tids = [tid for tid in numbers(pid, "task") if not _is_worker(pid, tid)]
    for tid in sorted(tids, key=lambda tid: tid != pid):
        status = proc_status.parse(read(pid, f"task/{tid}/status"))
        task.threads.append(SourceThread(task, tid, stat, status, Stop(0)))
    return task


def proc_alive_threads(pid: int, tids: list[int]) -> bool:
    """Is any of the threads alive, that is, neither gone nor dead?"""
    for tid in tids:
        try:
            if proc_stat.parse(read(pid, f"task/{tid}/stat")).state not in "ZX":
                return True
        except (TaskGone, FileNotFoundError):
            continue
    return False


def _thread(task: SourceTask, tid: int, seized: Seized) -> SourceThread:
    if tid == task.pid:
        stat, status = task.stat, task.status
    else:
        stat = proc_stat.parse(read(task.pid, f"task/{tid}/stat"))
        status = proc_status.parse(read(task.pid, f"task/{tid}/status"))
    thread = SourceThread(task, tid, stat, status, seized.stops[tid])
    thread.regs = ptrace.get_regs(tid)
    if thread.regs.cs != 0x33:
        raise Unsupported("it runs 32-bit code", hint="only 64-bit tasks can be dumped")
    thread.sigmask = ptrace.get_sigmask(tid)
    # Before anything runs in it: having left a restartable sequence, it goes on at the sequence's abort handler.
    thread.regs.ip = rseq.abort_address(tid, thread.regs.ip) or thread.regs.ip
    return thread


def read_mappings(task: SourceTask, known: dict[object, Any]) -> None:
    """Fill in ``task.mappings``; tasks with the same ones get the same list, by way of ``known``."""
    text, figures = read(task.pid, "maps"), read(task.pid, "smaps")
    if proc_smaps.protection_keys(figures):
        raise Unsupported("it has memory under protection keys (pkey_mprotect)", hint="they would be lost")
    key = text, *proc_smaps.raw_flags(figures)
    found = known.get(key)
    if found is None:
        flags = {start: names for start, _, names in proc_smaps.parse_flags(figures)}
        vmas = parsed_maps(text, known)
        found = known[key] = [Mapping(vma, flags.get(vma.start, frozenset())) for vma in vmas]
    task.mappings = found


def parsed_maps(text: bytes, known: dict[object, Any]) -> list[proc_maps.Vma]:
    """What the content of a maps file says; ``known`` remembers it, for the tasks of a forked tree have the same."""
    found: list[proc_maps.Vma] | None = known.get(text)
    if found is None:
        found = known[text] = proc_maps.parse(text)
    return found


def open_handles(task: SourceTask) -> None:
    """Open /proc/PID/mem and a pidfd; close_handles() closes them."""
    task.mem_fd = os.open(f"/proc/{task.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    task.pidfd = os.pidfd_open(task.pid)


def close_handles(task: SourceTask) -> None:
    """Close what open_handles() opened."""
    for fd in (task.mem_fd, task.pidfd):
        if fd >= 0:
            os.close(fd)
    task.mem_fd = task.pidfd = -1


def guest_in(task: SourceTask, seized: Seized) -> Guest:
    """The place in a stopped task where programs of ours run. Its mappings must be known, and its handles open."""
    in_use = task.status.SigCgt | task.status.ShdPnd
    for thread in task.threads:
        in_use |= thread.status.SigPnd
    rooms = rooms_for_guest([mapping.vma for mapping in task.mappings])
    return Guest(task.pid, task.own_pid, task.mem_fd, rooms, in_use, seized)


def rooms_for_guest(vmas: Sequence[proc_maps.Vma]) -> list[int]:
    """The ends of a task's mappings of code, where ours may lie for a moment: the vDSO's first.

    The others are for programs that have unmapped it: the last page of a segment of code is padded with zeros.
    """
    vdso = [vma.end for vma in vmas if vma.kind == proc_maps.VDSO]
    code = [
        vma.end
        for vma in vmas
        if vma.kind == proc_maps.FILE and vma.prot & proc_maps.PROT_EXEC and vma.flags & proc_maps.MAP_PRIVATE
    ]
    return vdso + code


class KcmpTree:
    """Numbers for kernel objects, equal for the same object: kcmp(2) tells an order, so a search tree finds them."""

    __slots__ = ("_compare", "_new", "_root")

    def __init__(self, compare: Callable[[Any, Any], int], new: Callable[[], int]) -> None:
        self._compare = compare
        self._new = new
        self._root: list[Any] | None = None

    def number_of(self, item: Any, number: int | None = None) -> tuple[int, bool]:
        """(number, is it new) for ``item``; a new one gets ``number`` if that is given."""
        node, parent, side = self._root, None, 0
        while node is not None:
            order = self._compare(item, node[0])
            if order == 0:
                return node[1], False
            parent, side = node, 2 if order == 1 else 3
            node = node[side]
        if number is None:
            number = self._new()
        fresh: list[Any] = [item, number, None, None]
        if parent is None:
            self._root = fresh
        else:
            parent[side] = fresh
        return number, True


def _kcmp(code: int, a: int, b: int) -> int:
    return kcmp(a, b, code)


def number_shared(tasks: dict[int, SourceTask]) -> None:
    """Fill in ``ids`` of every live task: equal numbers mean a shared address space, descriptor table, …

    Numbers start at 2: 1 stands for the dumping process itself in CRIU's images.
    """
    for kind, code in SHARED_KINDS.items():
        counter = iter(range(2, 1 << 31))
        tree = KcmpTree(functools.partial(_kcmp, code), counter.__next__)
        for task in tasks.values():
            if not task.zombie:
                task.ids[kind], _ = tree.number_of(task.pid)
