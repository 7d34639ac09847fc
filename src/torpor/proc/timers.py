"""/proc/PID/timers: the POSIX timers of a process, without their times.

Kernel: fs/proc/base.c, show_timer().
"""

from __future__ import annotations

from .record import Record

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4


class Timer(Record):
    """One timer.

    ``notify`` is one of SIGEV_*; ``target`` is the thread to signal with SIGEV_THREAD_ID, else
    the process.

    ``target`` is seen from the PID namespace of the procfs. ``sigval`` is the word that the
    signal carries.
    """

    ID: int
    signal: int
    sigval: int
    notify: int
    target: int
    ClockID: int


_NOTIFY = {b"signal": SIGEV_SIGNAL, b"none": SIGEV_NONE, b"thread": SIGEV_THREAD}
_WHOM = {b"pid": 0, b"tid": SIGEV_THREAD_ID}
_KEYS = [b"ID", b"signal", b"notify", b"ClockID"]


def parse(data: bytes) -> list[Timer]:
    """Parse the file, in the kernel's order.

    Raises ValueError when it is not what the kernel writes.
    """
    lines = [line.partition(b": ") for line in data.split(b"\n") if line]
    try:
        if [key for key, _, _ in lines] != _KEYS * (len(lines) // len(_KEYS)):
            raise ValueError("unknown lines")
        values = [value for _, _, value in lines]
        return [_timer(values[at : at + len(_KEYS)]) for at in range(0, len(values), len(_KEYS))]
    except (KeyError, ValueError) as error:
        raise ValueError(f"timers: cannot read {data[:400]!r}: {error}") from None


def _timer(values: list[bytes]) -> Timer:
    number, signal, notify, clock = values
    signo, sigval = signal.split(b"/")
    how, rest = notify.split(b"/")
    whom, target = rest.split(b".")
    return Timer(
        int(number),
        int(signo),
        int(sigval, 16),
        _NOTIFY[how] | _WHOM[whom],
        int(target),
        int(clock),
    )
