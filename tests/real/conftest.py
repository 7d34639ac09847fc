"""What the tests of real programs share.

Every program is frozen and woken while somebody uses it, and asked afterwards by its own means.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from kit import Target, Verbs
from kit.host import descendants, reap
from kit.network import own_network


def need(*programs: str) -> None:
    """Skip the test where a program is missing; ./test installs all of them."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"there is no program {program} here (./test installs it)")


@pytest.fixture
def network() -> Iterator[None]:
    """A network of the test's own: every port is free, and a lock of ours hinders nobody."""
    with own_network():
        yield


class Sleeps(Protocol):
    def __call__(self, target: Target, *, awake: Callable[[], object] = ..., **options: object) -> None: ...


@pytest.fixture
def sleeps(verbs: Verbs, images: str) -> Sleeps:
    """Puts a program that is in use to sleep twice: once left running, then ended and restored.

    ``awake`` is called when it should be back, after each; ``options`` are for dump and restore. State is not compared
    as in :mod:`tests.engine`: it moves.
    """

    def put(target: Target, *, awake: Callable[[], object] = lambda: None, **options: object) -> None:
        first, second = tempfile.mkdtemp(dir=images), tempfile.mkdtemp(dir=images)
        if verbs.name == "untouched":
            awake()
            return
        verbs.dump(target.pid, first, leave_running=True, **options)
        assert target.alive(), "a dump that leaves it running ended it"
        awake()
        target.pids()
        verbs.dump(target.pid, second, **options)
        target.wait_gone()
        # Those that were born and had ended by then have become ours, as the machine's reaper.
        reap(descendants(os.getpid()))
        assert verbs.restore(second, **options) == target.pid
        assert target.alive(), "restored, and dead"
        awake()

    return put
