r"""The name of a task. Kernel: fs/proc/array.c, proc_task_name().

``status`` shows a newline as ``\n`` and a backslash as ``\\``; ``stat`` and ``comm`` show the
bytes as they are.
"""

from __future__ import annotations


def unescape(name: bytes) -> bytes:
    """Undo the escapes of ``status``."""
    if b"\\" not in name:
        return name
    # A backslash stands for itself only in pairs, so what is between pairs can be replaced on its
    # own.
    return b"\\".join(part.replace(b"\\n", b"\n") for part in name.split(b"\\\\"))


def parse(data: bytes) -> bytes:
    """Parse /proc/PID/comm: everything up to the newline that the kernel adds."""
    return data.removesuffix(b"\n")
