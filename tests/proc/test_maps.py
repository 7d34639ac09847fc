from __future__ import annotations

import ctypes
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.proc import maps, read

PAGE = mmap.PAGESIZE
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0


def one(text: bytes) -> maps.Vma:
    [vma] = maps.parse(text + b"\n")
    return vma


def test_a_line() -> None:
    vma = one(b"7f5a1000-7f5a3000 r-xp 00002000 fe:01 12345                      /usr/lib/x y.so")
    assert (vma.start, vma.end, vma.pgoff) == (0x7F5A1000, 0x7F5A3000, 0x2000)
    assert (vma.prot, vma.flags) == (maps.PROT_READ | maps.PROT_EXEC, maps.MAP_PRIVATE)
    assert (vma.dev, vma.inode) == ((0xFE, 1), 12345)
    assert (vma.kind, vma.path, vma.deleted) == (maps.FILE, b"/usr/lib/x y.so", False)
    assert vma.name == vma.path


@pytest.mark.parametrize(
    ("shown", "kind", "path", "deleted", "name"),
    [
        (b"", "anon", b"", False, b""),
        (b"[heap]", "heap", b"[heap]", False, b"[heap]"),
        (b"[stack]", "stack", b"[stack]", False, b"[stack]"),
        (b"[vdso]", "vdso", b"[vdso]", False, b"[vdso]"),
        (b"[vvar]", "vvar", b"[vvar]", False, b"[vvar]"),
        (b"[vvar_vclock]", "vvar_vclock", b"[vvar_vclock]", False, b"[vvar_vclock]"),
        (b"[vsyscall]", "vsyscall", b"[vsyscall]", False, b"[vsyscall]"),
        (b"[uprobes]", "special", b"[uprobes]", False, b"[uprobes]"),
        (b"[anon:a: b]", "named", b"[anon:a: b]", False, b"a: b"),
        (b"[anon_shmem:x]", "named_shmem", b"[anon_shmem:x]", False, b"x"),
        (b"/dev/zero (deleted)", "shmem", b"/dev/zero", True, b"/dev/zero"),
        (b"/dev/zero", "file", b"/dev/zero", False, b"/dev/zero"),
        (b"/SYSV00000a0b (deleted)", "sysv", b"/SYSV00000a0b", True, b"/SYSV00000a0b"),
        (b"/SYSV (really)", "file", b"/SYSV (really)", False, b"/SYSV (really)"),
        (b"/memfd:a b (deleted)", "memfd", b"/memfd:a b", True, b"a b"),
        (b"/memfd: (deleted)", "memfd", b"/memfd:", True, b""),
        (b"/memfd:x (deleted) (deleted)", "memfd", b"/memfd:x (deleted)", True, b"x (deleted)"),
        (b"/secretmem (deleted)", "secretmem", b"/secretmem", True, b"/secretmem"),
        (b"/anon_hugepage (deleted)", "hugepage", b"/anon_hugepage", True, b"/anon_hugepage"),
        (b"/[aio] (deleted)", "aio", b"/[aio]", True, b"/[aio]"),
        (b"anon_inode:[perf_event]", "anon_inode", b"anon_inode:[perf_event]", False, None),
        (b"socket:[5]", "socket", b"socket:[5]", False, None),
        (b"pipe:[5]", "other", b"pipe:[5]", False, None),
        (b"/a\\012b (deleted)", "file", b"/a\nb", True, b"/a\nb"),
        (b"/a\\134 ", "file", b"/a\\134 ", False, b"/a\\134 "),
        (b"/with\rcr and\x0bvt", "file", b"/with\rcr and\x0bvt", False, None),
    ],
)
def test_kinds(shown: bytes, kind: str, path: bytes, deleted: bool, name: bytes | None) -> None:
    vma = one(b"1000-2000 rw-s 00000000 00:01 7 " + b" " * 9 + shown)
    assert (vma.kind, vma.path, vma.deleted) == (kind, path, deleted)
    assert vma.name == (path if name is None else name)


NAMES = st.one_of(
    st.sampled_from([b"", b"[heap]", b"[stack]", b"[vdso]", b"socket:[9]"]),
    st.binary(max_size=40)
    .filter(lambda path: b"\0" not in path and b"\\" not in path)
    .map(lambda path: b"/" + path),
)
VMAS = st.builds(
    lambda start, pages, prot, flags, pgoff, dev, inode, name: (
        start * PAGE,
        (start + pages) * PAGE,
        prot,
        flags,
        pgoff * PAGE,
        dev,
        inode,
        name,
    ),
    st.integers(0, 2**35),
    st.integers(1, 2**20),
    st.integers(0, 7),
    st.sampled_from([1, 2]),
    st.integers(0, 2**51),
    st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    st.integers(0, 2**64 - 1),
    NAMES,
)


def show(vma: tuple[int, int, int, int, int, tuple[int, int], int, bytes]) -> bytes:
    start, end, prot, flags, pgoff, dev, inode, name = vma
    perms = bytes(letter if prot >> bit & 1 else ord("-") for bit, letter in enumerate(b"rwx"))
    line = b"%08x-%08x %s%s %08x %02x:%02x %d " % (
        start,
        end,
        perms,
        b"s" if flags == 1 else b"p",
        pgoff,
        *dev,
        inode,
    )
    return line.ljust(73) + name.replace(b"\n", b"\\012") if name else line


