"""/proc/PID/cmdline and /proc/PID/environ: strings that end in a zero byte.

Kernel: fs/proc/base.c.
"""

from __future__ import annotations


def parse(data: bytes) -> list[bytes]:
    """Return the strings.

    What follows the last zero byte is one too: a process may have overwritten its arguments.
    """
    strings = data.split(b"\0")
    if not strings[-1]:
        strings.pop()
    return strings


def parse_environ(data: bytes) -> dict[bytes, bytes]:
    """Return name → value, the first one where a name repeats, as getenv(3) finds it.

    Odd strings are left out.
    """
    found: dict[bytes, bytes] = {}
    for string in parse(data):
        name, equals, value = string.partition(b"=")
        if equals:
            found.setdefault(name, value)
    return found
