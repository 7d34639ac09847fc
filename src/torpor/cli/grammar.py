"""The grammar of GNU getopt_long, over the options table.

Why not a library: scripts and runtimes rely on details of this grammar that the standard ones do
not have. Any unambiguous beginning of a long option stands for it (``--restore-detach``), short
options are bundled, an optional argument must be attached (``-v4``, ``--cpu-cap=fpu``) while a
required one may follow, options and other words may come in any order, and ``--`` ends the options.
"""

from __future__ import annotations

from ..errors import UsageError
from ..options import OURS_IN_CRIU, TABLE, nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..options import Option

NONE, REQUIRED, OPTIONAL = 0, 1, 2


class Entry:
    """One spelling of an option. ``effect`` is equal for spellings that do exactly the same."""

    __slots__ = ("effect", "name", "negated", "row", "takes")

    def __init__(self, name: str, row: Option, negated: bool = False) -> None:
        self.name, self.row, self.negated = name, row, negated
        self.takes = NONE if not row.arg else OPTIONAL if row.arg[0] == "[" else REQUIRED
        if row.long == "cgroup-root":  # its brackets are around a part of the argument
            self.takes = REQUIRED
        self.effect = (row.attr, negated) if row.kind == "switch" else (row.long, negated)


class Grammar:
    """What may be said: every long spelling in table order, and the short options."""

    __slots__ = ("long", "short")

    def __init__(self, rows: Iterable[Option]) -> None:
        self.long: dict[str, Entry] = {}
        self.short: dict[str, Entry] = {}
        for row in rows:
            if not row.long:
                continue
            entry = self.long[row.long] = Entry(row.long, row)
            if row.short:
                self.short[row.short] = entry
            if row.kind == "switch":
                self.long[f"no-{row.long}"] = Entry(f"no-{row.long}", row, negated=True)

    def find(self, name: str) -> Entry:
        """The long option called ``name``, or the one that begins so and is not ambiguous."""
        exact = self.long.get(name)
        if exact is not None:
            return exact
        found = [entry for long, entry in self.long.items() if long.startswith(name)]
        if not found:
            raise UsageError(f"there is no option --{name}", hint=nearest(name, self.long))
        first = found[0]
        if any(e.takes != first.takes or e.effect != first.effect for e in found[1:]):
            names = ", ".join(f"--{entry.name}" for entry in found)
            raise UsageError(f"--{name} may mean any of {names}")
        return first




def criu_grammar() -> Grammar:
    """The grammar of the ``criu`` command: the whole table, of what is ours only what it cannot do without."""
    return Grammar(row for row in TABLE if not row.ours or row.long in OURS_IN_CRIU)


def scan(
    words: list[str], grammar: Grammar, others: list[str], *, permute: bool = True
) -> Iterator[tuple[Entry, str | None]]:
    """Read a command line from left to right and yield every option with its argument or None.

    What is not an option is appended to ``others``. With ``permute`` off (as getopt behaves when
    POSIXLY_CORRECT is set) the first such word ends the options. Raises UsageError at the first
    thing that makes no sense, after everything before it has been yielded.
    """
    rest = iter(words)
    for word in rest:
        if word == "--":
            others.extend(rest)
        elif word.startswith("--"):
            yield _long(word[2:], rest, grammar)
        elif word.startswith("-") and word != "-":
            yield from _cluster(word[1:], rest, grammar)
        else:
            others.append(word)
            if not permute:
                others.extend(rest)


def _long(text: str, rest: Iterator[str], grammar: Grammar) -> tuple[Entry, str | None]:
    name, equals, attached = text.partition("=")
    entry = grammar.find(name)
    if equals:
        if entry.takes == NONE:
            raise UsageError(f"--{entry.name} takes no argument, and `{attached}` was given")
        return entry, attached
    if entry.takes == REQUIRED:
        return entry, _next(rest, f"--{entry.name}", entry)
    return entry, None


def _cluster(
    letters: str, rest: Iterator[str], grammar: Grammar
) -> Iterator[tuple[Entry, str | None]]:
    while letters:
        letter, letters = letters[0], letters[1:]
        entry = grammar.short.get(letter)
        if entry is None:
            raise UsageError(f"there is no option -{letter}")
        if entry.takes == NONE:
            yield entry, None
        elif letters or entry.takes == OPTIONAL:
            yield entry, letters or None
            return
        else:
            yield entry, _next(rest, f"-{letter}", entry)


def _next(rest: Iterator[str], spelled: str, entry: Entry) -> str:
    for word in rest:
        return word
    raise UsageError(f"{spelled} needs an argument: {entry.row.arg}")
