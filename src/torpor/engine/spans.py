"""Lists of address ranges, ascending: what several have in common, and what one has and another has not. Pure."""

from __future__ import annotations

from ..images.pages import Run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = 4096


def spans(runs: list[Run]) -> list[tuple[int, int]]:
    """The runs as (start, end); neighbours are joined."""
    found: list[tuple[int, int]] = []
    start = end = -1
    for run in runs:
        address = run[0]
        if address != end:
            if start >= 0:
                found.append((start, end))
            start = address
        end = address + run[1] * PAGE
    if start >= 0:
        found.append((start, end))
    return found


def minus_runs(runs: list[Run], spans: list[tuple[int, int]]) -> list[Run]:
    """The runs without those that lie in ``spans``, of which there are few."""
    for start, end in spans:
        if any(start <= run[0] < end for run in runs):
            runs = [run for run in runs if not start <= run[0] < end]
    return runs


def outside(runs: list[Run], spans: list[tuple[int, int]]) -> list[Run]:
    """The runs without what lies in ``spans``, of which there are few; both ascending."""
    found: list[Run] = []
    for run in runs:
        start, end = run.vaddr, run.vaddr + run.nr_pages * PAGE
        for low, high in minus([(start, end)], spans):
            offset = run.offset + low - start if run.fd >= 0 else run.offset
            found.append(run._replace(vaddr=low, nr_pages=(high - low) // PAGE, offset=offset))
    return found


def common(spans: list[tuple[int, int]], others: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What both lists of spans cover, in parts that lie in one of ``others`` each; both ascending."""
    index = 0
    for low, high in others:
        while index < len(spans) and spans[index][1] <= low:
            index += 1
        at = index
        while at < len(spans) and spans[at][0] < high:
            yield max(low, spans[at][0]), min(high, spans[at][1])
            at += 1


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours made one."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def minus(spans: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of ``spans`` that ``taken`` does not cover; both ascending."""
    found: list[tuple[int, int]] = []
    index = 0
    for start, end in spans:
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        at = index
        while start < end and at < len(taken) and taken[at][0] < end:
            if taken[at][0] > start:
                found.append((start, taken[at][0]))
            start = max(start, taken[at][1])
            at += 1
        if start < end:
            found.append((start, end))
    return found


def clipped(runs: list[Run], spans: list[tuple[int, int]]) -> Iterator[Run]:
    """The parts of stored runs that lie in one of ``spans``; both ascending."""
    index = 0
    for run in runs:
        end = run.vaddr + run.nr_pages * PAGE
        while index < len(spans) and spans[index][1] <= run.vaddr:
            index += 1
        at = index
        while at < len(spans) and spans[at][0] < end:
            low, high = max(run.vaddr, spans[at][0]), min(end, spans[at][1])
            yield run._replace(vaddr=low, nr_pages=(high - low) // PAGE, offset=run.offset + low - run.vaddr)
            at += 1
