"""What a snapshot holds, for people: tasks, mappings, open files, sizes.

:func:`summary`, :func:`mappings` and :func:`files` give plain data (what ``--json`` prints), the
``render_`` functions text. Only what is asked for is read; a set that lacks images, as an
incomplete or foreign one may, is shown as far as it goes.
"""

from __future__ import annotations

from ..errors import ImageError, UsageError
from . import crit, pages
from . import schema as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .store import ImageReader

    Json = dict[str, Any]

_STATUS = crit.VMA_STATUS
_FILE_BACKED = _STATUS["VMA_FILE_PRIVATE"] | _STATUS["VMA_FILE_SHARED"] | _STATUS["VMA_AREA_MEMFD"]
_SPECIAL = {
    "VMA_AREA_VDSO": "[vdso]",
    "VMA_AREA_VVAR": "[vvar]",
    "VMA_AREA_VSYSCALL": "[vsyscall]",
    "VMA_AREA_UPROBES": "[uprobes]",
    "VMA_AREA_SHSTK": "[shadow stack]",
    "VMA_AREA_STACK": "[stack]",
    "VMA_AREA_HEAP": "[heap]",
    "VMA_AREA_AIORING": "[aio]",
    "VMA_AREA_SOCKET": "[packet ring]",
    "VMA_AREA_SYSVIPC": "[sysv {shmid}]",
    "VMA_ANON_SHARED": "[shared {shmid}]",
}
# task_core_entry.task_state, as CRIU 4.2 writes it. crit has other names for it, of older days.
_STATES = {1: "alive", 2: "zombie", 3: "stopped", 6: "zombie"}
_OPEN_MODES = {0: "r", 1: "w", 2: "rw", 3: ""}
_CLOEXEC = 1  # FD_CLOEXEC in fdinfo_entry.flags


# ------------------------------------------------------------------------------------------- tree


def summary(reader: ImageReader) -> Json:
    """The set as a whole.

    ``inventory`` (format, writer, security module), ``tasks`` (parents before children, each with
    depth in the tree, pid, ppid, pgid, sid, comm, state, exit_code, threads, and in bytes
    ``memory``, of it ``stored`` here and ``inherited`` from parent snapshots; where it is in several
    pid namespaces its numbers in all of them, from that of the dumping process inwards: ``pids``,
    ``pgids``, ``sids``, and ``tids`` of each thread), ``images`` (name and bytes of every file).
    """
    tasks = [_task(reader, depth, entry) for depth, entry in pstree(reader)]
    images = [{"name": name, "bytes": reader.size(name)} for name in reader.names()]
    return {"inventory": _inventory(reader), "tasks": tasks, "images": images}


def _inventory(reader: ImageReader) -> Json:
    if not reader.has("inventory"):
        return {}
    entry = reader.read_one("inventory")
    shown: Json = {"version": entry.img_version, "writer": "criu"}
    if entry.torpor:
        shown["writer"] = f"torpor {text_of(entry.torpor)}"
    if entry.lsmtype:
        shown["lsm"] = pb.lsmtype.Name(entry.lsmtype).lower()
    if entry.plugins_entry.plugins:
        shown["plugins"] = [text_of(name) for name in entry.plugins_entry.plugins]
    return shown


def pstree(reader: ImageReader) -> list[tuple[int, Any]]:
    """(depth, pstree_entry) of every task, children behind their parents."""
    entries = reader.read_all("pstree", required=True)
    children: dict[int, list[Any]] = {}
    pids = {entry.pid for entry in entries}
    for entry in entries:
        parent = entry.ppid if entry.ppid in pids and entry.ppid != entry.pid else 0
        children.setdefault(parent, []).append(entry)
    found: list[tuple[int, Any]] = []
    waiting = [(0, entry) for entry in reversed(children.pop(0, []))]
    while waiting:
        depth, entry = waiting.pop()
        found.append((depth, entry))
        waiting += [(depth + 1, child) for child in reversed(children.pop(entry.pid, []))]
    if len(found) != len(entries):
        raise ImageError("pstree.img", "", "tasks that are their own ancestors, or share a pid")
    return found


