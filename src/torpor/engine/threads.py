"""What the threads of a process can have each for itself (unshare(2), setns(2)) and share after a restore.

Looked at while they run, a few microseconds a thread. Their pid namespaces are seen to by pid_spaces.py; a thread with
mounts of its own has a root and a working directory of its own, too.
"""

from __future__ import annotations

import os

from ..errors import Unsupported
from ..linux.kernel import KCMP_FILES, KCMP_FS, kcmp
from ..proc.read import numbers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAMESPACES = {"net": "network", "uts": "host name", "ipc": "IPC", "cgroup": "cgroup"}
TABLES = {KCMP_FILES: "descriptor table", KCMP_FS: "root and working directory"}
HINT = "have a process of its own do what it does"


def troubles(pid: int) -> Iterator[Unsupported]:
    """Why threads of a running process cannot be dumped, once for each thing that one of them has for itself."""
    others = [tid for tid in numbers(pid, "task") if tid != pid]
    if not others:
        return
    for kind, what in TABLES.items():
        tid = next((tid for tid in others if _differs(pid, tid, kind)), 0)
        if tid:
            yield Unsupported(f"its thread {tid} has a {what} of its own", hint=HINT)
    for name, what in NAMESPACES.items():
        own = _namespace(pid, pid, name)
        tid = next((tid for tid in others if _namespace(pid, tid, name) not in (own, "")), 0)
        if own and tid:
            yield Unsupported(f"its thread {tid} is in a {what} namespace of its own", hint=HINT)


def _differs(pid: int, tid: int, kind: int) -> bool:
    try:
        return kcmp(pid, tid, kind) != 0
    except OSError:  # it has ended
        return False


def _namespace(pid: int, tid: int, name: str) -> str:
    """What identifies it; empty for a thread that has ended."""
    try:
        return os.readlink(f"/proc/{pid}/task/{tid}/ns/{name}")
    except OSError:
        return ""
