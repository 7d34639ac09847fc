"""Links in /proc/PID/ns and /proc/PID/fd whose targets are no paths: ``net:[4026531840]``,
``socket:[5]``.
"""

from __future__ import annotations


def parse(target: bytes) -> tuple[str, int]:
    """Return (kind, inode number). Raises ValueError for other targets."""
    kind, _, number = target.partition(b":[")
    if not (kind and b"/" not in kind and number[-1:] == b"]" and number[:-1].isdigit()):
        raise ValueError(f"link: cannot read {target!r}")
    return kind.decode("ascii"), int(number[:-1])
