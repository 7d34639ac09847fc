"""Whole files, in and out."""

from __future__ import annotations

import os


def slurp(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def slurp_text(path: str) -> str:
    """A file's text; bytes that are no UTF-8 show as escapes."""
    return slurp(path).decode(errors="backslashreplace")


def appear(path: str, text: str) -> None:
    """Make a file appear with its whole content at once."""
    temporary = f"{path}.tmp.{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(text)
    os.rename(temporary, path)
