"""In what order the processes of a tree are made, so that each has its parent, session and process group.

A child inherits its session, and only a process that is not a group leader can begin a new one. So a child of another
session is born before its parent begins its own; and leaders that are gone are stood in for by helpers that end before
the tree runs. Pure: no kernel call is made here.
"""

from __future__ import annotations

from ..errors import ImageError, Unsupported
from ..model.snapshot import INIT_PID, RestoredTask, Snapshot

OUTSIDE = 0  # how a session or group outside of a pid namespace is seen in it
FORK, SETSID, MEMORY, LEAD, UNSHARE = "fork", "setsid", "memory", "lead", "unshare"


class Steps:
    """What one task's stub does first, in order: a list of (FORK, child), (SETSID, None), (MEMORY, None), (LEAD, None),
    which makes it the leader of its process group, and (UNSHARE, None), a pid namespace for the children to come.
    """

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps: list[tuple[str, RestoredTask | None]] = []


def add_helpers(snapshot: Snapshot, shell_job: bool) -> list[RestoredTask]:
    """Put a helper into the tree for every session and process group whose leader is gone; returns them.

    Helpers for a session take its members among the children of their subreaper as children of their own. Raises
    Unsupported where a session lies outside of the tree and ``shell_job`` does not allow that: the root's own, or one
    that is outside of its pid namespace, 0.
    """
    root = snapshot.root
    helpers: list[RestoredTask] = []
    outside = {root.session} if root.session != root.pid else set()
    if snapshot.apart and any(task.session == OUTSIDE for task in snapshot.tasks.values()):
        outside.add(OUTSIDE)
    if outside and not shell_job:
        lost = next(task for task in snapshot.tasks.values() if task.session in outside)
        raise Unsupported(
            f"task {lost.pid} is not a session leader: its session {lost.session} is outside of the tree",
            hint="--shell-job restores it into the session of the caller",
        )
    if len(outside) > 1:
        raise ImageError("pstree.img", f"task {root.pid}: sid", f"no tree has members of {sorted(outside)}")
    for task in list(snapshot.tasks.values()):
        if task.session in snapshot.tasks or task.session in outside:
            continue
        if task.parent is None or task.session == OUTSIDE:
            raise ImageError("pstree.img", f"task {task.pid}", f"no task can be in session {task.session}")
        helpers.append(_session_helper(task, snapshot))
    groups_outside = {root.group} if outside else set()
    for task in list(snapshot.tasks.values()):
        if task.group in snapshot.tasks or task.group in groups_outside or task.group == 0:
            continue
        if task.session in outside and task.session == task.group:
            continue
        if not task.groups[-1]:
            continue  # its leader is outside of the task's pid namespace: check_spaces() sees to it
        helper = _helper(task, task.groups)
        helper.session, helper.sessions = task.session, task.sessions
        helper.parent = task
        task.children.append(helper)
        snapshot.tasks[helper.pid] = helper
        helpers.append(helper)
    threads = {thread.tid for task in snapshot.tasks.values() for thread in task.threads}
    for helper in helpers:
        if helper.pid in threads:
            raise ImageError("pstree.img", f"threads: {helper.pid}", "a thread has the number of a session or group")
    return helpers


def _helper(task: RestoredTask, numbers: tuple[int, ...]) -> RestoredTask:
    """A helper with these numbers, in the innermost namespace of the task's where it has one."""
    depth = sum(1 for number in numbers if number)
    helper = RestoredTask(numbers[0], numbers[0], numbers[0])
    helper.helper = True
    helper.numbers = helper.groups = helper.sessions = numbers[:depth]
    helper.spaces = task.spaces[:depth]
    return helper


def _session_helper(task: RestoredTask, snapshot: Snapshot) -> RestoredTask:
    """A leader for the session of ``task``, put between it and its parent: it ends, and they return to the parent."""
    parent = task.parent
    assert parent is not None
    helper = _helper(task, task.sessions)
    helper.parent = parent
    if helper.spaces != parent.spaces:
        raise Unsupported(
            f"task {task.pid}: the leader of its session is gone, and was in another pid namespace than its parent is"
        )
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


