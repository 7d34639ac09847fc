"""What the copies of a snapshot have in common: a task from whom their roots inherit memory by forking."""

from __future__ import annotations

from ..model.snapshot import RestoredTask, Snapshot
from ..resources import MappingKinds
from . import spans
from .restore_memory import UNPLACED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

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
    places = [(entry.start, entry.end) for entry in kept if not entry.status & UNPLACED]
    task.runs = list(spans.clipped(root.runs, places))
    return task
