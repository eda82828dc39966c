"""Which pages a running process wrote: userfaultfd's asynchronous write-protection read through PAGEMAP_SCAN.

A mapping that appeared, moved or was replaced since it was registered is not watched; all that is in it counts as
written. What is no longer there is found by what is: every scan yields the pages present, and the caller compares.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import msgspec

from agent.kernel import userfaultfd
from agent.kernel.arch.x86_64 import TASK_SIZE
from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PFNZERO,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WPALLOWED,
    PAGE_IS_WRITTEN,
    Pagemap,
    Region,
)
from agent.kernel.procfs import MapsLine

Range = tuple[int, int]
_THERE: Final = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
_RETURNED: Final = (
    PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN | PAGE_IS_FILE | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO
)


class Scan(msgspec.Struct):
    """What one scan found: ranges with content of their own, the part of them that was written, and guard pages."""

    present: list[Range]
    written: list[Range]
    guards: list[Range]


class Tracker:
    """Follows one process's writes. `close` ends it and leaves no trace in the process."""

    def __init__(self, pid: int, uffd: int | None) -> None:
        self._pagemap = Pagemap(pid)
        self._uffd = uffd
        self._guard = _guard_supported(self._pagemap)

    @property
    def incremental(self) -> bool:
        return self._uffd is not None

    def watch(self, lines: Sequence[MapsLine]) -> None:
        """Register all mappings; those that are already are left as they are."""
        if self._uffd is None:
            return
        for line in lines:
            userfaultfd.register(self._uffd, line.start, line.end)

    def scan(self, excluded: Sequence[Range], protect: bool) -> Scan:
        """Look at the whole address space; with `protect`, what was written is protected again in the same step."""
        result = Scan([], [], [])
        protect = protect and self._uffd is not None
        any_of = _THERE | self._guard
        returned = _RETURNED | self._guard
        if not protect:
            self._sort(self._pagemap.scan(0, TASK_SIZE, any_of=any_of, returned=returned), result)
        else:
            watched = self._pagemap.scan(0, TASK_SIZE, any_of=any_of, returned=returned, write_protect=True)
            self._sort(watched, result)
            others = self._pagemap.scan(
                0,
                TASK_SIZE,
                any_of=any_of,
                returned=returned,
                required=PAGE_IS_WPALLOWED,
                inverted=PAGE_IS_WPALLOWED,
            )
            self._sort(others, result)
        return Scan(*(without(merged(r), excluded) for r in (result.present, result.written, result.guards)))

    def _sort(self, regions: object, into: Scan) -> None:
        for region in regions:  # type: ignore[attr-defined]
            self._classify(region, into)

    def _classify(self, region: Region, into: Scan) -> None:
        start, end, categories = region
        if categories & self._guard:
            into.guards.append((start, end))
        elif not categories & (PAGE_IS_FILE | PAGE_IS_PFNZERO):
            into.present.append((start, end))
            if categories & PAGE_IS_WRITTEN or not categories & PAGE_IS_WPALLOWED:
                into.written.append((start, end))

    def close(self) -> None:
        self._pagemap.close()
        if self._uffd is not None:
            os.close(self._uffd)
            self._uffd = None


def _guard_supported(pagemap: Pagemap) -> int:
    """PAGE_IS_GUARD where the kernel knows it (Linux 6.15), else 0."""
    try:
        list(pagemap.scan(0, 4096, any_of=_THERE | PAGE_IS_GUARD, returned=PAGE_IS_GUARD))
    except OSError:
        return 0
    return PAGE_IS_GUARD


def merged(ranges: Sequence[Range]) -> list[Range]:
    """The same pages in order and without overlap: a mapping replaced between two walks is in both."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def without(ranges: Sequence[Range], excluded: Sequence[Range]) -> list[Range]:
    """The ranges with the excluded ones cut out; both in order."""
    if not excluded:
        return list(ranges)
    result: list[Range] = []
    low, high = min(e[0] for e in excluded), max(e[1] for e in excluded)
    for start, end in ranges:
        if end <= low or start >= high:
            result.append((start, end))
            continue
        position = start
        for cut_start, cut_end in excluded:
            if cut_end <= position or cut_start >= end:
                continue
            if cut_start > position:
                result.append((position, cut_start))
            position = max(position, cut_end)
        if position < end:
            result.append((position, end))
    return result
