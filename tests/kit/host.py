"""What is left on the machine: processes, mounts, descriptors, files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

from .files import slurp_text

PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Orphans among our descendants become our children: nothing that a test starts gets away."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, ctypes.get_errno()


def stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat, the name at [1] without its parentheses; None if there is no such task."""
    try:
        text = slurp_text(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    head, _, tail = text.rpartition(")")
    number, _, name = head.partition("(")
    return [number.strip(), name, *tail.split()]


def open_links(pid: int) -> list[str]:
    """What a process has open, as /proc shows it; what it opens and closes meanwhile may be missing."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which ``pid`` started: tells two bearers of one number apart."""
    fields = stat_fields(pid)
    return int(fields[21]) if fields else None


def descendants(root: int) -> list[int]:
    """All descendants of ``root``, zombies included, without itself."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_fields(int(name))):
            children.setdefault(int(fields[3]), []).append(int(name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = sorted(children.get(todo.pop(), []))
        found += below
        todo += below
    return sorted(found)


def reap(pids: list[int]) -> None:
    """Collect those of ``pids`` that are our zombies; the others are none of our business.

    Their threads first: if we trace one that has ended, the process has not ended before we know.
    """
    for pid in pids:
        try:
            threads = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
        except (FileNotFoundError, ProcessLookupError):  # gone before, or as it is read
            threads = []
        for tid in [*(tid for tid in threads if tid != pid), pid]:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(tid, os.WNOHANG | 0x40000000)  # __WALL


def end_descendants(keep: set[int], *, timeout: float = 10) -> None:
    """Kill and reap every descendant of this process that is not in ``keep``."""
    deadline = time.monotonic() + timeout
    while left := [pid for pid in descendants(os.getpid()) if pid not in keep]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(left)
        if time.monotonic() > deadline:
            raise AssertionError(f"cannot be ended: {[stat_fields(pid) for pid in left]}")
        time.sleep(0.001)


def wait_until(what: str, condition: Callable[[], object], *, timeout: float = 15) -> None:
    """Wait for something that must come; a test whose wait is over fails with ``what``."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain: {what}"
        time.sleep(0.002)


def _named(folder: str, *words: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if any(word in name for word in words))
    except FileNotFoundError:
        return []


def _own_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _mounts() -> list[str]:
    """All mounts where nobody else is at work (in CI), elsewhere those that have our name."""
    alone = os.environ.get("CI") == "true"
    lines = (line.split(" ", 2)[2] for line in slurp_text("/proc/self/mountinfo").splitlines())
    return sorted(line for line in lines if alone or "torpor" in line)


def host_state(*folders: str) -> dict[str, Any]:
    """All that an operation could leave behind and that is ours; compare two with ``diff``.

    ``folders`` are listed with sizes, whole trees. Things outside of this process (/dev/shm, control
    groups) count only where a name shows that they are ours: other programs run on the machine too.
    """
    own = str(os.getpid())
    files = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(place, name)
                files[path] = os.lstat(path).st_size
    return {
        "processes": {pid: (stat_fields(pid) or ["gone", "gone"])[1] for pid in descendants(os.getpid())},
        "descriptors": _own_descriptors(),
        "mounts": _mounts(),
        "shm": [name for name in _named("/dev/shm", "torpor", "link_remap") if own in name],
        "temporary": _named(tempfile.gettempdir(), f"torpor-{own}", f"torpor.{own}"),
        "cgroups": [name for name in _named("/sys/fs/cgroup", "torpor") if own in name],
        "signals": {s: str(signal.getsignal(s)) for s in signal.valid_signals()},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "cwd": os.getcwd(),
        "umask": [line for line in slurp_text("/proc/self/status").splitlines() if "Umask" in line],
        "limits": slurp_text("/proc/self/limits"),
        "files": files,
    }
