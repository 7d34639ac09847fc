"""Image sets on disk: the frame, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images.made import ANNOUNCE, NAMES, entries, least, write_image
from kit.verbs import SOURCES
from torpor import limits
from torpor.errors import ImageError, KernelError, UsageError
from torpor.images import magic, payload, source, store
from torpor.images import schema as pb
from torpor.images.store import ImageReader, ImageWriter


class Folder:
    """A directory for images, and what lies in it, seen without Torpor."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def put(self, file: str, data: bytes) -> None:
        with open(os.path.join(self.path, file), "wb") as target:
            target.write(data)

    def get(self, file: str) -> bytes:
        with open(os.path.join(self.path, file), "rb") as source:
            return source.read()

    def state(self) -> dict[str, bytes | str]:
        found: dict[str, bytes | str] = {}
        for file in os.listdir(self.path):
            path = os.path.join(self.path, file)
            found[file] = os.readlink(path) if os.path.islink(path) else self.get(file)
        return found


@pytest.fixture
def folder() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory() as path:
        made = Folder(path)
        yield made
        os.close(made.fd)


def small_set(writer: ImageWriter) -> None:
    writer.write_one("inventory", pb.inventory_entry(img_version=2))
    for pid in (1, 2):
        writer.append("pstree", pb.pstree_entry(pid=pid, ppid=0, pgid=1, sid=1))
    writer.append("pipes-data", pb.pipe_data_entry(pipe_id=1, bytes=3), b"abc")
    os.write(writer.raw("pages-1"), b"p" * 4096)


# ---------------------------------------------------------------------------------------- frame


