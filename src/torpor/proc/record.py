"""Named tuples declared as classes, without importing typing.

``class Lock(Record): kind: str; …`` is read by type checkers as a ``typing.NamedTuple`` and is
made by ``collections.namedtuple`` when it runs: the typing module alone costs 8 ms of every
start.
"""

from __future__ import annotations

from collections import namedtuple

__all__ = ["Record"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as Record
else:

    class _RecordType(type):
        def __new__(meta, name, bases, body):
            if not bases:
                return super().__new__(meta, name, bases, body)
            made = namedtuple(name, body.pop("__annotations__", ()), module=body["__module__"])
            for key, value in body.items():
                if key not in {"__module__", "__qualname__"}:
                    setattr(made, key, value)
            return made

    class Record(metaclass=_RecordType):
        """Base of the records of this package; its subclasses are plain named tuples."""
