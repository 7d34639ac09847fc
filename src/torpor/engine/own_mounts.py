"""What one copy has mounted for itself: overlays, and a devpts in which its ptys have the numbers that they had; and an
IPC namespace.

All of it is in a mount namespace that is there before the copy is (annex.py), so that everything that the copy has open
is opened through it.
"""

from __future__ import annotations

from ..resources import devpts, ipc_space
from .annex import Annex
from .overlays import Overlays

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.snapshot import Snapshot
    from ..resources.base import BuildContext
    from .overlays import Wanted


class OwnMounts:
    """The mounts of one copy. ``annex``: the namespace with them; ``overlays``: None if there are none."""

    def __init__(self, wanted: Wanted, pts: str, snapshot: Snapshot, ctx: BuildContext, *, ipc: bool) -> None:
        """Make them: the overlays that are ``wanted``, a devpts at ``pts`` unless that is "", and an IPC namespace if
        ``ipc``.

        Raises UsageError, Unsupported and KernelError; all of it is taken back by ``ctx.on_failure`` and ``ctx.undo``.
        """
        self._pts, self._ipc = pts, ipc
        self.overlays = Overlays(wanted, snapshot, ctx) if wanted else None
        self.annex = Annex(ctx, self._furnish, ipc=ipc)
        if pts:
            ctx.notes.append(f"{pts}: a devpts of its own, with no terminals but those of the tree")
        if ipc:
            ctx.notes.append("an IPC namespace of its own, with no System V objects and queues but those of the tree")

    def _furnish(self) -> None:
        if self.overlays is not None:
            self.overlays.mount()
        if self._pts:
            devpts.mount_own(self._pts)
        if self._ipc:
            ipc_space.mount_queues()
