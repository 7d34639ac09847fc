#!/usr/bin/env python3
"""Write src/torpor/resources/heads.py, the heads of the modules in resources/files and resources/memory.

Run it after every change of a head (FD_TYPE, LINKS, MODES, KINDS, …); tests/resources/test_heads.py holds that the two
agree. Whatever is not in it is found all the same, by loading it at every start.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "src"))

from torpor import resources  # noqa: E402

HEADER = '''\
"""The heads of the modules in ``files`` and ``memory``: what tells kinds of files and mappings apart, to be known
without loading them. Made by tools/make_heads.py.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import FileHead, MappingHead

'''


def text() -> str:
    """The module's source."""
    lines = ["FILES: dict[str, FileHead] = {"]
    for name in resources.modules("files"):
        lines.append(f"    {name!r}: {resources.file_head(resources.load_one('files', name))!r},")
    lines += ["}", "MEMORY: dict[str, MappingHead] = {"]
    for name in resources.modules("memory"):
        lines.append(f"    {name!r}: {resources.mapping_head(resources.load_one('memory', name))!r},")
    return HEADER + "\n".join([*lines, "}"]).replace("'", '"') + "\n"


if __name__ == "__main__":
    with open(os.path.join(ROOT, "src", "torpor", "resources", "heads.py"), "w", encoding="utf-8") as file:
        file.write(text())
