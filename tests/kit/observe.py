"""Everything that can be seen of a task from outside, as plain data: two looks can be compared.

Left out is what changes by itself (times, counters, resident sizes) and what has no meaning of its
own (the number of a pipe's inode): pipes and other nameless things are numbered in the order in which
they are met, so that sharing shows and numbers do not.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import fnmatch
import hashlib
import os
import re
import struct
import termios
import time

from .files import slurp_text
from .host import descendants, stat_fields

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
SYS_PRLIMIT64, SYS_IOPRIO_GET, SYS_GET_ROBUST_LIST, SYS_KCMP, SYS_PIDFD_GETFD = (
    302,
    252,
    274,
    312,
    438,
)
KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO, KCMP_SYSVSEM = range(7)
F_GETOWN_EX, F_GETSIG, F_GETLEASE, F_GETPIPE_SZ, F_GET_SEALS = 16, 11, 1025, 1032, 1034

Tree = dict[str, object]

# Fields of /proc/PID/stat (proc(5) counts from 1) that say what a task is, not what it has used.
STAT = {
    "comm": 2, "ppid": 4, "pgrp": 5, "session": 6, "tty_nr": 7, "tpgid": 8, "priority": 18,
    "nice": 19, "num_threads": 20, "vsize": 23, "rsslim": 25, "startcode": 26, "endcode": 27,
    "startstack": 28, "exit_signal": 38, "rt_priority": 40, "policy": 41, "start_data": 45,
    "end_data": 46, "start_brk": 47, "arg_start": 48, "arg_end": 49, "env_start": 50,
    "env_end": 51, "exit_code": 52,
}  # fmt: skip

STATUS_LEFT_OUT = {
    "State", "Ngid", "FDSize", "VmPeak", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem",
    "VmPTE", "VmSwap", "SigQ", "CoreDumping", "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
}  # fmt: skip

# sd: soft-dirty belongs to whoever tracks memory. ac: accounting follows the history of a mapping.
VM_FLAGS_LEFT_OUT = {"sd", "ac"}

# Not time: a restore may give a tree a clock of its own, so that its clock does not jump.
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "user", "uts")

FILES = (
    "limits",
    "timers",
    "oom_score_adj",
    "personality",
    "loginuid",
    "coredump_filter",
    "cgroup",
)


def _syscall(number: int, *args: object) -> int:
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _text(path: str) -> str:
    try:
        text = slurp_text(path)
        return _without_others(text) if path.endswith("/cgroup") else text
    except OSError as error:
        return f"<{os.strerror(error.errno or 0)}>"


def _without_others(text: str) -> str:
    """/proc/PID/cgroup without the hierarchies that other runs of these tests mount meanwhile."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if ":name=torpor-test-" not in line or f"test-{os.getpid()}:" in line)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError as error:
        return f"<{os.strerror(error.errno or 0)}>"


