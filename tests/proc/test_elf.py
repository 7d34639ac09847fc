from __future__ import annotations

import ctypes
import os
import struct
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torpor.proc import elf, maps, read


def vdso() -> bytes:
    [vma] = [one for one in maps.parse(read.read(os.getpid(), "maps")) if one.kind == maps.VDSO]
    return ctypes.string_at(vma.start, vma.end - vma.start)


@pytest.fixture(scope="module")
def image() -> bytes:
    return vdso()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small shared library, linked with either kind of hash table; file offsets are addresses."""
    folder = tmp_path_factory.mktemp("elf")
    source = folder / "x.c"
    source.write_text("int one(void){return 1;} int two(void){return one();} extern int gone(void);"
                      "int three(void){return gone();}")  # fmt: skip
    images = {}
    for style in ("sysv", "gnu", "both"):
        output = folder / f"{style}.so"
        options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,--hash-style={style}", "-Wl,--build-id"]
        subprocess.run(["cc", *options, "-o", output, source], check=True)
        images[style] = output.read_bytes()
    return images


def test_vdso_symbols_are_where_the_dynamic_linker_finds_them(image: bytes) -> None:
    libc = ctypes.CDLL(None)
    libc.dlvsym.restype = ctypes.c_void_p
    libc.dlopen.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(libc.dlopen(b"linux-vdso.so.1", 5))  # RTLD_LAZY | RTLD_NOLOAD
    [vma] = [one for one in maps.parse(read.read(os.getpid(), "maps")) if one.kind == maps.VDSO]
    symbols = elf.Elf(image).symbols()
    assert "__vdso_clock_gettime" in symbols
    for name, symbol in symbols.items():
        if symbol.type != elf.STT_FUNC:
            continue
        found = libc.dlvsym(handle, name.encode(), b"LINUX_2.6")
        assert found == vma.start + symbol.value, name
        assert 0 < symbol.size < len(image) - symbol.value


def test_vdso_has_a_build_id_and_room(image: bytes) -> None:
    vdso = elf.Elf(image)
    build_id = vdso.build_id()
    assert build_id is not None
    assert len(build_id) == 20
    assert (b"GNU", elf.NT_GNU_BUILD_ID, build_id) in vdso.notes()
    assert build_id in image
    start, end = vdso.padding()
    assert end == len(image)
    assert not any(image[start:end])
    assert start >= max(s.offset + s.filesz for s in vdso.segments)


def test_find_code(image: bytes) -> None:
    vdso = elf.Elf(image)
    places = vdso.find_code(b"\x0f\x05")
    assert places == sorted(places)
    assert all(image[place : place + 2] == b"\x0f\x05" for place in places)
    [code] = [s for s in vdso.segments if s.type == elf.PT_LOAD and s.flags & elf.PF_X]
    assert len(places) == image[code.offset : code.offset + code.filesz].count(b"\x0f\x05")


@pytest.mark.parametrize("style", ["sysv", "gnu", "both"])
def test_symbols_of_a_library(style: str, library: dict[str, bytes]) -> None:
    symbols = elf.Elf(library[style]).symbols()
    assert {"one", "two", "three"} <= set(symbols)
    assert "gone" not in symbols  # it is only asked for
    assert symbols["one"].type == elf.STT_FUNC
    assert symbols["one"].value < symbols["two"].value < symbols["three"].value
    body = library[style][symbols["one"].value :][: symbols["one"].size]
    assert body.endswith(b"\xc3")  # ret


def test_build_id_of_a_library(library: dict[str, bytes]) -> None:
    build_id = elf.Elf(library["gnu"]).build_id()
    assert build_id is not None
    assert len(build_id) == 20


def test_an_image_that_is_not_at_zero(image: bytes) -> None:
    """All addresses moved up, as a linker script with another base would do."""
    base = 0xFFFFFFFFFF700000
    moved = bytearray(image)
    vdso = elf.Elf(image)
    for number, segment in enumerate(vdso.segments):
        at = 64 + 56 * number
        struct.pack_into("<Q", moved, at + 16, segment.vaddr + base)
        if segment.type == elf.PT_DYNAMIC:
            for entry in range(segment.offset, segment.offset + segment.filesz, 16):
                tag, value = struct.unpack_from("<QQ", image, entry)
                if tag in (4, 5, 6, 0x6FFFFEF5):
                    struct.pack_into("<Q", moved, entry + 8, value + base)
    parsed = elf.Elf(bytes(moved))
    assert parsed.base == base
    symbols = parsed.symbols()
    assert set(symbols) == set(vdso.symbols())
    expected = {name: symbol.value - base for name, symbol in vdso.symbols().items()}
    assert {name: symbol.value for name, symbol in symbols.items()} == expected


@pytest.mark.parametrize("size", [0, 4, 63])
def test_a_short_image_is_refused(size: int, image: bytes) -> None:
    with pytest.raises(ValueError, match="elf"):
        elf.Elf(image[:size])


@pytest.mark.parametrize(("at", "byte"), [(0, 0), (4, 1), (5, 2), (54, 0)])
def test_another_kind_of_image_is_refused(at: int, byte: int, image: bytes) -> None:
    broken = bytearray(image)
    broken[at] = byte
    with pytest.raises(ValueError, match="elf"):
        elf.Elf(bytes(broken))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 0x600), st.integers(0, 255)), max_size=20),
    length=st.integers(0, 8192),
)
def test_a_hostile_image_raises_nothing_else(edits: list[tuple[int, int]], length: int) -> None:
    broken = bytearray(vdso()[:length])
    for at, byte in edits:
        if at < len(broken):
            broken[at] = byte
    try:
        image = elf.Elf(bytes(broken))
        start, end = image.padding()
        assert 0 <= start <= end == len(broken)
        image.find_code(b"\x0f\x05")
    except ValueError:
        return
    for method in (image.symbols, image.notes, image.build_id):
        try:
            method()
        except ValueError:
            pass
