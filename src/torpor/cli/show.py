"""``torpor show DIR``."""

from __future__ import annotations

import os

from ..errors import UsageError, doing
from ..options import Option
from .parse import local_options, pid_of
from .terminal import out, out_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.store import ImageReader

ROWS = (
    Option("mappings", "m", "", "", "flag", "", "*", "the memory of process PID"),
    Option("files", "f", "", "", "flag", "", "*", "the open files of process PID"),
    Option("json", "", "", "", "flag", "", "*", "print it as JSON"),
    Option("help", "h", "", "", "flag", "", "*", "show this text"),
)
USAGE = "torpor show DIR [--json], torpor show DIR PID --mappings|--files [--json]"
TEXT = """\
Shows what the snapshot in DIR holds: its processes, how much memory each has, the size of the
images; of one process its mappings or its open files. Images of CRIU can be shown as well.
"""
EXAMPLES = """\
  torpor show /snap                      the tree of processes
  torpor show /snap 4242 --files         what 4242 had open
  torpor show /snap 4242 -m --json       its memory, for a program to read
"""


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    said = local_options(words, ROWS, USAGE, TEXT, EXAMPLES)
    if said is None:
        return 0
    flags, others = said
    what = [name for name in ("mappings", "files") if name in flags]
    if len(what) > 1 or len(others) != 1 + len(what):
        raise UsageError(f"show reads one directory: {USAGE}")
    from ..images.store import ImageReader

    with doing("show"):
        try:
            fd = os.open(others[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"`{others[0]}`: {error.strerror}") from None
        try:
            reader = ImageReader(fd)
            shown, text = _process(reader, others[1], what[0]) if what else _summary(reader)
        finally:
            os.close(fd)
    if "json" in flags:
        out_json(shown)
    else:
        out(text)
    return 0


def _summary(reader: ImageReader) -> tuple[object, str]:
    from ..images import show

    shown = show.summary(reader)
    return shown, show.render_summary(shown)


def _process(reader: ImageReader, word: str, what: str) -> tuple[object, str]:
    from ..images import show

    if what == "files":
        files = show.files(reader, pid_of(word))
        return files, show.render_files(files)
    mappings = show.mappings(reader, pid_of(word))
    return mappings, show.render_mappings(mappings)