def _task(reader: ImageReader, depth: int, entry: Any) -> Json:
    shown: Json = {
        "depth": depth,
        "pid": entry.pid,
        "ppid": entry.ppid,
        "pgid": entry.pgid,
        "sid": entry.sid,
        "comm": "",
        "state": "",
        "threads": [],
    }
    core = f"core-{entry.pid}"
    if reader.has(core):
        task = reader.read_one(core).tc
        shown["comm"] = text_of(task.comm)
        shown["state"] = _STATES.get(task.task_state, str(task.task_state))
        if shown["state"] == "zombie":
            shown["exit_code"] = task.exit_code
    if entry.HasField("levels"):
        shown |= {"pids": list(entry.levels.pid), "pgids": list(entry.levels.pgid), "sids": list(entry.levels.sid)}
    for index, tid in enumerate(entry.threads or [entry.pid]):
        thread: Json = {"tid": tid, "comm": _thread_comm(reader, tid)}
        if index < len(entry.levels.threads):
            thread["tids"] = list(entry.levels.threads[index].tid)
        shown["threads"].append(thread)
    mapped, stored, inherited = _memory(reader, entry.pid)
    return shown | {"memory": mapped, "stored": stored, "inherited": inherited}


def _thread_comm(reader: ImageReader, tid: int) -> str:
    core = f"core-{tid}"
    return text_of(reader.read_one(core).thread_core.comm) if reader.has(core) else ""


def _memory(reader: ImageReader, pid: int) -> tuple[int, int, int]:
    mapped = stored = inherited = 0
    if reader.has(f"mm-{pid}"):
        mapped = sum(vma.end - vma.start for vma in reader.read_one(f"mm-{pid}").vmas)
    for run in _runs(reader, pid):
        size = run.nr_pages * pages.PAGE_SIZE
        stored += size if run.flags & pages.PE_PRESENT else 0
        inherited += size if run.flags & pages.PE_PARENT else 0
    return mapped, stored, inherited


def _runs(reader: ImageReader, pid: int) -> list[pages.Run]:
    name = f"pagemap-{pid}"
    return pages.read_pagemap(reader, name).runs if reader.has(name) else []


# --------------------------------------------------------------------------------------- mappings


def mappings(reader: ImageReader, pid: int) -> list[Json]:
    """The mappings of task ``pid`` in order: start, end (bytes), prot and shared as in
    /proc/PID/maps, what is mapped (``name``) from which ``offset``, and how many bytes of it the
    snapshot has (``stored``; pages that equal the file's are in none). UsageError if there is no
    such task."""
    _check_known(reader, pid)
    paths = {entry.id: entry for entry in reader.files()}
    runs = _runs(reader, pid)
    shown, at = [], 0
    if not reader.has(f"mm-{pid}"):
        return []  # a zombie
    mm = reader.read_one(f"mm-{pid}")
    for vma in mm.vmas:
        stored, at = _overlap(runs, at, vma.start, vma.end)
        backed = vma.status & _FILE_BACKED
        shown.append(
            {
                "start": vma.start,
                "end": vma.end,
                "prot": "".join(c if vma.prot & 1 << i else "-" for i, c in enumerate("rwx"))
                + ("s" if vma.flags & 1 else "p"),
                "offset": vma.pgoff if backed else 0,
                "name": _path(paths.get(vma.shmid), vma.shmid) if backed else _special(vma, mm),
                "stored": stored,
            }
        )
    return shown


def _overlap(runs: list[pages.Run], at: int, start: int, end: int) -> tuple[int, int]:
    """Bytes of runs within [start, end), beginning to look at index ``at``; where to go on."""
    stored = 0
    while at < len(runs) and runs[at].vaddr < end:
        run = runs[at]
        stop = run.vaddr + run.nr_pages * pages.PAGE_SIZE
        stored += max(min(stop, end) - max(run.vaddr, start), 0)
        if stop > end:
            break
        at += 1
    return stored, at


