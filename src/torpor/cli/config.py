"""Configuration files in CRIU's format: one long option a line, without the dashes.

::

    tcp-established                  # a comment
    work-dir "/tmp/my \\"work\\" dir"
    ghost-limit 16M

The order in which the sources are read, each overriding the ones before it:
``/etc/criu/default.conf``, ``$HOME/.criu/default.conf``, the file named by ``$CRIU_CONFIG_FILE``,
the file of ``--config`` (which takes the place of the first two), the command line or the RPC
request, and the file that an RPC request names. A file that does not exist is passed over, as CRIU
does; the caller learns of it.

Where we differ from CRIU, it is to do what the line says: ``verbosity 4`` sets the level (CRIU
raises it by one, because an optional argument must be attached), a ``#`` within quotes is part of
the value (CRIU cuts there), and tabs separate as spaces do.
"""

from __future__ import annotations

import os

from ..errors import UsageError, doing
from .grammar import NONE, REQUIRED, Entry, Grammar
from .values import apply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..options import Options

GLOBAL_FILE = "/etc/criu/default.conf"
USER_FILE = ".criu/default.conf"


def read_line(line: str) -> tuple[str, str | None] | None:
    """One line as (option, argument or None), or None if it says nothing. Raises UsageError."""
    line = line.strip()
    if not line or line[0] == "#":
        return None
    name = line.split(None, 1)[0]
    rest = line[len(name) :].lstrip()
    if not rest or rest[0] == "#":
        return name, None
    value, rest = _quoted(rest) if rest[0] == '"' else _bare(rest)
    if rest and rest[0] != "#":
        raise UsageError(f"`{rest}` is one word too many; a value with spaces belongs in quotes")
    return name, value


def _quoted(text: str) -> tuple[str, str]:
    # Only \" is an escape; any other backslash is itself.
    end = 1
    while True:
        end = text.find('"', end)
        if end < 0:
            raise UsageError(f"`{text}`: the closing quote is missing")
        if end == 1 or text[end - 1] != "\\":
            return text[1:end].replace('\\"', '"'), text[end + 1 :].lstrip()
        end += 1


def _bare(text: str) -> tuple[str, str]:
    word = text.split(None, 1)[0]
    rest = text[len(word) :].lstrip()
    value, hash_sign, _ = word.partition("#")
    return value.replace('\\"', '"'), "#" if hash_sign else rest


def read(text: str, grammar: Grammar, options: Options, notes: list[str]) -> None:
    """Apply every line of a file's text; what is odd goes to ``notes``. Raises UsageError."""
    for number, line in enumerate(text.split("\n"), 1):
        with doing(f"line {number}"):
            said = read_line(line)
            if said is None:
                continue
            name, equals, attached = said[0].partition("=")
            _apply(grammar.find(name), attached if equals else said[1], options, notes)


def _apply(entry: Entry, value: str | None, options: Options, notes: list[str]) -> None:
    if not entry.row.attr and entry.row.long not in ("all", "close"):
        raise UsageError(f"`{entry.name}` has no place in a configuration file")
    if entry.takes == REQUIRED and value is None:
        raise UsageError(f"`{entry.name}` needs an argument: {entry.row.arg}")
    if entry.takes == NONE and value is not None:
        # CRIU ignores the word, so files with it exist; `no-...` is how to switch something off.
        notes.append(f"config: `{entry.name}` takes no argument, `{value}` is ignored")
    apply(options, entry.row, value if entry.takes != NONE else None, entry.negated)


def read_file(path: str, grammar: Grammar, options: Options, notes: list[str]) -> bool:
    """Apply a file; False if there is none or it cannot be opened. Raises UsageError."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except OSError:
        return False
    with doing(path):
        read(text, grammar, options, notes)
    return True


def read_defaults(
    options: Options, grammar: Grammar, *, config_file: str = "", no_default_config: bool = False
) -> list[str]:
    """Apply every configuration file that comes before the command line or the RPC request.

    ``config_file`` is what ``--config`` named; with it, or with ``no_default_config``, the global
    and the user's file are not read. Returns what the log should be told once it is open.
    """
    notes: list[str] = []
    if not (config_file or no_default_config):
        read_file(GLOBAL_FILE, grammar, options, notes)
        home = os.environ.get("HOME")
        if home:
            read_file(os.path.join(home, USER_FILE), grammar, options, notes)
    for path in (os.environ.get("CRIU_CONFIG_FILE", ""), config_file):
        if path and not read_file(path, grammar, options, notes):
            notes.append(f"config: `{path}` cannot be read, going on without it")
    return notes
