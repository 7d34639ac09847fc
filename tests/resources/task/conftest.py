"""Makes ``forked`` importable and ends what a test leaves behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from torpor.proc.read import root

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test leaves no descriptor open."""
    root()  # opened on first use and kept
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before)
