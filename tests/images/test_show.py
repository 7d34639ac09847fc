"""A snapshot as people see it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.made import least
from images.test_crit import fill
from torpor.errors import ImageError, UsageError
from torpor.images import schema as pb
from torpor.images import show
from torpor.images.store import ImageReader, ImageWriter


class Set:
    """A set under construction in its own directory."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.writer = ImageWriter(self.fd)

    def done(self) -> ImageReader:
        self.writer.commit()
        return ImageReader(self.fd)


@pytest.fixture
def made(tmp_path: Any) -> Iterator[Set]:
    one = Set(str(tmp_path))
    yield one
    one.writer.close()
    os.close(one.fd)


def test_the_tree(made: Set) -> None:
    fill(made.writer)
    made.writer.append("pstree", pb.pstree_entry(pid=9, ppid=6, pgid=9, sid=9, threads=[9, 10]))
    zombie = pb.core_entry(mtype=1, tc=least("task_core_entry"))
    zombie.tc.comm, zombie.tc.task_state, zombie.tc.exit_code = "gone", 2, 0x100
    made.writer.append("core-9", zombie)
    thread = pb.core_entry(mtype=1, thread_core=least("thread_core_entry"))
    thread.thread_core.comm = "worker"
    made.writer.append("core-10", thread)
    made.writer.write_one("inventory", pb.inventory_entry(img_version=2, torpor="0.1"))
    shown = show.summary(made.done())
    json.dumps(shown)
    assert shown["inventory"] == {"version": 2, "writer": "torpor 0.1"}
    assert [(task["pid"], task["depth"]) for task in shown["tasks"]] == [(5, 0), (6, 1), (9, 2)]
    first, _, last = shown["tasks"]
    assert (first["memory"], first["stored"], first["inherited"]) == (5 * 4096, 3 * 4096, 0)
    assert (last["state"], last["exit_code"], last["comm"]) == ("zombie", 256, "gone")
    assert last["threads"] == [{"tid": 9, "comm": ""}, {"tid": 10, "comm": "worker"}]
    assert {"name": "pages-1", "bytes": 3 * 4096} in shown["images"]
    assert show.render_summary(shown) == (
        "PID  PPID  PGID  SID  STATE   THREADS  MAPPED  STORED  COMMAND\n"
        "  5     0     5    5  0             1     20K     12K  task5\n"
        "  6     5     5    5  0             1       0       0    task6\n"
        "  9     6     9    9  zombie        2       0       0      gone\n"
        "\n13 images, 12K, of it pages 12K; written by torpor 0.1\n"
    )


def test_mappings(made: Set) -> None:
    fill(made.writer)
    shown = show.mappings(made.done(), 5)
    json.dumps(shown)
    keys = ("start", "end", "prot", "offset", "name", "stored")
    assert [tuple(row[key] for key in keys) for row in shown] == [
        (0x1000, 0x3000, "r-xp", 0x2000, "/bin/sh", 4096),
        (0x4000, 0x6000, "r-xp", 0, "", 4096),
        (0x7000, 0x8000, "r-xp", 0, "[vdso]", 0),
    ]
    lines = show.render_mappings(shown).splitlines()
    assert lines[0].split() == ["ADDRESS", "PROT", "SIZE", "STORED", "OFFSET", "MAPPED"]
    assert lines[1].split(maxsplit=1)[0] == "000000001000-000000003000"
    assert lines[1].split()[1:] == ["r-xp", "8.0K", "4.0K", "2000", "/bin/sh"]


