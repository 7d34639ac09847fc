"""Torpor checkpoints, restores and clones Linux processes.

::

    import torpor

    result = torpor.dump(pid, "/var/snap")          # the tree below pid is in /var/snap, and gone
    tree = torpor.restore("/var/snap")              # it runs again, as children of this process
    for problem in torpor.check(pid):               # what would stop a dump, before anything is frozen
        print(problem)

Every function takes the options of :class:`torpor.Options` as keyword arguments (``leave_running=True``,
``shell_job=True``, …) and raises :class:`torpor.TorporError` and its subclasses.
"""

from __future__ import annotations

from .errors import Blockers, ImageError, KernelError, TaskGone, TorporError, Unsupported, UsageError
from .options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from .engine.dump import DumpResult
    from .engine.restore import RestoreResult

__all__ = [
    "Blockers", "ImageError", "KernelError", "Options", "TaskGone", "TorporError", "Unsupported", "UsageError",
    "check", "dump", "explain", "restore",
]  # fmt: skip
__version__ = "0.1.0"


def dump(pid: int, images_dir: str | os.PathLike[str], **options: object) -> DumpResult:
    """Write a snapshot of the process tree below and with ``pid`` to the directory ``images_dir``.

    The tree is ended afterwards, unless ``leave_running`` or ``leave_stopped`` is given. Raises TorporError; the tree
    then runs on as if nothing had been. :class:`Blockers` lists everything that stands in the way at once.
    """
    from .engine.dump import dump as run

    return run(pid, Options(pid=pid, images_dir=_path(images_dir), **options).freeze())


def restore(images_dir: str | os.PathLike[str], **options: object) -> RestoreResult:
    """Wake the tree of processes whose snapshot is in ``images_dir``; ``.pid`` of the result is its root.

    It runs when this returns, its root being a child of the calling process, to be waited for. Raises TorporError;
    nothing of the attempt is left then.
    """
    from .engine.restore import restore as run

    return run(Options(images_dir=_path(images_dir), **options).freeze())


def check(pid: int, **options: object) -> list[TorporError]:
    """Everything that a dump of the tree below and with ``pid`` would refuse, with hints; empty when nothing stands in
    the way.

    Nothing is stopped or changed.
    """
    from .engine.check import check_task

    return check_task(pid, Options(pid=pid, **options).freeze())


def explain(images_dir: str | os.PathLike[str], **options: object) -> Iterator[str]:
    """What :func:`restore` would do in each task, a line for each system call, without doing it."""
    from .engine.restore import explain as run

    return run(Options(images_dir=_path(images_dir), **options).freeze())


def _path(path: str | os.PathLike[str]) -> str:
    import os

    return os.fsdecode(path)
