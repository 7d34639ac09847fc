"""The vDSO and its data pages, which the kernel maps into every task.

They cannot be made by mmap(2): the stub's own are unmapped and arch_prctl(ARCH_MAP_VDSO_64) maps new ones at the
address where the task had them: vvar first, the code behind it. Kernel: arch/x86/entry/vdso/vma.c

Image: vma_entry with VDSO or VVAR; the vDSO's pages are stored, so that a kernel with another vDSO is noticed.
"""

from __future__ import annotations

from ...errors import Unsupported
from ...proc import maps
from ..base import (
    MAP_ANONYMOUS,
    VMA_ANON_PRIVATE,
    VMA_REGULAR,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
    MappingResource,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program
    from ..base import BuildContext, DumpContext

ARCH_MAP_VDSO_64 = 0x2003
_STATUS_OF = {
    maps.VDSO: VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VDSO,
    maps.VVAR: VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VVAR,
    maps.VVAR_VCLOCK: VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VVAR,
    maps.VSYSCALL: VMA_ANON_PRIVATE | VMA_VSYSCALL,
}


class Vdso(MappingResource):
    """The pages of the kernel in a task's memory."""

    KINDS = tuple(_STATUS_OF)
    STATUS = VMA_VDSO | VMA_VVAR | VMA_VSYSCALL
    PRIORITY = 10
    PRIVATE_PAGES = False

    def dump(self, mapping: Any, task: Any, ctx: DumpContext, entry: Message) -> None:
        entry.status = _STATUS_OF[mapping.vma.kind]
        entry.flags |= MAP_ANONYMOUS
        entry.pgoff = 0

    def restore(self, entry: Message, prot: int, program: Program, ctx: BuildContext) -> None:
        """Nothing: see :func:`emit`, which places all of them at once."""


def layout(vmas: Any) -> tuple[int, int, int] | None:
    """(start of vvar, start of vdso, end of vdso) of a list of vma_entry, None where the task has no vDSO."""
    code = [entry for entry in vmas if entry.status & VMA_VDSO]
    if not code:
        return None
    data = [entry.start for entry in vmas if entry.status & VMA_VVAR]
    return min(data, default=code[0].start), code[0].start, code[0].end


def clear(wanted: tuple[int, int, int] | None, present: tuple[int, int, int] | None, program: Program) -> None:
    """Emit the call that unmaps the kernel's pages where they are ``present`` and not ``wanted``.

    It goes before any other mapping: something else may belong there.
    """
    if present and wanted != present:
        program.call("munmap", present[0], present[2] - present[0], why="vdso of the stub")


def emit(wanted: tuple[int, int, int] | None, present: tuple[int, int, int] | None, program: Program) -> None:
    """Emit the call that maps the kernel's pages where they are ``wanted`` and not ``present``; after clear()."""
    if wanted and wanted != present:
        program.call("arch_prctl", ARCH_MAP_VDSO_64, wanted[0], why="vdso where the task had it")


def check(wanted: tuple[int, int, int], here: tuple[int, int, int], content: bytes, ours: bytes) -> None:
    """Raise Unsupported when the image's vDSO is not this kernel's: ``here`` and ``ours`` are our own process's."""
    same_shape = wanted[1] - wanted[0] == here[1] - here[0] and wanted[2] - wanted[1] == here[2] - here[1]
    if not same_shape or content.rstrip(b"\0") != ours.rstrip(b"\0"):
        raise Unsupported(
            "the snapshot was taken on a kernel with another vDSO (or pages-1.img is damaged)",
            hint="restore it on the kernel that it was dumped on",
        )


RESOURCE = Vdso()