def _special(vma: Any, mm: Any) -> str:
    for bit, name in _SPECIAL.items():
        if vma.status & _STATUS[bit]:
            return name.format(shmid=vma.shmid)
    if vma.start <= mm.mm_start_stack < vma.end or vma.flags & 0x100:  # MAP_GROWSDOWN
        return "[stack]"
    if vma.start < mm.mm_brk and mm.mm_start_brk < vma.end:
        return "[heap]"
    return ""


# ------------------------------------------------------------------------------------------ files


def files(reader: ImageReader, pid: int) -> list[Json]:
    """What task ``pid`` has open: fd (or ``exe``, ``cwd``, ``root``), kind, mode, offset in the
    file, close-on-exec, and a description of what it is. UsageError if there is no such task."""
    _check_known(reader, pid)
    entries = {entry.id: entry for entry in reader.files()}
    shown = []
    for name, number in _fs(reader, pid):
        shown.append(_open_file(name, entries.get(number), number))
    table = _ids(reader, pid).files_id
    for descriptor in reader.read_all(f"fdinfo-{table}"):
        row = _open_file(str(descriptor.fd), entries.get(descriptor.id), descriptor.id)
        row["cloexec"] = bool(descriptor.flags & _CLOEXEC)
        shown.append(row)
    return shown


def _check_known(reader: ImageReader, pid: int) -> None:
    if all(entry.pid != pid for entry in reader.read_all("pstree", required=True)):
        raise UsageError(f"there is no process {pid} in the snapshot")


def _ids(reader: ImageReader, pid: int) -> Any:
    name = f"ids-{pid}"
    return reader.read_one(name) if reader.has(name) else reader.read_one(f"core-{pid}").ids


def _fs(reader: ImageReader, pid: int) -> list[tuple[str, int]]:
    found = []
    if reader.has(f"mm-{pid}"):
        found.append(("exe", reader.read_one(f"mm-{pid}").exe_file_id))
    if reader.has(f"fs-{pid}"):
        entry = reader.read_one(f"fs-{pid}")
        found += [("cwd", entry.cwd_id), ("root", entry.root_id)]
    return found


def _open_file(name: str, entry: Any, number: int) -> Json:
    row: Json = {"fd": name, "kind": "?", "mode": "", "pos": None, "what": f"file {number}"}
    if entry is None:
        return row
    fields = [(field.name, value) for field, value in entry.ListFields()]
    # The one field besides type and id that is set.
    of_kind = next(((key, value) for key, value in fields if key not in ("type", "id")), None)
    row["kind"] = pb.fd_types.Name(entry.type).lower()
    if of_kind is not None:
        key, body = of_kind
        row["mode"] = _OPEN_MODES[getattr(body, "flags", 3) & 3]
        row["pos"] = getattr(body, "pos", None)
        row["what"] = _WORDS[key](body) if key in _WORDS else ""
    return row


def _path(entry: Any, number: int) -> str:
    if entry is None:
        return f"file {number}"
    return _WORDS["memfd" if entry.HasField("memfd") else "reg"](
        entry.memfd if entry.HasField("memfd") else entry.reg
    )


def _inet(body: Any) -> str:
    words = [{6: "tcp", 17: "udp", 136: "udplite", 1: "icmp"}.get(body.proto, str(body.proto))]
    words.append(_endpoint(body.src_addr, body.src_port))
    if body.dst_port:
        words += ["→", _endpoint(body.dst_addr, body.dst_port)]
    if body.proto == 6:
        words.append(crit.TCP_STATES.get(body.state, str(body.state)).lower())
    return " ".join(words)


def _endpoint(address: Any, port: int) -> str:
    text = crit.ip_address(address) if len(address) in (1, 4) else "?"
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _unix(body: Any) -> str:
    name = text_of(body.name.rstrip(b"\0").replace(b"\0", b"@"))
    peer = f" ↔ {body.peer}" if body.peer else ""
    return f"unix {body.ino}{peer}" + (f" {name}" if name else "")


def _swapped(number: int) -> int:
    """A protocol from network order."""
    return int.from_bytes((number & 0xFFFF).to_bytes(2, "little"), "big")


def _events(body: Any) -> str:
    return f"{len(body.tfd)} watched: {' '.join(str(one.tfd) for one in body.tfd[:20])}"


