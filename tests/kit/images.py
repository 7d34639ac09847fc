"""Images that a dump would not write: one message of a set, changed by hand."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from torpor.images.store import ImageReader, ImageWriter


@contextlib.contextmanager
def changed(images: str, name: str) -> Iterator[Any]:
    """The one message of ``name`` (without .img); what becomes of it is written back at the end."""
    with tempfile.TemporaryDirectory() as beside, contextlib.ExitStack() as stack:
        folders = [os.open(path, os.O_RDONLY) for path in (images, beside)]
        for folder in folders:
            stack.callback(os.close, folder)
        message = ImageReader(folders[0]).read_one(name)
        yield message
        with ImageWriter(folders[1]) as writer:
            writer.write_one(name, message)
            writer.commit()
        shutil.copy(f"{beside}/{name}.img", images)
