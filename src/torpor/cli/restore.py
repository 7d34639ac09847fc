"""``torpor restore DIR``."""

from __future__ import annotations

import os

from ..collector import Paused
from ..errors import UsageError
from ..options import Options
from .common import catch_signals, hear_of_children, hold_signals, open_log
from .parse import VerbHelp, parse, settle_paths
from .terminal import Progress, out, out_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HELP = VerbHelp(
    "restore",
    "torpor restore DIR [OPTION...]",
    """\
Wakes the processes whose images are in DIR, with the pids that they had. The command stays in the
foreground as their parent, passes on signals, and ends as the first of them ends; with -d it prints
the pid and returns. If anything cannot be restored, nothing is left behind.
""",
    """\
  torpor restore /snap                   wake it, wait for it, take over its exit status
  torpor restore /snap -d                wake it, print its pid and return
  torpor restore /snap -j                a job of this shell, back in this terminal
""",
)


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    options = Options()
    others = parse(words, HELP, options)
    if others is None:
        return 0
    if len(others) > 1:
        raise UsageError("restore takes one directory: torpor restore DIR")
    if others:
        options.images_dir = others[0]
    options.validate("restore")
    settle_paths(options)
    open_log(options)
    if options.audit:
        from .audit import show

        return show(options, as_json=options.json, strict=options.strict)
    if options.explain:
        return _explain(options)
    catch_signals()
    hear_of_children()
    held: list[int] = []
    options.notify = lambda action: hold_signals(action, held)
    with Progress() as progress:
        options.progress = progress
        progress(f"restoring {options.images_dir}")
        with Paused():
            from ..engine.restore import restore

        result = restore(options.freeze())
    if options.json:
        out_json({"pid": result.pid, **({"written_to": result.written_to} if result.written_to else {})})
    if not options.restore_detached:
        return wait_for(result.pid, result.waits_for, held)
    if not options.json:
        out(f"{result.pid}\n")
    return 0


def _explain(options: Options) -> int:
    from ..engine.restore import explain

    for line in explain(options.freeze()):
        out(f"{line}\n")
    return 0


def wait_for(pid: int, child: int, held: Sequence[int] = ()) -> int:
    """Wait for ``child`` as if it were this process: pass on signals (and those ``held`` until now) to ``pid``, return
    the exit status.

    The child is ``pid`` itself or the init of its pid namespace, which ends with it.

    A child that died of a signal gives 128 plus its number, as in a shell.
    """
    import signal

    try:
        with_us = os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        with_us = False  # it has ended, and its init has taken its status
    # What the terminal sends to us it has sent to the child as well, if they are in one process group.
    ours = {signal.SIGINT, signal.SIGQUIT} if with_us else set()
    heard = {
        signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD
    }  # fmt: skip
    # Blocked and waited for: a handler would not be run if one came just before we waited.
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    coming = list(held)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        number = coming.pop(0) if coming else signal.sigwait(heard)
        if number not in (signal.SIGCHLD, *ours):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