def test_the_frame_is_criu_s(folder: Folder) -> None:
    with ImageWriter(folder.fd) as writer:
        small_set(writer)
        writer.create("fdinfo-2")
        writer.commit()
    assert folder.state() == {
        "inventory.img": bytes.fromhex("16313158 02000000 0802"),
        "pstree.img": bytes.fromhex(
            "19435654 30302750 08000000 0801100018012001 08000000 0802100018012001"
        ),
        "pipes-data.img": bytes.fromhex("19435654 09374556 04000000 08011003 616263"),
        "pages-1.img": b"p" * 4096,
        "fdinfo-2.img": bytes.fromhex("19435654 32372156"),
    }
    assert writer.sizes == {
        "inventory": 10, "pstree": 32, "pipes-data": 19, "pages-1": 4096, "fdinfo-2": 8
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(data=st.data())
def test_what_is_written_is_read(name: str, data: st.DataObject) -> None:
    what = data.draw(entries(name))
    with tempfile.TemporaryDirectory() as path:
        written = write_image(path, name, what)
        folder = Folder(path)
        try:
            reader = ImageReader(folder.fd)
            assert list(reader.iter_with_payload(name)) == what
            if what:
                assert reader.read_first(name) == what[0]
            else:
                with pytest.raises(ImageError, match=r"empty|pagemap_head"):
                    reader.read_first(name)
            assert reader.read_all(name) == [message for message, _ in what]
            assert reader.names() == [name]
            assert reader.size(name) == len(written)
            for (message, content), span in zip(what, reader.spans(name), strict=True):
                assert span.message == message
                assert written[span.offset : span.offset + span.size] == content
        finally:
            os.close(folder.fd)


@given(count=st.integers(0, 40), window=st.integers(1, 200))
def test_large_images_are_read_through_a_window(count: int, window: int) -> None:
    what = [(pb.pipe_data_entry(pipe_id=i, bytes=i), b"%c" % i * i) for i in range(count)]
    usual = limits.READ_WINDOW_BYTES
    with tempfile.TemporaryDirectory() as path:
        write_image(path, "pipes-data", what)
        folder = Folder(path)
        try:
            limits.READ_WINDOW_BYTES = window
            assert list(ImageReader(folder.fd).iter_with_payload("pipes-data")) == what
        finally:
            limits.READ_WINDOW_BYTES = usual
            os.close(folder.fd)


def test_large_images_are_written_piece_by_piece(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WRITE_BUFFER_BYTES", 100)
    with ImageWriter(folder.fd) as writer:
        for number in range(50):
            writer.append("pipes-data", pb.pipe_data_entry(pipe_id=number, bytes=9), b"123456789")
        writer.commit()
    assert len(ImageReader(folder.fd).read_all("pipes-data")) == 50


def test_a_payload_may_be_copied_in(folder: Folder) -> None:
    with ImageWriter(folder.fd) as writer:
        for number in range(3):
            writer.append("sk-queues", pb.sk_packet_entry(id_for=number, length=4))
            os.write(writer.fd("sk-queues"), b"%04d" % number)
        writer.commit()
    found = list(ImageReader(folder.fd).iter_with_payload("sk-queues"))
    assert [content for _, content in found] == [b"0000", b"0001", b"0002"]


def test_messages_of_queues() -> None:
    messages = [(1, b""), (2**63, b"x"), (7, b"12345678")]
    joined = payload.join_queue(messages)
    assert payload.split_queue(joined, "ipcns-msg-1.img", "entry 0") == messages
    assert joined.endswith(b"12345678"), "no padding where none is needed"


def test_version_1_has_no_common_magic(folder: Folder) -> None:
    folder.put("fs-3.img", bytes.fromhex("12394051 06000000 080110021803"))
    assert ImageReader(folder.fd).read_one("fs-3") == pb.fs_entry(cwd_id=1, root_id=2, umask=3)


def test_open_files_of_old_sets(folder: Folder) -> None:
    with ImageWriter(folder.fd) as writer:
        for number, (name, _) in enumerate(magic.OLD_STYLE_FILES.items(), 1):
            message = least(magic.kind_of(name).message)
            message.id = number
            writer.append(name, message)
        writer.commit()
    found = ImageReader(folder.fd).files()
    expected = [(n, *what) for n, what in enumerate(magic.OLD_STYLE_FILES.values(), 1)]
    assert expected == [
        (entry.id, pb.fd_types.Name(entry.type), entry.ListFields()[2][0].name) for entry in found
    ]
    assert all(entry.ListFields()[2][1].id == entry.id for entry in found)


def test_open_files_of_new_sets(folder: Folder) -> None:
    entry = pb.file_entry(type=pb.fd_types.PIPE, id=3)
    with ImageWriter(folder.fd) as writer:
        writer.append("files", entry)
        writer.append("pipes", least("pipe_entry"))
        writer.commit()
    assert ImageReader(folder.fd).files() == [entry]


def test_a_missing_image_is_empty_unless_required(folder: Folder) -> None:
    reader = ImageReader(folder.fd)
    assert not reader.has("files")
    assert reader.read_all("files") == []
    for ask in (
        lambda: reader.read_all("files", required=True),
        lambda: reader.read_one("inventory"),
        lambda: reader.pages("pages-1"),
        lambda: reader.size("mm-1"),
    ):
        with pytest.raises(ImageError, match=r"^(files|inventory|pages-1|mm-1)\.img: missing$"):
            ask()


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["../core-1", "core-1.img", "/etc/hosts", "x", ""])
def test_only_images_are_opened(folder: Folder, name: str) -> None:
    reader = ImageReader(folder.fd)
    with pytest.raises(UsageError):
        reader.read_all(name)
    with ImageWriter(folder.fd) as writer, pytest.raises(UsageError):
        writer.append(name, pb.inventory_entry(img_version=2))
    assert folder.state() == {}


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "socket"])
def test_only_plain_files_are_read(folder: Folder, kind: str) -> None:
    path = os.path.join(folder.path, "inventory.img")
    folder.put("real", bytes.fromhex("16313158 02000000 0802"))
    if kind == "link":
        os.symlink("real", path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        os.mkdir(path)
    else:
        os.mknod(path, 0o140644)
    reader = ImageReader(folder.fd)
    assert not reader.has("inventory")
    with pytest.raises(ImageError, match="not a plain file"):
        reader.read_one("inventory")


GOOD = bytes.fromhex("19435654 32372156 08000000 0801100218012003 08000000 0802100218012003")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "byte 0: 4 bytes expected, file ends"),
        (GOOD[:6], "byte 4: 4 bytes expected"),
        (GOOD[:10], "byte 8: 4 bytes expected"),
        (GOOD[:19], "byte 12: 8 bytes expected"),
        (GOOD + b"x", "byte 32: 4 bytes expected"),
        (bytes.fromhex("19435654 30302750"), "magic: not an image of type FDINFO"),
        (bytes.fromhex("40591055 32372156"), "magic: not an image of type FDINFO"),
        (bytes.fromhex("16313158"), "magic: not an image of type FDINFO"),
        (GOOD[:8] + b"\xff\xff\xff\xff" + GOOD[12:], "entry 0: 4294967295 bytes, the limit is"),
        (GOOD[:20] + b"\0\0\0\0", "entry 1: fdinfo_entry lacks id, flags, type and 1 more"),
        (GOOD[:20] + b"\1\0\0\0\xff", "entry 1: 1 bytes are no valid fdinfo_entry"),
    ],
)
def test_a_broken_image_is_refused(folder: Folder, data: bytes, text: str) -> None:
    folder.put("fdinfo-2.img", data)
    with pytest.raises(ImageError) as caught:
        ImageReader(folder.fd).read_all("fdinfo-2")
    assert str(caught.value).startswith(f"fdinfo-2.img: {text}")


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [
        ("MESSAGE_BYTES_MAX", 7, "entry 0: 8 bytes, the limit is 7"),
        ("IMAGE_BYTES_MAX", 15, "entry 1: more than 15 bytes of messages"),
        ("IMAGE_ENTRIES_MAX", 1, "entry 1: more than 1 messages"),
    ],
)
def test_images_are_bounded(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, text: str
) -> None:
    folder.put("fdinfo-2.img", GOOD)
    assert len(ImageReader(folder.fd).read_all("fdinfo-2")) == 2
    monkeypatch.setattr(limits, limit, value)
    with pytest.raises(ImageError, match=text):
        ImageReader(folder.fd).read_all("fdinfo-2")


