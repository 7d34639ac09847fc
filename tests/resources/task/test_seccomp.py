"""Seccomp: strict mode, filters, how they are shared; Program.pointer, which they take."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading

import pytest
from forked import (
    build_context,
    call_each,
    child,
    dump,
    prctl,
    proc_status,
    restore,
    restored_thread,
    syscall,
)

from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.remote.program import Program
from torpor.resources.task import creds, seccomp

ALLOW, ERRNO, USER_NOTIF = 0x7FFF0000, 0x00050000, 0x7FC00000
GETPPID, GETUID = 110, 102
LOG, TSYNC, SPEC_ALLOW = 2, 1, 4


def deny(number: int, error: int = errno.EXDEV) -> bytes:
    """A filter that makes one system call fail."""
    instructions = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, number),
        (6, 0, 0, ERRNO | error),
        (6, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *one) for one in instructions)


def install(code: bytes, flags: int = 0) -> None:
    area = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<H6xQ", len(code) // 8, ctypes.addressof(area))
    assert syscall(317, 1, flags, header) == 0


def fails_with(number: int) -> int:
    try:
        syscall(number)
    except OSError as error:
        return error.errno
    return 0


def context(dumped: object) -> object:
    return build_context(
        seccomp=[dumped.ctx.memo["seccomp"]] if "seccomp" in dumped.ctx.memo else []
    )


def test_pointer_is_an_address_in_the_data() -> None:
    program = Program()
    text = program.put(b"pointed at")
    block = program.put(bytes(24))
    program.pointer(block, 8, text)
    program.pointer(block, 16, text.at(8))
    program.call("getpid")
    run = call_each(program)
    first, second, third = struct.unpack("<3Q", run.bytes(block))
    assert (first, third - second) == (0, 8)
    assert ctypes.string_at(second, 10) == b"pointed at"
    with pytest.raises(AssertionError):
        program.pointer(block, 17, text)


def test_a_chain_of_filters() -> None:
    codes = [deny(GETPPID), deny(GETUID, errno.ELOOP), deny(GETPPID, errno.EDOM)]

    def setup() -> None:
        prctl(38, 1)
        for code, flags in zip(codes, (0, LOG, 0), strict=True):
            install(code, flags)

    with child(setup) as pid:
        first = dump(pid, seccomp.RESOURCE, creds.RESOURCE)
    stored = first.ctx.memo["seccomp"].seccomp_filters
    assert [entry.filter for entry in stored] == codes
    assert [entry.flags for entry in stored] == [0, LOG, 0]
    assert [entry.prev if entry.HasField("prev") else None for entry in stored] == [None, 0, 1]
    assert first.core.thread_core.seccomp_filter == 2

    def observe() -> None:
        restore(first.core, seccomp.RESOURCE, ctx=context(first))
        # The newest filter is asked first, and of equal actions its answer counts.
        assert (fails_with(GETPPID), fails_with(GETUID)) == (errno.EDOM, errno.ELOOP)

    with child(observe) as pid:
        assert proc_status(pid, "Seccomp") == "2"
        assert proc_status(pid, "Seccomp_filters") == "3"
        assert proc_status(pid, "NoNewPrivs") == "1"
        again = dump(pid, seccomp.RESOURCE, creds.RESOURCE)
    assert again.core == first.core
    assert again.ctx.memo["seccomp"] == first.ctx.memo["seccomp"]


def test_a_filter_adds_no_mitigation_to_what_is_known_of_the_thread() -> None:
    table = pb.seccomp_entry()
    table.seccomp_filters.add(filter=deny(GETPPID), flags=LOG)
    core = pb.core_entry()
    core.thread_core.seccomp_mode, core.thread_core.seccomp_filter = 2, 0
    for speculation, flags in (((), LOG), ((3, 0, 0), LOG | SPEC_ALLOW)):
        core.thread_core.speculation[:] = speculation
        program = Program()
        seccomp.RESOURCE.restore(None, core, program, build_context(seccomp=[table]))
        (record,) = program.records
        assert record.args[:2] == (1, flags)
        with child(lambda program=program: call_each(program)) as pid:
            assert proc_status(pid, "Seccomp") == "2"


def test_filters_of_a_user_without_privileges_and_without_no_new_privs() -> None:
    def setup() -> None:
        install(deny(GETPPID))
        os.setresuid(1000, 1000, 1000)

    with child(setup) as pid:
        first = dump(pid, seccomp.RESOURCE, creds.RESOURCE)
    kinds = (seccomp.RESOURCE, creds.RESOURCE)
    with child(lambda: restore(first.core, *kinds, ctx=context(first))) as pid:
        found = [proc_status(pid, name) for name in ("Seccomp", "NoNewPrivs", "CapEff")]
        assert found == ["2", "0", "0" * 16]
        assert proc_status(pid, "Uid").split() == ["1000"] * 4


def test_strict_mode() -> None:
    with child(lambda: None) as pid:
        assert not dump(pid, seccomp.RESOURCE).core.thread_core.HasField("seccomp_mode")
    core = pb.core_entry()
    core.thread_core.seccomp_mode = 1
    program = Program()
    seccomp.RESOURCE.restore(None, core, program, None)
    with child(lambda: call_each(program)) as pid:
        assert proc_status(pid, "Seccomp") == "1"
        assert dump(pid, seccomp.RESOURCE).core == core


def threads(*setups: object) -> object:
    """A setup that runs each function in a thread of its own; the first one in the main thread."""

    def setup() -> None:
        done = [threading.Event() for _ in setups]

        def run(number: int) -> None:
            setups[number]()
            done[number].set()
            if number:
                threading.Event().wait()

        for number in range(1, len(setups)):
            threading.Thread(target=run, args=(number,), daemon=True).start()
            assert done[number].wait(5)
        run(0)

    return setup


def test_filters_that_all_threads_share_are_restored_with_tsync() -> None:
    with child(threads(lambda: install(deny(GETPPID), TSYNC), lambda: None, lambda: None)) as pid:
        first = dump(pid, seccomp.RESOURCE)
    (entry,) = first.ctx.memo["seccomp"].seccomp_filters
    assert entry.flags == TSYNC
    modes = {tid: core.thread_core.seccomp_mode for tid, core in first.cores.items()}
    assert modes.pop(pid) == 2
    assert set(modes.values()) == {0}

    ctx = context(first)
    copy = threads(lambda: restore(first.core, seccomp.RESOURCE, ctx=ctx), lambda: None)
    with child(copy) as pid:
        again = dump(pid, seccomp.RESOURCE)
        assert len(again.cores) == 2
        for tid in again.cores:
            with open(f"/proc/{pid}/task/{tid}/status") as file:
                assert "Seccomp:\t2\n" in file.read()


def test_tsync_that_cannot_be_is_an_error() -> None:
    core = pb.core_entry()
    core.tc.blk_sigset = 0
    core.thread_core.seccomp_mode, core.thread_core.seccomp_filter = 2, 0
    table = pb.seccomp_entry()
    table.seccomp_filters.add(filter=deny(GETPPID), flags=TSYNC)
    ctx = build_context(seccomp=[table])

    def main() -> None:
        with pytest.raises(AssertionError, match="No such process"):
            restore(core, seccomp.RESOURCE, ctx=ctx)

    with child(threads(main, lambda: install(deny(GETUID)))):
        pass


def test_different_filters_of_threads_share_their_beginning() -> None:
    def one() -> None:
        install(deny(GETUID))

    def both() -> None:
        install(deny(GETUID))
        install(deny(GETPPID))

    with child(threads(lambda: None, one, both)) as pid:
        first = dump(pid, seccomp.RESOURCE)
    stored = first.ctx.memo["seccomp"].seccomp_filters
    assert [(entry.filter, entry.prev) for entry in stored] == [
        (deny(GETUID), 0),
        (deny(GETPPID), 0),
    ]
    assert not stored[0].HasField("prev")
    assert stored[1].HasField("prev")
    chosen = sorted(
        core.thread_core.seccomp_filter
        for core in first.cores.values()
        if core.thread_core.seccomp_mode == 2
    )
    assert chosen == [0, 1]


def test_a_filter_with_a_supervisor_is_refused() -> None:
    code = struct.pack("<HBBI", 0x20, 0, 0, 0) + struct.pack("<HBBI", 0x15, 0, 1, 400)
    code += struct.pack("<HBBI", 6, 0, 0, USER_NOTIF) + struct.pack("<HBBI", 6, 0, 0, ALLOW)
    with (
        child(lambda: install(code)) as pid,
        pytest.raises(Unsupported, match="hands system calls to a supervisor"),
    ):
        dump(pid, seccomp.RESOURCE)


@pytest.mark.parametrize(
    ("filters", "index", "why"),
    [
        ([], 0, "there is no filter 0"),
        ([{"filter": b"1234567"}], 0, "7 bytes"),
        ([{"filter": b""}], 0, "0 bytes"),
        ([{"filter": bytes(8 * 4097)}], 0, "32776 bytes"),
        ([{"filter": bytes(8), "flags": 8}], 0, "flags 0x8"),
        ([{"filter": bytes(8), "prev": 0}], 0, "comes before filter 0"),
        ([{"filter": bytes(8), "prev": 1}, {"filter": bytes(8)}], 0, "comes before filter 1"),
        ([{"filter": bytes(8)}], 1, "there is no filter 1"),
    ],
)
def test_malformed_tables_are_refused(filters: list[dict], index: int, why: str) -> None:
    table = pb.seccomp_entry()
    for entry in filters:
        table.seccomp_filters.add(**entry)
    core = pb.core_entry()
    core.thread_core.seccomp_mode, core.thread_core.seccomp_filter = 2, index
    with pytest.raises(ImageError, match=why):
        seccomp.RESOURCE.check(core, build_context(seccomp=[table]))
    assert restored_thread(core).tid == os.getpid()
