"""What of an address space is still to be brought in, against a plain table of pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torpor.engine.paging import without
from torpor.engine.pending import Pending

PAGE = 4096
PAGES = 40

pages = st.integers(0, PAGES - 1)
counts = st.integers(1, 12)
steps = st.one_of(
    st.tuples(st.just("drop"), pages, counts, pages), st.tuples(st.just("move"), pages, counts, pages)
)


def table(pending: Pending) -> dict[int, tuple[int, int]]:
    """Page → (file, page of the file)."""
    found: dict[int, tuple[int, int]] = {}
    for start, end, file, offset in pending.pieces:
        assert start < end
        for address in range(start, end, PAGE):
            assert address // PAGE not in found, "two pieces overlap"
            found[address // PAGE] = file, (offset + address - start) // PAGE
    return found


@given(st.lists(st.tuples(pages, counts), max_size=6), st.lists(steps, max_size=12))
def test_it_is_a_table_of_pages(runs: list[tuple[int, int]], todo: list[tuple[str, int, int, int]]) -> None:
    pieces, end, offset = [], 0, 0
    for gap, count in runs:
        start = end + gap * PAGE
        end = start + count * PAGE
        pieces.append((start, end, gap % 3, offset))
        offset += count * PAGE
    pending = Pending(pieces)
    expected = table(pending)
    child = pending.copy()
    for what, first, count, to in todo:
        if what == "drop":
            pending.drop(first * PAGE, (first + count) * PAGE)
            expected = {page: it for page, it in expected.items() if not first <= page < first + count}
        elif first + count <= to or to + count <= first:  # as mremap(2) has it
            pending.move(first * PAGE, to * PAGE, count * PAGE)
            moved = {page - first + to: it for page, it in expected.items() if first <= page < first + count}
            kept = {
                page: it for page, it in expected.items()
                if not first <= page < first + count and not to <= page < to + count
            }  # fmt: skip
            expected = kept | moved
        assert table(pending) == expected
        assert pending.pieces == sorted(pending.pieces)
        assert bool(pending) == bool(expected)
        for page in range(PAGES + 12):
            assert (pending.at(page * PAGE) is not None) == (page in expected)
        if expected:
            start = pending.next_from(to * PAGE)[0] // PAGE
            assert start == min((page for page in expected if page >= to), default=min(expected))
        inside = {page: it for page, it in expected.items() if first <= page < first + count}
        assert table(Pending(pending.between(first * PAGE, (first + count) * PAGE))) == inside
    assert table(child) == table(Pending(pieces))


@given(pages, counts, st.lists(st.tuples(pages, counts), max_size=4))
def test_what_is_left_of_a_span(first: int, count: int, taken: list[tuple[int, int]]) -> None:
    spans, end = [], 0
    for gap, size in taken:
        spans.append((end + gap, end + gap + size))
        end += gap + size
    left = {page for low, high in without(first, first + count, spans) for page in range(low, high)}
    covered = {page for low, high in spans for page in range(low, high)}
    assert left == set(range(first, first + count)) - covered
