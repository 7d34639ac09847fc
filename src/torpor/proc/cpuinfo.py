"""/proc/cpuinfo of x86: what the processors are and can do.

Kernel: arch/x86/kernel/cpu/proc.c, show_cpuinfo().
"""

from __future__ import annotations

from .record import Record


class Cpu(Record):
    """``flags`` are the features that every processor has; the rest describes the first one."""

    vendor_id: str
    cpu_family: int
    model: int
    stepping: int
    model_name: str
    flags: frozenset[str]


def parse(data: bytes) -> Cpu:
    """Parse the file. Raises ValueError when it is not what the kernel writes on x86."""
    blocks = [block for block in data.decode("utf-8", "replace").split("\n\n") if block.strip()]
    try:
        first = _fields(blocks[0])
        common = frozenset(first["flags"].split())
        seen = {first["flags"]}
        for block in blocks[1:]:
            flags = _fields(block)["flags"]
            if flags not in seen:
                seen.add(flags)
                common &= frozenset(flags.split())
        stepping = first["stepping"]
        return Cpu(
            first["vendor_id"],
            int(first["cpu family"]),
            int(first["model"]),
            0 if stepping == "unknown" else int(stepping),
            first["model name"],
            common,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"cpuinfo: cannot read {data[:200]!r}: {error!r}") from None


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs}
