"""/proc/PID/limits: the resource limits. Kernel: fs/proc/base.c, proc_pid_limits()."""

from __future__ import annotations

RLIM_INFINITY = (1 << 64) - 1

# Position is the number of the limit: RLIMIT_CPU is 0, RLIMIT_RTTIME is 15. Kernel:
# fs/proc/base.c, lnames[].
_NAMES = (
    b"Max cpu time",
    b"Max file size",
    b"Max data size",
    b"Max stack size",
    b"Max core file size",
    b"Max resident set",
    b"Max processes",
    b"Max open files",
    b"Max locked memory",
    b"Max address space",
    b"Max file locks",
    b"Max pending signals",
    b"Max msgqueue size",
    b"Max nice priority",
    b"Max realtime priority",
    b"Max realtime timeout",
)


def parse(data: bytes) -> dict[int, tuple[int, int]]:
    """Return number of the limit → (soft, hard), with 2**64 - 1 for unlimited.

    Raises ValueError when the file is not what the kernel writes.
    """
    limits: dict[int, tuple[int, int]] = {}
    # Names have spaces in them, but the columns are fixed.
    lines = {line[:25].rstrip(): line for line in data.split(b"\n")}
    for number, name in enumerate(_NAMES):
        line = lines.get(name, b"")
        try:
            limits[number] = _value(line[26:46].rstrip()), _value(line[47:67].rstrip())
        except ValueError:
            raise ValueError(f"limits: cannot read {name!r} in {line!r}") from None
    return limits


def _value(text: bytes) -> int:
    return RLIM_INFINITY if text == b"unlimited" else int(text)
