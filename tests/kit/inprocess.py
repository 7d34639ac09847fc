"""Running a Program in the test's own process: each record as a call of libc's syscall(2).

What the machine does inside of a task (remote/machine.S), for records without a child. It lets a test of a resource see what the
records do, without the machine, a stub or ptrace.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from torpor.linux.call import try_call
from torpor.remote.machine import RECORD_BYTES, RESULT_WORD
from torpor.remote.program import Data, Program, Ref, Run


def run(program: Program) -> Run:
    """Do all calls of ``program`` in order; gives what :class:`Run` gives after a run in a task.

    Raises OSError, with the record as its text, at the first call whose failure is not tolerated.
    """
    data = (ctypes.c_char * max(len(program.data), 1)).from_buffer_copy(bytes(program.data) or b"\0")
    results: list[int] = []
    for index, record in enumerate(program.records):
        assert record.child is None, f"#{index} makes a task"
        args = [_word(arg, results, ctypes.addressof(data)) for arg in record.args]
        result = try_call(record.name, *args)
        if -4096 < result < 0 and not (-result < 64 and record.may_fail >> -result & 1):
            raise OSError(-result, f"#{index} {record}: {errno.errorcode.get(-result, -result)}")
        results.append(result)
    memory = bytearray((len(results) + 1) * RECORD_BYTES)
    for index, result in enumerate(results):
        struct.pack_into("<q", memory, index * RECORD_BYTES + 8 * RESULT_WORD, result)
    return Run(program, bytes(memory) + data.raw[: len(program.data)])


def _word(arg: object, results: list[int], base: int) -> int:
    if isinstance(arg, Ref):
        return results[arg.index]
    if isinstance(arg, Data):
        return base + arg.offset
    assert isinstance(arg, int), arg
    return arg
