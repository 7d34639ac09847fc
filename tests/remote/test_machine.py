"""The machine's bytes are those of its source, and records are laid out as the source reads them."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest

from torpor.remote import machine
from torpor.remote.program import Program, Run

SOURCE = os.path.join(os.path.dirname(machine.__file__), "machine.S")


@pytest.fixture(scope="module")
def assembled(tmp_path_factory) -> tuple[bytes, dict[str, int]]:
    folder = tmp_path_factory.mktemp("machine")
    subprocess.run(["gcc", "-c", SOURCE, "-o", f"{folder}/m.o"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", f"{folder}/m.o", f"{folder}/m.bin"], check=True)
    names = subprocess.run(["nm", f"{folder}/m.o"], check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1]: int(line.split()[0], 16) for line in names.splitlines()}
    return (folder / "m.bin").read_bytes(), symbols


def test_bytes_are_those_of_the_source(assembled) -> None:
    code, at = assembled
    assert code[at["stub_start"] : at["stub_end"]] == machine.STUB
    assert code[at["own_start"] : at["own_end"]] == machine.OWN
    assert code[at["init_start"] : at["init_end"]] == machine.INIT
    assert code[at["fault_4"] : at["faults_end"]] == machine.FAULTS
    assert {signal: at[f"fault_{signal}"] - at["fault_4"] for signal in machine.FAULT_AT} == machine.FAULT_AT
    assert code[at["guest_start"] : at["guest_end"]] == machine.GUEST
    assert at["guest_start"] + machine.GUEST_RUN == at["guest_run"]


def test_the_frame_follows_the_code(assembled) -> None:
    _, at = assembled
    assert at["frame"] == at["guest_end"]
    words = {name: (at[name] - at["frame"]) // 8 for name in ("pid", "tid", "signal", "sigmask", "flags", "stack", "ip")}
    assert words == {"pid": 0, "tid": 1, "signal": 2, "sigmask": 4, "flags": 5, "stack": 6, "ip": 7}
    assert (at["regs"] - at["frame"]) // 8 + len(machine.REGISTERS) == machine.FRAME_WORDS


def test_a_compiled_record() -> None:
    child = Program("child")
    child.place(0x9000)
    program = Program("test")
    first = program.call("openat", -100, b"/x\0", 0, may_fail=(2, 13))
    program.call("close", first)
    program.call("pread64", 3, 0x4000, 10, 20, transfer=True)
    program.call("clone3", 0, 0, child=child)
    program.place(0x10000)
    words = struct.unpack_from("<60Q", program.compile())
    data = 0x10000 + 5 * machine.RECORD_BYTES
    assert words[:4] == (257 + 1, (1 << 64) - 100, data, 0)
    assert words[8] == 0x10000 + machine.RECORD_BYTES + 8  # the result goes into close's first argument
    assert words[9] == 1 << 2 | 1 << 13
    assert words[12] == 3 + 1
    assert words[24:31] == (17 + 1, 3, 0x4000, 10, 20, 0, 0)
    assert words[35] == 1
    assert words[46] == 0x9000
    assert words[48:60] == (0,) * 12
    assert program.compile()[5 * machine.RECORD_BYTES :].startswith(b"/x\0")


def test_pointers_and_results() -> None:
    program = Program("test")
    block = program.put(bytes(16))
    target = program.put(b"text\0")
    program.pointer(block, 8, target)
    ref = program.call("getpid")
    program.place(0x1000)
    compiled = bytearray(program.compile())
    data = 2 * machine.RECORD_BYTES
    assert struct.unpack_from("<Q", compiled, data + 8)[0] == 0x1000 + data + 16
    struct.pack_into("<q", compiled, 8 * machine.RESULT_WORD, -13)
    run = Run(program, bytes(compiled))
    assert run.result(ref) == -13
    assert run.bytes(target) == b"text\0"


def test_a_result_is_passed_on_once() -> None:
    program = Program("test")
    fd = program.call("dup", 0)
    program.call("close", fd)
    with pytest.raises(AssertionError):
        program.call("close", fd)


def test_explained_as_strace_would() -> None:
    program = Program("test")
    fd = program.call("openat", -100, b"/etc/passwd\0", 0, why="whatever")
    program.call("close", fd)
    assert list(program.explain()) == ["openat(-100, '/etc/passwd', 0)  # whatever", "close(result of #0)"]


def test_many_calls_at_once_are_as_one_by_one() -> None:
    rows = [(7, 8, 0o2000000), (9, 10, 0), ((1 << 64) - 1, 0, 0)]
    at_once, one_by_one = Program("test"), Program("test")
    for program in (at_once, one_by_one):
        opened = program.call("openat", -100, b"/x\0", 0)
        if program is at_once:
            program.calls("dup3", rows)
        else:
            for row in rows:
                program.call("dup3", *row)
        program.call("close", opened)
        program.place(0x10000)
    assert at_once.compile() == one_by_one.compile()
    assert [*at_once.explain()] == [*one_by_one.explain()]
    with pytest.raises(AssertionError):
        at_once.calls("no such call", rows)
