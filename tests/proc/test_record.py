from __future__ import annotations

import pickle
import sys

import pytest

from torpor.proc.record import Record


class Pair(Record):
    """Two things."""

    first: int
    second: bytes

    @property
    def both(self) -> tuple[int, bytes]:
        return self.first, self.second


def test_a_record_is_a_named_tuple() -> None:
    pair = Pair(1, second=b"2")
    assert pair == (1, b"2") == pair.both
    assert Pair._fields == ("first", "second")
    assert repr(pair) == "Pair(first=1, second=b'2')"
    assert pair._replace(first=3).first == 3


def test_a_record_keeps_its_home() -> None:
    assert (Pair.__doc__, Pair.__module__) == ("Two things.", __name__)
    sys.modules.setdefault(__name__, sys.modules[Pair.__module__])
    assert pickle.loads(pickle.dumps(Pair(1, b""))) == (1, b"")


def test_a_record_refuses_other_fields_and_changes() -> None:
    with pytest.raises(TypeError):
        Pair(1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        Pair(1, b"").first = 2  # type: ignore[misc]
