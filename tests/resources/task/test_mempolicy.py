"""NUMA policies: of a thread, of mappings; a machine with one node can have all of them, without effect."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
from forked import build_context, child, dump, restore, syscall

from torpor import log
from torpor.errors import ImageError
from torpor.images import schema as pb
from torpor.model.source import Mapping, SourceTask
from torpor.proc import maps
from torpor.resources.task import mempolicy

DEFAULT, PREFERRED, BIND, INTERLEAVE, LOCAL, PREFERRED_MANY = range(6)
STATIC, RELATIVE = 1 << 15, 1 << 14
GET, SET, MBIND = 239, 238, 237
BY_ADDRESS = 2
PAGE = 4096

pytestmark = pytest.mark.skipif(not os.path.exists("/sys/devices/system/node"), reason="a kernel without CONFIG_NUMA")


def policy(address: int = 0) -> tuple[int, int]:
    """(mode, nodes) of the calling thread or of the mapping at an address, asked without Torpor."""
    mode, nodes = ctypes.c_int(), (ctypes.c_uint64 * 16)()
    syscall(GET, ctypes.byref(mode), nodes, 1024, address, BY_ADDRESS if address else 0)
    return mode.value, nodes[0]


def choose(mode: int) -> None:
    nodes = ctypes.c_uint64(1)
    syscall(SET, mode, 0 if mode in (DEFAULT, LOCAL) else ctypes.byref(nodes), 65)


@pytest.mark.parametrize("mode", [DEFAULT, PREFERRED, BIND, INTERLEAVE, LOCAL, PREFERRED_MANY, BIND | STATIC])
def test_of_a_thread(mode: int) -> None:
    with child(lambda: choose(mode)) as pid:
        core = dump(pid, mempolicy.RESOURCE).core
    assert core.thread_core.HasField("mempolicy") == (mode != DEFAULT)

    def observe() -> None:
        restore(core, mempolicy.RESOURCE)
        assert policy() == (mode, 0 if mode in (DEFAULT, LOCAL) else 1)

    with child(observe) as pid:
        assert dump(pid, mempolicy.RESOURCE).core == core


def test_of_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mempolicy, "has_several_nodes", lambda: True)
    area = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    nodes = ctypes.c_uint64(1)
    lines = b"".join(
        b"%x-%x rw-p 00000000 00:00 0 \n" % (at, at + size)
        for at, size in ((start, PAGE), (start + PAGE, 2 * PAGE), (start + 3 * PAGE, PAGE))
    )

    def setup() -> None:
        area[: 4 * PAGE] = b"x" * 4 * PAGE
        syscall(MBIND, start + PAGE, 2 * PAGE, INTERLEAVE, ctypes.byref(nodes), 65, 0)

    monkeypatch.setattr(SourceTask, "__init__", _with_mappings(SourceTask.__init__, lines))
    with child(setup) as pid:
        core = dump(pid, mempolicy.RESOURCE).core
    (entry,) = core.tc.mempolicies
    assert (entry.start, entry.end, entry.mode) == (start + PAGE, start + 3 * PAGE, INTERLEAVE)

    def observe() -> None:
        area[: 4 * PAGE] = b"y" * 4 * PAGE
        restore(core, mempolicy.RESOURCE)
        found = [policy(start + page * PAGE)[0] for page in range(4)]
        assert found == [DEFAULT, INTERLEAVE, INTERLEAVE, DEFAULT]
        assert policy() == (DEFAULT, 0)

    with child(observe):
        pass


def _with_mappings(init: object, lines: bytes) -> object:
    def made(task: SourceTask, *args: object) -> None:
        assert callable(init)
        init(task, *args)
        task.mappings = [Mapping(vma, frozenset()) for vma in maps.parse(lines)]

    return made


def test_nodes_that_are_not_here_are_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    core = pb.core_entry()
    core.thread_core.mempolicy.mode, core.thread_core.mempolicy.nodes = BIND, bytes(99) + b"\x10"
    mempolicy.RESOURCE.check(core, build_context())
    assert "not all here" in said[0]

    def observe() -> None:
        restore(core, mempolicy.RESOURCE)
        assert policy() == (DEFAULT, 0)

    with child(observe):
        pass


@pytest.mark.parametrize(("mode", "nodes"), [(BIND, bytes(129)), (1 << 31, b"\x01")])
def test_what_is_no_policy_is_refused(mode: int, nodes: bytes) -> None:
    core = pb.core_entry()
    core.thread_core.mempolicy.mode, core.thread_core.mempolicy.nodes = mode, nodes
    with pytest.raises(ImageError, match="mempolicy"):
        mempolicy.RESOURCE.check(core, build_context())


def test_several_nodes_are_seen_by_the_kernels_list(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(mempolicy, "NODES", str(tmp_path))
    assert not mempolicy.has_several_nodes()  # without CONFIG_NUMA there is no such folder
    for text, several in (("0\n", False), ("0-1\n", True), ("0,8\n", True), ("0-3,5\n", True)):
        with open(f"{tmp_path}/possible", "w") as file:
            file.write(text)
        assert mempolicy.has_several_nodes() == several
