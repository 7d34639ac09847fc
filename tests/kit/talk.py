"""A copy of a template that is spoken to over pipes in place of its standard input and output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torpor

from .host import descendants, end_descendants
from .target import Target

#: What a Python program that is spoken to ends with: its function answer() gets each line, and what it returns is sent.
ANSWERS = """
ready()
wait_told("go")
rest = b""
while True:
    data = os.read(0, 4096)
    if not data:
        break
    rest += data
    *lines, rest = rest.split(b"\\n")
    for line in lines:
        os.write(1, repr(answer(line.decode())).encode() + b"\\n")
"""


@contextlib.contextmanager
def snapshot_of(target: Target, images: str) -> Iterator[Target]:
    """Dump a program into ``images`` and let it go on as soon as it is woken; everything woken from it is ended."""
    keep = set(descendants(os.getpid())) - set(target.pids())
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    try:
        yield target
    finally:
        end_descendants(keep)


class Talk:
    """A copy that is spoken to."""

    def __init__(self, template: Any, **wishes: Any) -> None:
        theirs, self.input = os.pipe()
        self.output, out = os.pipe()
        try:
            self.copy = template.clone(stdin=theirs, stdout=out, **wishes)
        except BaseException:
            os.close(self.input)
            os.close(self.output)
            raise
        finally:
            os.close(theirs)
            os.close(out)

    def ask(self, line: str) -> Any:
        os.write(self.input, line.encode() + b"\n")
        text = b""
        while not text.endswith(b"\n"):
            part = os.read(self.output, 1 << 16)
            if not part:
                raise AssertionError(f"it ended: {text!r}")
            text += part
        return eval(text)

    def end(self) -> int:
        os.close(self.input)
        os.close(self.output)
        return self.copy.wait()