def test_payloads_are_bounded(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(folder.path, "pipes-data", [(pb.pipe_data_entry(pipe_id=1, bytes=3), b"abc")])
    monkeypatch.setattr(limits, "PAYLOAD_BYTES_MAX", 2)
    reader = ImageReader(folder.fd)
    with pytest.raises(ImageError, match=r"pipes-data\.img: entry 0: 3 bytes follow"):
        list(reader.iter_with_payload("pipes-data"))
    assert [span.size for span in reader.spans("pipes-data")] == [3], "copying needs no bound"


def test_a_sparse_file_that_says_it_is_huge_costs_nothing(folder: Folder) -> None:
    write_image(folder.path, "pipes-data", [(pb.pipe_data_entry(pipe_id=1, bytes=3), b"abc")])
    path = os.path.join(folder.path, "pipes-data.img")
    os.truncate(path, 1 << 40)
    with pytest.raises(ImageError, match="entry 1: pipe_data_entry lacks"):
        ImageReader(folder.fd).read_all("pipes-data")


@pytest.mark.parametrize(
    "name", [name for name in NAMES if magic.kind_of(name).payload and "ghost" not in name]
)
def test_a_payload_that_is_cut_off_is_refused(folder: Folder, name: str) -> None:
    image = magic.kind_of(name)
    message = least(image.message)
    content = ANNOUNCE[image.magic](message, b"123456789")
    data = write_image(folder.path, name, [(message, content)])
    assert content and len(ImageReader(folder.fd).read_all(name)) == 1
    folder.put(magic.file_name(name), data[:-1])
    with pytest.raises(ImageError, match=magic.file_name(name)):
        ImageReader(folder.fd).read_all(name)


def test_one_message_means_one(folder: Folder) -> None:
    with ImageWriter(folder.fd) as writer:
        writer.create("core-1")
        for _ in range(2):
            writer.append("mm-1", least("mm_entry"))
        writer.commit()
    for name, count in (("core-1", 0), ("mm-1", 2)):
        with pytest.raises(ImageError, match=rf"{name}\.img: {count} messages, one expected"):
            ImageReader(folder.fd).read_one(name)


def test_a_pagemap_needs_its_head(folder: Folder) -> None:
    folder.put("pagemap-1.img", bytes.fromhex("19435654 25400856"))
    with pytest.raises(ImageError, match=r"pagemap-1\.img: no pagemap_head"):
        ImageReader(folder.fd).read_all("pagemap-1")


def test_an_incomplete_message_is_not_written(folder: Folder) -> None:
    with ImageWriter(folder.fd) as writer, pytest.raises(ImageError, match=r"entry 0: .* lacks id"):
        writer.append("fdinfo-2", pb.fdinfo_entry(fd=2))


def test_the_parent_may_be_missing_but_not_dangling(folder: Folder) -> None:
    reader = ImageReader(folder.fd)
    assert reader.open_parent() == -1
    os.symlink("gone", os.path.join(folder.path, "parent"))
    with pytest.raises(ImageError, match="parent: the snapshot that it names is missing"):
        reader.open_parent()
    folder.put("gone", b"")
    with pytest.raises(ImageError, match="parent: cannot be opened"):
        reader.open_parent()


# --------------------------------------------------------------------------------- all or nothing


def older_set(folder: Folder) -> None:
    for file in ("inventory.img", "core-9.img", "files.img", "stats-dump", "pages-1.img"):
        folder.put(file, b"old " + file.encode())
    for file in ("dump.log", "config.json", "core-9.img.bak"):
        folder.put(file, b"not ours")
    os.symlink("../before", os.path.join(folder.path, "parent"))


def test_nothing_is_to_be_seen_before_the_commit(folder: Folder) -> None:
    older_set(folder)
    before = folder.state()
    with ImageWriter(folder.fd, existing="replace") as writer:
        small_set(writer)
        writer.parent("../1")
        writer.flush()
        seen = {file: data for file, data in folder.state().items() if not file.startswith(".")}
        assert seen == before
    assert folder.state() == before


def test_close_discards(folder: Folder) -> None:
    writer = ImageWriter(folder.fd)
    small_set(writer)
    writer.flush()
    assert folder.state() != {}
    writer.close()
    assert folder.state() == {}
    writer.close()


def test_an_error_discards(folder: Folder) -> None:
    def interrupted() -> None:
        with ImageWriter(folder.fd) as writer:
            small_set(writer)
            writer.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert folder.state() == {}


NEW = {"inventory.img", "pstree.img", "pipes-data.img", "pages-1.img"}
OTHERS = {"dump.log", "config.json", "core-9.img.bak"}


@pytest.mark.parametrize(
    ("existing", "stay"),
    [("overwrite", {"core-9.img", "stats-dump", "parent"}), ("replace", set())],
)
def test_an_older_set(folder: Folder, existing: str, stay: set[str]) -> None:
    older_set(folder)
    before = folder.state()
    with ImageWriter(folder.fd, existing=existing) as writer:
        small_set(writer)
        assert set(writer.stale()) == {"core-9.img", "files.img", "stats-dump"}
        writer.commit()
    after = folder.state()
    assert set(after) == NEW | OTHERS | stay
    assert all(after[file] == before[file] for file in OTHERS | stay)
    assert all(after[file] != before.get(file) for file in NEW)


def test_an_older_set_is_refused_on_demand(folder: Folder) -> None:
    folder.put("dump.log", b"")
    ImageWriter(folder.fd, existing="refuse").close()
    older_set(folder)
    with pytest.raises(UsageError, match=r"already holds a set: core-9\.img, files\.img, inv.* …"):
        ImageWriter(folder.fd, existing="refuse")


def test_the_parent_is_linked(folder: Folder) -> None:
    older_set(folder)
    with ImageWriter(folder.fd) as writer:
        writer.parent("../1")
        writer.commit()
    assert folder.state()["parent"] == "../1"
    with ImageWriter(folder.fd) as writer, pytest.raises(UsageError, match="must be relative"):
        writer.parent("/images/1")


def test_leftovers_of_a_killed_process_do_not_disturb(folder: Folder) -> None:
    folder.put(f".pstree.img.{os.getpid()}.tmp", b"of a process that had our pid")
    with ImageWriter(folder.fd) as writer:
        small_set(writer)
        writer.commit()
    assert set(folder.state()) == NEW


CALLS = ("open", "write", "rename", "symlink", "fstat", "listdir")


class Failing:
    """Stands in for ``os`` in the store and lets call number ``nth`` fail."""

    def __init__(self, nth: int, number: int) -> None:
        self.nth, self.number, self.calls, self.hit = nth, number, 0, ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls == self.nth:
                self.hit = name
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **more)

        return call


