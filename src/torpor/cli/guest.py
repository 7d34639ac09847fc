"""``torpor guest COMMAND``: start a program that takes part in snapshots and cannot make a memfd by itself."""

from __future__ import annotations

import os

from ..errors import UsageError
from .terminal import out

HELP = """\
Usage: torpor guest COMMAND [ARGUMENT...]

Becomes COMMAND, with two more descriptors open: a guest page, by which the program is told before a
snapshot and after a wake-up, and an eventfd that is readable after every wake-up. Their numbers are
in the environment variable TORPOR_GUEST, with a comma between. What to do with them is in
docs/guest-protocol.md. Programs in Python, C and others that can call memfd_create(2) do not need
this command.

Examples:
  torpor guest node examples/guest.mjs LOG
"""


def main(words: list[str]) -> int:
    """Run the verb: there is no return from it but by an error."""
    if words and words[0] in ("-h", "--help"):
        out(HELP)
        return 0
    if words and words[0] == "--":
        words = words[1:]
    if not words or words[0].startswith("-"):
        raise UsageError("guest takes a command: torpor guest COMMAND [ARGUMENT...]")
    from ..model import guest_page

    page = guest_page.Page()
    fd = os.memfd_create(guest_page.NAME.decode(), 0)
    page.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    page.pid, page.id = os.getpid(), os.urandom(guest_page.ID_BYTES)
    os.write(fd, guest_page.build(page))
    os.execvpe(words[0], words, {**os.environ, "TORPOR_GUEST": f"{fd},{page.eventfd}"})
