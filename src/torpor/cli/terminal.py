"""What a person or a script sees: text to stdout and stderr, tables, sizes.

Written straight to the descriptors: the command may have been started with any of them closed, in
which case ``sys.stdout`` is None, and ``print`` to a ``sys.stderr`` that is None would end up on
stdout.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def keep_standard_descriptors() -> None:
    """Open /dev/null on those of 0, 1 and 2 that are closed, so that no other file lands there.

    Some callers start the command so (CRIU's own Python client does).
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            assert opened == fd  # the lowest free number


def out(text: str) -> None:
    """Write to stdout."""
    _write(1, text)


def err(text: str) -> None:
    """Write to stderr."""
    _write(2, text)


def _write(fd: int, text: str) -> None:
    data = memoryview(text.encode(errors="surrogateescape"))
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # nobody reads any more; what was asked for is done all the same


def out_json(value: object) -> None:
    """Write a value as one line of JSON to stdout."""
    import json

    out(json.dumps(value) + "\n")


def is_terminal(fd: int) -> bool:
    """Does a person look at this descriptor?"""
    return os.isatty(fd) and os.environ.get("TERM") != "dumb"


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of text in columns that are as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{indent}{line}\n" for line in lines)


def size(count: int) -> str:
    """A number of bytes for people: ``7.1 MiB``."""
    if count < 1024:
        return f"{count} bytes"
    amount, unit = count / 1024, "KiB"
    for bigger in ("MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, bigger
    return f"{amount:.1f} {unit}"


def seconds(amount: float) -> str:
    """A time for people: ``5.4 ms``."""
    return f"{amount:.2f} s" if amount >= 1 else f"{amount * 1e3:.1f} ms"


class Progress:
    """One line on stderr that says what is being done, while a person looks; gone afterwards."""

    __slots__ = ("_shown",)

    def __init__(self) -> None:
        self._shown = is_terminal(2)

    def __call__(self, text: str) -> None:
        if self._shown:
            err(f"\r\033[K{text} …")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            err("\r\033[K")
