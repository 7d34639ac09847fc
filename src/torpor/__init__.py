"""Torpor checkpoints, restores and clones Linux processes.

::

    import torpor

    result = torpor.dump(pid, "/var/snap")          # the tree below pid is in /var/snap, and gone
    tree = torpor.restore("/var/snap")              # it runs again, as children of this process
    with torpor.template("/var/snap") as template:  # any number of times, about a millisecond each
        copies = [template.clone(stdout=log) for log in logs]
    for problem in torpor.check(pid):               # what would stop a dump, before anything is frozen
        print(problem)

Every function takes the options of :class:`torpor.Options` as keyword arguments (``leave_running=True``,
``shell_job=True``, …) and raises :class:`torpor.TorporError` and its subclasses. ``notify=FUNCTION`` is called at the
moments that an ``--action-script`` is run at, with an object that has ``name``, ``pid``, ``images_dir`` and ``fd``; an
error that it raises ends the operation (:class:`torpor.ActionFailed`) where there still is a way back.
"""

from __future__ import annotations

from .errors import ActionFailed, Blockers, ImageError, KernelError, TaskGone, TorporError, Unsupported, UsageError
from .options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from .engine.audit import Audit
    from .engine.dump import DumpResult
    from .engine.restore import RestoreResult
    from .engine.template import Template

__all__ = [
    "ActionFailed", "Blockers", "ImageError", "KernelError", "Options", "TaskGone", "TorporError", "Unsupported",
    "UsageError", "audit", "check", "dump", "explain", "restore", "template",
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


def template(images_dir: str | os.PathLike[str], **options: object) -> Template:
    """Hold the snapshot in ``images_dir`` ready to be copied: its memory is restored once.

    Use it as a context manager and call :meth:`Template.clone` for each copy, all in one thread. Copies are children of
    this process and outlive the template. Raises TorporError; nothing of the attempt is left then.
    """
    from .engine.template import Template

    return Template(Options(images_dir=_path(images_dir), **options).freeze())


def check(pid: int, **options: object) -> list[TorporError]:
    """Everything that a dump of the tree below and with ``pid`` would refuse, with hints; empty when nothing stands in
    the way.

    Nothing is stopped or changed.
    """
    from .engine.check import check_task

    return check_task(pid, Options(pid=pid, **options).freeze())


def audit(images_dir: str | os.PathLike[str], **options: object) -> Audit:
    """What the copies of a snapshot would have in common and should not, the worst first in ``.shared``.

    Read from the snapshot alone; ``fresh`` and ``tcp_close`` are taken into account. What ``restore(strict=True)``
    would refuse is in ``.refused()``.
    """
    from .engine.audit import audit as run

    return run(Options(images_dir=_path(images_dir), **options).freeze())


def explain(images_dir: str | os.PathLike[str], **options: object) -> Iterator[str]:
    """What :func:`restore` would do in each task, a line for each system call, without doing it."""
    from .engine.restore import explain as run

    return run(Options(images_dir=_path(images_dir), **options).freeze())


def _path(path: str | os.PathLike[str]) -> str:
    import os

    return os.fsdecode(path)
