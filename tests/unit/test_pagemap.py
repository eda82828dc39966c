"""PAGEMAP_SCAN on our own memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from agent.kernel.arch.x86_64 import TASK_SIZE
from agent.kernel.pagemap import PAGE_IS_PRESENT, PAGE_IS_SWAPPED, Pagemap

PAGE = 4096


@pytest.fixture
def own() -> Iterator[Pagemap]:
    found = Pagemap(os.getpid())
    yield found
    found.close()


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 770, 1024, 2000, 20000])
def test_many_ranges_come_in_order_and_once(own: Pagemap, count: int) -> None:
    """As many as its buffer of 512 has, several of them, more than ours; and the way goes on behind them."""
    area = mmap.mmap(-1, (2 * count + 1) * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for number in range(count):
        area[2 * number * PAGE] = 1
    there = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    wanted = [(start + 2 * n * PAGE, start + (2 * n + 1) * PAGE) for n in range(count)]
    end = start + (2 * count + 1) * PAGE
    assert [(s, e) for s, e, _ in own.scan(start, end, any_of=there, returned=0)] == wanted
    everything = [(s, e) for s, e, _ in own.scan(0, TASK_SIZE, any_of=there, returned=there)]
    assert everything == sorted(set(everything))
    inside = [(max(s, start), min(e, end)) for s, e in everything if s < end and start < e]
    assert sum(e - s for s, e in inside) == count * PAGE