_WORDS: dict[str, Callable[[Any], str]] = {
    "reg": lambda body: text_of(body.name),
    "pipe": lambda body: f"pipe:[{body.pipe_id}]",
    "fifo": lambda body: f"fifo:[{body.pipe_id}]",
    "isk": _inet,
    "usk": _unix,
    "efd": lambda body: f"count {body.counter}" + (" semaphore" if body.semaphore else ""),
    "epfd": _events,
    "sgfd": lambda body: f"mask {body.sigmask:#x}",
    "tfd": lambda body: f"clock {body.clockid}",
    "ify": lambda body: f"{len(body.wd)} watches",
    "ffy": lambda body: f"{len(body.mark)} marks",
    "tty": lambda body: f"terminal {body.tty_info_id}",
    "nlsk": lambda body: f"netlink protocol {body.protocol}",
    "psk": lambda body: f"packet protocol {_swapped(body.protocol):#06x}",
    "nsf": lambda body: f"namespace {body.ns_id}",
    "tunf": lambda body: f"tun {text_of(body.netdev)}",
    "memfd": lambda body: f"memfd inode {body.inode_id}",
    "bpf": lambda body: f"bpf map {text_of(body.map_name)}",
    "pidfd": lambda body: f"pid {body.nspid}",
    "ext": lambda body: "from a plugin",
}


# ------------------------------------------------------------------------------------------- text


def render_summary(shown: Json) -> str:
    """The tree of tasks, and what the set takes, as lines of text. Of a task in several pid namespaces all numbers are
    given, that in the dumping process' first.
    """
    rows = [("PID", "PPID", "PGID", "SID", "STATE", "THREADS", "MAPPED", "STORED", "COMMAND")]
    for task in shown["tasks"]:
        rows.append(
            (
                "/".join(map(str, task.get("pids", [task["pid"]]))),
                *(str(task[key]) for key in ("ppid", "pgid", "sid", "state")),
                str(len(task["threads"])),
                human(task["memory"]),
                human(task["stored"]) + ("+" if task["inherited"] else ""),
                "  " * task["depth"] + printable(task["comm"]),
            )
        )
    total = sum(image["bytes"] for image in shown["images"])
    of_pages = sum(i["bytes"] for i in shown["images"] if i["name"].startswith("pages-"))
    writer = printable(shown["inventory"].get("writer", "?"))
    end = f"{len(shown['images'])} images, {human(total)}, of it pages {human(of_pages)}"
    return f"{_columns(rows, right=(0, 1, 2, 3, 5, 6, 7))}\n{end}; written by {writer}\n"


def render_mappings(shown: list[Json]) -> str:
    """Mappings as lines of text, much as /proc/PID/maps."""
    rows = [("ADDRESS", "PROT", "SIZE", "STORED", "OFFSET", "MAPPED")]
    for vma in shown:
        rows.append(
            (
                f"{vma['start']:012x}-{vma['end']:012x}",
                vma["prot"],
                human(vma["end"] - vma["start"]),
                human(vma["stored"]) if vma["stored"] else "",
                f"{vma['offset']:x}" if vma["offset"] else "",
                printable(vma["name"]),
            )
        )
    return _columns(rows, right=(2, 3, 4))


def render_files(shown: list[Json]) -> str:
    """Open files as lines of text."""
    rows = [("FD", "KIND", "MODE", "POS", "WHAT")]
    for row in shown:
        mode = row["mode"] + (" e" if row.get("cloexec") else "")
        pos = str(row["pos"]) if row["pos"] is not None else ""
        rows.append((row["fd"], row["kind"], mode, pos, printable(row["what"])))
    return _columns(rows, right=(0, 3))


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def human(size: int) -> str:
    """A size in bytes in four characters or so: 4096 is ``4.0K``."""
    if size < 1024:
        return str(size)
    value = float(size)
    for unit in "KMGTPE":
        value /= 1024
        if value < 1024:
            return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
    return f"{value:.0f}E"


def printable(text: str) -> str:
    """``text`` with everything that could steer a terminal as escapes: names are not trusted."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def text_of(value: str | bytes) -> str:
    return pb.get_bytes(value).decode(errors="backslashreplace")
