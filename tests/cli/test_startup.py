"""What the commands load before they know what to do: start-up is a budget."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .conftest import environment

HEAVY = {
    "argparse", "asyncio", "collections", "ctypes", "dataclasses", "enum", "getopt", "google",
    "importlib.metadata", "importlib.util", "inspect", "json", "logging", "pathlib", "re", "shutil",
    "signal", "socket", "subprocess", "tempfile", "threading", "traceback", "typing",
}  # fmt: skip
OF_OURS = {"engine", "resources", "images", "remote", "proc", "linux", "model"}


def loaded(command: str, *words: str) -> set[str]:
    """The modules that a command has loaded when it is done, beyond those of the interpreter."""
    code = (
        f"import sys; before = set(sys.modules); from torpor.cli.{command} import main\n"
        f"main({list(words)!r}); sys.stdout.flush()\n"
        "sys.stderr.write(' '.join(set(sys.modules) - before))"
    )
    words_to_run = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        words_to_run, env=environment(), capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("criu", ["--version"]),
        ("criu", ["--help"]),
        ("criu", ["check", "--feature", "list"]),
        ("main", ["--version"]),
        ("main", ["--help"]),
        ("main", ["dump", "--help"]),
        ("main", ["restore", "--help"]),
        ("main", ["check", "--help"]),
        ("main", ["show", "--help"]),
        ("main", ["crit", "--help"]),
    ],
)
def test_help_and_version_load_next_to_nothing(command: str, words: list[str]) -> None:
    modules = loaded(command, *words)
    heavy = HEAVY - ({"signal", "enum", "re", "collections"} if "list" in words else set())
    assert "torpor.options" in modules, "nothing was loaded: the test is blind"
    assert {name for name in modules if name in heavy or name.split(".")[0] in heavy} == set()
    assert {name for name in modules if name.partition(".")[2].split(".")[0] in OF_OURS} == set()


def test_a_verb_loads_only_itself() -> None:
    modules = loaded("main", "dump", "--help")
    assert "torpor.cli.dump" in modules
    assert not {"torpor.cli.restore", "torpor.cli.check", "torpor.cli.criu"} & modules
    assert "torpor.cli.config" not in modules
