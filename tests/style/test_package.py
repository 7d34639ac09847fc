"""What the installed package has, and what nothing in the tree may have."""

from __future__ import annotations

import os
import subprocess
import tomllib

import pytest

from kit.files import slurp, slurp_text
from kit.verbs import ROOT, SOURCES


def project() -> dict[str, object]:
    parsed: dict[str, object] = tomllib.loads(slurp_text(os.path.join(ROOT, "pyproject.toml")))["project"]
    return parsed


def test_the_schema_is_packaged() -> None:
    """uv_build packs all that lies in the module's folder and is not ignored by default."""
    folder = os.path.join(SOURCES, "torpor", "images")
    assert os.path.getsize(os.path.join(folder, "schema.binpb")) > 10_000
    assert any(name.endswith(".proto") for name in os.listdir(os.path.join(folder, "schema")))
    assert os.path.exists(os.path.join(SOURCES, "torpor", "py.typed"))


def test_protobuf_is_the_only_dependency() -> None:
    dependencies = project()["dependencies"]
    assert isinstance(dependencies, list)
    assert [name.split(">")[0] for name in dependencies] == ["protobuf"]


@pytest.mark.parametrize("command", ["torpor", "torpor-criu", "criu"])
def test_the_commands_lead_somewhere(command: str) -> None:
    scripts = project()["scripts"]
    assert isinstance(scripts, dict)
    module, _, function = scripts[command].partition(":")
    path = os.path.join(SOURCES, *module.split(".")) + ".py"
    assert f"def {function}(".encode() in slurp(path)


def test_nothing_is_tracked_that_can_be_made() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: run it in a clone")
    made = [name for name in listed.stdout.split() if name.endswith((".pyc", ".img", ".o", ".so"))
            and not name.startswith("tests/")]  # fmt: skip
    assert not made
