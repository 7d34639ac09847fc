"""``torpor crit``: CRIU's image tool."""

from __future__ import annotations

import os
import sys

from ..errors import UsageError, doing
from ..options import Option
from .common import guarded, words_of
from .parse import local_options
from .terminal import keep_standard_descriptors

ROWS = (
    Option("in", "i", "FILE", "", "text", "", "*", "what to read (default: stdin)"),
    Option("out", "o", "FILE", "", "text", "", "*", "what to write (default: stdout)"),
    Option("pretty", "", "", "", "flag", "", "*", "indented, addresses and flags as people write"),
    Option("nopl", "", "", "", "flag", "", "*", "leave out the data behind entries"),
    Option("help", "h", "", "", "flag", "", "*", "show this text"),
)
USAGE = "torpor crit decode|encode [-i FILE] [-o FILE] | show|info FILE | x DIR ps|fds|mems|rss"
TEXT = """\
Turns one image file into JSON (decode), JSON into an image (encode), shows an image (show: decode
with --pretty), or says what it is (info). x shows what a whole set holds: its processes, files,
mappings. The JSON is that of CRIU's crit.
"""
EXAMPLES = """\
  torpor crit show /snap/core-4242.img
  torpor crit decode -i pstree.img -o pstree.json
  torpor crit encode -i pstree.json -o pstree.img
"""


def command(argv: list[str] | None = None) -> int:
    """Run as a command of its own with these words (default: the process's); its exit status."""
    keep_standard_descriptors()
    return guarded("crit", lambda: main(words_of(argv)))


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    said = local_options(words, ROWS, USAGE, TEXT, EXAMPLES)
    if said is None:
        return 0
    flags, others = said
    action = others[0] if others else ""
    if action == "x":
        return _explore(others[1:])
    named = action in ("show", "info")
    if action not in ("decode", "encode", "show", "info") or len(others) != 1 + named:
        raise UsageError(f"usage: {USAGE}")
    source = others[1] if named else flags.get("in", "")
    with doing(f"crit {action}"):
        fd = _input(source)
        try:
            _run(action, fd, source or "stdin", flags)
        finally:
            os.close(fd)
    return 0


def _explore(words: list[str]) -> int:
    from ..images.explore import EXPLORERS
    from ..images.store import ImageReader

    if len(words) != 2 or words[1] not in EXPLORERS:
        raise UsageError(f"usage: {USAGE}")
    with doing("crit x"):
        fd = os.open(words[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sys.stdout.write(EXPLORERS[words[1]](ImageReader(fd)))
        finally:
            os.close(fd)
    return 0


def _run(action: str, fd: int, name: str, flags: dict[str, str]) -> None:
    from ..images import crit

    if action == "encode":
        with open(fd, "rb", closefd=False) as file:
            _output(flags.get("out", ""), crit.from_json(file.read(), name))
        return
    pretty = action != "decode" or "pretty" in flags
    if action == "info":
        loaded = crit.info(fd, name)
    else:
        loaded = crit.load(fd, name, pretty=pretty, payloads="nopl" not in flags)
    text = crit.to_json(loaded, pretty=pretty)
    _output(flags.get("out", ""), text.encode(errors="surrogateescape") + b"\n")


def _input(path: str) -> int:
    """A descriptor that can be read at any offset: what comes through a pipe is copied first."""
    if path:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.memfd_create("stdin")
    while chunk := os.read(0, 1 << 20):
        os.write(fd, chunk)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _output(path: str, data: bytes) -> None:
    if path:
        with open(path, "wb") as file:
            file.write(data)
    elif sys.stdout is not None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