class Names:
    """Nameless things by the order in which they are met: ``pipe:[8122]`` becomes ``pipe:#0``."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def of(self, link: str) -> str:
        match = re.fullmatch(r"(pipe|socket|mnt|net|anon_inode):\[(\d+)\]", link)
        if match is None or match[1] not in ("pipe", "socket"):
            return link
        kind = match[1]
        count = sum(name.startswith(kind) for name in self.known.values())
        return self.known.setdefault(link, f"{kind}:#{count}")


# ---------------------------------------------------------------------------------------- threads


def _status(path: str) -> Tree:
    lines = (line.partition(":") for line in _text(path).splitlines())
    return {key: " ".join(value.split()) for key, _, value in lines if key not in STATUS_LEFT_OUT}


def _state(letter: str) -> str:
    return {"T": "stopped", "t": "traced", "Z": "zombie", "X": "dead"}.get(letter, "alive")


def _stat(path: str) -> Tree:
    head, _, tail = _text(path).rpartition(")")
    fields = [*head.split("(", 1), *tail.split()]
    seen: Tree = {name: fields[place - 1] for name, place in STAT.items()}
    return {**seen, "state": _state(fields[2])}


def _robust_list(tid: int) -> tuple[int, int]:
    head, size = ctypes.c_uint64(), ctypes.c_uint64()
    _syscall(SYS_GET_ROBUST_LIST, tid, ctypes.byref(head), ctypes.byref(size))
    return head.value, size.value


def _thread(pid: int, tid: int) -> Tree:
    base = f"/proc/{pid}/task/{tid}"
    with contextlib.suppress(ProcessLookupError):
        return {
            "stat": _stat(f"{base}/stat"),
            "status": _status(f"{base}/status"),
            "comm": _text(f"{base}/comm"),
            "policy": os.sched_getscheduler(tid),
            "priority": os.sched_getparam(tid).sched_priority,
            "affinity": sorted(os.sched_getaffinity(tid)),
            "ioprio": _syscall(SYS_IOPRIO_GET, 1, tid),
            "timerslack": _text(f"/proc/{tid}/timerslack_ns"),
            "robust_list": _robust_list(tid),
        }
    return {"gone": True}


# ----------------------------------------------------------------------------------------- memory


def _mapping(header: str, fields: dict[str, str]) -> Tree:
    span, perms, offset, device, inode, *name = header.split(None, 5)
    start, end = (int(text, 16) for text in span.split("-"))
    path = name[0] if name else ""
    nameless = path.endswith(" (deleted)") and not path.startswith("/SYSV")
    return {
        "start": start, "end": end, "perms": perms, "offset": int(offset, 16),
        "file": "" if nameless or not int(inode) else f"{device} {inode}", "path": path,
        "pages": fields.get("KernelPageSize", ""), "key": fields.get("ProtectionKey", ""),
        "flags": " ".join(f for f in fields["VmFlags"].split() if f not in VM_FLAGS_LEFT_OUT),
    }  # fmt: skip


def _continues(first: Tree, second: Tree) -> bool:
    same = all(first[key] == second[key] for key in first if key not in ("start", "end", "offset"))
    assert isinstance(first["end"], int) and isinstance(first["start"], int)
    has_file = first["file"] or str(first["path"]).startswith("/")
    expected = first["offset"] + first["end"] - first["start"] if has_file else first["offset"]  # type: ignore[operator]
    return same and first["end"] == second["start"] and second["offset"] == expected


def mappings(pid: int) -> list[Tree]:
    """The mappings with their flags.

    Neighbours that differ in nothing count as one: merging is the kernel's business.
    """
    found: list[Tree] = []
    header, fields = "", dict[str, str]()
    for line in _text(f"/proc/{pid}/smaps").splitlines():
        key, colon, value = line.partition(":")
        if not colon or not key.isidentifier():
            header, fields = line, {}
            continue
        fields[key] = value.strip()
        if key == "VmFlags":  # always the last line of a mapping
            mapping = _mapping(header, fields)
            if found and _continues(found[-1], mapping):
                found[-1]["end"] = mapping["end"]
            else:
                found.append(mapping)
    return found


def _maps_by_place(pid: int) -> Tree:
    return {
        f"{m['start']:x}-{m['end']:x}": {k: v for k, v in m.items() if k not in ("start", "end")} for m in mappings(pid)
    }


def observe_memory(pid: int) -> dict[int, bytes]:
    """A digest of every page that can be read, by address, without [vvar] (time passes there)."""
    digests = {}
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for mapping in mappings(pid):
            if "r" not in str(mapping["perms"]) or str(mapping["path"]).startswith("[vvar"):
                continue
            start, end = mapping["start"], mapping["end"]
            assert isinstance(start, int) and isinstance(end, int)
            for page in range(start, end, 4096):
                with contextlib.suppress(OSError):  # [vsyscall], and pages beyond the end of a file
                    content = os.pread(memory, 4096, page)
                    digests[page] = hashlib.blake2b(content, digest_size=8).digest()
    finally:
        os.close(memory)
    return digests


# -------------------------------------------------------------------------------------- descriptors


def _fdinfo(pid: int, fd: str, plain: bool) -> Tree:
    seen: Tree = {}
    for line in _text(f"/proc/{pid}/fdinfo/{fd}").splitlines():
        key, _, value = line.partition(":")
        value = " ".join(value.split())
        if key == "ino" and not plain:
            continue
        if key == "eventfd-id":
            continue
        if key == "it_value":  # time passes; what counts is whether it will ring
            value = "off" if value == "(0, 0)" else "armed"
        if key == "tfd":
            key, value = f"tfd {value.split()[0]}", re.sub(r" (pos|ino|sdev):\S+", "", value)
        if key == "lock":
            value = value.split(": ", 1)[1]
            key = f"lock {value}"
        seen[key] = value
    return seen


def _fcntl(fd: int, command: int, argument: int | bytes = 0) -> object:
    try:
        return fcntl.fcntl(fd, command, argument)
    except OSError as error:
        return os.strerror(error.errno or 0)


def _unread(fd: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def _description(fd: int, link: str, plain: bool) -> Tree:
    """What only the open file description itself can tell; ``fd`` is our own reference to it."""
    status = os.fstat(fd)
    seen: Tree = {
        "mode": oct(status.st_mode), "rdev": status.st_rdev, "links": status.st_nlink,
        "owner": struct.unpack("ii", _fcntl(fd, F_GETOWN_EX, bytes(8))),  # type: ignore[arg-type]
        "signal": _fcntl(fd, F_GETSIG), "lease": _fcntl(fd, F_GETLEASE),
    } if not _is_path(fd) else {"mode": oct(status.st_mode), "links": status.st_nlink}  # fmt: skip
    if plain or link.endswith("(deleted)"):
        seen["size"] = status.st_size
    if plain:
        seen["inode"] = f"{status.st_dev} {status.st_ino}"
    if link.startswith("pipe:") or (status.st_mode & 0o170000 == 0o010000 and not _is_path(fd)):
        seen["capacity"] = _fcntl(fd, F_GETPIPE_SZ)
        seen["unread"] = _unread(fd)
    if link.startswith("/memfd:"):
        seen["seals"] = _fcntl(fd, F_GET_SEALS)
    return seen


def _is_path(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)


def _descriptors(pid: int, names: Names) -> Tree:
    seen: Tree = {}
    pidfd = os.pidfd_open(pid)
    try:
        for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
            link = _link(f"/proc/{pid}/fd/{fd}")
            # Inodes in /proc are made when they are looked at.
            nameless = link.endswith(" (deleted)") or link.startswith("/proc/")
            plain = link.startswith("/") and not nameless
            own = _syscall(SYS_PIDFD_GETFD, pidfd, int(fd), 0)
            try:
                description = _description(own, link, plain)
            finally:
                os.close(own)
            seen[fd] = {"link": names.of(link), **_fdinfo(pid, fd, plain), **description}
    finally:
        os.close(pidfd)
    return seen


# -------------------------------------------------------------------------------- tasks and trees


def observe(pid: int, names: Names | None = None) -> Tree:
    """One process with all its threads."""
    fields = stat_fields(pid)
    if fields is None:
        return {"gone": True}
    if fields[2] == "Z":
        return {
            "stat": _stat(f"/proc/{pid}/stat"),
            "uid": _status(f"/proc/{pid}/status").get("Uid"),
        }
    base = f"/proc/{pid}"
    return {
        "threads": {t: _thread(pid, int(t)) for t in sorted(os.listdir(f"{base}/task"), key=int)},
        "maps": _maps_by_place(pid),
        "fds": _descriptors(pid, names or Names()),
        "links": {name: _link(f"{base}/{name}") for name in ("cwd", "root", "exe")},
        "namespaces": {name: _link(f"{base}/ns/{name}") for name in NAMESPACES},
        "cmdline": _text(f"{base}/cmdline"),
        "environ": _text(f"{base}/environ"),
        "auxv": _text(f"{base}/auxv"),
        **{name: _text(f"{base}/{name}") for name in FILES},
    }


def _kcmp(first: int, second: int, kind: int, a: int = 0, b: int = 0) -> bool:
    try:
        return _syscall(SYS_KCMP, first, second, kind, a, b) == 0
    except OSError:
        return False


def _classes(things: list[tuple[str, int, int]], kind: int) -> list[list[str]]:
    """Which of the things (name, pid, index) are the same to the kernel; lone ones are left out."""
    classes: list[list[tuple[str, int, int]]] = []
    for thing in things:
        for known in classes:
            if _kcmp(known[0][1], thing[1], kind, known[0][2], thing[2]):
                known.append(thing)
                break
        else:
            classes.append([thing])
    return [[name for name, _, _ in known] for known in classes if len(known) > 1]


def _sharing(tree: dict[int, Tree]) -> Tree:
    tasks = [
        (f"{tid}", int(tid), 0)
        for seen in tree.values() for tid in seen.get("threads", {})  # type: ignore[attr-defined]
    ]  # fmt: skip
    kinds = {"vm": KCMP_VM, "files": KCMP_FILES, "fs": KCMP_FS, "sighand": KCMP_SIGHAND}
    shared: Tree = {name: _classes(tasks, kind) for name, kind in kinds.items()}
    alike: dict[str, list[tuple[str, int, int]]] = {}
    for pid, seen in tree.items():
        for fd, info in seen.get("fds", {}).items():  # type: ignore[attr-defined]
            key = f"{info['link']} {info.get('pos')}"
            alike.setdefault(key, []).append((f"{pid}:{fd}", pid, int(fd)))
    found = [_classes(things, KCMP_FILE) for things in alike.values()]
    shared["open files"] = sorted(members for classes in found for members in classes)
    return shared


def observe_tree(root: int) -> Tree:
    """A process and all its descendants, with what they share."""
    names = Names()
    tree = {pid: observe(pid, names) for pid in (root, *descendants(root))}
    return {**{str(pid): seen for pid, seen in tree.items()}, "shared": _sharing(tree)}


def observe_settled(root: int, *, looks_max: int = 200) -> Tree:
    """As :func:`observe_tree`, once two looks a moment apart are alike.

    A program says that it is ready before its children have finished being born, for example.
    """
    seen = observe_tree(root)
    for _ in range(looks_max):
        time.sleep(0.005)
        again = observe_tree(root)
        if again == seen:
            break
        seen = again
    return seen


def _differences(before: object, after: object, path: str) -> list[tuple[str, str]]:
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in [*before, *(key for key in after if key not in before)]:
            place = f"{path}/{key}"
            if key not in after:
                found.append((place, f"gone, was {before[key]!r}"))
            elif key not in before:
                found.append((place, f"new: {after[key]!r}"))
            else:
                found += _differences(before[key], after[key], place)
        return found
    if before == after:
        return []
    if isinstance(before, str) and isinstance(after, str) and "\n" in before:
        old, new = before.splitlines(), after.splitlines()
        gone, come = ([line for line in one if line not in other] for one, other in ((old, new), (new, old)))
        return [(path, f"{gone!r} → {come!r}")]
    return [(path, f"{before!r} → {after!r}")]


def diff(before: object, after: object, ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs, a line each: ``/PATH: old → new``. ``ignore`` holds shell patterns of paths."""
    return [
        f"{path}: {what}"
        for path, what in _differences(before, after, "")
        if not any(fnmatch.fnmatch(path, pattern) for pattern in ignore)
    ]


def assert_same(before: object, after: object, ignore: tuple[str, ...] = ()) -> None:
    """Fail with a readable list when two observations differ."""
    found = diff(before, after, ignore)
    assert not found, "not as it was:\n" + "\n".join(found[:60])
