"""Test programs in C: compiled once per text, kept by hash in a folder of the user's own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile

from .files import slurp_text

HERE = os.path.dirname(os.path.abspath(__file__))
FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread")


def cache_dir() -> str:
    """A folder that only this user can write to; made when missing."""
    path = os.path.join(tempfile.gettempdir(), f"torpor-test-programs-{os.getuid()}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path, follow_symlinks=False)
    assert status.st_uid == os.getuid(), f"{path} belongs to somebody else"
    return path


def compile_c(source: str, *flags: str, header: bool = True) -> str:
    """The path of the program that ``source`` compiles to, with ``kit.h`` included ahead of it."""
    included = slurp_text(os.path.join(HERE, "kit.h")) if header else ""
    arguments = [*FLAGS, *flags]
    text = "\0".join([*arguments, included, source])
    path = os.path.join(cache_dir(), hashlib.sha256(text.encode()).hexdigest()[:24])
    if os.path.exists(path):
        return path
    temporary = f"{path}.{os.getpid()}"
    prefix = ["-include", os.path.join(HERE, "kit.h")] if header else []
    result = subprocess.run(
        ["cc", *arguments, *prefix, "-x", "c", "-", "-o", temporary],
        input=source, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"a test program does not compile:\n{result.stderr}"
    os.rename(temporary, path)
    return path
