"""/proc/PID/stat: one line about a task. Kernel: fs/proc/array.c, do_task_stat()."""

from __future__ import annotations

from .record import Record


class Stat(Record):
    """The fields in the kernel's order and under the names of proc(5).

    Addresses are 0 without the right to trace the task. ``starttime`` counts clock ticks (1/100
    s) since boot and belongs to the boot-time clock of the reader's time namespace. ``comm``
    holds any bytes but zero: nothing is escaped here.
    """

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int
    minflt: int
    cminflt: int
    majflt: int
    cmajflt: int
    utime: int
    stime: int
    cutime: int
    cstime: int
    priority: int
    nice: int
    num_threads: int
    itrealvalue: int
    starttime: int
    vsize: int
    rss: int
    rsslim: int
    start_code: int
    end_code: int
    start_stack: int
    kstkesp: int
    kstkeip: int
    signal: int
    blocked: int
    sigignore: int
    sigcatch: int
    wchan: int
    nswap: int
    cnswap: int
    exit_signal: int
    processor: int
    rt_priority: int
    policy: int
    delayacct_blkio_ticks: int
    guest_time: int
    cguest_time: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int


_NUMBERS = len(Stat._fields) - 3


def parse(data: bytes) -> Stat:
    """Parse the file. Raises ValueError when it is not what the kernel writes."""
    # The name may hold parentheses and spaces, the rest is numbers: so the last parenthesis
    # closes it.
    opening, closing = data.find(b" ("), data.rfind(b") ")
    # Fields that a later kernel appends are left out.
    words = data[closing + 4 :].split()[:_NUMBERS]
    try:
        if opening < 0 or closing < opening or len(words) < _NUMBERS:
            raise ValueError("fields are missing")
        name, state = data[opening + 2 : closing], chr(data[closing + 2])
        return Stat(int(data[:opening]), name, state, *map(int, words))
    except ValueError as error:
        raise ValueError(f"stat: cannot read {data!r}: {error}") from None
