"""System V shared memory: each test has an IPC namespace of its own, in a child."""

from __future__ import annotations

import ctypes
import os
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from kit.file_bench import Bench, alone_after, run_here
from torpor.errors import Unsupported
from torpor.images import schema as pb
from torpor.linux.call import call
from torpor.model.source import Mapping
from torpor.proc import maps, smaps
from torpor.remote.program import Program
from torpor.resources.memory.sysv import RESOURCE

CLONE_NEWIPC = 0x08000000
PAGE = 4096
AREA = 0x600000000000
IPC_SET, IPC_STAT, SHM_LOCK = 1, 2, 11


alone = alone_after(lambda: call("unshare", CLONE_NEWIPC))


def segment(key: int = 0, size: int = 5 * PAGE, mode: int = 0o640, at: int = AREA, flags: int = 0) -> int:
    number = call("shmget", key, size, 0o3000 | mode)
    assert call("shmat", number, at, flags) == at
    return number


def row(number: int) -> dict[str, str] | None:
    with open("/proc/sysvipc/shm") as file:
        head, *lines = [line.split() for line in file]
    return next((dict(zip(head, line, strict=True)) for line in lines if line[1] == str(number)), None)


def layout() -> list[str]:
    with open("/proc/self/maps") as file:
        return [line for line in file if "SYSV" in line and AREA <= int(line.split("-")[0], 16) < AREA + (1 << 32)]


class Round:
    """Dump what this process has attached, take it away, make it again."""

    def __init__(self, **memo: Any) -> None:
        self.bench = Bench()
        self.memo = memo
        self.mm = pb.mm_entry()
        with open("/proc/self/smaps", "rb") as file:
            flags = {start: names for start, _, names in smaps.parse_flags(file.read())}
        with open("/proc/self/maps", "rb") as file:
            found = [vma for vma in maps.parse(file.read()) if vma.kind == maps.SYSV and row(vma.inode)]
        for vma in found:
            entry = self.mm.vmas.add(
                start=vma.start, end=vma.end, pgoff=vma.pgoff, prot=vma.prot, flags=vma.flags,
                shmid=0, fd=-1, status=0,
            )  # fmt: skip
            mapping = Mapping(vma, flags[vma.start])
            RESOURCE.check(mapping, os.getpid(), self.bench.dumping)
            RESOURCE.dump(mapping, SimpleNamespace(pid=os.getpid()), self.bench.dumping, entry)
        for vma in found:
            call("munmap", vma.start, vma.end - vma.start)

    def build(self) -> Program:
        ctx = self.bench.commit()
        ctx.memo.update(self.memo, mm=self.mm)
        program = Program()
        for entry in self.mm.vmas:
            assert entry.status & RESOURCE.STATUS
            RESOURCE.prepare(entry, ctx)
        for entry in self.mm.vmas:
            RESOURCE.restore(entry, entry.prot, program, ctx)
        return program

    def go(self) -> None:
        run_here(self.build())
        for hook in self.bench.building.memo.get("after_mappings", ()):
            hook()


def write(at: int, data: bytes) -> None:
    ctypes.memmove(at, data, len(data))


def remove(number: int) -> None:
    call("shmctl", number, 0, None)


STAYING = ("key", "shmid", "perms", "size", "nattch", "uid", "gid", "cuid", "cgid")


def staying(number: int) -> dict[str, str]:
    found = row(number)
    assert found is not None
    return {name: found[name] for name in STAYING}


@alone
def test_made_again_with_everything() -> None:
    for _ in range(3):
        remove(call("shmget", 0, PAGE, 0o1600))
    os.setegid(77)
    os.seteuid(66)
    number = segment(key=0x7ABC, size=5 * PAGE - 100, mode=0o642)
    os.seteuid(0)
    os.setegid(0)
    area = ctypes.create_string_buffer(256)
    call("shmctl", number, IPC_STAT, area)
    struct.pack_into("II", area, 4, 88, 99)  # another owner than who made it
    call("shmctl", number, IPC_SET, area)
    call("shmctl", number, SHM_LOCK, None)
    write(AREA + 2 * PAGE, b"content")
    before, shown = staying(number), layout()
    assert (before["uid"], before["cuid"], before["perms"]) == ("88", "66", "2642")
    again = Round()
    remove(number)
    assert row(number) is None
    again.go()
    assert staying(number) == before and layout() == shown
    assert ctypes.string_at(AREA + 2 * PAGE, 7) == b"content"
    assert ctypes.string_at(AREA, 8) == bytes(8)
    assert call("shmget", 0x7ABC, 1, 0) == number


