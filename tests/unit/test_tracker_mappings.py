"""Dirty tracking while mappings come, go, move and become one."""

from __future__ import annotations

import pytest
from unit.children import PAGE
from unit.watched import (
    HUGE,
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MAYMOVE_FIXED,
    PAGES,
    TOLD_TWICE,
    TOLD_WHOLE,
    Arena,
    Watched,
    pages,
    touch,
)

from agent.kernel import userfaultfd
from agent.kernel.arch import x86_64 as arch


def test_a_mapping_that_moves(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(4))
    arena.scan()
    arena.puppet.call(arch.NR_mremap, arena.base, 4 * PAGE, 4 * PAGE, MAYMOVE_FIXED, arena.page(PAGES))
    moved = {PAGES + n for n in range(4)}
    assert arena.scan() == (moved, moved, set())
    if TOLD_TWICE:
        assert arena.scan() == (moved, moved, set())  # watched since the scan before, protected only now
    assert arena.scan() == (moved, set(), set())
    arena.write(PAGES + 1)
    assert arena.scan() == (moved, {PAGES + 1}, set())


def test_a_new_mapping_at_an_old_address(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(8))
    arena.scan()
    arena.puppet.call(arch.NR_munmap, arena.page(2), 4 * PAGE)
    arena.puppet.map(4 * PAGE, arena.page(2))
    arena.write(3)
    assert arena.scan() == ({0, 1, 3, 6, 7}, {0, 1, 3, 6, 7} if TOLD_WHOLE else {3}, set())
    arena.write(4)
    assert arena.scan() == ({0, 1, 3, 4, 6, 7}, {3, 4} if TOLD_TWICE else {4}, set())
    arena.write(3)
    assert arena.scan() == ({0, 1, 3, 4, 6, 7}, {3}, set())


def test_what_is_unmapped(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(8))
    arena.scan()
    arena.puppet.call(arch.NR_munmap, arena.page(2), 4 * PAGE)
    assert arena.scan() == ({0, 1, 6, 7}, {0, 1, 6, 7} if TOLD_WHOLE else set(), set())
    assert arena.scan() == ({0, 1, 6, 7}, set(), set())


@pytest.mark.parametrize("protection", [0, 1])
def test_what_may_not_be_written_any_more_was_still_written(watched: Watched, protection: int) -> None:
    arena = Arena(watched)
    arena.write(*range(4))
    arena.scan()
    arena.write(1)
    arena.puppet.call(arch.NR_mprotect, arena.base, 4 * PAGE, protection)
    assert arena.scan() == ({0, 1, 2, 3}, {0, 1, 2, 3} if TOLD_WHOLE else {1}, set())
    arena.puppet.call(arch.NR_mprotect, arena.base, 4 * PAGE, 3)
    arena.write(2)
    assert arena.scan() == ({0, 1, 2, 3}, {0, 1, 2, 3} if TOLD_WHOLE else {2}, set())
    arena.puppet.call(arch.NR_mprotect, arena.base, arena.size * PAGE, protection)
    assert arena.scan() == ({0, 1, 2, 3}, set(), set())


