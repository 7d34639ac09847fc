"""What a Python program may use that is going to be snapshotted, woken and cloned.

::

    from torpor import guest

    @guest.before_snapshot
    def close_pool(): ...          # may raise: then there is no snapshot, and the program goes on

    @guest.after_restore
    def open_pool(): ...           # in every woken copy, before anything else of the program runs

    load_everything()
    guest.snapshot_point()         # waits here; every copy goes on from here
    serve(guest.argument())

A woken copy has, before its callbacks run, new random state: :func:`reseed` says where. What cannot be renewed, and how
other languages take part, is in docs/guest-protocol.md.

All of it happens in the main thread, in the handler of a signal. Until the first function of this module is called
nothing has been installed.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    from ._lifecycle import Lifecycle

    Callback = TypeVar("Callback", bound=Callable[[], object])

__all__ = [
    "ABANDONED", "RESTORED", "RESUMED", "after_restore", "after_snapshot", "apply_environ", "argument",
    "before_snapshot", "enable", "enabled", "generation", "keep", "outcome", "reseed", "snapshot_point",
]  # fmt: skip

#: How a snapshot came out for this process: it is a woken copy; the original, with a snapshot taken; or none was taken.
RESTORED, RESUMED, ABANDONED = "restored", "resumed", "abandoned"

_living: list[Lifecycle] = []


def enable(*, signal: int | None = None, after_limit: float = 60.0) -> None:
    """Take part in snapshots from now on. Called by everything else here; again, it does nothing.

    ``signal`` is the signal that Torpor sends (default: ``SIGRTMIN + 10``), which has to be free. ``after_limit``: how
    many seconds all ``after_restore`` callbacks together may take; a copy in which they take longer is ended. Raises
    RuntimeError outside of the main thread, where Python allows no handlers.
    """
    if not _living:
        from ._lifecycle import Lifecycle

        _living.append(Lifecycle(signal, after_limit))


def enabled() -> bool:
    """Does this program take part already?"""
    return bool(_living)


def _life() -> Lifecycle:
    enable()
    return _living[0]


def before_snapshot(callback: Callback) -> Callback:
    """Decorator: call this before a snapshot, the last one registered first, as things are taken down.

    If it raises, the dump is refused with its words, those that have not run yet are not run, and the program goes on
    by way of its ``after_snapshot`` callbacks. How long all may take is the dump's ``--guest-timeout``; that a dump has
    given up is noticed when the callback under way returns.
    """
    _life().before.append(callback)
    return callback


def after_restore(callback: Callback) -> Callback:
    """Decorator: call this in every woken copy, in the order of registration, after :func:`reseed`.

    If one raises, the others are still run; then the copy is ended (status 70) with the traces on stderr, since half
    woken it might do anything. The same goes for their time limit, see :func:`enable`.
    """
    _life().after.append(callback)
    return callback


def after_snapshot(callback: Callback) -> Callback:
    """Decorator: call this in the *original* when it goes on, in the order of registration; see :func:`outcome`.

    Also when no snapshot came of it, so a callback may run without its ``before_snapshot`` having run. What it raises
    is printed, and the program goes on.
    """
    _life().resumed.append(callback)
    return callback


def snapshot_point(timeout: float | None = None) -> str:
    """Wait for a snapshot; returns in every woken copy (:data:`RESTORED`) and in the original (:data:`RESUMED`), after
    all callbacks have run. A dump that fails is waited through.

    ``timeout`` is in seconds; TimeoutError after it. May be called in any thread, if the main thread can run handlers
    meanwhile.
    """
    return _life().wait(timeout)


def outcome() -> str:
    """How the last snapshot came out for this process: one of the three constants, or "" if there was none."""
    return _living[0].outcome if _living else ""


def argument() -> bytes:
    """What was handed over to this copy (``torpor restore --argument``), b"" if nothing was."""
    return _life().page.argument()


def apply_environ(document: bytes | None = None) -> dict[str, str | None]:
    """Take over an environment that was handed over as JSON: ``{"environ": {"NAME": "value", "OTHER": null}}``.

    Sets these variables in ``os.environ``, removes those that are null, and returns them. ``document`` defaults to
    :func:`argument`. Without an object "environ" in it nothing is done; ValueError for what is not of this form.
    Nothing calls this by itself.
    """
    import json
    import os

    text = argument() if document is None else document
    try:
        parsed = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise ValueError(f"the argument is no JSON: {error}") from None
    wanted: Any = parsed.get("environ", {}) if isinstance(parsed, dict) else {}
    if not isinstance(wanted, dict) or not all(value is None or isinstance(value, str) for value in wanted.values()):
        raise ValueError("`environ` is not an object of strings and nulls")
    for name, value in wanted.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return wanted


def reseed() -> Mapping[str, int]:
    """Give all random state that is known here new values from the kernel; name → how many states were renewed.

    ``random`` (the module's and every live ``random.Random``), NumPy (the legacy state and every generator), OpenSSL
    behind ``ssl``, ``uuid.uuid1``, ``tempfile`` names, ``multiprocessing``; modules that are not loaded are left alone.
    Runs by itself in every woken copy, before its callbacks.
    """
    from . import _reseed

    return _reseed.reseed()


def keep(generator: object) -> None:
    """Leave this generator as it is in woken copies: it was seeded so that they all do the same."""
    from . import _reseed

    _reseed.kept.append(generator)


class _Generation:
    """Which wake-up this process is of."""

    @property
    def counter(self) -> int:
        """32 bits, other than before in every woken copy, one more than in what it was woken from."""
        return _life().page.generation()

    @property
    def id(self) -> bytes:
        """16 bytes, the same in all processes of one wake-up, and in no other wake-up."""
        return _life().page.id()

    def fileno(self) -> int:
        """A descriptor that is readable (poll, ``loop.add_reader``) from a wake-up until :meth:`clear`."""
        return _life().page.event_fd

    def clear(self) -> bool:
        """Make :meth:`fileno` unreadable again; was it readable?"""
        return _life().page.clear()

    def changed(self) -> bool:
        """Is the counter another one than when this was last asked (the first time: than at :func:`enable`)?"""
        page = _life().page
        before, page.asked = page.asked, page.generation()
        return page.asked != before

    def __repr__(self) -> str:
        return f"<generation {self.counter} {self.id.hex()}>"


generation = _Generation()
