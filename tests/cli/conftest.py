"""Running the commands for real, with the engine and with one that only pretends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
SOURCES = os.path.join(ROOT, "src")
FAKE = os.path.join(HERE, "fake_engine.py")


class Ended:
    """How a command ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    def __repr__(self) -> str:
        return f"status {self.status}\n--- stdout\n{self.out}--- stderr\n{self.err}"


def environment(**more: str) -> dict[str, str]:
    """An environment in which no configuration of this machine is found."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("CRIU_")}
    return {**base, "PYTHONPATH": SOURCES, "HOME": "/nonexistent", **more}


class Runner:
    """Runs ``command WORD...``; ``fake`` pretends an engine that behaves in this way."""

    def __init__(self, command: str, cwd: str) -> None:
        self.command, self.cwd = command, cwd

    def argv(self, *words: str, fake: str | None = None) -> list[str]:
        if fake is not None:
            return [sys.executable, FAKE, self.command, *words]
        start = f"import sys; from torpor.cli.{self.module} import main; sys.exit(main())"
        return [sys.executable, "-c", start, *words]

    @property
    def module(self) -> str:
        return "main" if self.command == "torpor" else "criu"

    def __call__(self, *words: str, fake: str | None = None, **env: str) -> Ended:
        done = subprocess.run(
            self.argv(*words, fake=fake), env=environment(FAKE=fake or "", **env), cwd=self.cwd,
            timeout=60, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Ended(done)

    def start(self, *words: str, fake: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(*words, fake=fake), env=environment(FAKE=fake), cwd=self.cwd,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def criu(tmp_path: os.PathLike[str]) -> Callable[..., Ended]:
    """The ``criu`` command, in an empty directory."""
    return Runner("criu", os.fspath(tmp_path))


@pytest.fixture
def torpor(tmp_path: os.PathLike[str]) -> Callable[..., Ended]:
    """The ``torpor`` command, in an empty directory."""
    return Runner("torpor", os.fspath(tmp_path))
