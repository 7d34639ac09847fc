"""BPF maps: what they are and what is in them, through the images and through the whole engine."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import Library, Targets
from kit.file_bench import Bench
from torpor.errors import ImageError, KernelError, TorporError, Unsupported
from torpor.images import schema as pb
from torpor.linux import bpf_map

HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU, LPM = 1, 2, 5, 6, 9, 11


def content(fd: int, key: int, value: int) -> dict[bytes, bytes]:
    """By another way than the code under test takes: key by key."""
    found: dict[bytes, bytes] = {}
    for keys, values, _ in bpf_map._one_by_one(fd, key, value):
        found[keys] = values
    return found


def round_trip(fd: int) -> int:
    """The bench's own descriptor of the restored map, which the caller closes."""
    with Bench() as bench:
        number = bench.dump(fd)
        bench.commit()
        return os.dup(bench.build(number))


@settings(max_examples=20)
@given(st.dictionaries(st.binary(min_size=6, max_size=6), st.binary(min_size=11, max_size=11), max_size=50))
def test_a_table_of_any_content(wanted: dict[bytes, bytes]) -> None:
    fd = bpf_map.create(HASH, 6, 11, 64, 1, b"kit_table")
    bpf_map.write(fd, 6, 11, b"".join(wanted), b"".join(wanted.values()), len(wanted))
    copy = round_trip(fd)
    before, after = bpf_map.Map(fd), bpf_map.Map(copy)
    for field in ("type", "key_size", "value_size", "max_entries", "flags", "name", "extra"):
        assert getattr(after, field) == getattr(before, field)
    assert after.id != before.id
    assert content(copy, 6, 11) == wanted
    os.close(fd)
    os.close(copy)


def test_more_than_fits_into_one_batch() -> None:
    fd = bpf_map.create(HASH, 4, 8, 20000, 0, b"")
    wanted = {struct.pack("=I", n * 7): struct.pack("=Q", n) for n in range(15000)}
    bpf_map.write(fd, 4, 8, b"".join(wanted), b"".join(wanted.values()), len(wanted))
    copy = round_trip(fd)
    assert content(copy, 4, 8) == wanted
    os.close(fd)
    os.close(copy)


@pytest.mark.parametrize("kind", [ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU, LPM])
def test_the_other_plain_kinds(kind: int) -> None:
    size = 8 if kind == LPM else 4
    fd = bpf_map.create(kind, size, 12, 4, 1 if kind == LPM else 0, b"kit")
    with open("/sys/devices/system/cpu/possible") as file:
        cpus = int(file.read().split("-")[-1]) + 1
    width = 16 * cpus if kind in (PERCPU_HASH, PERCPU_ARRAY) else 12
    for n in range(3):
        key = struct.pack("=I", 8 * (n + 1)) + b"\x07abc" if kind == LPM else struct.pack("=I", n)
        value = b"".join(bytes([16 * n + cpu] * 12) + bytes(4) for cpu in range(cpus)) if width > 12 else bytes([n]) * 12
        bpf_map.write(fd, size, width, key, value, 1)
    copy = round_trip(fd)
    assert content(copy, size, width) == content(fd, size, width)
    assert len(content(fd, size, width)) >= 1
    os.close(fd)
    os.close(copy)


def test_a_frozen_map_stays_frozen_and_a_read_only_descriptor_read_only() -> None:
    fd = bpf_map.create(ARRAY, 4, 8, 2, 1 << 10, b"")  # BPF_F_MMAPABLE
    bpf_map.write(fd, 4, 8, bytes(4), b"ABCDEFGH", 1)
    bpf_map.freeze(fd)
    other = bpf_map.by_id(bpf_map.Map(fd).id, bpf_map.F_RDONLY)
    with Bench() as bench:
        numbers = [bench.dump(fd), bench.dump(other)]
        bench.commit()
        copy, reader = (bench.build(number) for number in numbers)
        assert bpf_map.Map(copy).id == bpf_map.Map(reader).id
        assert content(reader, 4, 8)[bytes(4)] == b"ABCDEFGH"
        with open(f"/proc/self/fdinfo/{copy}") as file:
            assert "frozen:\t1\n" in file.read()
        with pytest.raises(KernelError) as caught:
            bpf_map.write(copy, 4, 8, bytes(4), bytes(8), 1)
        assert caught.value.errno == errno.EPERM
        with open(f"/proc/self/fdinfo/{reader}") as file:
            assert int(file.read().split("flags:\t")[1].split()[0], 8) & 3 == os.O_RDONLY
    os.close(fd)
    os.close(other)


