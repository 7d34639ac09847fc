"""Names, files and magics of images."""

from __future__ import annotations

import pytest

from images.made import NAMES
from torpor.errors import UsageError
from torpor.images import magic


@pytest.mark.parametrize(
    ("name", "file", "head"),
    [
        ("inventory", "inventory.img", "16313158"),
        ("core-42", "core-42.img", "1943565447380555"),
        ("files", "files.img", "1943565438313056"),
        ("pagemap-shmem-18446744073709551615", "pagemap-shmem-18446744073709551615.img",
         "1943565425400856"),
        ("ghost-file-1f", "ghost-file-1f.img", "1943565405365852"),
        ("tcp-stream-ab", "tcp-stream-ab.img", "1943565406554651"),
        ("signal-s-7", "signal-s-7.img", "1943565447562559"),
        ("tmpfs-dev-5.tar.gz", "tmpfs-dev-5.tar.gz.img", ""),
        ("netns-ct-9", "netns-ct-9.img", ""),
        ("pages-1", "pages-1.img", ""),
        ("stats-dump", "stats-dump", "4059105506330957"),
        ("irmap-cache", "irmap-cache", "4059105559400057"),
    ],
)  # fmt: skip
def test_an_image_is_called_as_criu_calls_it(name: str, file: str, head: str) -> None:
    assert magic.file_name(name) == file
    assert magic.image_name(file) == name
    assert magic.head(magic.kind_of(name)).hex() == head


@pytest.mark.parametrize(
    "name",
    [
        "", "core", "core-", "core-x", "core-1f", "core--1", "core-1/../2", "../core-1",
        "/etc/passwd", "core-1.img", "core-1\0", "core-123456789012345678901", "files-1", "parent",
        "dump.log", "ghost-file-1F", "tmpfs-5", "core-5.tar.gz", "stats-x", "stats",
        "core-\u0661", ".", "..",
    ],
)  # fmt: skip
def test_nothing_else_is_an_image(name: str) -> None:
    assert magic.find(name) is None
    with pytest.raises(UsageError, match="is no image of a set"):
        magic.file_name(name)


@pytest.mark.parametrize(
    "file", ["core-1", "stats-dump.img", "core-1.img.img", "core-1.IMG", ".img"]
)
def test_nothing_else_is_an_image_file(file: str) -> None:
    assert magic.image_name(file) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_magic_tells_the_kind(name: str) -> None:
    image = magic.kind_of(name)
    assert magic.by_number(image.number).magic == image.magic
    assert magic.by_magic(image.magic).message == image.message
    assert magic.image_name(magic.file_name(name)) == name
