"""How the verbs of the ``torpor`` command read their words: the same table, fewer options.

There are no configuration files here and no older spellings, and what ``criu`` says with an option
that everybody needs (``--tree``) is said with a plain word.
"""

from __future__ import annotations

import os

from ..errors import UsageError
from ..options import OPTIONS_NOT_YET, TABLE, Options
from .grammar import Grammar, scan
from .help import option_line, option_list
from .terminal import out
from .values import apply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..options import Option

# Spellings that exist for the sake of CRIU's users alone.
CRIU_ONLY = frozenset((
    "all", "close", "config", "daemon", "deprecated", "exec-cmd", "experimental", "ext-mount-map",
    "extra", "feature", "log-pid", "ms", "no-default-config", "restore-sibling", "status-fd",
    "tree", "unprivileged", "veth-pair", "version",
))  # fmt: skip


class VerbHelp:
    """What ``torpor VERB --help`` says around the list of options."""

    __slots__ = ("also", "examples", "text", "usage", "verb")

    def __init__(self, verb: str, usage: str, text: str, examples: str, also: str = "") -> None:
        self.verb, self.usage, self.text, self.examples, self.also = (
            verb, usage, text, examples, also,
        )  # fmt: skip

    def wants(self, row: Option) -> bool:
        """Does the verb take this option?"""
        if not row.long or row.long in CRIU_ONLY:
            return False
        return row.used_by(self.verb) or (bool(self.also) and row.used_by(self.also))

    def render(self) -> str:
        """The whole text."""
        options = option_list(self.shows)
        return f"Usage: {self.usage}\n\n{self.text}\n{options}\nExamples:\n{self.examples}"

    def shows(self, row: Option) -> bool:
        """Is the option worth a line? Not if it would only be refused; `criu --help` has those."""
        for_a_server = row.group == "Servers" and "page_server" in OPTIONS_NOT_YET
        refused = row.attr in OPTIONS_NOT_YET or f"{self.verb} {row.attr}" in OPTIONS_NOT_YET
        return self.wants(row) and not refused and not for_a_server


def parse(words: list[str], help: VerbHelp, options: Options) -> list[str] | None:
    """Apply the options among ``words`` and return the other words; None once help was printed."""
    grammar = Grammar(row for row in TABLE if help.wants(row))
    others: list[str] = []
    for entry, text in scan(words, grammar, others):
        if entry.row.long == "help":
            out(help.render())
            return None
        apply(options, entry.row, text, entry.negated)
    return others


def local_options(
    words: list[str], rows: tuple[Option, ...], usage: str, text: str, examples: str
) -> tuple[dict[str, str], list[str]] | None:
    """The same for a verb with a few options of its own: option → argument, and the other words."""
    said: dict[str, str] = {}
    others: list[str] = []
    for entry, argument in scan(words, Grammar(rows), others):
        said[entry.name] = argument or ""
    if "help" not in said:
        return said, others
    lines = "".join(option_line(row) for row in rows)
    out(f"Usage: {usage}\n\n{text}\n{lines}\nExamples:\n{examples}")
    return None


def pid_of(word: str) -> int:
    """The process that a word on the command line means."""
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise UsageError(f"`{word}` is not a process id")
    return int(word)


def settle_paths(options: Options, default_log: str = "") -> None:
    """Make every path absolute; the log of ``default_log`` is in the work directory."""
    options.images_dir = os.path.abspath(options.images_dir)
    options.work_dir = os.path.abspath(options.work_dir) if options.work_dir else options.images_dir
    if options.log_file not in ("", "-"):
        options.log_file = os.path.abspath(options.log_file)
    elif default_log and not options.log_file:
        options.log_file = os.path.join(options.work_dir, default_log)
    if options.pidfile:
        options.pidfile = os.path.abspath(options.pidfile)
    options.overlay = tuple(os.path.abspath(one) for one in options.overlay)
    if options.overlay_upper:
        options.overlay_upper = os.path.abspath(options.overlay_upper)
    options.action_script = tuple(os.path.abspath(one) if "/" in one else one for one in options.action_script)
    options.unprivileged = os.geteuid() != 0
