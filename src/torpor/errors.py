"""The errors of Torpor, all of them.

::

    TorporError              anything Torpor refuses or fails at; never a bug
    ├── KernelError          a system call failed (also an OSError: .errno is set)
    ├── ImageError           an image is missing, truncated, malformed or inconsistent
    ├── Unsupported          something that cannot be dumped or restored here, and why
    │   └── Blockers         all the things that stand in the way, found in one go
    ├── TaskGone             a task ended while it was being worked on
    ├── ActionFailed         an action script or callback of the caller failed
    └── UsageError           the caller asked for something that makes no sense

An error reads from the outside in and ends with its cause::

    dump: task 42: fd 7 (io_uring): requests are in flight (hint: …)

The context is added by :func:`doing` on the way out; ``str(error)`` is the one text that the log, the command line and
the RPC all show.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


class TorporError(Exception):
    """Base of every error that Torpor raises on purpose.

    ``hint`` is advice for the reader, kept apart from the fact. ``context`` is the chain of what was being done,
    outermost first. ``status`` is the value that CRIU's RPC calls cr_errno, ``exit_status`` how a command ends by it.
    """

    status = 0
    exit_status = 1

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.context: list[str] = []

    def __str__(self) -> str:
        text = ": ".join([*self.context, self.what])
        return f"{text} (hint: {self.hint})" if self.hint else text


class KernelError(TorporError, OSError):
    """A system call failed. ``errno`` holds its error number, ``call`` what was called."""

    def __init__(self, call: str, number: int, *, hint: str = "") -> None:
        self.call = call
        name = _errno.errorcode.get(number, str(number))
        TorporError.__init__(self, f"{call}: {os.strerror(number)} ({name})", hint=hint)
        self.errno = number
        self.strerror = os.strerror(number)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.call, self.errno))


class ImageError(TorporError):
    """An image cannot be used. ``image`` is the file's name, ``field`` the place in it."""

    def __init__(self, image: str, field: str, why: str, *, hint: str = "") -> None:
        self.image = image
        self.field = field
        place = f"{image}: {field}" if field else image
        super().__init__(f"{place}: {why}", hint=hint)


class Unsupported(TorporError):
    """Something that cannot be dumped or restored, by name."""


class Blockers(Unsupported):
    """Everything that stands in the way of a dump or restore, in one error. ``causes`` is a list."""

    def __init__(self, causes: Sequence[TorporError]) -> None:
        assert causes
        self.causes = list(causes)
        lines = "".join(f"\n  - {cause}" for cause in causes)
        count = "one thing stands" if len(causes) == 1 else f"{len(causes)} things stand"
        super().__init__(f"{count} in the way:{lines}")


class TaskGone(TorporError):
    """The task ended while it was being worked on."""

    status = _errno.ESRCH


class ActionFailed(TorporError):
    """What the caller wanted done at a moment of the operation, ``action``, could not be done."""

    def __init__(self, action: str, why: str, exit_status: int = 1) -> None:
        super().__init__(f"action {action}: {why}")
        self.action = action
        self.exit_status = exit_status


class UsageError(TorporError):
    """The request itself is wrong: an option, a combination, a target."""


class doing:
    """Say what is being done: an error that passes through gets it as context. ``what`` may be a function that says
    it then, for loops.

    An OSError that is not ours is turned into a :class:`KernelError` on the way, so that nothing above sees a bare one.
    """

    __slots__ = ("what",)

    def __init__(self, what: str | Callable[[], str]) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        what = self.what if isinstance(self.what, str) else self.what()
        if isinstance(error, TorporError):
            error.context.insert(0, what)
        elif isinstance(error, OSError) and error.errno is not None:
            path = f"`{os.fsdecode(error.filename)}`" if error.filename is not None else "system call"
            wrapped = KernelError(path, error.errno)
            wrapped.context.insert(0, what)
            raise wrapped from error
