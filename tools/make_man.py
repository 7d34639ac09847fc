#!/usr/bin/env python3
"""Write the option lists of docs/man/*.md from the options table.

A page is written by hand except for what lies between a line `<!-- options: VERB -->` and the next
`<!-- end -->`. Run it after every change of src/torpor/options.py; tests/cli/test_man.py holds that
the two agree.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
PAGES = os.path.join(ROOT, "docs", "man")
BEGIN, END = "<!-- options: ", "<!-- end -->"


def option_lists() -> dict[str, str]:
    """The text for every place that a page may have."""
    from torpor.cli import check, dump, restore
    from torpor.cli.help import option_markdown
    from torpor.options import OURS_IN_CRIU

    lists = {"criu": option_markdown(lambda row: (not row.ours or row.long in OURS_IN_CRIU) and row.long != "ms")}
    for module in (dump, restore, check):
        lists[module.HELP.verb] = option_markdown(module.HELP.shows)
    return lists


def filled(page: str, lists: dict[str, str]) -> str:
    """The page with every list as it has to be."""
    parts = page.split(BEGIN)
    for number, part in enumerate(parts[1:], 1):
        verb, _, rest = part.partition(" -->\n")
        _, _, after = rest.partition(END)
        parts[number] = f"{verb} -->\n{lists[verb]}{END}{after}"
    return BEGIN.join(parts)


def main() -> None:
    """Rewrite the pages."""
    sys.path.insert(0, os.path.join(ROOT, "src"))
    lists = option_lists()
    for name in sorted(os.listdir(PAGES)):
        path = os.path.join(PAGES, name)
        with open(path, encoding="utf-8") as file:
            page = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(filled(page, lists))


if __name__ == "__main__":
    main()