@given(st.lists(VMAS, max_size=8), st.booleans())
def test_what_is_printed_is_parsed(
    vmas: list[tuple[int, int, int, int, int, tuple[int, int], int, bytes]], deleted: bool
) -> None:
    suffix = b" (deleted)" if deleted else b""
    shown = [(*vma[:-1], vma[-1] + suffix) if vma[-1][:1] == b"/" else vma for vma in vmas]
    text = b"".join(show(vma) + b"\n" for vma in shown)
    parsed = maps.parse(text)
    assert [vma[:7] for vma in parsed] == [vma[:7] for vma in vmas]
    for vma, (*_, name) in zip(parsed, vmas, strict=True):
        if name[:1] == b"/":
            assert vma.deleted == (deleted or name.endswith(b" (deleted)"))
            assert vma.path == name or vma.path + b" (deleted)" == name
        else:
            assert (vma.path, vma.deleted) == (name, False)


@pytest.mark.parametrize(
    "text",
    [
        b"1000-2000 rw-p 0 00:00 0",
        b"\n",
        b"1000 rw-p 0 00:00 0 \n",
        b"1000-2000 rwzp 0 00:00 0 \n",
        b"1000-2000 rw-x 0 00:00 0 \n",
        b"1000-2000 rw-pp 0 00:00 0 \n",
        b"1000-2000 rw-p 0 0000 0 \n",
        b"1000-2000 rw-p 0 00:00 0\n",
        b"1000-2000 rw-p 0 00:00 z \n",
    ],
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^maps: cannot read"):
        maps.parse(text)


def test_nothing_is_mapped() -> None:
    assert maps.parse(b"") == []


def mine() -> dict[int, maps.Vma]:
    return {vma.start: vma for vma in maps.parse(read.read(os.getpid(), "maps"))}


def address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def test_live_file(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"odd\nname \r (deleted)")
    with open(path, "wb+") as file:
        file.truncate(4 * PAGE)
        mapping = mmap.mmap(file.fileno(), PAGE, mmap.MAP_SHARED, offset=2 * PAGE)
        stat = os.fstat(file.fileno())
    vma = mine()[address(mapping)]
    assert (vma.end - vma.start, vma.pgoff) == (PAGE, 2 * PAGE)
    assert (vma.prot, vma.flags) == (3, maps.MAP_SHARED)
    assert vma.dev == (os.major(stat.st_dev), os.minor(stat.st_dev))
    assert vma.inode == stat.st_ino
    assert vma.kind == maps.FILE
    # It looks deleted and is not; the inode number is there to tell.
    assert vma.path + b" (deleted)" == path
    os.unlink(path)
    assert mine()[vma.start].path == path
    assert mine()[vma.start].deleted


def test_live_memfd() -> None:
    fd = os.memfd_create("a ] b", 0)
    os.ftruncate(fd, PAGE)
    mapping = mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE)
    vma = mine()[address(mapping)]
    assert (vma.kind, vma.name, vma.deleted) == (maps.MEMFD, b"a ] b", True)
    assert vma.inode == os.fstat(fd).st_ino
    os.close(fd)


@pytest.mark.parametrize(
    ("flags", "plain", "named"),
    [(mmap.MAP_SHARED, maps.SHMEM, maps.NAMED_SHMEM), (mmap.MAP_PRIVATE, maps.ANON, maps.NAMED)],
)
def test_live_memory_without_a_file(flags: int, plain: str, named: str) -> None:
    # The pages on both sides keep it from being merged with a neighbour.
    span = mmap.mmap(-1, 3 * PAGE, flags | mmap.MAP_ANONYMOUS)
    start = address(span) + PAGE
    libc = ctypes.CDLL(None)
    place = (ctypes.c_void_p(start), ctypes.c_ulong(PAGE))
    assert libc.mprotect(*place, mmap.PROT_READ) == 0
    vma = mine()[start]
    assert (vma.kind, vma.path, vma.prot) == (plain, *NO_NAME[plain], maps.PROT_READ)
    zero = ctypes.c_ulong(PR_SET_VMA_ANON_NAME)
    if libc.prctl(PR_SET_VMA, zero, *place, ctypes.c_char_p(b"x: y")) == 0:
        assert (mine()[start].kind, mine()[start].name) == (named, b"x: y")
    else:  # a kernel without CONFIG_ANON_VMA_NAME
        assert mine()[start].kind == plain


NO_NAME = {maps.SHMEM: (b"/dev/zero",), maps.ANON: (b"",)}


def test_live_specials_are_found_once() -> None:
    kinds = [vma.kind for vma in mine().values()]
    for kind in (maps.VDSO, maps.VVAR, maps.STACK, maps.HEAP):
        assert kinds.count(kind) == 1, kind
    addresses = [bound for vma in mine().values() for bound in (vma.start, vma.end)]
    assert addresses == sorted(addresses)
