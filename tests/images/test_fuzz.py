"""Damaged images: whatever the bytes, an ImageError or a result, and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images.made import NAMES, entries, write_image
from images.test_crit import fill
from torpor.errors import ImageError, UsageError
from torpor.images import crit, explore, magic, pages, show
from torpor.images.store import ImageReader, ImageWriter


@st.composite
def damages(draw: st.DrawFn, size: int) -> list[tuple[str, int, bytes]]:
    """Edits of a file of ``size`` bytes: what, where, with which bytes."""
    words = st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1\0\0\0"])
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["replace", "insert", "delete", "cut"]),
                st.integers(0, max(size - 1, 0)),
                st.one_of(st.binary(min_size=1, max_size=5), words),
            ),
            min_size=1,
            max_size=4,
        )
    )


def damaged(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for what, at, piece in edits:
        if what == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif what == "insert":
            data = data[:at] + piece + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(piece) :]
        else:
            data = data[:at]
    return data


def refused(look: Callable[[], object]) -> ImageError | None:
    """The ImageError that comes out, if one does; any other exception is a bug."""
    try:
        look()
    except ImageError as error:
        return error
    except UsageError as error:
        assert "there is no process 5" in str(error)  # in a damaged tree there may be none
    return None


def read_every_way(reader: ImageReader, name: str) -> None:
    for look in (
        lambda: reader.read_all(name),
        lambda: list(reader.iter_with_payload(name)),
        lambda: reader.read_one(name),
        lambda: reader.read_first(name),
    ):
        refusal = refused(look)
        assert refusal is None or refusal.image == magic.file_name(name)
    fd = reader.open(name)
    try:
        for pretty in (False, True):
            try:
                text = crit.to_json(crit.load(fd, name, pretty=pretty), pretty=pretty)
            except ImageError:
                continue
            refused(lambda text=text: crit.from_json(text, name))
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_damaged_image(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        good = write_image(folder, name, data.draw(entries(name)))
        broken = damaged(good, data.draw(damages(len(good))))
        with open(os.path.join(folder, magic.file_name(name)), "wb") as file:
            file.write(broken)
        fd = os.open(folder, os.O_RDONLY)
        try:
            read_every_way(ImageReader(fd), name)
        finally:
            os.close(fd)


def looks(reader: ImageReader) -> None:
    """Everything that looks at a set as a whole."""
    for look in (
        lambda: show.render_summary(show.summary(reader)),
        lambda: show.render_files(show.files(reader, 5)),
        lambda: show.render_mappings(show.mappings(reader, 5)),
        lambda: explore.processes(reader),
        lambda: explore.descriptors(reader),
        lambda: explore.memory(reader),
        lambda: explore.resident(reader),
        lambda: reader.files(),
        lambda: runs(reader),
    ):
        refused(look)


def runs(reader: ImageReader) -> None:
    with pages.Pages(reader, "pagemap-5") as found:
        list(found.runs())


SET = ("pstree", "core-5", "core-6", "ids-5", "fs-5", "fdinfo-2", "files", "mm-5", "pagemap-5")


@pytest.mark.parametrize("name", SET)
@settings(max_examples=60)
@given(data=st.data())
def test_a_set_with_a_damaged_image(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fd = os.open(folder, os.O_RDONLY)
        try:
            with ImageWriter(fd) as writer:
                fill(writer)
                writer.commit()
            path = os.path.join(folder, magic.file_name(name))
            with open(path, "rb") as file:
                good = file.read()
            looks(ImageReader(fd))
            with open(path, "wb") as file:
                file.write(damaged(good, data.draw(damages(len(good)))))
            looks(ImageReader(fd))
            os.unlink(path)
            looks(ImageReader(fd))
        finally:
            os.close(fd)


def test_a_whole_set_is_looked_at_without_an_error() -> None:
    """What the test above damages is good to begin with."""
    with tempfile.TemporaryDirectory() as folder:
        fd = os.open(folder, os.O_RDONLY)
        with ImageWriter(fd) as writer:
            fill(writer)
            writer.commit()
        reader = ImageReader(fd)
        assert show.summary(reader)["tasks"] and show.files(reader, 5) and show.mappings(reader, 5)
        runs(reader)
        os.close(fd)
