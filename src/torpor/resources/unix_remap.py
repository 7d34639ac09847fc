"""--remap-address OLD=NEW for unix sockets: those of the tree that come up under another name than they had.

OLD and NEW are both absolute paths, or both abstract names, written with @ in front. OLD is a path as the socket was
bound to, or where its file is now. Of all rules that match, the first counts. Sockets outside of the tree, to which one
of the tree is connected, keep their names.
"""

from __future__ import annotations

import os

from .. import log
from ..errors import UsageError
from ..images import schema as pb
from ..linux.sockets import SUN_PATH_MAX
from . import inet_remap
from .unix_names import RENAMED, address, is_path, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from .base import BuildContext

EXTERN = 1  # in unix_sk_entry.uflags


class Rule:
    """One OLD=NEW."""

    __slots__ = ("new", "old", "text")

    def __init__(self, rule: str) -> None:
        """Read it. Raises UsageError that says what is wrong with it."""
        self.text = rule
        old, equals, new = rule.partition("=")
        try:
            if not equals:
                raise ValueError("it is not of the form OLD=NEW")
            if old[:1] != new[:1]:
                raise ValueError("a path becomes a path, an abstract name (@NAME) an abstract name")
            self.old, self.new = _name(old), _name(new)
        except ValueError as error:
            raise UsageError(f"--remap-address {rule}: {error}") from None

    def matches(self, entry: Message) -> bool:
        """Does it concern the socket of this unix_sk_entry?"""
        name = address(entry.name)
        if not is_path(name):
            return name == self.old
        bound = os.path.normpath(os.path.join(pb.get_bytes(entry.name_dir) or b"/", name))
        return self.old in (bound, pb.get_bytes(entry.path))


def _name(word: str) -> bytes:
    name = os.fsencode(word)
    if len(name) > SUN_PATH_MAX - 1 or len(name) < 2:
        raise ValueError(f"`{word}` has {len(name)} bytes; from 2 to {SUN_PATH_MAX - 1} make a name")
    return b"\0" + name[1:] if name.startswith(b"@") else os.path.normpath(name)


def is_unix(rule: str) -> bool:
    """Is it a rule for unix sockets?"""
    return rule[:1] in ("/", "@")


def check(rule: str) -> str:
    """The rule, of whatever kind. Raises UsageError for one that makes no sense."""
    return Rule(rule).text if is_unix(rule) else inet_remap.Rule(rule).text


def apply(entries: list[Message], ctx: BuildContext) -> None:
    """Do what the rules say to the entries."""
    rules = [Rule(rule) for rule in ctx.options.remap_address if is_unix(rule)]
    renamed: dict[bytes, bytes] = dict(ctx.memo.get(RENAMED, {}))
    left = {rule.text for rule in rules}
    for entry in entries:
        rule = next((rule for rule in rules if entry.name and rule.matches(entry)), None)
        if rule is None or entry.uflags & EXTERN:
            continue
        left.discard(rule.text)
        before = address(entry.name)
        note = f"socket {show(entry.name)} comes up as {show(rule.new)}"
        if note not in ctx.notes:
            ctx.notes.append(note)
            log.info(note)
        renamed = {name: rule.new if now == before else now for name, now in renamed.items()}
        renamed.setdefault(before, rule.new)
        entry.name = rule.new
        entry.ClearField("name_dir")
        entry.ClearField("path")
    ctx.memo[RENAMED] = renamed
    for text in sorted(left):
        log.warning(f"--remap-address {text}: no socket is concerned")