@alone
def test_removed_segment_lasts_as_long_as_it_is_attached() -> None:
    number = segment()
    write(AREA, b"going")
    remove(number)
    before = staying(number)
    assert before["perms"] == "1640"
    again = Round()
    assert row(number) is None
    again.go()
    assert staying(number) == before
    assert ctypes.string_at(AREA, 5) == b"going"
    call("shmdt", AREA)
    assert row(number) is None


@alone
def test_a_segment_that_is_there_is_filled_only_if_nobody_uses_it() -> None:
    number = segment(key=5)
    write(AREA, b"dumped")
    again = Round()
    assert call("shmat", number, AREA, 0) == AREA
    write(AREA, b"later!")
    write(AREA + PAGE, b"later!")
    call("shmdt", AREA)
    again.go()
    assert ctypes.string_at(AREA, 6) == b"dumped" and ctypes.string_at(AREA + PAGE, 6) == bytes(6)
    again = Round()
    other = AREA + (1 << 30)
    assert call("shmat", number, other, 0) == other
    write(other, b"in use")
    again.go()
    assert ctypes.string_at(AREA, 6) == b"in use"


@alone
def test_another_segment_in_its_place() -> None:
    number = segment(size=PAGE)
    again = Round()
    remove(number)
    with open("/proc/sys/kernel/shm_next_id", "w") as file:
        file.write(str(number))
    assert call("shmget", 0, 9 * PAGE, 0o1600) == number
    with pytest.raises(Unsupported, match="another segment has this identifier"):
        again.build()


@alone
def test_its_key_is_taken() -> None:
    number = segment(key=9)
    again = Round()
    remove(number)
    call("shmget", 9, PAGE, 0o1600)
    with pytest.raises(Unsupported, match="another segment has its key 0x9"):
        again.build()


@alone
def test_a_failed_restore_removes_what_it_made() -> None:
    number = segment()
    again = Round()
    remove(number)
    again.build()
    assert row(number) is not None
    again.bench.building.on_failure.roll_back()
    assert row(number) is None


@alone
def test_read_only_attachment_and_protections() -> None:
    number = segment()
    write(AREA, b"x")
    other = AREA + (1 << 30)
    assert call("shmat", number, other, 0o10000) == other
    call("mprotect", AREA + PAGE, PAGE, 1)
    call("mprotect", AREA + 2 * PAGE, PAGE, 0)
    shown = layout()
    again = Round()
    again.go()
    assert layout() == shown and len(shown) == 5
    call("mprotect", AREA + PAGE, PAGE, 3)
    with pytest.raises(OSError, match="EACCES"):
        call("mprotect", other, PAGE, 3)
    assert staying(number)["nattch"] == "5"  # the kernel counts pieces


@alone
def test_unmapped_parts() -> None:
    segment(size=8 * PAGE)
    write(AREA + 5 * PAGE, b"kept")
    call("munmap", AREA, PAGE)
    call("munmap", AREA + 3 * PAGE, PAGE)
    call("munmap", AREA + 7 * PAGE, PAGE)
    shown = layout()
    again = Round(arena=(AREA - PAGE, AREA))
    again.go()
    assert layout() == shown and len(shown) == 2
    assert ctypes.string_at(AREA + 5 * PAGE, 4) == b"kept"
    again = Round(arena=(AREA + 3 * PAGE, AREA + 4 * PAGE))
    with pytest.raises(Unsupported, match="needed for the restore itself"):
        again.build()
