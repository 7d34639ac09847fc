"""BTF: the kernel's description of its own types (Documentation/bpf/btf.rst), for where in a structure a field lies.

Reading it all costs 50 ms and more, so that answers are kept in a file until the next start of the system.
"""

from __future__ import annotations

import os
import struct
from array import array

from ..errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VMLINUX = "/sys/kernel/btf/vmlinux"
CACHE = "/run/torpor"
MAGIC = 0xEB9F
STRUCT, UNION, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, TYPE_TAG = 4, 5, 8, 9, 10, 11, 12, 18
WRAPPERS = (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG)
# Words that follow the three of every type: a fixed number, and for each of its members.
FIXED_WORDS = {1: 1, 3: 3, 14: 1, 17: 1}
MEMBER_WORDS = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}


class Btf:
    """The types of one BTF blob."""

    def __init__(self, data: bytes) -> None:
        """Index ``data``. Raises ValueError when it is none."""
        if len(data) < 24:
            raise ValueError("BTF: too short")
        magic, version, _, header, types, types_bytes, strings, strings_bytes = struct.unpack_from("<HBBIIIII", data)
        if magic != MAGIC or version != 1 or types_bytes % 4:
            raise ValueError(f"BTF: magic {magic:#x}, version {version}")
        self._words = array("I", data[header + types : header + types + types_bytes])
        self._strings = data[header + strings : header + strings + strings_bytes]
        self._places = self._index()
        self._found: dict[tuple[str, int], int] = {}

    def _index(self) -> list[int]:
        """Type id → its first word. Ids begin with 1; 0 is void."""
        words = self._words
        fixed = [3 + FIXED_WORDS.get(kind, 0) for kind in range(32)]
        member = [MEMBER_WORDS.get(kind, 0) for kind in range(32)]
        places = [0]
        position, end = 0, len(words)
        append = places.append
        try:
            while position < end:
                append(position)
                info = words[position + 1]
                kind = info >> 24 & 31
                position += fixed[kind] + member[kind] * (info & 0xFFFF)
        except IndexError:
            position = -1
        if position != end:
            raise ValueError("BTF: it ends inside of a type")
        return places

    def _kind(self, type_id: int) -> int:
        return self._words[self._places[type_id] + 1] >> 24 & 31

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def find(self, name: str, kind: int) -> int:
        """The id of the type called ``name``. Raises LookupError."""
        key = name, kind
        if key not in self._found:
            at = self._strings.find(b"\0" + name.encode() + b"\0") + 1  # each string stands there once, and whole
            words = self._words
            ids = (index for index, place in enumerate(self._places) if words[place] == at and index)
            self._found[key] = next((index for index in ids if self._kind(index) == kind), 0) if at else 0
        if self._found[key]:
            return self._found[key]
        raise LookupError(f"the kernel has no type {name}")

    def offset(self, path: str) -> int:
        """Where ``struct.field.field`` lies in the struct, in bytes; what has no name is looked through.

        Raises LookupError.
        """
        name, *fields = path.split(".")
        type_id, bits = self.find(name, STRUCT), 0
        for field in fields:
            for found, member, at in self._members(type_id):
                if found == field:
                    type_id, bits = member, bits + at
                    break
            else:
                raise LookupError(f"the kernel has no {path}")
        return bits // 8

    def size(self, name: str) -> int:
        """How many bytes a struct takes. Raises LookupError."""
        return self._words[self._places[self.find(name, STRUCT)] + 2]

    def _members(self, type_id: int) -> Iterator[tuple[str, int, int]]:
        """(name, type, offset in bits) of a struct's or union's fields."""
        while self._kind(type_id) in WRAPPERS:
            type_id = self._words[self._places[type_id] + 2]
        if self._kind(type_id) not in (STRUCT, UNION):
            return
        place = self._places[type_id]
        info = self._words[place + 1]
        for index in range(info & 0xFFFF):
            name, member, at = self._words[place + 3 + 3 * index : place + 6 + 3 * index]
            if info >> 31:
                at &= 0xFFFFFF  # the rest is the width of a bit field
            if name:
                yield self._name(name), member, at
            else:
                for inner, inner_type, inner_at in self._members(member):
                    yield inner, inner_type, at + inner_at


def lookup(questions: Sequence[str]) -> dict[str, int]:
    """What the running kernel answers to each question: ``struct.field`` is an offset, ``func()`` the id of a function,
    ``struct{}`` its size in bytes.

    In ``a|b`` the first that exists is taken: a field has got another name. ``a?`` is -1 where there is none.
    Raises Unsupported when the kernel has no BTF or no answer.
    """
    known = _remembered()
    if all(question in known for question in questions):
        return {question: known[question] for question in questions}
    try:
        with open(VMLINUX, "rb") as file:
            btf = Btf(file.read())
        answers = {question: _ask(btf, question) for question in questions}
    except (OSError, LookupError, ValueError) as error:
        raise Unsupported(f"the kernel does not describe its types: {error}") from None
    _remember({**known, **answers})
    return answers


def _ask(btf: Btf, question: str) -> int:
    if question.endswith("?"):
        try:
            return _ask(btf, question[:-1])
        except LookupError:
            return -1
    first, _, others = question.partition("|")
    if others:
        try:
            return _ask(btf, first)
        except LookupError:
            return _ask(btf, others)
    if question.endswith("{}"):
        return btf.size(question[:-2])
    return btf.find(question[:-2], FUNC) if question.endswith("()") else btf.offset(question)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _remembered() -> dict[str, int]:
    """The kept answers; none if they are of another kernel or could be another user's."""
    try:
        with open(f"{CACHE}/btf", encoding="ascii") as file:
            stat = os.fstat(file.fileno())
            if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
                return {}
            boot, *lines = file.read().splitlines()
        if boot != _boot_id():
            return {}
        return {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        return {}


def _remember(answers: dict[str, int]) -> None:
    """Keep the answers, if that is possible."""
    text = "\n".join([_boot_id(), *(f"{name} {value}" for name, value in answers.items())]) + "\n"
    fresh = f"{CACHE}/btf.{os.getpid()}"
    try:
        os.makedirs(CACHE, 0o755, exist_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        os.rename(fresh, f"{CACHE}/btf")
    except OSError:
        pass
