"""The ``torpor`` command: its verbs, each a module that is imported only when it is asked for."""

from __future__ import annotations

from ..errors import UsageError
from ..options import nearest
from .common import CRIU_VERSION, VERSION, guarded, words_of
from .terminal import keep_standard_descriptors, out

# verb → (module with main(words) -> int, what it does)
VERBS = {
    "dump": ("torpor.cli.dump", "freeze a tree of processes into a directory of images"),
    "restore": ("torpor.cli.restore", "wake it up again"),
    "template": ("torpor.cli.template", "hold a snapshot ready to be copied"),
    "clone": ("torpor.cli.clone", "make copies of a template, in about a millisecond each"),
    "check": ("torpor.cli.check", "say what this kernel can do, or what stands in a dump's way"),
    "show": ("torpor.cli.show", "show what is in a snapshot"),
    "plain": ("torpor.cli.plain", "copy a snapshot in the form that CRIU reads"),
    "audit": ("torpor.cli.audit", "say what copies of a snapshot would share"),
    "guest": ("torpor.cli.guest", "start a program that takes part in snapshots by descriptors"),
    "generation": ("torpor.cli.generation", "make a file that tells programs of wake-ups"),
    "crit": ("torpor.cli.crit", "turn image files into JSON and back"),
    "criu": ("torpor.cli.criu", "be the criu command, for whoever expects that one"),
}

HELP = """\
Torpor freezes running Linux processes into a snapshot and wakes them again: on the same machine or
another one, once or many times.

Usage: torpor VERB [ARGUMENT...]

{verbs}
`torpor VERB --help` explains a verb; `torpor --version` shows the version. Torpor also installs
itself as `criu`, with the options and images of CRIU {criu}.

Examples:
  torpor check 4242                what would stand in the way of a dump? Nothing is stopped
  torpor dump 4242 -D /snap        freeze process 4242 and all below it into /snap, and end it
  torpor restore /snap             wake it up; this command stays and ends as the process ends
"""


def main(argv: list[str] | None = None) -> int:
    """Run the ``torpor`` command with these words (default: the process's own); its exit status."""
    keep_standard_descriptors()
    return guarded("torpor", lambda: _main(words_of(argv)))


def help_text() -> str:
    """What ``torpor --help`` prints."""
    verbs = "".join(f"  torpor {name:<11}{summary}\n" for name, (_, summary) in VERBS.items())
    return HELP.format(verbs=verbs, criu=CRIU_VERSION)


def _main(words: list[str]) -> int:
    if not words:
        out(help_text())
        return 1
    verb = words[0]
    if verb in ("-h", "--help", "help"):
        if len(words) > 1 and verb == "help":
            return _main([words[1], "--help"])
        out(help_text())
        return 0
    if verb in ("-V", "--version"):
        out(f"torpor {VERSION} (as criu: {CRIU_VERSION})\n")
        return 0
    if verb not in VERBS:
        what = "option" if verb.startswith("-") else "verb"
        raise UsageError(f"there is no {what} `{verb}`", hint=nearest(verb, VERBS))
    import importlib

    run = importlib.import_module(VERBS[verb][0]).main
    return guarded(f"torpor {verb}", lambda: int(run(words[1:]) or 0))
