"""Files of /proc that hold one value or two.

All functions raise ValueError for what the kernel does not write.
"""

from __future__ import annotations

# (uid_t)-1, which the kernel shows for a task that has no login uid.
LOGINUID_UNSET = 0xFFFFFFFF


def parse_uptime(data: bytes) -> tuple[float, float]:
    """/proc/uptime: (seconds since boot, seconds of idle time over all CPUs), to the hundredth."""
    try:
        up, idle = data.split()
        return float(up), float(idle)
    except ValueError as error:
        raise _malformed("uptime", data) from error


def parse_personality(data: bytes) -> int:
    """/proc/PID/personality: what personality(2) takes, in hexadecimal."""
    return _integer("personality", data, 16)


def parse_loginuid(data: bytes) -> int | None:
    """/proc/PID/loginuid: the user of the login, or None if never set."""
    value = _integer("loginuid", data, 10)
    return None if value == LOGINUID_UNSET else value


def parse_oom_score_adj(data: bytes) -> int:
    """/proc/PID/oom_score_adj: -1000 to 1000."""
    return _integer("oom_score_adj", data, 10)


def parse_autogroup(data: bytes) -> int | None:
    """/proc/PID/autogroup: the nice value of ``/autogroup-N nice VALUE``; None where the file is empty."""
    if not data.strip():
        return None
    head, _, nice = data.rpartition(b" nice ")
    if not head.startswith(b"/autogroup-"):
        raise _malformed("autogroup", data)
    return _integer("autogroup", nice, 10)


def parse_coredump_filter(data: bytes) -> int:
    """/proc/PID/coredump_filter: a mask in hexadecimal.

    The file is empty for a task without memory: 0.
    """
    return _integer("coredump_filter", data, 16) if data else 0


def _integer(name: str, data: bytes, base: int) -> int:
    try:
        return int(data, base)
    except ValueError as error:
        raise _malformed(name, data) from error


def _malformed(name: str, data: bytes) -> ValueError:
    return ValueError(f"{name}: cannot read {data[:200]!r}")
