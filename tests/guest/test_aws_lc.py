"""The real AWS-LC, as the package awscrt brings it: what is said of it in docs/guest-protocol.md.

It makes private keys; two copies that make the same one have the same state.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest

import torpor
from kit import Target
from torpor.resources import generation

from .conftest import Copies

Program = Callable[..., Target]
Take = Callable[..., Copies]

PATH = "/dev/sysgenid"

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("awscrt"), reason="needs AWS-LC: pip install awscrt")

KEYS = """
import json
from awscrt.crypto import ED25519, ED25519ExportFormat
def draw():
    return {"key": ED25519.new_generate().export_public_key(ED25519ExportFormat.RAW).hex()}
draw()
ready()
wait_told("go")
tell("draws", json.dumps(draw()))
while True:
    time.sleep(1)
"""


@pytest.fixture
def sysgenid() -> Iterator[None]:
    """The file that it looks for, which has to be at that place; as it was afterwards."""
    if os.path.exists(PATH):
        pytest.skip(f"{PATH} is there already: move it away")
    try:
        generation.create(PATH)
    except OSError as error:
        pytest.skip(f"{PATH} cannot be made: {error}")
    yield
    with contextlib.suppress(FileNotFoundError):
        os.unlink(PATH)


def keys(woken: Copies, count: int = 3, **options: object) -> int:
    """How many different keys so many copies make."""
    return len({str(woken.draws(**options)) for _ in range(count)})


def test_alone_it_asks_the_kernel_every_time(program: Program, copies: Take) -> None:
    """Where there is no counter it takes fresh entropy for every request: nothing needs to be renewed."""
    if os.path.exists(PATH):
        pytest.skip(f"{PATH} is there: it would be told")
    assert keys(copies(program(KEYS))) == 3


def test_where_there_is_a_generation_file_it_relies_on_it(sysgenid: None, program: Program, copies: Take) -> None:
    woken = copies(program(KEYS))
    assert keys(woken) == 3
    assert keys(woken, new_generation=False) == 1, "it does not look at the file, and the test is blind"
    assert keys(woken, new_generation=False, fresh=True) == 3, "it also watches memory that fork wipes"
    wiped = torpor.audit(woken.images).find("wipe-on-fork")
    assert wiped is not None and wiped.severity == "secret"
    assert torpor.audit(woken.images, fresh=True).find("wipe-on-fork").renewed == "--fresh"  # type: ignore[union-attr]
