"""What the ``torpor`` and the ``criu`` command share: the log, signals, and one way to fail.

Exit statuses: 0 done, 1 refused or failed (with the reason as one line on stderr and in the log),
or death by the signal that interrupted it.
"""

from __future__ import annotations

import os
import sys

from .. import log
from ..errors import TorporError, UsageError
from .terminal import err

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.hooks import Action
    from ..options import Options

VERSION = "0.1.0"
CRIU_VERSION = "4.2"  # what we are a drop-in for; tools compare it


class Interrupted(KeyboardInterrupt):
    """A signal asked us to end. Raised so that everything that was begun is taken back."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Screen:
    """What the failing end has to know: where the log goes and whether to keep silent."""

    log_fd = -1
    log_name = ""
    silent = False


def open_log(options: Options) -> None:
    """Send the log to where ``options`` say, an absolute path by now. Raises OSError."""
    fd = 2
    if options.log_file == "-":
        fd = 1
    elif options.log_file:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(options.log_file, flags, 0o600)
    log.open_log(fd, options.log_level)
    _Screen.log_fd = fd
    _Screen.log_name = options.log_file
    _Screen.silent = options.log_level < log.ERROR
    kernel = os.uname()
    log.info(f"Version: {CRIU_VERSION} (torpor {VERSION})")
    log.info(f"Running on {kernel.nodename} {kernel.sysname} {kernel.release} {kernel.machine}")


def guarded(command: str, body: Callable[[], int]) -> int:
    """Run ``body`` and turn whatever goes wrong into a message and an exit status."""
    try:
        return body()
    except UsageError as error:
        _report(error)
        if not _Screen.silent:
            err(f"Try `{command} --help`.\n")
        return 1
    except TorporError as error:
        _report(error)
        return error.exit_status
    except KeyboardInterrupt as error:
        say_error(f"{command}: interrupted")
        _die_of(error.number if isinstance(error, Interrupted) else 2)
        return 1
    except OSError as error:
        where = f"`{os.fsdecode(error.filename)}`: " if error.filename is not None else ""
        say_error(f"{command}: {where}{error.strerror or error}")
        return 1
    except Exception as error:
        return _crashed(command, error)


def say_error(text: str) -> None:
    """One line to the log, and to stderr unless the log is there."""
    log.error(text)
    if _Screen.log_fd != 2 and not _Screen.silent:
        err(f"Error: {text}\n")


def _report(error: TorporError) -> None:
    log.error(str(error))
    for note in getattr(error, "__notes__", ()):
        log.warning(str(note))
    if _Screen.log_fd == 2 or _Screen.silent:
        return
    err(shown(error))


def shown(error: TorporError) -> str:
    """An error as people are told of it: a line, and those of its hint and its notes below."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    below = ([f"hint: {error.hint}"] if error.hint else []) + notes
    return f"Error: {': '.join([*error.context, error.what])}\n" + "".join(f"  {line}\n" for line in below)


def _crashed(command: str, error: Exception) -> int:
    """An exception that nobody meant to raise: a bug of ours."""
    try:
        import traceback

        trace = traceback.format_exc()
    except ImportError:  # our files are out of reach, as in a container's namespaces
        trace = f"{error!r}\n"
    if os.environ.get("TORPOR_DEBUG"):
        err(trace)
        return 1
    name = _Screen.log_name
    if _Screen.log_fd > 2:
        log.error(f"internal error\n{trace}")
    else:
        name = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"torpor-crash-{os.getpid()}.log")
        try:
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError:
            err(trace)
            return 1
        os.write(fd, trace.encode(errors="replace"))
        os.close(fd)
    say_error(f"{command}: internal error, please report it with the trace in {name}")
    return 1


def catch_signals() -> None:
    """From now on SIGTERM and SIGHUP raise :class:`Interrupted`, as Ctrl-C raises its parent."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        # A second one must not cut the taking back short.
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def hear_of_children() -> None:
    """From now on the end of a child leaves a status, also when we were started with SIGCHLD ignored."""
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def hold_signals(action: Action, held: list[int]) -> None:
    """To be told of a restore's actions: when the tasks are about to run, and nothing can be taken back any more,
    signals no longer interrupt it. Those that come are noted in ``held``, for who waits for the tree.
    """
    if action.name != "pre-resume":
        return
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: held.append(number))


def default_signals() -> None:
    """From now on signals do what they do to any program: nothing is left to be taken back."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _die_of(number: int) -> None:
    import signal

    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def words_of(argv: list[str] | None) -> list[str]:
    """The words after the command's name."""
    return sys.argv[1:] if argv is None else list(argv)