OPEN_FILES = {
    "reg": ("reg_file_entry", {"name": "/etc/passwd", "flags": 0, "pos": 7}, "/etc/passwd"),
    "pipe": ("pipe_entry", {"pipe_id": 9, "flags": 1}, "pipe:[9]"),
    "eventfd": ("eventfd_file_entry", {"counter": 3, "semaphore": True}, "count 3 semaphore"),
    "unixsk": ("unix_sk_entry", {"ino": 5, "peer": 6, "name": b"\0abc"}, "unix 5 ↔ 6 @abc"),
    "inetsk": (
        "inet_sk_entry",
        {"proto": 6, "state": 1, "src_port": 80, "dst_port": 1, "src_addr": [0x0100007F],
         "dst_addr": [0, 0, 0, 0x01000000]},
        "tcp 127.0.0.1:80 → [::1]:1 established",
    ),
    "signalfd": ("signalfd_entry", {"sigmask": 0x200}, "mask 0x200"),
    "packetsk": ("packet_sock_entry", {"protocol": 0x0008}, "packet protocol 0x0800"),
    "pidfd": ("pidfd_entry", {"nspid": 12}, "pid 12"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPEN_FILES)
def test_an_open_file(made: Set, kind: str) -> None:
    name, values, text = OPEN_FILES[kind]
    number = pb.fd_types.Value(kind.upper())
    entry = pb.file_entry(type=number, id=4)
    field = next(
        field for field in entry.DESCRIPTOR.fields
        if field.message_type is not None and field.message_type.name == name
    )  # fmt: skip
    body = getattr(entry, field.name)
    body.CopyFrom(least(name))
    for key, value in values.items():
        if isinstance(value, list):
            getattr(body, key).extend(value)
        else:
            setattr(body, key, value)
    made.writer.append("files", entry)
    made.writer.append("fdinfo-2", pb.fdinfo_entry(id=4, flags=1, type=number, fd=0))
    made.writer.append("ids-5", pb.task_kobj_ids_entry(vm_id=1, files_id=2, fs_id=1, sighand_id=1))
    made.writer.append("pstree", pb.pstree_entry(pid=5, ppid=0, pgid=5, sid=5))
    (shown,) = show.files(made.done(), 5)
    json.dumps(shown)
    assert (shown["fd"], shown["kind"], shown["what"], shown["cloexec"]) == ("0", kind, text, True)
    assert shown["mode"] == {1: "w"}.get(values.get("flags", 0), "r")  # type: ignore[call-overload]
    assert shown["pos"] == values.get("pos")
    assert text in show.render_files([shown])


def test_what_is_missing_is_said(made: Set) -> None:
    fill(made.writer)
    shown = show.files(made.done(), 5)
    assert [(row["fd"], row["kind"], row["what"]) for row in shown] == [
        ("exe", "reg", "/bin/sh"),
        ("cwd", "reg", "/bin/sh"),
        ("root", "?", "file 9"),
        ("0", "reg", "/bin/sh"),
        ("3", "pipe", "pipe:[77]"),
        ("4", "?", "file 3"),
    ]
    reader = ImageReader(made.fd)
    assert show.mappings(reader, 6) == []
    for look in (show.files, show.mappings):
        with pytest.raises(UsageError, match="there is no process 7 in the snapshot"):
            look(reader, 7)


@pytest.mark.parametrize("tree", [[(5, 6), (6, 5)], [(5, 0), (6, 7), (7, 6)], [(5, 0), (5, 0)]])
def test_a_tree_that_is_none(made: Set, tree: list[tuple[int, int]]) -> None:
    for pid, ppid in tree:
        made.writer.append("pstree", pb.pstree_entry(pid=pid, ppid=ppid, pgid=1, sid=1))
    if tree[0] == tree[1]:
        made.writer.append("pstree", pb.pstree_entry(pid=8, ppid=5, pgid=1, sid=1))
        shown = show.summary(made.done())
        assert len(shown["tasks"]) == 3, "the same pid twice is strange, but can be shown"
    else:
        with pytest.raises(ImageError, match=r"pstree\.img: tasks that are their own ancestors"):
            show.summary(made.done())


def test_names_do_not_steer_the_terminal(made: Set) -> None:
    core = pb.core_entry(mtype=1, tc=least("task_core_entry"))
    pb.put_bytes(core.tc, "comm", b"\x1b[2J\xff\r")
    made.writer.append("core-5", core)
    made.writer.append("pstree", pb.pstree_entry(pid=5, ppid=0, pgid=5, sid=5))
    text = show.render_summary(show.summary(made.done()))
    assert "\\x1b[2J\\xff\\r" in text
    assert text.replace("\n", "").isprintable()


@given(st.text())
def test_printable(text: str) -> None:
    shown = show.printable(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1.0K"), (10240, "10K"), (1 << 20, "1.0M"),
     (1023 << 10, "1023K"), (3 << 39, "1.5T"), (1 << 60, "1.0E"), (1 << 64, "16E")],
)  # fmt: skip
def test_sizes(size: int, text: str) -> None:
    assert show.human(size) == text


def test_an_empty_directory(made: Set) -> None:
    with pytest.raises(ImageError, match=r"pstree\.img: missing"):
        show.summary(ImageReader(made.fd))
