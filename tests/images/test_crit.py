"""JSON in crit's form, and back without losing a bit."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images.made import NAMES, entries, least, messages, write_image
from torpor.errors import ImageError
from torpor.images import crit, explore, magic
from torpor.images import schema as pb
from torpor.images.store import ImageReader, ImageWriter


def loaded(data: bytes, **how: bool) -> dict[str, Any]:
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        return crit.load(fd, "it.img", **how)
    finally:
        os.close(fd)


def image(name: str, *what: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pairs = [one if isinstance(one, tuple) else (one, b"") for one in what]
        return write_image(folder, name, pairs)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(data=st.data())
def test_to_json_and_back_nothing_is_lost(name: str, data: st.DataObject) -> None:
    bytes_before = image(name, *data.draw(entries(name)))
    for pretty in (False, True):
        text = crit.to_json(loaded(bytes_before, pretty=pretty), pretty=pretty)
        text.encode("ascii")
        assert crit.from_json(text, "it.json") == bytes_before


@given(messages("core_entry"), st.integers(5000, 6000), st.binary(max_size=9))
def test_fields_of_a_later_version_survive(message: Any, number: int, value: bytes) -> None:
    extra = pb._varint(number << 3 | 2) + pb._varint(len(value)) + value
    message.MergeFromString(extra)
    message.thread_core.MergeFromString(extra)
    for field in ("futex_rla", "futex_rla_len"):
        setattr(message.thread_core, field, 1)
    data = image("core-1", message)
    assert crit.from_json(crit.to_json(loaded(data)), "it.json") == data


def one(name: str, message: Any, content: bytes = b"", *, pretty: bool = False) -> dict[str, Any]:
    shown: dict[str, Any] = loaded(image(name, (message, content)), pretty=pretty)["entries"][0]
    return shown


def test_the_form() -> None:
    what = loaded(image("pstree", pb.pstree_entry(pid=1, ppid=0, pgid=1, sid=1, threads=[1, 5])))
    assert crit.to_json(what) == (
        '{"magic": "PSTREE", "entries": '
        '[{"pid": 1, "ppid": 0, "pgid": 1, "sid": 1, "threads": [1, 5]}]}'
    )
    pretty = crit.to_json(what, pretty=True)
    assert pretty.startswith('{\n    "magic": "PSTREE",\n    "entries": [\n')


def test_values() -> None:
    reg = pb.reg_file_entry(id=1, flags=0o2100001, pos=5, mnt_id=-1, fown=least("fown_entry"))
    pb.put_bytes(reg, "name", b"/a\xff\xc3\xa4")
    shown = one("reg-files", reg)
    assert shown["name"] == "/a\udcffä"
    assert (shown["flags"], shown["mnt_id"]) == (0o2100001, -1)
    assert one("reg-files", reg, pretty=True)["flags"] == "O_WRONLY | O_LARGEFILE | O_CLOEXEC"
    tty = pb.tty_data_entry(tty_id=1, data=bytes(range(60)))
    assert one("tty-data", tty)["data"].count("\n") == 2, "76 characters a line, as crit"
    descriptor = pb.fdinfo_entry(id=1, flags=0, type=pb.fd_types.PIPE, fd=3)
    assert one("fdinfo-2", descriptor)["type"] == "PIPE"


def test_pretty_values() -> None:
    vma = least("vma_entry")
    vma.start, vma.prot, vma.flags, vma.status = 0x7F0000001000, 5, 0x40022, 0x201 | 1 << 16
    shown = one("vmas-1", vma, pretty=True)
    assert shown["start"] == "0x7f0000001000"
    assert shown["prot"] == "PROT_READ | PROT_EXEC"
    assert shown["flags"] == "MAP_PRIVATE | MAP_ANON | 0x40000"
    assert shown["status"] == "VMA_AREA_REGULAR | VMA_ANON_PRIVATE | 0x10000"
    core = pb.core_entry(mtype=pb.core_entry.X86_64, tc=least("task_core_entry"))
    core.tc.task_state, core.tc.blk_sigset = 1, 0x10
    core.thread_info.CopyFrom(least("thread_info_x86"))
    core.thread_info.gpregs.ip = 0xABC
    shown = one("core-1", core, pretty=True)
    assert (shown["tc"]["task_state"], shown["tc"]["blk_sigset"]) == ("Alive", "0x10")
    assert shown["thread_info"]["gpregs"]["ip"] == "0xabc", "registers by their frame's mark"
    assert shown["thread_info"]["clear_tid_addr"] == "0x0"
    mount = least("mnt_entry")
    mount.root_dev = 253 << 20 | 7
    assert one("mountpoints-1", mount, pretty=True)["root_dev"] == "253:7"
    ghost = pb.ghost_file_entry(uid=0, gid=0, mode=0o20600, rdev=os.makedev(4, 300))
    assert one("ghost-file-1", ghost, pretty=True)["rdev"] == "4:300"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([0x0100007F], ["127.0.0.1"]),
        ([0, 0, 0, 0x01000000], ["::1"]),
        ([1, 2], [1, 2]),
    ],
)
def test_addresses(words: list[int], text: list[Any]) -> None:
    socket = least("inet_sk_entry")
    socket.family, socket.type, socket.proto, socket.state = 2, 1, 6, 10
    socket.src_addr.extend(words)
    data = image("inetsk", socket)
    shown = loaded(data, pretty=True)
    assert shown["entries"][0]["src_addr"] == text
    assert [shown["entries"][0][key] for key in ("family", "type", "proto", "state")] == [
        "INET", "STREAM", "TCP", "LISTEN"
    ]  # fmt: skip
    assert crit.dump(shown, "it.json") == data


@pytest.mark.parametrize("name", [b"\0abstract\xff", b"a\r\nb\n", b"=", b"x" * 100 + b" ", b"\t"])
def test_names_of_unix_sockets(name: bytes) -> None:
    socket = least("unix_sk_entry")
    socket.name = name
    data = image("unixsk", socket)
    assert crit.dump(loaded(data), "it.json") == data


def test_payloads() -> None:
    pipe = pb.pipe_data_entry(pipe_id=1, bytes=3)
    assert one("pipes-data", pipe, b"abc") == {"pipe_id": 1, "bytes": 3, "extra": "YWJj\n"}
    stream = least("tcp_stream_entry")
    stream.inq_len, stream.outq_len = 1, 2
    assert one("tcp-stream-1", stream, b"abc")["extra"] == {"inq": "YQ==\n", "outq": "YmM=\n"}
    semaphores = pb.ipc_sem_entry(nsems=3, desc=least("ipc_desc_entry"))
    assert one("ipcns-sem-1", semaphores, b"\1\0\2\0\0\1")["extra"] == [1, 2, 256]
    without = loaded(image("pipes-data", (pipe, b"abc")), payloads=False)
    assert without["entries"][0]["extra"] == "... <3B>"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (1020, "1020B"), (1024, "1KB"), (1536, "1.5KB"), (1 << 30, "1GB")]
)
def test_sizes_without_payloads(size: int, text: str) -> None:
    message = pb.ipc_shm_entry(size=size, desc=least("ipc_desc_entry"))
    data = image("ipcns-shm-1", message)
    fd = os.memfd_create("image")
    os.write(fd, data)
    os.truncate(fd, len(data) + size)
    shown = crit.load(fd, "it.img", payloads=False)
    os.close(fd)
    assert shown["entries"][0]["extra"] == f"... <{text}>"


def test_a_ghost_file_in_one_piece_and_in_chunks() -> None:
    whole = pb.ghost_file_entry(uid=0, gid=0, mode=0o100600)
    assert one("ghost-file-1", whole, b"abc")["extra"] == "YWJj\n"
    parts = pb.ghost_file_entry(uid=0, gid=0, mode=0o100600, chunks=True, size=9)
    data = image("ghost-file-1", parts, (pb.ghost_chunk_entry(len=2, off=4), b"xy"))
    shown = loaded(data)["entries"]
    assert "extra" not in shown[0]
    assert shown[1] == {"len": 2, "off": 4, "extra": "eHk=\n"}


def test_info() -> None:
    for name, what, count in (
        ("pagemap-1", [pb.pagemap_head(pages_id=1), least("pagemap_entry")], 1),
        ("pstree", [least("pstree_entry")] * 3, 3),
    ):
        fd = os.memfd_create("image")
        os.write(fd, image(name, *what))
        assert crit.info(fd, "it") == {"magic": magic.kind_of(name).magic, "count": count}
        os.close(fd)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("[1]", "magic: None is unknown"),
        ('{"magic": []}', "magic: "),
        ('{"magic": "X"}', "magic: 'X' is unknown"),
        ('{"magic": "PSTREE", "entries": 5}', "entries: not a list"),
        ('{"magic": "PSTREE", "entries": [5]}', "entry 0: pstree_entry should be an object"),
        ('{"magic": "PSTREE", "entries": [{"pid": 1}]}', "entry 0: pstree_entry lacks ppid"),
        ('{"magic": "PSTREE", "entries": [{"pid": "x"}]}', "entry 0: pid: "),
        ('{"magic": "PSTREE", "entries": [{"pid": 4294967296}]}', "entry 0: pid: "),
        ('{"magic": "PSTREE", "entries": [{"pid": 1.5}]}', "entry 0: pid: "),
        ('{"magic": "PSTREE", "entries": [{"threads": 7}]}', "entry 0: threads: "),
        ('{"magic": "FDINFO", "entries": [{"type": "X"}]}', "entry 0: type: "),
        ('{"magic": "MNTS", "entries": [{"root_dev": "1:2:3"}]}', "entry 0: root_dev: "),
        ('{"magic": "TTY_DATA", "entries": [{"data": "x"}]}', "entry 0: data: "),
        ('{"magic": "MM", "entries": [{"vmas": [1]}]}', "entry 0: vmas: vma_entry should be"),
        ('{"magic": "REG_FILES", "entries": [{"name": 5}]}', "entry 0: "),
        (
            '{"magic": "PIPES_DATA", "entries": [{"pipe_id": 1, "bytes": 9, "extra": "YQ=="}]}',
            "entry 0: extra has 1 bytes, the message announces 9",
        ),
        ('{"magic": "CGROUP", "entries": [' + "[" * 100000, "no JSON"),
        (
            '{"magic": "CGROUP", "entries": [{"controllers": [{"dirs": ['
            + '{"dir_name": "", "children": [' * 900 + "]}" * 900 + "]}]}]}",
            "",
        ),
    ],
)  # fmt: skip
def test_what_describes_no_image_is_refused(text: str, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        crit.from_json(text, "it.json")
    assert str(caught.value).startswith(f"it.json: {why}")


def test_raw_data_is_no_image() -> None:
    with pytest.raises(ImageError, match=r"it\.img: magic: 0x70707070 is unknown"):
        loaded(b"p" * 4096)


# ---------------------------------------------------------------------------------------- crit x


@pytest.fixture
def reader(tmp_path: Any) -> Any:
    fd = os.open(tmp_path, os.O_RDONLY)
    with ImageWriter(fd) as writer:
        fill(writer)
        writer.commit()
    yield ImageReader(fd)
    os.close(fd)


def fill(writer: ImageWriter) -> None:
    for pid, ppid in ((5, 0), (6, 5)):
        writer.append("pstree", pb.pstree_entry(pid=pid, ppid=ppid, pgid=5, sid=5))
        core = pb.core_entry(mtype=1, tc=least("task_core_entry"))
        core.tc.comm = f"task{pid}"
        writer.append(f"core-{pid}", core)
    writer.append("ids-5", pb.task_kobj_ids_entry(vm_id=1, files_id=2, fs_id=1, sighand_id=1))
    writer.append("fs-5", pb.fs_entry(cwd_id=1, root_id=9))
    for fd, number, kind in ((0, 1, "REG"), (3, 2, "PIPE"), (4, 3, "EVENTFD")):
        entry = pb.fdinfo_entry(id=number, flags=0, type=pb.fd_types.Value(kind), fd=fd)
        writer.append("fdinfo-2", entry)
    reg = pb.file_entry(type=pb.fd_types.REG, id=1, reg=least("reg_file_entry"))
    reg.reg.name = "/bin/sh"
    pipe = pb.file_entry(type=pb.fd_types.PIPE, id=2, pipe=least("pipe_entry"))
    pipe.pipe.pipe_id = 77
    writer.append("files", reg)
    writer.append("files", pipe)
    mm = least("mm_entry")
    mm.exe_file_id = 1
    for start, end, status, shmid, pgoff in (
        (0x1000, 0x3000, 1 << 6 | 1, 1, 0x2000),
        (0x4000, 0x6000, 1 << 9 | 1, 0, 0),
        (0x7000, 0x8000, 1 << 3, 0, 0),
    ):
        vma = least("vma_entry")
        vma.start, vma.end, vma.status, vma.shmid, vma.pgoff = start, end, status, shmid, pgoff
        vma.prot = 5
        mm.vmas.append(vma)
    writer.append("mm-5", mm)
    writer.append("pagemap-5", pb.pagemap_head(pages_id=1))
    run = pb.pagemap_entry(vaddr=0x2000, compat_nr_pages=0, flags=4, nr_pages=3)
    writer.append("pagemap-5", run)
    os.truncate(writer.raw("pages-1"), 3 * 4096)


def test_x_ps(reader: ImageReader) -> None:
    assert explore.processes(reader) == (
        "    PID   PGID    SID   COMM\n"
        "      5      5      5   task5\n"
        "      6      5      5       task6\n"
    )


def test_x_fds(reader: ImageReader) -> None:
    assert explore.descriptors(reader) == (
        "5\n\t      0: /bin/sh\n\t      3: pipe[77]\n\t      4: EVENTFD.3\n"
        "\t    cwd: /bin/sh\n\t   root: unknown path\n6\n"
    )


def test_x_mems(reader: ImageReader) -> None:
    lines = explore.memory(reader).splitlines()
    assert [line.split() for line in lines] == [
        ["5"], ["exe", "/bin/sh"], ["00001000-00003000", "r-x", "/bin/sh", "+", "0x2000"],
        ["00004000-00006000", "r-x"], ["00007000-00008000", "r-x", "[vdso]", "*"], ["6"],
    ]  # fmt: skip


def test_x_rss(reader: ImageReader) -> None:
    lines = explore.resident(reader).splitlines()
    assert [line.split() for line in lines if line.strip()] == [
        ["5"], ["2000", "/", "3", "00001000", "/", "2", "/bin/sh"], ["00004000", "/", "2"], ["6"],
    ]  # fmt: skip


def test_json_is_json(reader: ImageReader) -> None:
    for name in reader.names():
        if magic.kind_of(name).form != magic.RAW:
            fd = reader.open(name)
            assert json.loads(crit.to_json(crit.load(fd, name)))["entries"]
            os.close(fd)