@pytest.mark.parametrize("existing", ["overwrite", "replace"])
def test_whatever_call_fails_the_directory_is_as_before(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, existing: str
) -> None:
    older_set(folder)
    before = folder.state()
    hit = []
    for nth in range(1, 200):
        failing = Failing(nth, errno.EIO)
        descriptors = len(os.listdir("/proc/self/fd"))
        for module in (store, source):
            monkeypatch.setattr(module, "os", failing)
        outcome = None
        try:
            with ImageWriter(folder.fd, existing=existing) as writer:
                small_set(writer)
                os.write(writer.raw("pages-9"), b"not needed")
                os.write(writer.scratch(), b"nowhere")
                writer.drop("pages-9")
                writer.parent("../1")
                writer.commit()
        except OSError as error:
            outcome = error
        monkeypatch.undo()
        if failing.hit:
            assert isinstance(outcome, KernelError) and outcome.errno == errno.EIO
        assert len(os.listdir("/proc/self/fd")) == descriptors
        if not failing.hit:
            break
        hit.append(failing.hit)
        assert folder.state() == before, f"call {nth}: {failing.hit}"
    assert set(hit) == set(CALLS)
    assert folder.state()["parent"] == "../1"


def test_a_full_disk_names_the_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real file system of 64 KiB, in a mount namespace of its own."""
    program = """
