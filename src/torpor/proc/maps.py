r"""/proc/PID/maps: the mappings of a task. Kernel: fs/proc/task_mmu.c, show_map_vma().

The kernel escapes a newline in a path as ``\012`` and nothing else, not even the backslash, and
appends `` (deleted)`` to the path of an unlinked file. So a file really named ``a\012b`` or ``a
(deleted)`` reads the same; where that matters, the links in /proc/PID/map_files and the inode
number settle it.
"""

from __future__ import annotations

from .record import Record

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE = 1, 2

# What a mapping is, as far as its name tells.
ANON = "anon"  # no name
HEAP = "heap"
STACK = "stack"
VDSO = "vdso"
VVAR = "vvar"
VVAR_VCLOCK = "vvar_vclock"
VSYSCALL = "vsyscall"
NAMED = "named"  # [anon:NAME], given by PR_SET_VMA_ANON_NAME
NAMED_SHMEM = "named_shmem"  # [anon_shmem:NAME], the same for shared memory
SPECIAL = "special"  # any other [name]
SHMEM = "shmem"  # /dev/zero (deleted): shared anonymous memory
SYSV = "sysv"  # /SYSVkey (deleted)
MEMFD = "memfd"  # /memfd:NAME (deleted)
SECRETMEM = "secretmem"
HUGEPAGE = "hugepage"  # /anon_hugepage (deleted): anonymous hugetlb memory
AIO = "aio"  # the ring of io_setup(2)
ANON_INODE = "anon_inode"
SOCKET = "socket"
FILE = "file"
OTHER = "other"

_BRACKETS = {
    b"[heap]": HEAP,
    b"[stack]": STACK,
    b"[vdso]": VDSO,
    b"[vvar]": VVAR,
    b"[vvar_vclock]": VVAR_VCLOCK,
    b"[vsyscall]": VSYSCALL,
}
# Files that were never linked, on file systems that only the kernel mounts.
_UNLINKED = {
    b"/dev/zero": SHMEM,
    b"/secretmem": SECRETMEM,
    b"/anon_hugepage": HUGEPAGE,
    b"/[aio]": AIO,
}
_UNLINKED_PREFIXES = ((b"/memfd:", MEMFD), (b"/SYSV", SYSV))
_PREFIXES = (
    (b"[anon:", NAMED),
    (b"[anon_shmem:", NAMED_SHMEM),
    (b"[", SPECIAL),
    (b"anon_inode:", ANON_INODE),
    (b"socket:", SOCKET),
)
_DELETED = b" (deleted)"


class Vma(Record):
    """One mapping.

    ``start`` and ``end`` are addresses, ``pgoff`` is in bytes. ``prot`` is made of PROT_*,
    ``flags`` is MAP_SHARED or MAP_PRIVATE. ``dev`` is (major, minor). ``kind`` is one of the
    constants above. ``path`` is the name without escapes and without `` (deleted)``, which is
    ``deleted`` instead; it is empty where the kernel shows none.
    """

    start: int
    end: int
    prot: int
    flags: int
    pgoff: int
    dev: tuple[int, int]
    inode: int
    kind: str
    path: bytes
    deleted: bool

    @property
    def name(self) -> bytes:
        """The NAME in ``[anon:NAME]``, ``[anon_shmem:NAME]`` and ``/memfd:NAME``; of others the
        path.
        """
        if self.kind in (NAMED, NAMED_SHMEM):
            return self.path[self.path.index(b":") + 1 : -1]
        if self.kind == MEMFD:
            return self.path[len(b"/memfd:") :]
        return self.path


def parse(data: bytes) -> list[Vma]:
    """Parse the file into mappings in ascending order.

    Raises ValueError when it is not what the kernel writes.
    """
    vmas: list[Vma] = []
    permissions: dict[bytes, tuple[int, int]] = {}
    tails: dict[bytes, tuple[tuple[int, int], int, str, bytes, bool]] = {}
    make = Vma._make
    lines = data.split(b"\n")
    line = lines.pop()
    try:
        if line:
            raise ValueError("no newline at the end")
        for line in lines:
            addresses, perms, offset, tail = line.split(b" ", 3)
            start, end = addresses.split(b"-")
            # Few kinds of permissions and few files make up most mappings.
            if (access := permissions.get(perms)) is None:
                access = permissions[perms] = _permissions(perms)
            if (what := tails.get(tail)) is None:
                what = tails[tail] = _tail(tail)
            vmas.append(make((int(start, 16), int(end, 16), *access, int(offset, 16), *what)))
    except ValueError as error:
        raise ValueError(f"maps: cannot read {line!r}: {error}") from None
    return vmas


def parse_line(line: bytes) -> Vma:
    """Parse one line, without its newline. Raises ValueError."""
    [vma] = parse(line + b"\n")
    return vma


def classify(name: bytes) -> tuple[str, bytes, bool]:
    """Take the last column of a line apart: (kind, path, deleted)."""
    path = name.replace(b"\\012", b"\n") if b"\\" in name else name
    if path.startswith(b"/"):
        if not path.endswith(_DELETED):
            return FILE, path, False
        path = path[: -len(_DELETED)]
        kind = _UNLINKED.get(path)
        if kind is None:
            kind = next(
                (kind for start, kind in _UNLINKED_PREFIXES if path.startswith(start)), FILE
            )
        return kind, path, True
    if not path:
        return ANON, path, False
    kind = _BRACKETS.get(path)
    if kind is None:
        kind = next((kind for start, kind in _PREFIXES if path.startswith(start)), OTHER)
    return kind, path, False


def _permissions(perms: bytes) -> tuple[int, int]:
    prot = 0
    for letter, expected, bit in zip(
        perms, b"rwx", (PROT_READ, PROT_WRITE, PROT_EXEC), strict=False
    ):
        if letter == expected:
            prot |= bit
        elif letter != ord("-"):
            raise ValueError(f"permissions {perms!r}")
    if len(perms) != 4 or perms[3:] not in (b"s", b"p"):
        raise ValueError(f"permissions {perms!r}")
    return prot, MAP_SHARED if perms[3:] == b"s" else MAP_PRIVATE


def _tail(tail: bytes) -> tuple[tuple[int, int], int, str, bytes, bool]:
    dev, inode, name = tail.split(b" ", 2)
    major, minor = dev.split(b":")
    return (int(major, 16), int(minor, 16)), int(inode), *classify(name.lstrip(b" "))