def test_declared_types_are_kept() -> None:
    """BTF of one unsigned int (Documentation/bpf/btf.rst)."""
    strings = b"\0word\0"
    types = struct.pack("=IIII", 1, 1 << 24, 4, 32)
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    btf = bpf_map.load_btf(head + types + strings)
    fd = bpf_map.create(ARRAY, 4, 4, 2, 0, b"typed", btf=(btf, 1, 1))
    copy = round_trip(fd)
    after = bpf_map.Map(copy)
    assert (after.btf_key, after.btf_value) == (1, 1)
    assert bpf_map.btf_bytes(after.btf) == bpf_map.btf_bytes(bpf_map.Map(fd).btf)
    for one in (btf, fd, copy):
        os.close(one)


def test_kinds_that_cannot_be_carried_are_named() -> None:
    for kind, key, value, what in ((22, 0, 4, "queue"), (7, 4, 8, "stack traces"), (3, 4, 4, "programs")):
        fd = bpf_map.create(kind, key, value, 4, 0, b"")
        with Bench() as bench, pytest.raises(Unsupported, match=what) as caught:
            bench.check(fd)
        assert caught.value.hint
        os.close(fd)
    fd = bpf_map.create(HASH, 4, 4, 4, bpf_map.F_WRONLY, b"")
    with Bench() as bench, pytest.raises(Unsupported, match="writing only"):
        bench.check(fd)
    os.close(fd)


@pytest.mark.parametrize("damage", ["keys", "values", "kind"])
def test_a_damaged_image_is_named(damage: str) -> None:
    fd = bpf_map.create(HASH, 4, 8, 4, 0, b"")
    bpf_map.write(fd, 4, 8, bytes(4), bytes(8), 1)
    with Bench() as bench:
        number = bench.dump(fd)
        building = bench.commit()
        _, entry = building.files[number]
        broken = pb.bpfmap_file_entry()
        broken.CopyFrom(entry)
        if damage == "keys":
            broken.key_size = 400
        elif damage == "values":
            broken.value_size = 80
        else:
            broken.map_type = 27
        with pytest.raises((ImageError, Unsupported)) as caught:
            bench.kinds.of_type(19).restore(broken, building)
        assert isinstance(caught.value, TorporError)
    os.close(fd)


PROGRAM = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attr):
    area = ctypes.create_string_buffer(attr, len(attr))
    return libc.syscall(321, command, area, len(attr)), area.raw
def element(command, fd, key, value):
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    r, _ = bpf(command, struct.pack("=IxxxxQQQ", fd, ctypes.addressof(k), ctypes.addressof(v), 0))
    return r, v.raw
fd, _ = bpf(0, struct.pack("=7I16s", 1, 4, 8, 10, 0, 0, 0, b"kit_map"))
assert fd >= 0
other = os.dup(fd); os.set_inheritable(other, True)
for n in range(5): assert element(2, fd, struct.pack("=I", n), b"value%03d" % n)[0] == 0
child = os.fork()
if child == 0:
    wait_told("go")
    element(2, fd, struct.pack("=I", 7), b"by child")
    os._exit(0)
ready(); wait_told("go")
os.waitpid(child, 0)
values = [element(1, other, struct.pack("=I", n), bytes(8)) for n in (*range(5), 7, 9)]
wanted = [(0, b"value%03d" % n) for n in range(5)] + [(0, b"by child"), (-1, bytes(8))]
done(values == wanted, f"{values}")
"""


def test_parent_and_child_share_a_map(start: Targets, library: Library, images: str) -> None:
    target = start.python(PROGRAM)
    target.pids()
    library.dump(target.pid, images)
    target.wait_gone()
    library.restore(images)
    target.go()