import os, sys
from torpor.errors import KernelError
from torpor.images import schema as pb
from torpor.images.store import ImageWriter
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    with ImageWriter(fd) as writer:
        writer.append("pipes-data", pb.pipe_data_entry(pipe_id=1, bytes=1 << 17), bytes(1 << 17))
        writer.commit()
except KernelError as error:
    print(error, error.errno)
print(os.listdir(sys.argv[1]))
"""
    mount = f'mount -t tmpfs -o size=64k none "$0" && exec "{sys.executable}" -c "$1" "$0"'
    argv = ["unshare", "--mount", "sh", "-c", mount, folder.path, program]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": SOURCES}
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("write `pipes-data.img`: No space left on device (ENOSPC) (hint: the")
    assert first.endswith(" 28")
    assert second == "[]"


def test_short_writes_are_continued(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def __getattr__(self, name: str) -> Any:
            if name == "write":
                return lambda fd, data: os.write(fd, bytes(data)[:3])
            return getattr(os, name)

    monkeypatch.setattr(store, "os", Short())
    with ImageWriter(folder.fd) as writer:
        writer.append("pipes-data", pb.pipe_data_entry(pipe_id=1, bytes=100), bytes(range(100)))
        writer.commit()
    monkeypatch.undo()
    found = list(ImageReader(folder.fd).iter_with_payload("pipes-data"))
    assert found[0][1] == bytes(range(100))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda writer: writer.append("pipes-data", pb.pipe_data_entry(pipe_id=1, bytes=3), b"four"),
        lambda writer: writer.append("mm-1", least("mm_entry"), b"none expected"),
        lambda writer: writer.raw("mm-1"),
        lambda writer: [writer.write_one("mm-1", least("mm_entry")) for _ in range(2)],
    ],
)
def test_our_own_mistakes_are_seen(folder: Folder, wrong: Callable[[ImageWriter], object]) -> None:
    with ImageWriter(folder.fd) as writer, pytest.raises(AssertionError):
        wrong(writer)


def test_the_directory_may_be_renamed_meanwhile() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.mkdir(f"{place}/a")
        folder = Folder(f"{place}/a")
        with ImageWriter(folder.fd) as writer:
            small_set(writer)
            os.rename(f"{place}/a", f"{place}/b")
            writer.commit()
        assert set(os.listdir(f"{place}/b")) == NEW
        assert len(ImageReader(folder.fd).read_all("pstree")) == 2
        os.close(folder.fd)
        shutil.rmtree(f"{place}/b")
