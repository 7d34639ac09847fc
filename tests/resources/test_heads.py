"""What is said about a module without loading it is what the module says."""

from __future__ import annotations

import os

import pytest

from kit.files import slurp_text
from kit.verbs import SOURCES, tool
from torpor import resources
from torpor.images import schema as pb


def test_the_heads_are_those_of_the_modules() -> None:
    assert slurp_text(os.path.join(SOURCES, "torpor", "resources", "heads.py")) == tool("make_heads").text(), "run tools/make_heads.py"


def test_a_module_without_a_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was just put into the folder."""
    monkeypatch.delitem(resources.heads.FILES, "eventfd")
    monkeypatch.delitem(resources.heads.MEMORY, "sysv")
    found = resources.FileKinds().of_type(pb.fd_types.EVENTFD)
    assert type(found).__name__ == "Eventfd"
    entry = pb.vma_entry(start=0, end=4096, pgoff=0, shmid=0, prot=0, flags=0, status=0x400, fd=0)
    assert type(resources.MappingKinds().of_entry(entry)).__name__ == "SysvShared"


def test_a_type_that_nobody_restores() -> None:
    assert resources.FileKinds().of_type(999) is None
