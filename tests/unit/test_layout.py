"""Layouts: what `difference` says to do turns a model of an address space into another, losing nothing.

The model is a page table of a few pages: what each page is, and a token for its content.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.layout import Advise, Flag, Map, Mapping, Protect, Unmap, difference, find_gap, merge

PAGE = 4096
BASE = 0x7F00_0000_0000
PAGES = 16
FLAGS = (
    0,
    Flag.LOCKED,
    Flag.HUGEPAGE,
    Flag.NOHUGEPAGE,
    Flag.GROWSDOWN,
    Flag.NORESERVE,
    Flag.SHARED,
    Flag.SHARED | Flag.DONTFORK,
)

Page = tuple[int, int, int, int]  # protection, flags, file, offset in the file


@st.composite
def layouts(draw: st.DrawFn) -> list[Mapping]:
    """Mappings in address order without overlap, in any cut."""
    edges = draw(st.lists(st.integers(0, PAGES), unique=True, max_size=8))
    found = []
    for first, last in itertools.pairwise(sorted(edges)):
        if draw(st.booleans()):
            file = draw(st.sampled_from((-1, -1, 0, 1)))
            # few shifts: so that the two layouts often show the same part of a file at the same place
            offset = (first + draw(st.sampled_from((0, 0, 3)))) * PAGE if file >= 0 else 0
            protection, flags = draw(st.sampled_from((0, 1, 3))), int(draw(st.sampled_from(FLAGS)))
            found.append(Mapping(BASE + first * PAGE, BASE + last * PAGE, protection, flags, file, offset))
    return found


def pages(layout: Sequence[Mapping]) -> dict[int, Page]:
    """What every mapped page is."""
    return {
        address: (m.protection, m.flags, m.file, m.offset + address - m.start if m.file >= 0 else 0)
        for m in layout
        for address in range(m.start, m.end, PAGE)
    }


class AddressSpace:
    """Does operations as strictly as the kernel: nothing is mapped over, nothing absent is changed."""

    def __init__(self, layout: Sequence[Mapping]) -> None:
        self.pages = pages(layout)
        self.content = {address: ("old", address) for address in self.pages}

    def apply(self, operation: Unmap | Map | Protect | Advise) -> None:
        match operation:
            case Unmap(start, end):
                for address in range(start, end, PAGE):
                    del self.pages[address], self.content[address]
            case Map(mapping):
                for address, page in pages([mapping]).items():
                    assert address not in self.pages, f"{address:#x} is mapped already (MAP_FIXED_NOREPLACE)"
                    self.pages[address], self.content[address] = page, ("fresh", address)
            case Protect(start, end, protection):
                for address in range(start, end, PAGE):
                    self.pages[address] = (protection, *self.pages[address][1:])
            case Advise(start, end, before, after):
                for address in range(start, end, PAGE):
                    was, flags, *rest = self.pages[address]
                    assert flags == before
                    self.pages[address] = (was, after, rest[0], rest[1])


def same(was: Page, now: Page) -> bool:
    """Whether the one page may become the other: the same, and no advice lost that no call takes back."""

    def thing(page: Page) -> tuple[int, int, int]:
        _, flags, file, offset = page
        return file, offset, flags & (Flag.SHARED | Flag.GROWSDOWN | Flag.NORESERVE)

    huge = Flag.HUGEPAGE | Flag.NOHUGEPAGE
    return thing(was) == thing(now) and not (was[1] & huge and not now[1] & huge)


@given(layouts(), layouts())
def test_difference_turns_one_layout_into_the_other(old: list[Mapping], new: list[Mapping]) -> None:
    space = AddressSpace(old)
    for operation in difference(old, new):
        space.apply(operation)
    assert space.pages == pages(new)


@given(layouts(), layouts())
def test_difference_keeps_content_where_the_memory_is_the_same_and_nowhere_else(
    old: list[Mapping], new: list[Mapping]
) -> None:
    space = AddressSpace(old)
    before = dict(space.pages)
    for operation in difference(old, new):
        space.apply(operation)
    for address, page in pages(new).items():
        kept = address in before and same(before[address], page)
        assert space.content[address] == (("old", address) if kept else ("fresh", address))


@given(layouts(), layouts())
def test_difference_unmaps_first_and_then_goes_up(old: list[Mapping], new: list[Mapping]) -> None:
    operations = difference(old, new)
    kinds = [isinstance(o, Unmap) for o in operations]
    assert kinds == sorted(kinds, reverse=True)
    for kind in (Unmap, Protect, Advise):
        starts = [o.start for o in operations if isinstance(o, kind)]
        assert starts == sorted(starts)
    mapped = [o.mapping.start for o in operations if isinstance(o, Map)]
    assert mapped == sorted(mapped)


@given(layouts())
def test_no_difference_between_cuts_of_the_same_layout(layout: list[Mapping]) -> None:
    cut = [m.cut(a, a + PAGE) for m in layout for a in range(m.start, m.end, PAGE)]
    assert difference(layout, layout) == []
    assert difference(layout, cut) == []
    assert difference(cut, layout) == []


@given(layouts())
def test_merge_is_canonical(layout: list[Mapping]) -> None:
    merged = merge(layout)
    assert pages(merged) == pages(layout)
    assert merge(merged) == merged
    cut = [m.cut(a, a + PAGE) for m in layout for a in range(m.start, m.end, PAGE)]
    assert merge(cut) == merged


def test_merge_keeps_apart_what_does_not_continue() -> None:
    first = Mapping(BASE, BASE + PAGE, 3, 0, 0, 0)
    for other in (
        Mapping(BASE + PAGE, BASE + 2 * PAGE, 3, 0, 0, 2 * PAGE),  # another place of the file
        Mapping(BASE + PAGE, BASE + 2 * PAGE, 3, 0, 1, PAGE),  # another file
        Mapping(BASE + PAGE, BASE + 2 * PAGE, 1, 0, 0, PAGE),
        Mapping(BASE + PAGE, BASE + 2 * PAGE, 3, int(Flag.LOCKED), 0, PAGE),
        Mapping(BASE + 2 * PAGE, BASE + 3 * PAGE, 3, 0, 0, 2 * PAGE),  # a gap between
    ):
        assert merge([first, other]) == [first, other]
    continued = Mapping(BASE + PAGE, BASE + 2 * PAGE, 3, 0, 0, PAGE)
    assert merge([first, continued]) == [msgspec.structs.replace(first, end=continued.end)]


@given(
    st.lists(layouts(), max_size=3),
    st.integers(1, PAGES + 2),
    st.integers(0, PAGES),
    st.integers(0, PAGES + 4),
)
def test_find_gap_is_the_lowest_that_is_free_in_all(
    all_: list[list[Mapping]], size: int, low: int, high: int
) -> None:
    taken = {(a - BASE) // PAGE for layout in all_ for a in pages(layout)}
    free = [p for p in range(low, high - size + 1) if not taken & set(range(p, p + size))]
    arguments = (all_, size * PAGE, BASE + low * PAGE, BASE + high * PAGE)
    if free:
        assert find_gap(*arguments) == BASE + free[0] * PAGE
    else:
        with pytest.raises(MemoryError):
            find_gap(*arguments)
