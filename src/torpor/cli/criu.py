"""The ``criu`` command: CRIU 4.2's grammar, order of events and exit statuses.

What happens, in this order: the command line is read; ``--help`` and ``--version`` answer at once;
configuration files, then the command line, are applied; the verb is found; the process changes to
the work directory and opens the log there; the options are checked; the engine does the work.
"""

from __future__ import annotations

import os

from .. import log
from ..collector import Paused
from ..errors import UsageError
from ..options import FEATURES, VERBS_NOT_YET, Options, nearest
from .common import (
    CRIU_VERSION,
    catch_signals,
    default_signals,
    guarded,
    hold_signals,
    open_log,
    say_error,
    words_of,
)
from .config import read_defaults
from .grammar import criu_grammar, scan
from .terminal import err, keep_standard_descriptors, out
from .values import apply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .grammar import Entry

VERBS = (
    "dump", "pre-dump", "restore", "lazy-pages", "check", "page-server", "service", "swrk", "dedup",
    "cpuinfo dump", "cpuinfo check", "exec", "show",
)  # fmt: skip

# Verbs that CRIU itself has given up, and what to use instead. It exits with 255 for them.
REMOVED = {
    "exec": "exec no longer exists: the compel library runs code in another task",
    "show": "show no longer exists: `crit decode -i FILE --pretty` prints an image",
}

CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE = 1 << 21, 1 << 40


def main(argv: list[str] | None = None) -> int:
    """Run the ``criu`` command with these words (default: the process's own); its exit status."""
    keep_standard_descriptors()
    return guarded("criu", lambda: _main(words_of(argv)))


class CommandLine:
    """A command line, taken apart: options in order, other words, and what was wrong if
    anything."""

    __slots__ = ("error", "options", "others")

    def __init__(self, words: list[str]) -> None:
        self.options: list[tuple[Entry, str | None]] = []
        self.others: list[str] = []
        self.error: UsageError | None = None
        permute = "POSIXLY_CORRECT" not in os.environ
        try:
            for pair in scan(words, criu_grammar(), self.others, permute=permute):
                self.options.append(pair)
        except UsageError as error:
            self.error = error

    def last(self, name: str) -> str | None:
        """The argument of the last ``--name`` ("" if it has none), or None if it was not given."""
        for entry, text in reversed(self.options):
            if entry.row.long == name:
                return text or ""
        return None

    def has(self, name: str) -> bool:
        """Was the option given?"""
        return self.last(name) is not None


def _main(words: list[str]) -> int:
    if not words:
        from .help import criu_usage

        out(f"{criu_usage()}\nTry `criu --help`.\n")
        return 1
    line = CommandLine(words)
    before_command = words[: words.index("--")] if "--" in words else words
    if line.has("help") or "-h" in before_command or "--help" in before_command:
        from .help import criu_help

        out(criu_help(CRIU_VERSION))
        return 0
    if line.has("version"):
        out(f"Version: {CRIU_VERSION}\n")
        return 0
    if line.error:
        raise line.error
    options, notes = read_options(line)
    verb, rest = _verb(line.others)
    if verb in REMOVED:
        err(f"Error: {REMOVED[verb]}\n")
        return 255
    if verb in VERBS_NOT_YET:
        raise NotImplementedYet(verb)
    _check_capabilities(options)
    _take_command(options, verb, rest, line.has("exec-cmd"))
    _settle_paths(options)
    open_log(options)
    for note in notes:
        log.warning(note)
    _warn(options, verb, line)
    options.validate(verb)
    catch_signals()
    return {"dump": _dump, "restore": _restore, "check": _check}[verb](options.freeze())


class NotImplementedYet(UsageError):
    """A verb that the grammar knows and the engine does not."""

    def __init__(self, verb: str) -> None:
        super().__init__(f"{verb} is not implemented yet")


def read_options(line: CommandLine) -> tuple[Options, list[str]]:
    """The options of configuration files and the command line, and notes for the log."""
    # CRIU knows of no guests; whoever wants them told says so.
    options = Options(guest=False)
    notes = read_defaults(
        options,
        criu_grammar(),
        config_file=line.last("config") or "",
        no_default_config=line.has("no-default-config"),
    )
    for entry, text in line.options:
        apply(options, entry.row, text, entry.negated)
    if "CRIU_DEPRECATED" in os.environ:
        options.deprecated = True
    return options, notes


def _verb(others: list[str]) -> tuple[str, list[str]]:
    """The verb and the words after it."""
    if not others:
        raise UsageError("what is to be done? No command was given")
    verb, rest = others[0], others[1:]
    if verb == "cpuinfo":
        verb, rest = f"cpuinfo {rest[0] if rest else ''}", rest[1:]
        if verb not in VERBS:
            raise UsageError("cpuinfo needs one more word: dump or check")
    if verb not in VERBS:
        raise UsageError(f"there is no command `{verb}`", hint=nearest(verb, VERBS))
    return verb, rest


