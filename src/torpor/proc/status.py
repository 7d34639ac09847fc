"""/proc/PID/status: what the kernel tells about a task line by line.

Kernel: fs/proc/array.c, proc_pid_status().
"""

from __future__ import annotations

from .comm import unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Status:
    """The lines of the file, each under the kernel's own name: ``status.Uid``, ``status["Uid"]``.

    A value is converted when it is first asked for, since a dump wants a third of them. A line
    that this kernel does not write is None where it is declared so below, and AttributeError
    (KeyError) otherwise; ``in`` and ``get`` ask without an error. :meth:`line` gives any line
    unconverted.

    Uid and Gid are (real, effective, saved, filesystem). Signal sets and capabilities are masks,
    with signal n at bit n - 1. The NS lists begin with the number in the PID namespace of the
    procfs and end with the innermost one.
    """

    Name: bytes
    Umask: int | None  # None for a task without a file system context: a zombie
    State: str  # one letter
    Tgid: int
    Pid: int
    PPid: int
    TracerPid: int
    Uid: tuple[int, int, int, int]
    Gid: tuple[int, int, int, int]
    FDSize: int
    Groups: list[int]
    NStgid: list[int]
    NSpid: list[int]
    NSpgid: list[int]
    NSsid: list[int]
    Kthread: bool | None
    VmRSS: int | None  # bytes; None for a task without memory
    CoreDumping: bool | None
    THP_enabled: bool | None
    x86_Thread_features: frozenset[str] | None
    x86_Thread_features_locked: frozenset[str] | None
    Threads: int
    SigQ: tuple[int, int]  # queued, limit
    SigPnd: int
    ShdPnd: int
    SigBlk: int
    SigIgn: int
    SigCgt: int
    CapInh: int
    CapPrm: int
    CapEff: int
    CapBnd: int
    CapAmb: int
    NoNewPrivs: bool
    Seccomp: int | None
    Seccomp_filters: int | None
    Cpus_allowed: int
    Mems_allowed: int

    def __init__(self, data: bytes) -> None:
        """Take the file's content. Raises ValueError when it is not what the kernel writes."""
        if not data.startswith(b"Name:\t") or not data.endswith(b"\n"):
            raise ValueError(f"status: cannot read {data[:200]!r}")
        self._data = b"\n" + data

    def line(self, name: str) -> bytes | None:
        """Return what stands behind ``name:`` and a tab, or None if there is no such line."""
        start = self._data.find(f"\n{name}:\t".encode())
        if start < 0:
            return None
        start += len(name) + 3
        return self._data[start : self._data.index(b"\n", start)]

    def __getattr__(self, name: str) -> object:
        convert = _CONVERT.get(name)
        if convert is None:
            raise AttributeError(name)
        text = self.line(name)
        if text is None:
            if name not in _OPTIONAL:
                raise AttributeError(f"status: this kernel shows no {name}")
            value = None
        else:
            try:
                value = convert(text)
            except ValueError:
                raise ValueError(f"status: {name}: cannot read {text!r}") from None
        self.__dict__[name] = value
        return value

    def __getitem__(self, name: str) -> object:
        try:
            return getattr(self, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __contains__(self, name: str) -> bool:
        return self.line(name) is not None

    def get(self, name: str, default: object = None) -> object:
        """Return the converted value, or ``default`` where the kernel shows no such line."""
        return self[name] if self.line(name) is not None else default


def parse(data: bytes) -> Status:
    """Parse the file. Raises ValueError when it is not what the kernel writes."""
    return Status(data)


def _hexadecimal(text: bytes) -> int:
    return int(text, 16)


def _octal(text: bytes) -> int:
    return int(text, 8)


def _flag(text: bytes) -> bool:
    return int(text) != 0


def _bitmap(text: bytes) -> int:
    # Groups of 32 bits, most significant first, between commas.
    return int(text.replace(b",", b""), 16)


def _numbers(text: bytes) -> list[int]:
    return [*map(int, text.split())]


def _four(text: bytes) -> tuple[int, ...]:
    first, second, third, fourth = map(int, text.split())
    return first, second, third, fourth


def _fraction(text: bytes) -> tuple[int, int]:
    part, _, whole = text.partition(b"/")
    return int(part), int(whole)


def _kilobytes(text: bytes) -> int:
    number, _ = text.split()
    return int(number) * 1024


def _words(text: bytes) -> frozenset[str]:
    return frozenset(text.decode("ascii").split())


def _letter(text: bytes) -> str:
    return text[:1].decode("ascii")


_CONVERT: dict[str, Callable[[bytes], object]] = {
    **dict.fromkeys(("Tgid", "Pid", "PPid", "TracerPid", "FDSize", "Threads"), int),
    **dict.fromkeys(("Seccomp", "Seccomp_filters"), int),
    **dict.fromkeys(("Kthread", "CoreDumping", "THP_enabled", "NoNewPrivs"), _flag),
    **dict.fromkeys(("NStgid", "NSpid", "NSpgid", "NSsid", "Groups"), _numbers),
    **dict.fromkeys(("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"), _hexadecimal),
    **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), _hexadecimal),
    **dict.fromkeys(("Cpus_allowed", "Mems_allowed"), _bitmap),
    **dict.fromkeys(("x86_Thread_features", "x86_Thread_features_locked"), _words),
    "Name": unescape,
    "Umask": _octal,
    "State": _letter,
    "Uid": _four,
    "Gid": _four,
    "VmRSS": _kilobytes,
    "SigQ": _fraction,
}
_OPTIONAL = frozenset(
    name for name, kind in Status.__annotations__.items() if str(kind).endswith("| None")
)