def birth_session(task: RestoredTask) -> int | None:
    """The session that a task is born into, for it and all its descendants to be where they belong; None: any."""
    if task.session == task.pid:
        # It begins one; what it is born into matters only to children that stay behind in an older one.
        older = [birth_session(child) for child in task.children]
        return next((session for session in older if session not in (None, task.pid)), None)
    return task.session


def _born_before(task: RestoredTask) -> list[RestoredTask]:
    """Those children of a session's leader that belong into an older session."""
    leads = task.session == task.pid
    return [child for child in task.children if leads and birth_session(child) not in (None, task.pid)]


def steps_of(task: RestoredTask, shares_memory: set[int]) -> Steps:
    """The first steps of a task. ``shares_memory``: pids of tasks that are to inherit their parent's pages."""
    plan = Steps()
    leads = task.session == task.pid
    before = _born_before(task)
    after = [child for child in task.children if child not in before]
    inward = [child for child in after if child.spaces != task.spaces]
    heirs = any(child.pid in shares_memory for child in task.children)
    if heirs:
        plan.steps.append((MEMORY, None))
    plan.steps += [(FORK, child) for child in before]
    if leads:
        plan.steps.append((SETSID, None))
    plan.steps += [(FORK, child) for child in after if child not in inward]
    if task.group == task.pid and not leads:
        plan.steps.append((LEAD, None))
    # Those who cannot see their group have to be born into it, so the group is there first.
    plan.steps += [(FORK, child) for child in inward if child.space != task.children_space]
    if task.children_space is not None:
        plan.steps.append((UNSHARE, None))
    late = [child for child in inward if child.space == task.children_space]
    plan.steps += [(FORK, child) for child in sorted(late, key=lambda child: child.own_pid != INIT_PID)]
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


def check_spaces(snapshot: Snapshot) -> None:
    """Raise Unsupported when some task cannot be born into its pid namespace, or into its group there."""
    groups: dict[int, int] = {}  # task → the group that it is born into
    for task in snapshot.tasks.values():
        if task.children_space is not None and len(task.threads) > 1:
            raise Unsupported(f"task {task.pid}: its children are born into another pid namespace, and it has threads")
        before = _born_before(task)
        homes = {child.space for child in task.children if child.own_pid == INIT_PID}
        if task.children_space and task.children_space not in homes:
            raise _without_init(task, "the children it will have are")
        for child in task.children:
            inward = child.spaces != task.spaces
            if inward and child.spaces[:-1] != task.spaces:
                raise Unsupported(
                    f"task {child.pid}: its pid namespace is not the one that its parent's children are born into",
                    hint="dump a tree that has all of that namespace, from its init on",
                )
            late = child.space == task.children_space
            if inward and not late and child.own_pid != INIT_PID:
                raise _without_init(child, "it is")
            if inward and late and child in before:
                raise Unsupported(f"task {child.pid}: it is of an older session than the pid namespace it is in")
            leads = task.pid in (task.group, task.session) and (inward or task.session == task.pid)
            groups[child.pid] = task.pid if leads and child not in before else groups.get(task.pid, task.group)
            if not child.groups[-1] and child.group != groups[child.pid] and child.group:
                raise Unsupported(
                    f"task {child.pid}: its process group {child.group} is outside of its pid namespace, "
                    f"and is not that of its parent"
                )


def _without_init(task: RestoredTask, whose: str) -> Unsupported:
    return Unsupported(
        f"task {task.pid}: {whose} in a pid namespace whose init is not a child of the same parent in the tree",
        hint="dump a tree that has all of that namespace, from its init on",
    )


class Place:
    """Where the arena will be."""

    __slots__ = ("base", "size")

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size


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
