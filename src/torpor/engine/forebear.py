"""What the copies of a snapshot have in common: a task from whom their roots inherit memory by forking."""

from __future__ import annotations

from ..images.pages import Run
from ..model.snapshot import RestoredTask, Snapshot
from ..resources import MappingKinds
from .restore_memory import PAGE, UNPLACED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..images.schema import Message
    from ..resources.base import BuildContext


def forebear(
    snapshot: Snapshot, ctx: BuildContext, own: Callable[[Message], bool] = lambda _: False
) -> RestoredTask:
    """A task from whom the root of every copy of the snapshot can inherit its memory by forking: as much of it as
    they may have in common. ``own`` tells of mappings that a copy has for itself besides.
    """
    root, kinds = snapshot.root, MappingKinds()
    task = RestoredTask(root.pid, root.group, root.session)
    for name in ("core", "fs", "ids"):
        setattr(task, name, getattr(root, name))
    kept = [
        entry
        for entry in root.mm.vmas
        if entry.status & UNPLACED or (kinds.of_entry(entry).inheritable(entry, ctx) and not own(entry))
    ]
    task.mm = root.mm
    if len(kept) < len(root.mm.vmas):
        task.mm = type(root.mm)()
        task.mm.CopyFrom(root.mm)
        del task.mm.vmas[:]
        task.mm.vmas.extend(kept)
    spans = [(entry.start, entry.end) for entry in kept if not entry.status & UNPLACED]
    task.runs = list(_clipped(root.runs, spans))
    return task


def _clipped(runs: list[Run], spans: list[tuple[int, int]]) -> Iterator[Run]:
    """The parts of stored runs that lie in one of ``spans``; both ascending."""
    index = 0
    for run in runs:
        end = run.vaddr + run.nr_pages * PAGE
        while index < len(spans) and spans[index][1] <= run.vaddr:
            index += 1
        at = index
        while at < len(spans) and spans[at][0] < end:
            low, high = max(run.vaddr, spans[at][0]), min(end, spans[at][1])
            yield run._replace(vaddr=low, nr_pages=(high - low) // PAGE, offset=run.offset + low - run.vaddr)
            at += 1
