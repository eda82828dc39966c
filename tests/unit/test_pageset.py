"""PageSet against a set of page numbers, around the edges of its blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from agent.pageset import PageSet, chunks, pages_in

PAGE = 4096
BLOCK = PageSet.BLOCK // PAGE
# around the edges of two neighbouring blocks, and one far away
NUMBERS = st.one_of(
    st.integers(0, 40), st.integers(BLOCK - 20, BLOCK + 20), st.integers(2 * BLOCK - 9, 2 * BLOCK + 9)
)
RANGES = st.tuples(NUMBERS, st.integers(0, 30)).map(lambda r: (r[0] * PAGE, (r[0] + r[1]) * PAGE))
STEPS = st.lists(st.tuples(st.sampled_from(("add", "remove")), RANGES), max_size=12)


def numbers(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {page for start, end in ranges for page in range(start // PAGE, end // PAGE)}


def build(steps: list[tuple[str, tuple[int, int]]]) -> tuple[PageSet, set[int]]:
    pages, model = PageSet(), set[int]()
    for what, (start, end) in steps:
        if what == "add":
            pages.add(start, end)
            model |= numbers([(start, end)])
        else:
            pages.remove(start, end)
            model -= numbers([(start, end)])
    return pages, model


def check(pages: PageSet, model: set[int]) -> None:
    found = pages.ranges()
    assert numbers(found) == model
    assert len(pages) == len(model)
    assert found == sorted(found)
    # maximal: between two ranges there is a hole, at a block's edge too
    assert all(first[1] < second[0] for first, second in itertools.pairwise(found))


@given(STEPS)
def test_add_and_remove(steps: list[tuple[str, tuple[int, int]]]) -> None:
    pages, model = build(steps)
    check(pages, model)
    for page in (0, 5, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 7 * BLOCK):
        assert (page * PAGE in pages) == (page in model)
        assert (page * PAGE + 4095 in pages) == (page in model)


@given(STEPS, STEPS)
def test_without(ours: list[tuple[str, tuple[int, int]]], theirs: list[tuple[str, tuple[int, int]]]) -> None:
    (left, left_model), (right, right_model) = build(ours), build(theirs)
    difference = left.without(right)
    check(difference, left_model - right_model)
    difference.add(0, PAGE)  # a copy: it changes neither of them
    check(left, left_model)
    check(right, right_model)


@given(st.lists(RANGES), st.lists(RANGES))
def test_update_and_subtract(added: list[tuple[int, int]], removed: list[tuple[int, int]]) -> None:
    pages = PageSet(added)
    pages.update(removed)
    check(pages, numbers(added) | numbers(removed))
    pages.subtract(removed)
    check(pages, numbers(added) - numbers(removed))


@given(st.lists(RANGES.filter(lambda r: r[0] < r[1])), st.integers(1, 20), st.integers(1, 4))
def test_chunks(ranges: list[tuple[int, int]], size: int, most: int) -> None:
    parts = list(chunks(ranges, size * PAGE, most))
    assert all(part and len(part) <= most and pages_in(part) <= size for part in parts)
    flat = [page for part in parts for start, end in part for page in range(start, end, PAGE)]
    assert flat == [page for start, end in ranges for page in range(start, end, PAGE)]
    # nothing is cut that fits: only a full part ends inside a range
    assert all(pages_in(part) == size or len(part) == most for part in parts[:-1])
