"""The manual pages are in step with the options."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from kit.verbs import tool
from torpor.cli.main import VERBS
from torpor.options import TABLE

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "man").glob("*.md"))


@pytest.mark.parametrize("name", ["criu.8.md", "torpor.1.md"])
def test_page_is_what_the_tool_would_write(name: str) -> None:
    maker = tool("make_man")
    page = (ROOT / "docs" / "man" / name).read_text()
    assert maker.filled(page, maker.option_lists()) == page, "run tools/make_man.py"


def test_the_tool_replaces_what_is_there() -> None:
    maker = tool("make_man")
    page = "a\n<!-- options: x -->\nold\n<!-- end -->\nb\n<!-- options: y -->\n<!-- end -->\n"
    filled = maker.filled(page, {"x": "new\n", "y": "other\n"})
    assert filled == (
        "a\n<!-- options: x -->\nnew\n<!-- end -->\nb\n<!-- options: y -->\nother\n<!-- end -->\n"
    )
    assert maker.filled(filled, {"x": "new\n", "y": "other\n"}) == filled


def test_pages_name_no_option_that_is_not_there() -> None:
    known = {row.long for row in TABLE if row.long}
    for module in ("template", "clone", "show", "audit"):  # those with options of their own
        known |= {row.long for row in importlib.import_module(f"torpor.cli.{module}").ROWS}
    known |= {f"no-{row.long}" for row in TABLE if row.kind == "switch"} | {"no"}
    for page in PAGES:
        words = re.findall(r"--([a-z][a-z-]*[a-z])", page.read_text())
        assert words
        assert set(words) <= known, page.name


def test_criu_page_has_every_option_of_criu() -> None:
    text = (ROOT / "docs" / "man" / "criu.8.md").read_text()
    for row in TABLE:
        if row.long and not row.ours and row.long != "ms":
            assert f"--{row.long}" in text or f"--[no-]{row.long}" in text


def test_torpor_page_has_every_verb() -> None:
    text = (ROOT / "docs" / "man" / "torpor.1.md").read_text()
    assert all(f"torpor {verb}" in text for verb in VERBS)
