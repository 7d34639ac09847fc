"""What the tests of the engine share: one call that puts a program through everything."""

from __future__ import annotations

import os
from typing import Protocol

import pytest

import torpor
from kit import Target, Targets, Verbs, assert_same, observe_settled, observe_tree, round_trip


class Survives(Protocol):
    def __call__(
        self,
        source: str | Target,
        *args: str,
        flags: tuple[str, ...] = (),
        ignore: tuple[str, ...] = (),
        options: dict[str, object] | None = None,
        compare: bool = True,
    ) -> Target: ...


@pytest.fixture
def survives(start: Targets, verbs: Verbs, images: str) -> Survives:
    """Puts a C program (or a target that runs) through a dump that leaves it running, a dump that
    ends it and a restore, compares what can be seen of it after each, and asks it itself.

    ``options`` are for dump and restore; ``ignore`` holds patterns of what may differ.
    """

    def check(
        source: str | Target,
        *args: str,
        flags: tuple[str, ...] = (),
        ignore: tuple[str, ...] = (),
        options: dict[str, object] | None = None,
        compare: bool = True,
    ) -> Target:
        target = source if isinstance(source, Target) else start.c(source, *args, flags=flags)
        options = options or {}
        first, second = os.path.join(images, "running"), os.path.join(images, "killed")
        os.mkdir(first)
        os.mkdir(second)
        before = observe_settled(target.pid)
        verbs.dump(target.pid, first, leave_running=True, **options)
        assert target.alive(), "a dump that leaves it running ended it"
        if compare:
            assert_same(before, observe_tree(target.pid), ignore)
        round_trip(verbs, target, second, ignore=ignore, dump=options, restore=options, compare=compare)
        target.go()
        return target

    return check


def copies_end_well(target: Target, images: str) -> None:
    """Dump a tree, and see that each of some copies finds everything as it was: then it ends with status 42."""
    target.pids()
    torpor.dump(target.pid, images)
    target.wait_gone()
    with torpor.template(images) as template:
        copies = [template.clone() for _ in range(4)]
    target.tell("go")
    assert [copy.wait() for copy in copies] == [42] * 4
