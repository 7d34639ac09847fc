"""``torpor audit DIR``, and the same as ``torpor restore --audit``."""

from __future__ import annotations

from ..errors import UsageError
from ..options import Option, Options
from .parse import local_options
from .terminal import out, out_json, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..engine.audit import Audit

ROWS = (
    Option("fresh", "", "", "", "flag", "", "*", "as if restored with --fresh"),
    Option("tcp-close", "", "", "", "flag", "", "*", "as if restored with --tcp-close"),
    Option("strict", "", "", "", "flag", "", "*", "status 1 if there is a secret that nobody renews"),
    Option("json", "", "", "", "flag", "", "*", "print it as JSON"),
    Option("help", "h", "", "", "flag", "", "*", "show this text"),
)
USAGE = "torpor audit DIR [--fresh] [--tcp-close] [--strict] [--json]"
TEXT = """\
Says what the copies of the snapshot in DIR would have in common and should not: the state of random
number generators, sessions, keys, the layout of memory. Only what is known is named. SECRET is what
lets one copy be broken or foretold by way of another; STATE is what makes copies do the same; FIXED
cannot be renewed in a running program. Programs that take part in snapshots renew what is theirs.
"""
EXAMPLES = """\
  torpor audit /snap                     what would copies share?
  torpor restore /snap --strict          refuse to wake it if one of it is a secret
"""


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    said = local_options(words, ROWS, USAGE, TEXT, EXAMPLES)
    if said is None:
        return 0
    flags, others = said
    if len(others) != 1:
        raise UsageError(f"audit reads one directory: {USAGE}")
    options = Options(images_dir=others[0], fresh="fresh" in flags, tcp_close="tcp-close" in flags)
    return show(options, as_json="json" in flags, strict="strict" in flags)


def show(options: Options, *, as_json: bool, strict: bool) -> int:
    """Print what was found; the exit status."""
    from ..engine.audit import audit

    found = audit(options)
    if as_json:
        out_json(_as_json(found, options))
    else:
        out(render(found))
    return 1 if strict and found.refused(options.allow_shared) else 0


def _as_json(found: Audit, options: Options) -> dict[str, object]:
    shared = [
        {
            "what": one.what, "severity": one.severity, "pids": one.pids, "open_pids": one.open_pids,
            "renewed": one.renewed, "text": one.text, "advice": one.advice,
        }
        for one in found.shared
    ]  # fmt: skip
    refused = [one.what for one in found.refused(options.allow_shared)]
    return {"guests": found.guests, "shared": shared, "refused": refused}


def render(found: Audit) -> str:
    """The findings as text: a table, and a paragraph for each that somebody should do something about."""
    rows = [("SEVERITY", "WHAT", "TASKS", "RENEWED BY")]
    for one in found.shared:
        pids = " ".join(map(str, one.pids[:6])) + (f" and {len(one.pids) - 6} more" if len(one.pids) > 6 else "")
        rows.append((one.severity, one.what, pids, one.renewed or "nobody"))
    parts = [table(rows), "\n"]
    for one in found.shared:
        if not one.renewed:
            parts.append(f"{one.what}: {one.text}.\n    {one.advice}.\n")
    guests = ", ".join(map(str, found.guests)) or "none"
    parts.append(f"\nTasks that take part in snapshots: {guests}.\n")
    return "".join(parts)
