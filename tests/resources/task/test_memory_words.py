"""What the kernel looks at in a thread's memory: clear_child_tid, robust list, rseq."""

from __future__ import annotations

import ctypes
import os
import struct

import pytest
from forked import child, dump, prctl, restore, syscall

from kit.programs import compile_c
from torpor.errors import Unsupported
from torpor.linux import ptrace
from torpor.linux.kernel import read_memory
from torpor.remote.tracee import Seized
from torpor.resources.task import robust_list, rseq, tid_address

SIGNATURE = 0x53053053  # glibc's on x86
libc = ctypes.CDLL(None)


def aligned(size: int, boundary: int) -> int:
    keep.append(ctypes.create_string_buffer(size + boundary))
    return -(-ctypes.addressof(keep[-1]) // boundary) * boundary


keep: list[object] = []
NO_RSEQ = "glibc.pthread.rseq=0"
SECTION = """
#include <linux/rseq.h>
#include <sys/syscall.h>
#include <unistd.h>
static struct rseq area __attribute__((aligned(32)));
static struct rseq_cs section __attribute__((aligned(32)));
extern char begin[], end[], handler[];
int main(void) {
    unsigned long places[2] = {(unsigned long)begin, (unsigned long)handler};
    section.start_ip = places[0];
    section.post_commit_offset = end - begin;
    section.abort_ip = places[1];
    if (syscall(SYS_rseq, &area, sizeof(area), 0, 0x53053053)) return 1;
    if (write(1, places, 16) != 16) return 2;
    __asm__ volatile(
        ".globl begin, end, handler\\n"
        "begin: movq %1, %0\\n1: jmp 1b\\nend: nop\\n"
        ".long 0x53053053\\nhandler: jmp begin\\n"
        : "=m"(area.rseq_cs) : "r"(&section) : "memory");
    return 0;
}
"""


def test_the_word_that_is_cleared_at_the_end() -> None:
    word = ctypes.c_int(7)
    with child(lambda: syscall(218, ctypes.addressof(word))) as pid:
        core = dump(pid, tid_address.RESOURCE).core
    assert core.thread_info.clear_tid_addr == ctypes.addressof(word)

    def observe() -> None:
        restore(core, tid_address.RESOURCE)
        out = ctypes.c_uint64()
        prctl(40, ctypes.byref(out))
        assert out.value == ctypes.addressof(word)

    with child(observe):
        pass


def test_robust_list() -> None:
    head = aligned(24, 8)
    with child(lambda: syscall(273, head, 24)) as pid:
        core = dump(pid, robust_list.RESOURCE).core
    assert (core.thread_core.futex_rla, core.thread_core.futex_rla_len) == (head, 24)

    def observe() -> None:
        restore(core, robust_list.RESOURCE)
        found, length = ctypes.c_uint64(), ctypes.c_uint64()
        syscall(274, 0, ctypes.byref(found), ctypes.byref(length))
        assert (found.value, length.value) == (head, 24)

    with child(observe):
        pass


def unregister() -> None:
    """End glibc's registration, if there is one, which only its owner can."""
    try:
        offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
        size = ctypes.c_uint.in_dll(libc, "__rseq_size").value
    except ValueError:
        return
    if not size:
        return
    base = ctypes.c_uint64()
    syscall(158, 0x1003, ctypes.byref(base))  # arch_prctl(ARCH_GET_FS)
    syscall(334, base.value + offset, 32, 1, SIGNATURE)


def test_registration() -> None:
    area = aligned(32, 32)

    def setup() -> None:
        unregister()
        syscall(334, area, 32, 0, 0x1234567)

    with child(setup) as pid:
        core = dump(pid, rseq.RESOURCE).core
    entry = core.thread_core.rseq_entry
    assert (entry.rseq_abi_pointer, entry.rseq_abi_size, entry.signature) == (area, 32, 0x1234567)

    def copy() -> None:
        unregister()
        restore(core, rseq.RESOURCE)
        os.sched_yield()
        cpu = struct.unpack_from("<II", ctypes.string_at(area, 8))
        assert cpu[0] < os.cpu_count()  # the kernel writes there now

    with child(copy) as pid:
        assert dump(pid, rseq.RESOURCE).core == core


def test_no_registration() -> None:
    with child(unregister) as pid:
        core = dump(pid, rseq.RESOURCE).core
    assert core.thread_core.HasField("rseq_entry")
    assert core.thread_core.rseq_entry.rseq_abi_pointer == 0

    def copy() -> None:
        unregister()
        restore(core, rseq.RESOURCE)

    with child(copy) as pid:
        assert dump(pid, rseq.RESOURCE).core == core


@pytest.mark.parametrize(
    ("ip", "version", "found"),
    [
        (0x1000, 0, 0x9000),
        (0x10FF, 0, 0x9000),
        (0x1100, 0, None),
        (0xFFF, 0, None),
        (0x1000, 1, ""),
    ],
)
def test_abort_address(
    ip: int, version: int, found: int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = ctypes.create_string_buffer(struct.pack("<IIQQQ", version, 0, 0x1000, 0x100, 0x9000))
    area = (ctypes.c_uint64 * 4)(0, ctypes.addressof(section), 0, 0)
    configuration = (ctypes.addressof(area), 32, SIGNATURE, 0)
    monkeypatch.setattr(ptrace, "rseq_configuration", lambda tid: configuration)
    assert read_memory(os.getpid(), ctypes.addressof(area) + 8, 8) == struct.pack(
        "<Q", ctypes.addressof(section)
    )
    if found == "":
        with pytest.raises(Unsupported, match="version 1"):
            rseq.abort_address(os.getpid(), ip)
    else:
        assert rseq.abort_address(os.getpid(), ip) == found
    area[1] = 0
    assert rseq.abort_address(os.getpid(), ip) is None
    monkeypatch.setattr(ptrace, "rseq_configuration", lambda tid: None)
    assert rseq.abort_address(os.getpid(), ip) is None


def test_a_thread_stopped_in_a_critical_section_is_found() -> None:
    """A real section, which the thread only leaves through the abort handler, to enter again."""
    path = compile_c(SECTION, "-static", "-no-pie", header=False)
    hears, says = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, says, 1)]
    pid = os.posix_spawn(path, [path], {"GLIBC_TUNABLES": NO_RSEQ}, file_actions=actions)
    os.close(says)
    seized = Seized()
    try:
        start, handler = struct.unpack("<QQ", os.read(hears, 16))
        found = []
        for _ in range(5000):  # how much of its time it spends there is the machine's business
            seized.seize([pid])
            ip = ptrace.get_regs(pid).ip
            if ip > start:  # behind the instruction that enters
                found.append(rseq.abort_address(pid, ip))
            seized.release(pid)
            if found.count(handler) > 10:
                break
        assert found.count(handler) > 10
        # None: rseq_cs was cleared, and the thread on its way back through the handler.
        assert set(found) <= {handler, None}
    finally:
        os.close(hears)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
