"""Entries of /proc/PID/pagemap, many at a time, against one at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import soft_dirty
from agent.kernel import pagemap
from agent.kernel.arch.x86_64 import PAGE, TASK_SIZE
from agent.kernel.pagemap import (
    PM_FILE,
    PM_GUARD_REGION,
    PM_MMAP_EXCLUSIVE,
    PM_PFN_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    SWAP_TYPE,
    SWP_PTE_MARKER,
)
from agent.soft_dirty import BLOCK, Snapshot, SoftDirty
from agent.tracking import Range

FLAGS = (PM_SOFT_DIRTY, PM_MMAP_EXCLUSIVE, PM_UFFD_WP, PM_GUARD_REGION, PM_FILE, PM_SWAP, PM_PRESENT)
# few frames, so that two entries often have the same; the low bits of one of them are a marker's
FRAME = st.sampled_from([0, 1, 2, SWP_PTE_MARKER, 0xABCDE00, 1 << 33, PM_PFN_MASK])
ENTRY = st.one_of(
    st.just(0),
    st.builds(lambda frame, flags: frame | sum(set(flags)), FRAME, st.lists(st.sampled_from(FLAGS))),
)
ENTRIES = st.lists(ENTRY, min_size=1, max_size=600).flatmap(
    lambda some: st.integers(1, 4).map(lambda times: some * times)
)


def packed(entries: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries)


# --- one at a time ---


def is_own(entry: int) -> bool:
    if entry & PM_FILE or entry & PM_GUARD_REGION:
        return False
    if entry & PM_SWAP and entry & SWAP_TYPE == SWP_PTE_MARKER:
        return False
    return bool(entry & (PM_PRESENT | PM_SWAP))


def who(entry: int) -> int:
    return entry & ~(PM_SOFT_DIRTY | PM_MMAP_EXCLUSIVE | PM_UFFD_WP)


# --- many at a time ---


@given(ENTRIES)
def test_own_pages(entries: list[int]) -> None:
    assert list(soft_dirty.own_pages(packed(entries))) == [is_own(e) for e in entries]


@given(ENTRIES)
def test_guard_pages(entries: list[int]) -> None:
    assert list(soft_dirty.guard_pages(packed(entries))) == [bool(e & PM_GUARD_REGION) for e in entries]


@given(ENTRIES)
def test_identity(entries: list[int]) -> None:
    assert soft_dirty.identity(packed(entries)) == packed([who(e) for e in entries])


@given(ENTRIES, st.data())
def test_differences(entries: list[int], data: st.DataObject) -> None:
    """Most of it is the same."""
    before = list(entries)
    for at in data.draw(st.lists(st.integers(0, len(entries) - 1), max_size=5)):
        before[at] = data.draw(ENTRY)
    found = soft_dirty.differences(packed([who(e) for e in entries]), packed([who(e) for e in before]))
    assert list(found) == [who(a) != who(b) for a, b in zip(entries, before, strict=True)]


@given(ENTRIES)
def test_dirty_pages(entries: list[int]) -> None:
    assert list(soft_dirty.dirty_pages(packed(entries))) == [bool(e & PM_SOFT_DIRTY) for e in entries]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40).map(bytes), max_size=4))
def test_marks_as_ranges(blocks: list[bytes]) -> None:
    """Block after block as one."""
    whole, once, joined = list[Range](), list[Range](), b"".join(blocks)
    for number, marks in enumerate(blocks):
        soft_dirty.append(whole, sum(map(len, blocks[:number])) * PAGE, marks)
    soft_dirty.append(once, 0, joined)
    assert whole == once
    assert {page for low, high in once for page in range(low // PAGE, high // PAGE)} == {
        page for page, mark in enumerate(joined) if mark
    }
    assert all(a[1] < b[0] for a, b in itertools.pairwise(once))


@given(ENTRIES)
def test_nothing_is_known_of_the_first_scan(entries: list[int]) -> None:
    unknown = Snapshot([]).entries(0x1000, 8 * len(entries))
    found = soft_dirty.differences(soft_dirty.identity(packed(entries)), unknown)
    assert all(mark for mark, entry in zip(found, entries, strict=True) if is_own(entry))


# --- what a snapshot knows ---

PLACES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=6)


def snapshot(places: list[tuple[int, int]]) -> tuple[Snapshot, dict[int, int]]:
    """One with entries at some places, and the same by page number."""
    words, known, page = [], dict[int, int](), 0
    for gap, length in places:
        page += gap
        entries = [(page + n + 1) << 8 for n in range(length)]
        words.append((page * PAGE, packed(entries)))
        known |= {page + n: entry for n, entry in enumerate(entries)}
        page += length
    return Snapshot(words), known


@given(PLACES, st.integers(0, 40), st.integers(1, 20))
def test_entries_of_a_snapshot(places: list[tuple[int, int]], first: int, count: int) -> None:
    found, known = snapshot(places)
    expected = packed([known.get(page, 0) for page in range(first, first + count)])
    assert found.entries(first * PAGE, 8 * count) == expected


@given(PLACES, PLACES)
def test_a_snapshot_cut_to_some_ranges(places: list[tuple[int, int]], kept: list[tuple[int, int]]) -> None:
    found, known = snapshot(places)
    _, pages = snapshot(kept)
    ranges = [(page * PAGE, (page + 1) * PAGE) for page in pages]
    left = found.cut_to(ranges).entries(0, 8 * 60)
    assert left == packed([known.get(page, 0) if page in pages else 0 for page in range(60)])


# --- what is read ---


def test_blocks_join_neighbours_and_are_cut() -> None:
    ranges = [(BLOCK - 8192, BLOCK - 4096), (BLOCK - 4096, 2 * BLOCK + 4096), (5 * BLOCK, 6 * BLOCK)]
    found = list(soft_dirty.blocks(ranges))
    assert found == [
        *((BLOCK - 8192, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK + 4096)),
        (5 * BLOCK, 6 * BLOCK),
    ]


SMAPS = b"""\
00400000-00500000 r-xp 00000000 fd:00 12 /usr/bin/Rss: 4
Size:               1024 kB
Rss:                   0 kB
Swap:                  0 kB
VmFlags: rd ex mr mw me
00600000-00700000 rw-p 00000000 00:00 0
Rss:                   4 kB
Swap:                  0 kB
00800000-00900000 rw-p 00000000 00:00 0
Rss:                   0 kB
Swap:                 16 kB
SwapPss:               0 kB
00900000-00a00000 rw-p 00000000 00:00 0                                  [heap]
Rss:                   0 kB
Swap:                  0 kB
SwapPss:               8 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Rss:                   4 kB
"""


def test_mappings_that_have_pages() -> None:
    assert soft_dirty.populated(SMAPS) == [(0x600000, 0x700000), (0x800000, 0x900000)]


def test_extents() -> None:
    maps = Path("/proc/self/maps").read_bytes()
    found = soft_dirty.extents(maps)
    assert len(found) in (maps.count(b"\n"), maps.count(b"\n") - 1)
    assert all(start < end <= TASK_SIZE for start, end in found)


# --- without a process's help ---


def test_present_pages_of_ourselves() -> None:
    tracker = SoftDirty(os.getpid(), None)
    data = bytearray(os.urandom(64 * PAGE))
    at = id(data) // PAGE * PAGE
    found = tracker.scan([], [], protect=True)
    tracker.close()
    assert not tracker.incremental
    assert found.present == found.written
    assert any(start <= at < end for start, end in found.present)


def test_two_may_not_follow_the_same_process() -> None:
    """Each would take from the other what was written."""
    first = SoftDirty(os.getpid(), contextlib.nullcontext())
    with pytest.raises(BlockingIOError, match="followed already"):
        SoftDirty(os.getpid(), contextlib.nullcontext())
    SoftDirty(os.getpid(), None).close()  # only looks
    first.close()
    SoftDirty(os.getpid(), contextlib.nullcontext()).close()


def test_entries_stop_at_the_end_of_the_address_space() -> None:
    own = pagemap.Pagemap(os.getpid())
    assert own.entries(TASK_SIZE - PAGE, TASK_SIZE) == bytes(8)
    own.close()