def _take_command(options: Options, verb: str, rest: list[str], wanted: bool) -> None:
    """Words after the verb are the command of --exec-cmd and nothing else."""
    if not wanted:
        if rest:
            raise UsageError(f"{verb} takes no other words, and `{' '.join(rest)}` was given")
        return
    if not rest:
        raise UsageError("--exec-cmd needs a command: criu restore ... --exec-cmd -- COMMAND")
    if verb != "restore":
        raise UsageError("--exec-cmd is for restore only")
    if options.restore_detached:
        raise UsageError("--exec-cmd and --restore-detached contradict each other")
    options.exec_cmd = tuple(rest)


def _check_capabilities(options: Options) -> None:
    """CRIU refuses to begin without the right to; so it is known before anything is stopped."""
    with open("/proc/self/status", "rb") as file:
        line = next(line for line in file if line.startswith(b"CapEff:"))
    if not int(line.split()[1], 16) & (CAP_SYS_ADMIN | CAP_CHECKPOINT_RESTORE):
        raise UsageError(
            "the capability CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is missing",
            hint="run as root, or give the Python interpreter file capabilities",
        )
    if os.geteuid() != 0 and not options.unprivileged:
        raise UsageError("to run without root, say --unprivileged and accept its limits")


def _settle_paths(options: Options) -> None:
    """Make paths absolute and change to the work directory, against which the later ones count."""
    images_dir = os.path.abspath(options.images_dir)
    work_dir = os.path.abspath(options.work_dir) if options.work_dir else images_dir
    os.close(os.open(images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    os.chdir(work_dir)
    options.images_dir, options.work_dir = images_dir, work_dir
    if options.log_file not in ("", "-"):
        options.log_file = os.path.abspath(options.log_file)
    if options.pidfile:
        options.pidfile = os.path.abspath(options.pidfile)


def _warn(options: Options, verb: str, line: CommandLine) -> None:
    if verb != "restore":
        return
    if line.has("network-lock"):
        log.warning("--network-lock does nothing in restore: the method of the dump is used")
    if options.pid:
        log.warning("--tree does nothing in restore: the images say which processes there are")
    if options.restore_detached and options.leave_stopped and options.shell_job:
        log.warning("a shell job that is left stopped and detached will be hung up by the kernel")


# --- the verbs ----------------------------------------------------------------------------------


def _dump(options: Options) -> int:
    with Paused():
        from ..engine.dump import dump

    dump(options.pid, options)
    if options.display_stats:
        out(dump_statistics(options.images_dir))
    return 0


def dump_statistics(images_dir: str) -> str:
    """What ``--display-stats`` prints after a dump, in CRIU's lines."""
    from ..images.store import ImageReader

    fd = os.open(images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        stats = ImageReader(fd).read_one("stats-dump").dump
    finally:
        os.close(fd)
    times = (
        ("Freezing time", stats.freezing_time),
        ("Frozen time", stats.frozen_time),
        ("Memory dump time", stats.memdump_time),
        ("Memory write time", stats.memwrite_time),
    )
    pages = (
        ("Memory pages scanned", stats.pages_scanned),
        ("Memory pages skipped from parent", stats.pages_skipped_parent),
        ("Memory pages written", stats.pages_written),
        ("Lazy memory pages", stats.pages_lazy),
    )
    lines = ["Displaying dump stats:"]
    lines += [f"{name}: {amount} us" for name, amount in times]
    lines += [f"{name}: {count} (0x{count:x})" for name, count in pages]
    return "".join(f"{line}\n" for line in lines)


def _restore(options: Options) -> int:
    with Paused():
        from ..engine.restore import restore

    held: list[int] = []
    result = restore(options.replace(notify=lambda action: hold_signals(action, held)).freeze())
    if options.display_stats:
        out(f"Displaying restore stats:\nRestore time: {result.total_s * 1e6:.0f} us\n")
    if options.restore_detached:
        return 0
    default_signals()
    for number in held:
        os.kill(os.getpid(), number)
    if not options.exec_cmd:
        return _wait_for_children()
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it; its successor should not
    try:
        os.execvp(options.exec_cmd[0], options.exec_cmd)
    except OSError as error:
        say_error(f"restore: the tree runs, but not `{options.exec_cmd[0]}`: {error.strerror}")
        return 1


def _wait_for_children() -> int:
    """Until all are gone. CRIU's status is 0 however they ended, and callers know that."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return 0


def _check(options: Options) -> int:
    if options.feature == "list":
        out("".join(f"{name}\n" for name in FEATURES))
        return 0
    from ..engine import check

    if options.feature:
        if check.feature(options.feature):
            out(f"{options.feature} is supported\n")
            return 0
        say_error(f"check: this kernel does not have the feature {options.feature}")
        return 1
    missing = [finding for finding in check.check_kernel(options) if not finding.ok]
    if not options.extra:
        missing = [finding for finding in missing if finding.required]
    for finding in missing:
        log.warning(f"check: {finding.name}: {finding.text}")
    if not missing:
        out("Looks good.\n")
        return 0
    names = ", ".join(finding.name for finding in missing)
    if any(finding.required for finding in missing):
        say_error(f"check: does not look good: {names}")
    else:
        out(f"Looks good but something that some programs need is missing: {names}\n")
    return 1
