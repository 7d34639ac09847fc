from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.errors import Unsupported
from torpor.linux import btf

INT, STRUCT, UNION, ARRAY, TYPEDEF, FUNC = 1, 4, 5, 3, 8, 12


class Writer:
    """Writes BTF; types are numbered from 1 in the order in which they are added."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"

    def name(self, text: str) -> int:
        known = self.strings.find(b"\0" + text.encode() + b"\0")
        if not text or known >= 0:
            return known + 1 if text else 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(self, name: str, kind: int, size: int, *words: int, count: int = 0, flag: int = 0) -> None:
        self.types += struct.pack("<III", self.name(name), flag << 31 | kind << 24 | count, size)
        self.types += struct.pack(f"<{len(words)}I", *words)

    def composite(self, name: str, kind: int, *members: tuple[str, int, int], flag: int = 0) -> None:
        words = [word for field, kind_of, bits in members for word in (self.name(field), kind_of, bits)]
        self.add(name, kind, 64, *words, count=len(members), flag=flag)

    def data(self) -> bytes:
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return head + self.types + self.strings


def sample() -> bytes:
    w = Writer()
    w.add("int", INT, 4, 32)  # 1
    w.composite("inner", STRUCT, ("a", 1, 0), ("b", 1, 32))  # 2
    w.add("inner_t", TYPEDEF, 2)  # 3
    w.composite("", UNION, ("u", 1, 0), ("", 5, 64))  # 4
    w.composite("", STRUCT, ("deep", 3, 128))  # 5
    w.composite("outer", STRUCT, ("first", 1, 0), ("", 4, 64), ("plain", 2, 512))  # 6
    w.add("outer", FUNC, 1)  # 7: a function of the same name
    w.composite("bits", STRUCT, ("one", 1, 3 << 24 | 0), ("two", 1, 5 << 24 | 35), flag=1)  # 8
    w.add("", ARRAY, 0, 1, 1, 7)  # 9
    w.composite("outer_outer", STRUCT, ("last", 1, 24 * 8))  # 10
    return w.data()


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("outer.first", 0), ("outer.u", 8), ("outer.deep", 8 + 8 + 16), ("outer.deep.b", 8 + 8 + 16 + 4),
        ("outer.plain.b", 64 + 4), ("bits.two", 4), ("outer_outer.last", 24), ("inner.b", 4),
    ],
)  # fmt: skip
def test_offsets(path: str, offset: int) -> None:
    assert btf.Btf(sample()).offset(path) == offset


@pytest.mark.parametrize("path", ["outer.nothing", "nothing.first", "inner_t.a", "outer.first.more", "utter.first"])
def test_what_is_not_there(path: str) -> None:
    with pytest.raises(LookupError):
        btf.Btf(sample()).offset(path)


def test_functions_and_structs_are_told_apart() -> None:
    types = btf.Btf(sample())
    assert (types.find("outer", btf.STRUCT), types.find("outer", btf.FUNC)) == (6, 7)


@given(st.binary(max_size=200))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        btf.Btf(data)


@given(st.data())
def test_a_piece_of_it_is_refused_or_read(data: st.DataObject) -> None:
    whole = sample()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        btf.Btf(cut).offset("outer.deep.b")
    except (ValueError, LookupError):
        pass


def test_this_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Against what is part of the kernel's interface and so will not change."""
    monkeypatch.setattr(btf, "CACHE", str(tmp_path))
    questions = ["timespec64.tv_nsec", "iovec.iov_base_ago|iovec.iov_len", "pollfd.revents", "epoll_event.data"]
    answers = btf.lookup([*questions, "bpf_iter_task()"])
    assert [answers[question] for question in questions] == [8, 8, 6, 4]
    assert answers["bpf_iter_task()"] > 0


def test_answers_are_kept_for_this_boot_and_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(btf, "CACHE", str(tmp_path))
    assert btf.lookup(["iovec.iov_len"]) == {"iovec.iov_len": 8}
    kept = f"{tmp_path}/btf"
    monkeypatch.setattr(btf, "VMLINUX", "/nonexistent")
    assert btf.lookup(["iovec.iov_len"]) == {"iovec.iov_len": 8}
    with pytest.raises(Unsupported):
        btf.lookup(["iovec.iov_len", "pollfd.revents"])  # not asked for before
    os.chmod(kept, 0o666)
    with pytest.raises(Unsupported):
        btf.lookup(["iovec.iov_len"])
    os.chmod(kept, 0o644)
    with open(kept, encoding="ascii") as file:
        text = file.read()
    with open(kept, "w", encoding="ascii") as file:
        file.write("another-boot\n" + text.partition("\n")[2])
    with pytest.raises(Unsupported):
        btf.lookup(["iovec.iov_len"])
