"""Is the vDSO that a snapshot's tasks have been linked with the one of this kernel?"""

from __future__ import annotations

import os

from ..errors import Unsupported
from ..model.snapshot import RestoredTask, Snapshot
from ..proc import maps as proc_maps
from ..proc.read import read
from ..resources.memory import vdso

PAGE = 4096


def check_vdso(snapshot: Snapshot) -> None:
    """Raise Unsupported when the tasks' vDSO is not the one of this kernel."""
    here = _own_vdso()
    checked = False
    for task in snapshot.tasks.values():
        if checked:
            break
        wanted = vdso.layout(task.mm.vmas) if task.alive else None
        if wanted is None:
            continue
        if here is None:
            raise Unsupported("this kernel has no vDSO and the snapshot's tasks have one")
        stored = _stored_vdso(task, wanted)
        if stored:
            vdso.check(wanted, here[0], stored, here[1])
            checked = True


_here: list[tuple[tuple[int, int, int], bytes] | None] = []


def _own_vdso() -> tuple[tuple[int, int, int], bytes] | None:
    """Ours: (start of vvar, start, end) and content. It stays where it is, so it is looked up once."""
    if not _here:
        _here.append(_find_own_vdso())
    return _here[0]


def _find_own_vdso() -> tuple[tuple[int, int, int], bytes] | None:
    vmas = proc_maps.parse(read(os.getpid(), "maps"))
    code = [vma for vma in vmas if vma.kind == proc_maps.VDSO]
    if not code:
        return None
    data = [vma.start for vma in vmas if vma.kind in (proc_maps.VVAR, proc_maps.VVAR_VCLOCK)]
    place = (min(data, default=code[0].start), code[0].start, code[0].end)
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(place[1])
        return place, memory.read(place[2] - place[1])


def _stored_vdso(task: RestoredTask, wanted: tuple[int, int, int]) -> bytes:
    for address, count, _, fd, offset, _ in task.runs:
        if address <= wanted[1] and wanted[2] <= address + count * PAGE and fd >= 0:
            return os.pread(fd, wanted[2] - wanted[1], offset + wanted[1] - address)
    return b""
