"""Start-up is a feature: what is imported on the way is counted, not timed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kit.verbs import SOURCES

HEAVY = {
    "argparse",
    "asyncio",
    "dataclasses",
    "importlib.metadata",
    "inspect",
    "logging",
    "subprocess",
    "typing",
}


def modules_after(code: str) -> set[str]:
    """What is imported in an interpreter that does nothing but ``code``, without site's own imports."""
    program = f"import sys; sys.path.insert(0, {SOURCES!r})\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_check_sees_what_is_imported() -> None:
    assert HEAVY & modules_after("import subprocess")


def test_the_library_imports_nothing_heavy() -> None:
    loaded = modules_after("import torpor")
    assert not HEAVY & loaded
    assert not any(name.startswith("google") for name in loaded), "protobuf is for those who dump or restore"


@pytest.mark.parametrize("module", ["torpor.cli.main", "torpor.cli.criu"])
def test_the_commands_import_nothing_heavy(module: str) -> None:
    assert not HEAVY & modules_after(f"import {module}")
