"""What one copy has mounted for itself: overlays, a devpts in which its ptys have the numbers that they had, a /dev/shm
with its own segments; and an IPC namespace.

All of it is in a mount namespace that is there before the copy is (annex.py), so that everything that the copy has open
is opened through it.
"""

from __future__ import annotations

import os

from ..resources import devpts, ipc_space, own_shm
from .annex import Annex
from .overlays import Overlays, is_within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.snapshot import Snapshot
    from ..resources.base import BuildContext
    from .overlays import Wanted


class Needed:
    """What the copies of a snapshot need for themselves: ``pts``, where a devpts is to be mounted, "" for none;
    ``shm``, a /dev/shm; ``ipc``, an IPC namespace.
    """

    __slots__ = ("ipc", "pts", "shm")

    def __init__(self, snapshot: Snapshot, ctx: BuildContext, wanted: Wanted) -> None:
        """``wanted`` overlays may do the same."""
        self.pts = devpts.folder(ctx)
        self.ipc = ipc_space.is_used(snapshot, ctx)
        covered = any(is_within(path, own_shm.PATH) for path in map(os.path.realpath, wanted.dirs))
        self.shm = not covered and own_shm.decide(snapshot, ctx)

    def __bool__(self) -> bool:
        return bool(self.pts or self.ipc or self.shm)


class OwnMounts:
    """The mounts of one copy. ``annex``: the namespace with them; ``overlays``: None if there are none."""

    def __init__(self, wanted: Wanted, needed: Needed, snapshot: Snapshot, ctx: BuildContext) -> None:
        """Make them: the overlays that are ``wanted``, and what is ``needed``.

        Raises UsageError, Unsupported and KernelError; all of it is taken back by ``ctx.on_failure`` and ``ctx.undo``.
        """
        self._needed = needed
        pts, ipc = needed.pts, needed.ipc
        self.overlays = Overlays(wanted, snapshot, ctx) if wanted else None
        self.annex = Annex(ctx, self._furnish, ipc=ipc)
        if pts:
            ctx.notes.append(f"{pts}: a devpts of its own, with no terminals but those of the tree")
        if needed.shm:
            ctx.notes.append(f"{own_shm.PATH}: a file system of its own, with no files but those of the tree")
        if ipc:
            ctx.notes.append("an IPC namespace of its own, with no System V objects and queues but those of the tree")

    def _furnish(self) -> None:
        if self.overlays is not None:
            self.overlays.mount()
        if self._needed.pts:
            devpts.mount_own(self._needed.pts)
        if self._needed.shm:
            own_shm.mount_own()
        if self._needed.ipc:
            ipc_space.mount_queues()
