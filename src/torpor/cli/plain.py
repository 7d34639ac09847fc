"""``torpor plain SNAPSHOT DIR``: a copy that CRIU can read."""

from __future__ import annotations

import os

from ..errors import UsageError, doing
from ..options import Option
from .parse import local_options
from .terminal import out

ROWS = (Option("help", "h", "", "", "flag", "", "*", "show this text"),)
USAGE = "torpor plain SNAPSHOT DIR"
TEXT = """\
Copies the snapshot in SNAPSHOT to DIR in the form that CRIU reads. Torpor stores pages that several tasks share once;
the copy has them with every task. DIR is made if it does not exist, and must not hold a snapshot.
"""
EXAMPLES = """\
  torpor plain /snap /snap-for-criu
  criu restore -D /snap-for-criu
"""


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    said = local_options(words, ROWS, USAGE, TEXT, EXAMPLES)
    if said is None:
        return 0
    _, others = said
    if len(others) != 2:
        raise UsageError(f"usage: {USAGE}")
    from ..images.plain import convert

    with doing("plain"):
        os.makedirs(others[1], mode=0o700, exist_ok=True)
        source = os.open(others[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            target = os.open(others[1], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                copied = convert(source, target)
            finally:
                os.close(target)
        finally:
            os.close(source)
    out(f"Copied to {others[1]}; {copied:,} pages that tasks share were written again.\n")
    return 0
