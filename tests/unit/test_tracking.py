"""The arithmetic of ranges, against sets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from agent.tracking import Range, intersection, merged, without

PAGE = 4096


def numbers(ranges: Sequence[Range]) -> set[int]:
    return {page for start, end in ranges for page in range(start // PAGE, end // PAGE)}


def ordered(ranges: Sequence[Range]) -> bool:
    """In order, not empty, without overlap."""
    return all(s < e for s, e in ranges) and all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


@st.composite
def in_order(draw: st.DrawFn) -> list[Range]:
    """Ranges in order without overlap; neighbours may touch, as they do in the kernel's answers."""
    found, position = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=8)):
        found.append(((position + gap) * PAGE, (position + gap + length) * PAGE))
        position += gap + length
    return found


ANY = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda r: (r[0] * PAGE, sum(r) * PAGE)))


@given(ANY)
def test_merged(ranges: list[Range]) -> None:
    result = merged(ranges)
    assert numbers(result) == numbers(ranges)
    assert ordered(result)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(result))  # maximal


@given(in_order(), in_order())
def test_intersection(ranges: list[Range], allowed: list[Range]) -> None:
    result = intersection(ranges, allowed)
    assert numbers(result) == numbers(ranges) & numbers(allowed)
    assert ordered(result)


@given(in_order(), in_order())
def test_without(ranges: list[Range], excluded: list[Range]) -> None:
    before = list(ranges)
    result = without(ranges, excluded)
    assert numbers(result) == numbers(ranges) - numbers(excluded)
    assert ordered(result)
    assert ranges == before
