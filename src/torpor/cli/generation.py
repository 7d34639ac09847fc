"""``torpor generation create|show PATH``: files that tell programs of wake-ups."""

from __future__ import annotations

from ..errors import UsageError, doing
from .terminal import out

HELP = """\
Usage: torpor generation create PATH
       torpor generation show PATH

`create` makes a generation file: 4096 bytes that begin with a 32-bit counter. A program that has it
mapped (MAP_SHARED) or open when it is dumped finds, when it is woken, a page of its own in its
place, in which the counter has moved on; the file itself is not changed. AWS-LC looks for such a
word in /dev/sysgenid. `show` prints counter and id.

Examples:
  torpor generation create /dev/sysgenid
"""


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    if words and words[0] in ("-h", "--help"):
        out(HELP)
        return 0
    if len(words) != 2 or words[0] not in ("create", "show"):
        raise UsageError("generation takes `create` or `show`, and a path")
    if words[0] == "show":
        return _show(words[1])
    from ..resources.generation import create

    with doing("generation"), doing(words[1]):
        create(words[1])
    return 0


def _show(path: str) -> int:
    from ..model import guest_page

    with open(path, "rb") as file:
        try:
            page = guest_page.parse(file.read(guest_page.PAGE_BYTES))
        except ValueError as error:
            raise UsageError(f"`{path}` is no generation file: {error}") from None
    out(f"{page.generation} {page.id.hex()}\n")
    return 0
