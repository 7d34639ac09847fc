"""What this process has itself, to tell beforehand what cannot be given to a restored task."""

from __future__ import annotations

from ...proc import limits, status
from ...proc.read import read_system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...proc.status import Status
    from ..base import BuildContext

CAP_SYS_RESOURCE = 24

#: ctx.memo has a true value under this key when the tree is restored into a user namespace of its
#: own, where the tasks begin with all capabilities.
OWN_USER_NAMESPACE = ("user namespace", "own")


def own_status(ctx: BuildContext) -> Status:
    """/proc/self/status of the builder, read once."""
    found: Status = ctx.once(("own", "status"), lambda: status.parse(read_system("self/status")))
    return found


def own_limits(ctx: BuildContext) -> dict[int, tuple[int, int]]:
    """The builder's resource limits, read once: number → (soft, hard)."""
    found: dict[int, tuple[int, int]] = ctx.once(
        ("own", "limits"), lambda: limits.parse(read_system("self/limits"))
    )
    return found


def capable(ctx: BuildContext, number: int) -> bool:
    """Does the builder have the capability ``number``, not only in a namespace of the tree's?"""
    return bool(own_status(ctx).CapEff >> number & 1)
