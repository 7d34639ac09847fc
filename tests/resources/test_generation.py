"""The guest page in bytes, and what the builder makes of it."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.errors import UsageError
from torpor.images import schema as pb
from torpor.model import guest_page
from torpor.options import ARGUMENT_BYTES, Options
from torpor.resources import generation
from torpor.resources.base import BuildContext
from torpor.undo import Undo

ID = bytes(range(16))


def page(**values: object) -> bytes:
    made = guest_page.Page()
    for name, value in values.items():
        setattr(made, name, value)
    return guest_page.build(made)


def context(**options: object) -> BuildContext:
    return BuildContext(Options(**options), None, Undo())


def test_offsets_are_those_of_the_documentation() -> None:
    """Every row of the table in docs/guest-protocol.md, against bytes that were put there by hand."""
    raw = bytearray(4096)
    struct.pack_into("<II", raw, 0, 7, 1)
    raw[8:20] = b"torpor guest"
    raw[24:40] = ID
    struct.pack_into("<IIiiiIIII", raw, 40, 6, 12, 9, 100, 101, 10_000, 1, 5, 3)
    raw[128:131] = b"why"
    raw[1024:1029] = b"\0\1\2\3\4"
    seen = guest_page.parse(bytes(raw))
    assert (seen.generation, seen.id, seen.state, seen.signal, seen.eventfd) == (7, ID, 6, 12, 9)
    assert (seen.pid, seen.tid, seen.point, seen.text, seen.argument) == (100, 101, 1, "why", b"\0\1\2\3\4")
    assert guest_page.ARGUMENT_BYTES == ARGUMENT_BYTES == 3072


@given(
    counter=st.integers(0, 2**32 - 1), state=st.integers(0, 6), signal=st.integers(0, 64), text=st.text(max_size=200),
    argument=st.binary(max_size=3072), pid=st.integers(0, 1 << 22), fd=st.integers(-1, 1 << 20),
)  # fmt: skip
def test_renewing_keeps_what_is_the_programs(
    counter: int, state: int, signal: int, text: str, argument: bytes, pid: int, fd: int
) -> None:
    before = page(generation=counter, state=state, signal=signal, text=text, argument=b"old", pid=pid, eventfd=fd)
    seen = guest_page.parse(guest_page.renewed(before, ID, argument))
    assert seen.generation == (counter + 1) % 2**32 or (counter == 2**32 - 1 and seen.generation == 1)
    assert seen.generation != 0
    assert (seen.id, seen.argument, seen.state, seen.text) == (ID, argument, guest_page.RESTORED, "")
    assert (seen.signal, seen.pid, seen.eventfd) == (signal, pid, fd)


@given(st.binary(max_size=200), st.integers(0, 4095))
def test_any_bytes_are_refused_or_read(noise: bytes, where: int) -> None:
    raw = bytearray(page())
    raw[where : where + len(noise)] = noise
    try:
        seen = guest_page.parse(bytes(raw[:4096]))
    except ValueError:
        return
    assert 0 <= seen.signal <= 64 and len(seen.argument) <= 3072 and seen.text.isprintable()


@pytest.mark.parametrize("content", [b"", bytes(4096), page()[:4095], b"x" * 4096])
def test_what_is_no_page(content: bytes) -> None:
    with pytest.raises(ValueError, match="do not begin as a guest page"):
        guest_page.parse(content)


def test_pages_of_one_wake_up_have_one_id() -> None:
    ctx, other = context(argument=b"for all"), context()
    found = []
    for where in (ctx, ctx, other):
        fd = os.memfd_create("page")
        os.write(fd, page(generation=4))
        generation.renew(fd, guest_page.NAME, where)
        found.append(guest_page.parse(os.pread(fd, 4096, 0)))
        os.close(fd)
    assert found[0].id == found[1].id != found[2].id
    assert [one.generation for one in found] == [5, 5, 5]
    assert [one.argument for one in found] == [b"for all", b"for all", b""]


def test_an_argument_of_one_copy_and_a_pid_of_its_own() -> None:
    ctx = context(argument=b"for all")
    ctx.memo["argument"] = b"for this one"
    fd = os.memfd_create("page")
    os.write(fd, page(pid=40, tid=40))
    generation.renew(fd, guest_page.NAME, ctx)
    generation.moved(40, 77, ctx)
    seen = guest_page.parse(os.pread(fd, 4096, 0))
    os.close(fd)
    assert (seen.argument, seen.pid, seen.tid) == (b"for this one", 77, 77)
    assert generation.woken(ctx)[0].page.pid == 77


def test_with_the_switch_off_nothing_is_changed() -> None:
    fd = os.memfd_create("page")
    os.write(fd, page())
    generation.renew(fd, guest_page.NAME, context(new_generation=False))
    assert os.pread(fd, 4096, 0) == page()
    os.close(fd)
    entry = pb.reg_file_entry(id=1, flags=0, pos=0, name="/x", generation=3)
    assert generation.stand_in(entry, os.O_RDONLY, context(new_generation=False)) is None


def test_an_argument_has_a_limit() -> None:
    generation.check(bytes(3072))
    with pytest.raises(UsageError, match="3073 bytes: 3072 at most") as caught:
        generation.check(bytes(3073))
    assert "name of a file" in caught.value.hint


def test_a_generation_file_is_known_by_its_content(tmp_path: object) -> None:
    path = f"{tmp_path}/generation"
    generation.create(path)
    assert generation.counter_of(path, os.stat(path)) == 1
    assert os.stat(path).st_mode & 0o777 == 0o644
    assert os.listdir(str(tmp_path)) == ["generation"], "nothing is left beside it"
    with pytest.raises(FileExistsError):
        generation.create(path)
    assert os.listdir(str(tmp_path)) == ["generation"]
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"other")
    assert generation.counter_of(path, os.stat(path)) is None
    os.truncate(path, 100)
    assert generation.counter_of(path, os.stat(path)) is None
    assert generation.counter_of(f"{tmp_path}/gone", os.stat(path)) is None
