"""What answers Torpor: a signal handler in the main thread, in which callbacks run and a dump is waited for."""

from __future__ import annotations

import os
import signal
import sys
import threading

from ..model import guest_page as layout
from . import ABANDONED, RESTORED, RESUMED, _reseed
from ._page import LivePage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

DEFAULT_SIGNAL = signal.SIGRTMIN + 10
LOOK_S = 0.1  # how often a program that waits for a dump looks whether there is still one
STATUS_FAILED = 70  # EX_SOFTWARE of sysexits.h
OUTCOMES = {layout.RESTORED: RESTORED, layout.RESUMED: RESUMED, layout.ABANDONED: ABANDONED}


class Lifecycle:
    """What this process does about snapshots."""

    def __init__(self, number: int | None, after_limit: float) -> None:
        self.number = DEFAULT_SIGNAL if number is None else int(number)
        self.after_limit = after_limit
        self.before: list[Callable[[], object]] = []
        self.after: list[Callable[[], object]] = []
        self.resumed: list[Callable[[], object]] = []
        self.outcome = ""
        self.rounds = 0  # snapshots that were taken, seen from either side
        self.condition = threading.Condition()
        self.busy = False
        #: What was found before the snapshot of all that has to be renewed after it
        self.generators: list[Any] | None = None
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("torpor.guest has to be enabled in the main thread, the only one that may set handlers")
        if signal.getsignal(self.number) is not signal.SIG_DFL:
            raise RuntimeError(f"signal {self.number} is in use; choose another: torpor.guest.enable(signal=…)")
        signal.signal(self.number, self._on_signal)  # before the page says so: unhandled, it would end us
        self.page = LivePage(self.number)
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """A child has a page of its own; what it has inherited stays its parent's."""
        old = self.page
        self.page = LivePage(self.number, old.generation(), old.id(), old.argument())
        old.close()
        self.condition = threading.Condition()
        self.busy = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Do what the state word says, until there is nothing more to be done."""
        if self.busy:
            return
        self.busy = True
        try:
            while (state := self.page.state) in (layout.PREPARE, *OUTCOMES):
                if state == layout.PREPARE:
                    self._prepare()
                else:
                    self.page.state = layout.IDLE
                    self._over(OUTCOMES[state])
        finally:
            self.busy = False

    def _prepare(self) -> None:
        # Blocked, so that it can be waited for: the one that tells how it came out must not be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {self.number})
        try:
            for callback in reversed(self.before):
                self.page.say(f"in @before_snapshot callback {_name(callback)}")
                try:
                    callback()
                except BaseException as error:
                    self.page.say(f"@before_snapshot callback {_name(callback)}: {type(error).__name__}: {error}")
                    self.page.state = layout.REFUSED
                    self._over(ABANDONED)
                    if not isinstance(error, Exception):
                        raise  # Ctrl-C and the like mean the program
                    return
            if self.page.state == layout.PREPARE:
                self.page.say("")
                self.generators = _reseed.live_generators()
                self.page.state = layout.READY
            while self.page.state == layout.READY:
                signal.sigtimedwait({self.number}, LOOK_S)
                if self.page.state == layout.READY and self.page.deserted():
                    self.page.state = layout.ABANDONED
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _over(self, outcome: str) -> None:
        self.outcome = outcome
        if outcome == RESTORED:
            self._restored()
        self.generators = None
        if outcome != RESTORED:
            for callback, raised in _errors(self.resumed):
                _complain(f"@after_snapshot callback {_name(callback)}", raised)
        if outcome != ABANDONED:
            with self.condition:
                self.rounds += 1
                self.condition.notify_all()

    def _restored(self) -> None:
        done = threading.Event()
        if self.after:
            threading.Thread(target=self._watch, args=(done,), name="torpor-after-restore", daemon=True).start()
        failed = False
        try:
            _reseed.reseed(self.generators)
        except Exception as error:  # with old random state it must not go on
            _complain("renewing random state", error)
            failed = True
        for callback, raised in _errors(self.after):
            _complain(f"@after_restore callback {_name(callback)}", raised)
            failed = True
        done.set()
        if failed:
            _end()

    def _watch(self, done: threading.Event) -> None:
        if not done.wait(self.after_limit):
            sys.stderr.write(f"torpor.guest: @after_restore callbacks took more than {self.after_limit} s\n")
            _end()

    def wait(self, timeout: float | None) -> str:
        """See torpor.guest.snapshot_point()."""
        with self.condition:
            seen = self.rounds
            self.page.put(layout.AT_POINT, 1)
            try:
                if not self.condition.wait_for(lambda: self.rounds != seen, timeout):
                    raise TimeoutError(f"no snapshot was taken within {timeout} s")
            finally:
                self.page.put(layout.AT_POINT, 0)
            return self.outcome


def _name(callback: object) -> str:
    return str(getattr(callback, "__qualname__", None) or repr(callback))


def _errors(callbacks: list[Callable[[], object]]) -> list[tuple[Callable[[], object], Exception]]:
    """Call all of them; those that raised, with what they raised."""
    found = []
    for callback in list(callbacks):
        try:
            callback()
        except Exception as error:
            found.append((callback, error))
    return found


def _complain(what: str, error: Exception) -> None:
    import traceback

    trace = "".join(traceback.format_exception(error))
    sys.stderr.write(f"torpor.guest: {what} failed in process {os.getpid()}:\n{trace}")


def _end() -> None:
    """End this copy at once: nothing of the program is to run in it, not even what it does at its exit."""
    sys.stderr.write(f"torpor.guest: process {os.getpid()}, a woken copy, is ended\n")
    sys.stderr.flush()
    os._exit(STATUS_FAILED)
