"""A journal of reversals: whatever changes the live system says first how to take it back."""

from __future__ import annotations

from . import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Undo:
    """Steps to take back, last in, first out, unless :meth:`commit` was reached.

    A step that fails becomes a note on the error under way (or is logged); it never replaces it and never stops the
    steps after it.
    """

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, step: Callable[[], object]) -> None:
        """Register ``step`` (called without arguments); ``what`` names it in the log."""
        self._steps.append((what, step))

    def commit(self) -> None:
        """The change stands: forget all steps."""
        self._steps.clear()

    def roll_back(self, error: BaseException | None = None) -> None:
        """Run all steps, newest first."""
        while self._steps:
            what, step = self._steps.pop()
            try:
                step()
                log.debug(f"(undo: {what})")
            except Exception as failure:  # a step may fail in any way; the others must still run
                note = f"undo: {what}: {failure}"
                if error is not None:
                    error.add_note(note)
                log.warning(note)

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.roll_back(error)
