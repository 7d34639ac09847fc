"""Planning without a kernel: order of births, helpers, holes, runs of pages, ranges of descriptors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.engine import dump_memory, plan
from torpor.engine.programs import others, ranges
from torpor.engine.spans import minus
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.model.snapshot import RestoredTask, Snapshot

PAGE = 4096


def tree(*rows: tuple[int, int, int, int]) -> Snapshot:
    """A snapshot of (pid, parent, group, session)."""
    snapshot = Snapshot()
    for pid, parent, group, session in rows:
        task = RestoredTask(pid, group, session)
        task.core = pb.core_entry(mtype=1)
        task.core.tc.task_state = 1
        if parent:
            task.parent = snapshot.tasks[parent]
            task.parent.children.append(task)
        else:
            snapshot.root = task
        snapshot.tasks[pid] = task
    return snapshot


def names(task: RestoredTask, heirs: set[int] = frozenset()) -> list[object]:
    return [step if child is None else (step, child.pid) for step, child in plan.steps_of(task, heirs).steps]


def test_a_child_of_the_old_session_is_born_first() -> None:
    snapshot = tree((1, 0, 1, 1), (2, 1, 2, 2), (3, 2, 1, 1), (4, 2, 2, 2))
    plan.check_sessions(snapshot)
    assert names(snapshot.tasks[2]) == [("fork", 3), "setsid", ("fork", 4), "memory"]


def test_memory_comes_before_those_who_inherit_it() -> None:
    snapshot = tree((1, 0, 1, 1), (2, 1, 1, 1), (3, 1, 1, 1))
    assert names(snapshot.root, {3}) == ["memory", "setsid", ("fork", 2), ("fork", 3)]
    assert names(snapshot.root) == ["setsid", ("fork", 2), ("fork", 3), "memory"]


def test_an_impossible_session_is_refused() -> None:
    snapshot = tree((1, 0, 1, 1), (2, 1, 2, 2), (3, 2, 3, 3), (4, 3, 1, 1), (5, 1, 1, 1))
    plan.check_sessions(snapshot)  # 4 was born before 3 and 2 began sessions
    snapshot = tree((1, 0, 1, 1), (2, 1, 1, 1), (3, 1, 3, 3), (4, 2, 3, 3))
    with pytest.raises(ImageError, match="task 4: sid"):
        plan.check_sessions(snapshot)


def test_helpers_stand_in_for_leaders_that_are_gone() -> None:
    snapshot = tree((1, 0, 1, 1), (5, 1, 7, 7), (6, 1, 8, 1))
    helpers = plan.add_helpers(snapshot, shell_job=False)
    assert {helper.pid for helper in helpers} == {7, 8}
    assert snapshot.tasks[5].parent is snapshot.tasks[7]
    assert snapshot.tasks[7].parent is snapshot.root
    assert list(snapshot.tasks).index(7) < list(snapshot.tasks).index(5)
    assert snapshot.tasks[8].parent is snapshot.tasks[6]


def test_a_session_outside_needs_shell_job() -> None:
    with pytest.raises(Unsupported, match="shell-job"):
        plan.add_helpers(tree((9, 0, 5, 3)), shell_job=False)
    assert plan.add_helpers(tree((9, 0, 5, 3), (10, 9, 5, 3)), shell_job=True) == []


def nested(*rows: tuple[int, int, tuple[int, ...], tuple[int, ...]]) -> Snapshot:
    """A snapshot of (pid, parent, its numbers, the namespaces), all in the session and group of the root."""
    root = rows[0][0]
    snapshot = tree(*((pid, parent, root, root) for pid, parent, _, _ in rows))
    for pid, _, numbers, spaces in rows:
        task = snapshot.tasks[pid]
        task.numbers, task.spaces = numbers, spaces
        task.groups = task.sessions = (root, *(0 for _ in numbers[1:]))
    return snapshot


def test_children_in_a_pid_namespace_are_born_last_its_init_first() -> None:
    snapshot = nested((5, 0, (5,), (1,)), (6, 5, (6, 2), (1, 9)), (7, 5, (7, 1), (1, 9)), (8, 5, (8,), (1,)))
    snapshot.root.children_space = 9
    plan.check_spaces(snapshot)
    assert names(snapshot.root) == ["setsid", ("fork", 8), "unshare", ("fork", 7), ("fork", 6), "memory"]


def test_an_init_that_was_cloned_into_its_namespace() -> None:
    snapshot = nested((5, 0, (5,), (1,)), (6, 5, (6, 1), (1, 9)), (7, 6, (7, 2), (1, 9)))
    plan.check_spaces(snapshot)
    assert names(snapshot.root) == ["setsid", ("fork", 6), "memory"]


def test_pid_namespaces_that_cannot_be_come_into_are_refused() -> None:
    entered = nested((5, 0, (5,), (1,)), (6, 5, (6, 2), (1, 9)))
    with pytest.raises(Unsupported, match=r"task 6: .* whose init is not a child of the same parent"):
        plan.check_spaces(entered)
    elsewhere = nested((5, 0, (5,), (1,)))
    elsewhere.root.children_space = 9
    with pytest.raises(Unsupported, match="task 5: the children it will have"):
        plan.check_spaces(elsewhere)
    deep = nested((5, 0, (5,), (1,)), (6, 5, (6, 2, 1), (1, 9, 10)))
    with pytest.raises(Unsupported, match="task 6: its pid namespace is not the one"):
        plan.check_spaces(deep)


def test_a_group_outside_of_the_namespace_has_to_be_inherited() -> None:
    snapshot = nested((5, 0, (5,), (1,)), (6, 5, (6, 1), (1, 9)), (7, 5, (7,), (1,)))
    snapshot.tasks[7].group, snapshot.tasks[7].groups = 7, (7,)
    snapshot.tasks[6].group, snapshot.tasks[6].groups = 7, (7, 0)
    with pytest.raises(Unsupported, match="process group 7 is outside of its pid namespace"):
        plan.check_spaces(snapshot)


SPANS = st.lists(st.tuples(st.integers(0, 1 << 35), st.integers(1, 1 << 22)), max_size=20).map(
    lambda pairs: [(start * PAGE, (start + length) * PAGE) for start, length in pairs]
)


@given(SPANS, st.integers(1, 1 << 30))
def test_a_hole_is_free(spans: list[tuple[int, int]], size: int) -> None:
    base = plan.hole(spans, size)
    assert base % PAGE == 0
    assert all(end <= base or start >= base + size for start, end in spans)


def test_no_hole() -> None:
    with pytest.raises(Unsupported):
        plan.hole([(0, 0x7FFFFFFFF000)], PAGE)


def pages(spans: list[tuple[int, int]]) -> set[int]:
    return {page for start, end in spans for page in range(start, end)}


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8)


def apart(pairs: list[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    """Ascending spans that do not overlap."""
    found, at = [], 0
    for skip, length in pairs:
        at += skip % 7 + gap
        found.append((at, at + length))
        at += length
    return found


@given(RUNS, RUNS)
def test_clip(runs: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    some, within = apart(runs, 1), apart(spans)
    assert pages(dump_memory.clip(some, within)) == pages(some) & pages(within)


@given(RUNS, RUNS)
def test_clip_takes_some_whole(runs: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    some, within = apart(runs, 1), apart(spans)
    whole = set(within[::2])
    expected = pages(some) & pages(within) | pages(sorted(whole))
    assert pages(dump_memory.clip(some, within, whole)) == expected


@given(RUNS, RUNS)
def test_minus(spans: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    some, less = apart(spans), apart(taken)
    assert pages(minus(some, less)) == pages(some) - pages(less)


@given(st.sets(st.integers(0, 300)))
def test_ranges_and_the_others(numbers: set[int]) -> None:
    mine = [number for first, last in ranges([*numbers]) for number in range(first, last + 1)]
    assert mine == sorted(numbers)
    rest = others([*numbers])
    assert rest[-1][1] == 0xFFFFFFFF
    assert {n for first, last in rest for n in range(first, min(last, 400) + 1)} == set(range(401)) - numbers
