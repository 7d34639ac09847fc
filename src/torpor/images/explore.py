"""``crit x``: the four looks that CRIU's crit takes into a set, line by line as it prints them.

:mod:`torpor.images.show` is the look for people; this is for scripts that know crit's.
"""

from __future__ import annotations

from . import pages
from . import schema as pb
from .crit import VMA_STATUS, quoted_printable
from .show import pstree, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .store import ImageReader

_FILE = VMA_STATUS["VMA_FILE_PRIVATE"] | VMA_STATUS["VMA_FILE_SHARED"]


class _Set:
    """A set of images with what several lines need."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader
        self.files = {entry.id: entry for entry in reader.files()}
        self.pids = [entry.pid for entry in reader.read_all("pstree", required=True)]

    def mm(self, pid: int) -> Any:
        return self.reader.read_one(f"mm-{pid}") if self.reader.has(f"mm-{pid}") else pb.mm_entry()

    def file(self, number: int, kind: int) -> str:
        """What crit calls the open file ``number``."""
        entry = self.files.get(number)
        if kind == pb.fd_types.REG:
            if entry is None or not entry.HasField("reg"):
                return "unknown path"
            return text_of(entry.reg.name)
        if kind == pb.fd_types.PIPE:
            return f"pipe[{entry.pipe.pipe_id}]" if entry is not None else "pipe[?]"
        if kind == pb.fd_types.UNIXSK:
            if entry is None:
                return "unix[?]"
            name = quoted_printable(entry.usk.name)
            return f"unix[{entry.usk.ino} ({entry.usk.peer}){' ' + name if name else ''}]"
        return f"{pb.fd_types.Name(kind)}.{number}"


def processes(reader: ImageReader) -> str:
    """pid, process group, session and name of every task, as a tree."""
    lines = [f"{'PID':>7}{'PGID':>7}{'SID':>7}   COMM\n"]
    for depth, entry in pstree(reader):
        comm = text_of(reader.read_one(f"core-{entry.pid}").tc.comm)
        lines.append(f"{entry.pid:7}{entry.pgid:7}{entry.sid:7}   {' ' * 4 * depth}{comm}\n")
    return "".join(lines)


def descriptors(reader: ImageReader) -> str:
    """What every task has open."""
    whole, lines = _Set(reader), []
    for pid in whole.pids:
        lines.append(f"{pid}\n")
        if not reader.has(f"ids-{pid}"):
            continue  # a zombie
        table = reader.read_one(f"ids-{pid}").files_id
        for row in reader.read_all(f"fdinfo-{table}"):
            lines.append(f"\t{row.fd:7}: {whole.file(row.id, row.type)}\n")
        for fs in reader.read_all(f"fs-{pid}"):
            lines.append(f"\t{'cwd':>7}: {whole.file(fs.cwd_id, pb.fd_types.REG)}\n")
            lines.append(f"\t{'root':>7}: {whole.file(fs.root_id, pb.fd_types.REG)}\n")
    return "".join(lines)


def memory(reader: ImageReader) -> str:
    """What every task has mapped."""
    whole, lines = _Set(reader), []
    shared: dict[int, int] = {}
    for pid in whole.pids:
        mm = whole.mm(pid)
        lines.append(f"{pid}\n")
        if mm.vmas:
            exe = whole.file(mm.exe_file_id, pb.fd_types.REG)
            lines.append(f"\t{'exe':<36}    {exe}\n")
        for vma in mm.vmas:
            prot = "".join(c if vma.prot & 1 << bit else "-" for bit, c in enumerate("rwx"))
            place = f"{vma.start:08x}-{vma.end:08x}"
            lines.append(f"\t{place:<36}{prot}{_mapped(whole, vma, shared)}\n")
    return "".join(lines)


def _mapped(whole: _Set, vma: Any, shared: dict[int, int]) -> str:
    status = vma.status
    for bit, name in (
        ("VMA_AREA_SYSVIPC", "ips"),
        ("VMA_ANON_SHARED", "shmem"),
        ("VMA_AREA_SOCKET", "packet"),
    ):
        if status & VMA_STATUS[bit]:
            text = f" {name}[{shared.setdefault(vma.shmid, len(shared) + 1):x}]"
            break
    else:
        text = _private(whole, vma)
    return text + ("" if status & VMA_STATUS["VMA_AREA_REGULAR"] else " *")


def _private(whole: _Set, vma: Any) -> str:
    if vma.status & _FILE:
        text = " " + whole.file(vma.shmid, pb.fd_types.REG)
        text += f" + {vma.pgoff:#x}" if vma.pgoff else ""
        return text + (" (s)" if vma.status & VMA_STATUS["VMA_FILE_SHARED"] else "")
    for bit in ("STACK", "VSYSCALL", "VDSO"):
        if vma.status & VMA_STATUS[f"VMA_AREA_{bit}"]:
            return f" [{bit.lower()}]"
    return " [stack?]" if vma.flags & 0x100 else ""  # MAP_GROWSDOWN


def resident(reader: ImageReader) -> str:
    """Every run of pages in the set and the mappings it lies in."""
    whole, lines = _Set(reader), []
    for pid in whole.pids:
        lines.append(f"{pid}\n")
        vmas = whole.mm(pid).vmas
        if reader.has(f"pagemap-{pid}"):
            lines += _runs(whole, pages.read_pagemap(reader, f"pagemap-{pid}").runs, vmas)
    return "".join(lines)


def _runs(whole: _Set, runs: list[pages.Run], vmas: Any) -> list[str]:
    lines, at, last = [], 0, -1
    for run in runs:
        end = run.vaddr + run.nr_pages * pages.PAGE_SIZE
        while at < len(vmas) and vmas[at].end <= run.vaddr:
            at += 1
        inside = ""
        while at < len(vmas) and vmas[at].start < end:
            vma = vmas[at]
            if at == last:
                inside += " ~"
            else:
                inside += f" {vma.start:08x} / {(vma.end - vma.start) >> 12:<8}"
                if vma.status & _FILE:
                    inside += " " + whole.file(vma.shmid, pb.fd_types.REG)
                last = at
            inside += f"\n\t{'':23}"
            at += 1
        at = max(at - 1, 0)
        lines.append(f"\t{run.vaddr:x} / {run.nr_pages:<8}".ljust(24) + inside + "\n")
    return lines


EXPLORERS: dict[str, Callable[[ImageReader], str]] = {
    "ps": processes,
    "fds": descriptors,
    "mems": memory,
    "rss": resident,
}