def plain_area(watched: Watched, size: int) -> int:
    """Memory at a multiple of what one page table maps, without huge pages; every page differs."""
    target = watched.puppet
    base = -(-target.map(size + HUGE) // HUGE) * HUGE
    target.call(arch.NR_madvise, base, size, MADV_NOHUGEPAGE)
    for page in range(base, base + size, 16 * PAGE):
        target.fill(page + 9, 1 + page // PAGE % 251)
    return base


def test_a_page_table_that_moves_to_where_other_pages_were(watched: Watched) -> None:
    """mremap(2) hangs a whole page table somewhere else, and touches no entry in it."""
    first, second = plain_area(watched, HUGE), plain_area(watched, HUGE)
    for _ in range(3):
        watched.follow(first, first + HUGE)
    assert not pages(watched.follow(first, first + HUGE).written, first, first + HUGE)
    watched.puppet.call(arch.NR_mremap, second, HUGE, HUGE, MAYMOVE_FIXED, first)
    moved = set(range(first, first + HUGE, 16 * PAGE))
    found = watched.follow(first, first + HUGE)
    assert pages(found.present, first, first + HUGE) == pages(found.written, first, first + HUGE) == moved
    assert all(watched.held[page] == watched.actual(page) for page in moved)
    assert watched.held[first][9] == 1 + second // PAGE % 251


def test_given_back_and_read_again(watched: Watched) -> None:
    """A zero page is where another page was; nothing was written."""
    arena = Arena(watched)
    arena.write(*range(8))
    for _ in range(2):
        watched.follow(arena.base, arena.page(PAGES))
    arena.puppet.call(arch.NR_madvise, arena.page(2), 3 * PAGE, MADV_DONTNEED)
    touch(arena, 2, 4)
    watched.follow(arena.base, arena.page(PAGES))
    assert all(watched.held.get(p, bytes(PAGE)) == watched.actual(p) for p in map(arena.page, range(8)))
    assert watched.actual(arena.page(3)) == bytes(PAGE) != watched.actual(arena.page(1))


def test_a_mapping_made_anew_that_joins_its_neighbour(watched: Watched) -> None:
    """As malloc does it: reserved without rights, then opened up, by which the two become one."""
    arena = Arena(watched)
    arena.write(*range(8))
    for _ in range(2):
        watched.follow(arena.base, arena.page(PAGES))
    arena.puppet.call(arch.NR_munmap, arena.page(4), 4 * PAGE)
    arena.puppet.map(4 * PAGE, arena.page(4), 0)
    arena.puppet.call(arch.NR_mprotect, arena.page(4), 4 * PAGE, 3)
    touch(arena, 4, 6)
    arena.write(6, byte=0x66)
    watched.follow(arena.base, arena.page(PAGES))
    assert all(watched.held.get(p, bytes(PAGE)) == watched.actual(p) for p in map(arena.page, range(8)))


def test_a_mapping_that_grew_and_became_part_of_its_neighbour(watched: Watched) -> None:
    """While a mapping is new, mprotect(2) makes its pages writable and leaves no mark; merging ends that."""
    arena = Arena(watched)
    arena.puppet.call(arch.NR_munmap, arena.page(12), (PAGES - 12) * PAGE)
    arena.write(*range(12))
    arena.puppet.call(arch.NR_mprotect, arena.page(4), 2 * PAGE, 0)
    for _ in range(3):
        watched.follow(arena.base, arena.page(PAGES))
    arena.puppet.map(2 * PAGE, arena.page(12))
    for protection in (1, 3):
        arena.puppet.call(arch.NR_mprotect, arena.page(6), 8 * PAGE, protection)
    arena.write(8, byte=0x88)
    arena.puppet.call(arch.NR_mprotect, arena.page(4), 2 * PAGE, 3)
    watched.follow(arena.base, arena.page(PAGES))
    assert watched.held[arena.page(8)] == watched.actual(arena.page(8))
    arena.write(9, byte=0x99)
    watched.follow(arena.base, arena.page(PAGES))
    assert watched.held[arena.page(9)] == watched.actual(arena.page(9))


def moved_back(watched: Watched) -> Arena:
    """Pages 8 to 15 went somewhere else, were followed there, and came back beside their old neighbours."""
    arena = Arena(watched)
    arena.write(*range(16))
    low, high = arena.base, arena.page(3 * PAGES)
    for _ in range(2):
        watched.follow(low, high)
    there, size = arena.page(PAGES + 8), 8 * PAGE
    for old, new in ((arena.page(8), there), (there, arena.page(8))):
        arena.puppet.call(arch.NR_mremap, old, size, size, MAYMOVE_FIXED, new)
        arena.write(3)  # by which its page may be written without a fault from now on
        watched.follow(low, high)
        watched.follow(low, high, protect=False)
    return arena


def test_a_mapping_that_comes_back_to_its_neighbours(watched: Watched) -> None:
    """They become one again, and the kernel takes the watch off the neighbours, but leaves their marks."""
    arena = moved_back(watched)
    for byte in (0x66, 0x77):
        for number in (3, 10, 14):
            arena.write(number, byte=byte)
            watched.follow(arena.base, arena.page(PAGES))
            assert watched.held[arena.page(number)] == watched.actual(arena.page(number))
    if TOLD_TWICE:
        assert arena.scan()[1] == set()


def test_marks_that_cannot_be_taken_off_are_not_believed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is so: a mapping in the range may be gone by then."""
    if not TOLD_TWICE:
        return
    monkeypatch.setattr(userfaultfd, "unprotect", lambda *_: False)
    arena = moved_back(watched)
    arena.write(3, byte=0x66)
    assert {3, 10} <= arena.scan()[1]
    monkeypatch.undo()
    for _ in range(2):
        assert {3, 10} <= arena.scan()[1]  # told until the scan that protects them
    assert arena.scan()[1] == set()
    arena.write(3, byte=0x77)
    assert arena.scan()[1] == {3}


def test_a_large_empty_mapping(watched: Watched) -> None:
    """Address space costs nothing; and a page in the middle of it is found."""
    size = 1 << 40
    arena = Arena(watched)
    start = watched.puppet.map(size, flags=0x4022)  # MAP_NORESERVE
    arena.write(1)
    assert arena.scan()[1] == {1}
    watched.puppet.call(arch.NR_mprotect, start + size // 2, PAGE, 3)
    watched.puppet.call(arch.NR_munmap, start, size // 2 - (1 << 30))
    watched.puppet.call(arch.NR_munmap, start + size // 2 + (1 << 30), size // 2 - (1 << 30))
    middle = start + size // 2
    watched.puppet.fill(middle, 5)
    assert middle in pages(watched.scan().written, middle, middle + PAGE)
