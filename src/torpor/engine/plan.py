"""In what order the processes of a tree are made, so that each has its parent, session and process group.

A child inherits its session, and only a process that is not a group leader can begin a new one. So a child of another
session is born before its parent begins its own; and leaders that are gone are stood in for by helpers that end before
the tree runs. Pure: no kernel call is made here.
"""

from __future__ import annotations

from ..errors import ImageError, Unsupported
from ..model.snapshot import RestoredTask, Snapshot

FORK, SETSID, MEMORY = "fork", "setsid", "memory"


class Steps:
    """What one task's stub does first: a list of (FORK, child), (SETSID, None) and (MEMORY, None), in order."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps: list[tuple[str, RestoredTask | None]] = []


def add_helpers(snapshot: Snapshot, shell_job: bool) -> list[RestoredTask]:
    """Put a helper into the tree for every session and process group whose leader is gone; returns them.

    Helpers for a session take its members among the children of their subreaper as children of their own. Raises
    Unsupported where the root's own session lies outside of the tree and ``shell_job`` does not allow that.
    """
    root = snapshot.root
    helpers: list[RestoredTask] = []
    if root.session != root.pid and not shell_job:
        raise Unsupported(
            f"task {root.pid} is not a session leader: its session {root.session} is outside of the tree",
            hint="--shell-job restores it into the session of the caller",
        )
    outside = {root.session} if root.session != root.pid else set()
    for task in list(snapshot.tasks.values()):
        if task.session in snapshot.tasks or task.session in outside:
            continue
        if task.parent is None or task.session == 0:
            raise ImageError("pstree.img", f"task {task.pid}", f"no task can be in session {task.session}")
        helpers.append(_session_helper(task, snapshot))
    groups_outside = {root.group} if outside else set()
    for task in list(snapshot.tasks.values()):
        if task.group in snapshot.tasks or task.group in groups_outside or task.group == 0:
            continue
        if task.session in outside and task.session == task.group:
            continue
        helper = RestoredTask(task.group, task.group, task.session)
        helper.helper = True
        helper.parent = task
        task.children.append(helper)
        snapshot.tasks[helper.pid] = helper
        helpers.append(helper)
    threads = {thread.tid for task in snapshot.tasks.values() for thread in task.threads}
    for helper in helpers:
        if helper.pid in threads:
            raise ImageError("pstree.img", f"threads: {helper.pid}", "a thread has the number of a session or group")
    return helpers


def _session_helper(task: RestoredTask, snapshot: Snapshot) -> RestoredTask:
    """A leader for the session of ``task``, put between it and its parent: it ends, and they return to the parent."""
    parent = task.parent
    assert parent is not None
    helper = RestoredTask(task.session, task.session, task.session)
    helper.helper = True
    helper.parent = parent
    members = [child for child in parent.children if child.session == task.session]
    for child in members:
        parent.children.remove(child)
        child.parent = helper
        helper.children.append(child)
    parent.children.append(helper)
    # Before its members in the order of the tree.
    rest = dict(snapshot.tasks)
    snapshot.tasks.clear()
    for pid, other in rest.items():
        if other is members[0]:
            snapshot.tasks[helper.pid] = helper
        snapshot.tasks[pid] = other
    return helper


def birth_session(task: RestoredTask) -> int:
    """The session that a task is born into, for it and all its descendants to be where they belong."""
    if task.session == task.pid:
        # It begins one; what it is born into matters only to children that stay behind in an older one.
        older = [birth_session(child) for child in task.children]
        return next((session for session in older if session not in (0, task.pid)), 0)
    return task.session


def steps_of(task: RestoredTask, shares_memory: set[int]) -> Steps:
    """The first steps of a task. ``shares_memory``: pids of tasks that are to inherit their parent's pages."""
    plan = Steps()
    leads = task.session == task.pid
    before = [child for child in task.children if leads and birth_session(child) not in (0, task.pid)]
    after = [child for child in task.children if child not in before]
    heirs = any(child.pid in shares_memory for child in task.children)
    if heirs:
        plan.steps.append((MEMORY, None))
    plan.steps += [(FORK, child) for child in before]
    if leads:
        plan.steps.append((SETSID, None))
    plan.steps += [(FORK, child) for child in after]
    if not heirs:
        plan.steps.append((MEMORY, None))
    return plan


def check_sessions(snapshot: Snapshot) -> None:
    """Raise ImageError when no order of births can give every task its session."""
    for task in snapshot.tasks.values():
        if task.parent is None or task.session == task.pid:
            continue
        born_in = task.session
        parent: RestoredTask | None = task.parent
        while parent is not None and parent.session != born_in:
            if parent.session != parent.pid or birth_session(parent) != born_in:
                raise ImageError("pstree.img", f"task {task.pid}: sid", f"it cannot have come into session {born_in}")
            parent = parent.parent


def hole(spans: list[tuple[int, int]], size: int, low: int = 0x10000000, high: int = 0x7F0000000000) -> int:
    """The address of ``size`` bytes, with a margin around, that none of the (start, end) spans touches.

    Raises Unsupported when the address spaces leave no such place.
    """
    margin = 1 << 24
    candidate = 0x2000_0000_0000
    merged = sorted(spans)
    if _free(merged, candidate - margin, candidate + size + margin):
        return candidate
    end = low
    for start, stop in [*merged, (high, high)]:
        if start - end >= size + 2 * margin:
            return (end + margin + 0xFFFF) & ~0xFFFF
        end = max(end, stop)
    raise Unsupported(f"no {size} bytes of address space are free in all tasks")


def _free(merged: list[tuple[int, int]], low: int, high: int) -> bool:
    return all(stop <= low or start >= high for start, stop in merged)
