"""The linters are tests: one command tells a newcomer everything."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from kit.verbs import ROOT


def lint(*argv: str) -> None:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"


def test_ruff() -> None:
    lint(sys.executable, "-m", "ruff", "check", "--quiet", ".")


@pytest.mark.timeout(300)  # type: ignore[untyped-decorator]
def test_mypy() -> None:
    lint(sys.executable, "-m", "mypy", "--no-error-summary")


@pytest.mark.parametrize("script", ["demo", "test", ".ci/run", "scripts/environment.sh"])
def test_shell_scripts_parse(script: str) -> None:
    lint(shutil.which("bash") or "bash", "-n", script)
