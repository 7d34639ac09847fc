"""What is to be done in a task, as data: a list of system calls, compiled for the machine.

A :class:`Program` is written once, printed (``explain``), compiled for the place it will run at, and run any number of
times. Nothing in here touches the kernel.
"""

from __future__ import annotations

import errno
import struct
from array import array
from itertools import repeat

from ..linux.nr import NR
from .machine import RECORD_BYTES, RECORD_WORDS, RESULT_WORD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_WORD = (1 << 64) - 1
_PADDING = tuple((0,) * (7 - count) for count in range(7))


class Ref:
    """The result of an earlier record, as an argument of one later record."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Data:
    """Bytes that travel with the program; as an argument, their address. After a run, :meth:`Run.bytes` reads them."""

    __slots__ = ("content", "offset")

    def __init__(self, content: bytes, offset: int) -> None:
        self.content = content
        self.offset = offset

    def at(self, delta: int) -> Data:
        """The address ``delta`` bytes further on."""
        return Data(b"", self.offset + delta)


class Label:
    """The start of another program, known when both have been placed."""

    __slots__ = ("program",)

    def __init__(self, program: Program) -> None:
        self.program = program


class Record:
    """One system call: name, arguments, what may go wrong, and why it is done."""

    __slots__ = ("args", "child", "may_fail", "name", "plain", "store", "transfer", "why")

    def __init__(self, name: str, args: tuple[object, ...], why: str) -> None:
        self.name = name
        self.args = args
        self.why = why
        self.may_fail = 0
        self.store: tuple[int, int] | None = None
        self.child: Program | None = None
        self.transfer = False
        self.plain = False  # are all arguments numbers?

    def __str__(self) -> str:
        return _line(self)


class Row:
    """A record of :meth:`Program.calls`: one of many, and so it has nothing but a name and numbers."""

    __slots__ = ("args", "name")

    why, may_fail, store, child, transfer, plain = "", 0, None, None, False, True

    def __init__(self, name: str, args: tuple[int, ...]) -> None:
        self.name = name
        self.args = args

    def __str__(self) -> str:
        return _line(self)


def _line(record: Record | Row) -> str:
    shown = ", ".join(_show(arg) for arg in record.args)
    return f"{record.name}({shown})" + (f"  # {record.why}" if record.why else "")


def _show(arg: object) -> str:
    if isinstance(arg, int):
        signed = arg - (1 << 64) if arg >> 63 and arg > 0 else arg
        return str(signed) if -4096 < signed < 65536 else hex(signed)
    if isinstance(arg, Ref):
        return f"result of #{arg.index}"
    if isinstance(arg, Data):
        text = arg.content.rstrip(b"\0")
        if not text:
            return f"&data[{arg.offset}]"
        return repr(text.decode()) if text.isascii() and text.decode().isprintable() else f"<{text.hex()}>"
    return "&program" if isinstance(arg, Label) else repr(arg)


class Program:
    """A list of records and the data that they point to."""

    __slots__ = ("base", "blocks", "data", "image", "name", "pointers", "records")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.pointers: list[tuple[int, int]] = []
        self.records: list[Record | Row] = []
        #: (index, how many, compiled) of the records of calls()
        self.blocks: list[tuple[int, int, bytes]] = []
        self.data = bytearray()
        self.base = 0  # where it was placed; 0: not yet
        self.image = b""  # for whoever runs it again at the same place

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        return "\n".join(f"{index:4} {record}" for index, record in enumerate(self.records))

    def put(self, content: bytes | bytearray) -> Data:
        """Place bytes beside the program; gives what to pass as their address."""
        raw = bytes(content)
        data = Data(raw, len(self.data))
        self.data += raw
        self.data += bytes(-len(self.data) % 8)
        return data

    def out(self, size: int) -> Data:
        """An output buffer of ``size`` zero bytes."""
        return self.put(bytes(size))

    def pointer(self, block: Data, offset: int, target: Data) -> None:
        """Have the 8 bytes at ``offset`` in ``block`` hold the address of ``target`` when the program runs."""
        assert 0 <= offset <= len(block.content) - 8, offset
        self.pointers.append((block.offset + offset, target.offset))

    def call(
        self,
        name: str,
        *args: int | bytes | Ref | Data | Label,
        may_fail: Iterable[int] = (),
        why: str = "",
        child: Program | None = None,
        transfer: bool = False,
    ) -> Ref:
        """Append the system call ``name``.

        ``bytes`` arguments are placed beside the program and passed by address. ``may_fail`` lists errnos (< 64)
        after which the program goes on. ``child``: the program that the child of a clone goes on with. ``transfer``: a
        call of the form (fd, buffer, count, offset), repeated until all of count has moved. Returns a reference to the
        result.
        """
        number = NR.get(name)
        assert number is not None, f"no system call {name}"
        assert len(args) <= 6, name
        records = self.records
        index = len(records)
        plain = True
        for arg in args:
            if type(arg) is not int:
                plain = False
                break
        record = Record(name, args if plain else self._placed(args, index), why)
        record.plain = plain
        for failure in may_fail:
            assert 0 < failure < 64, errno.errorcode.get(failure, failure)
            record.may_fail |= 1 << failure
        record.child = child
        record.transfer = transfer
        records.append(record)
        return Ref(index)

    def calls(self, name: str, rows: Iterable[tuple[int, ...]]) -> None:
        """Append the system call ``name`` for each row of arguments, which are numbers from 0 up; none may fail."""
        assert name in NR, f"no system call {name}"
        own = [*rows]
        if own:
            words = array("Q", bytes(len(own) * RECORD_BYTES))
            words[::RECORD_WORDS] = array("Q", [NR[name] + 1]) * len(own)
            for position, column in enumerate(zip(*own, strict=True), 1):
                words[position::RECORD_WORDS] = array("Q", column)
            self.blocks.append((len(self.records), len(own), words.tobytes()))
            self.records += map(Row, repeat(name), own)

    def _placed(self, args: tuple[object, ...], index: int) -> tuple[object, ...]:
        """Arguments with bytes placed beside the program, and with the sources of results told where they are
        wanted.
        """
        placed = tuple(self.put(arg) if isinstance(arg, bytes) else arg for arg in args)
        for position, arg in enumerate(placed):
            if isinstance(arg, Ref):
                source = self.records[arg.index]
                assert isinstance(source, Record) and source.store is None, "a result can be passed on once"
                source.store = (index, position)
        return placed

    @property
    def size(self) -> int:
        """Bytes that the compiled program needs, its end record and data included."""
        return (len(self.records) + 1) * RECORD_BYTES + len(self.data)

    def place(self, base: int) -> None:
        """Decide the address that it will run at."""
        self.base = base

    def compile(self) -> bytes:
        """The bytes to be put at :attr:`base`."""
        assert self.base, "place it first"
        data_base = self.base + (len(self.records) + 1) * RECORD_BYTES
        pieces: list[bytes] = []
        done = 0
        for start, count, block in [*self.blocks, (len(self.records), 0, bytes(RECORD_BYTES))]:
            pieces += (self._compile(self.records[done:start], data_base), block)
            done = start + count
        data = bytearray(self.data)
        for place, target in self.pointers:
            struct.pack_into("<Q", data, place, data_base + target)
        return b"".join((*pieces, data))

    def _compile(self, records: list[Record | Row], data_base: int) -> bytes:
        words: list[int] = []
        for record in records:
            assert isinstance(record, Record)
            args, store = record.args, record.store
            numbers = args if record.plain else [self._word(arg, data_base) for arg in args]
            padding = _PADDING[len(args)]  # the arguments left out, and the result
            words += (NR[record.name] + 1, *[number & _WORD for number in numbers], *padding)  # type: ignore[operator]
            words += (
                self.base + store[0] * RECORD_BYTES + 8 * (1 + store[1]) if store else 0,
                record.may_fail, record.child.base if record.child is not None else 0, record.transfer,
            )  # fmt: skip
        return struct.pack(f"<{len(words)}Q", *words)

    @staticmethod
    def _word(arg: object, data_base: int) -> int:
        if isinstance(arg, int):
            return arg
        if isinstance(arg, Data):
            return data_base + arg.offset
        if isinstance(arg, Label):
            return arg.program.base
        assert isinstance(arg, Ref)
        return 0

    def explain(self) -> Iterator[str]:
        """A line for each call, as strace would print it."""
        for record in self.records:
            yield str(record)


class Run:
    """What a program left behind: the bytes read back from where it ran."""

    __slots__ = ("memory", "program")

    def __init__(self, program: Program, memory: bytes) -> None:
        self.program = program
        self.memory = memory

    def result(self, ref: Ref) -> int:
        """The result of a record, negative errnos included."""
        value: int = struct.unpack_from("<q", self.memory, ref.index * RECORD_BYTES + 8 * RESULT_WORD)[0]
        return value

    def bytes(self, data: Data, size: int | None = None) -> bytes:
        """The bytes of a data area after the run."""
        start = (len(self.program.records) + 1) * RECORD_BYTES + data.offset
        return self.memory[start : start + (len(data.content) if size is None else size)]
