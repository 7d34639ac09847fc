"""Programs that know of snapshots, and copies of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from kit import Library, Target, Targets, wait_until
from kit.programs import HERE
from kit.verbs import SOURCES

PATH = os.pathsep.join([os.path.join(HERE, "inside"), SOURCES])


@pytest.fixture
def program(start: Targets) -> Callable[..., Target]:
    """Starts a Python program that may import torpor.guest; what NumPy there is comes from where ours would."""

    def run(source: str, *args: str, wait: bool = True) -> Target:
        more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return start.python(source, *args, wait=wait, env={"PYTHONPATH": os.pathsep.join([PATH, *more])})

    return run


class Copies:
    """Wakes one snapshot again and again, one copy after the other; each has to be over before the next."""

    def __init__(self, target: Target, images: str) -> None:
        self.target, self.images, self.awake = target, images, False

    def wake(self, **options: object) -> int:
        self.end()
        for name in ("go", "draws", "result"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.target.path(name))
        pid = Library().restore(self.images, **options)
        self.awake = True
        return pid

    def draws(self, **options: object) -> dict[str, object]:
        """What a fresh copy says when it is told to go."""
        self.wake(**options)
        self.target.tell("go")
        found: dict[str, object] = json.loads(self.target.wait_file("draws"))
        return found

    def end(self) -> None:
        if not self.awake:
            return
        self.awake = False
        for pid in self.target.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.target.wait_gone()


@pytest.fixture
def copies(images: str) -> Iterator[Callable[[Target], Copies]]:
    """Dumps a target, ending it; gives what wakes it."""
    made: list[Copies] = []

    def take(target: Target, **options: object) -> Copies:
        target.pids()
        Library().dump(target.pid, images, **options)
        target.wait_gone()
        made.append(Copies(target, images))
        return made[-1]

    yield take
    for one in made:
        one.end()


def wait_ended(pid: int) -> int:
    """The exit status of a child of ours that ends by itself."""
    found: list[int] = []

    def ended() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG)
        found.append(status)
        return done == pid

    wait_until(f"{pid} ends", ended)
    return os.waitstatus_to_exitcode(found[-1])

