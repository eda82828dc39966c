"""Which pages a running process wrote: userfaultfd's asynchronous write-protection read through PAGEMAP_SCAN.

A mapping that appeared, moved or was replaced since it was registered is not watched; all that is in it counts as
written. What is no longer there is found by what is: every scan yields the pages present, and the caller compares.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
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
_FOREIGN: Final = PAGE_IS_FILE | PAGE_IS_PFNZERO


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

    def scan(self, files: Sequence[Range], excluded: Sequence[Range], protect: bool) -> Scan:
        """Look at the whole address space; with `protect`, what was written is protected again in the same step.

        `files` are the mappings of files: only there the kernel is asked whether a page is the file's own, for that
        question costs five times the rest of the walk. Neither files nor excluded ranges overlap, both are in order.
        """
        protect = protect and self.incremental
        written = self._written(protect)
        if self.incremental:  # what is not watched is written, whatever marks its pages may carry
            unwatched = self._there(0, TASK_SIZE, inverted=PAGE_IS_WPALLOWED)
            written = merged([*written, *((s, e) for s, e, _ in unwatched)])
        present, guards = list[Range](), list[Range]()
        for start, end, categories in self._there(0, TASK_SIZE, returned=self._guard):
            (guards if categories else present).append((start, end))
        own = [r for low, high in files for r in self._own(low, high)]
        present = without(merged([*without(present, files), *own]), excluded)
        return Scan(present, intersection(written, present), without(guards, excluded))

    def _own(self, start: int, end: int) -> list[Range]:
        """Pages in a mapping of a file that are no longer the file's."""
        found: list[Range] = []
        for low, high, categories in self._there(start, end, inverted=_FOREIGN, returned=PAGE_IS_SWAPPED):
            holes = self._pagemap.markers(low, high) if categories else []
            found += without([(low, high)], holes)
        return found

    def _written(self, protect: bool) -> list[Range]:
        """The kernel's short way also takes holes for written, and would protect them, so that each costs a marker."""
        any_of = _THERE if protect else 0
        regions = self._pagemap.scan(
            0, TASK_SIZE, any_of=any_of, required=PAGE_IS_WRITTEN, returned=PAGE_IS_WRITTEN, write_protect=protect
        )
        return [(start, end) for start, end, _ in regions]

    def _there(self, start: int, end: int, inverted: int = 0, returned: int = 0) -> Iterator[Region]:
        return self._pagemap.scan(
            start,
            end,
            any_of=_THERE | self._guard,
            required=inverted,
            inverted=inverted,
            returned=returned,
        )

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


def intersection(ranges: Sequence[Range], allowed: Sequence[Range]) -> list[Range]:
    """The parts of `ranges` inside `allowed`; both in order."""
    found: list[Range] = []
    index = 0
    for start, end in ranges:
        while index < len(allowed) and allowed[index][1] <= start:
            index += 1
        if index < len(allowed) and allowed[index][0] <= start and end <= allowed[index][1]:
            found.append((start, end))
            continue
        position = index
        while position < len(allowed) and allowed[position][0] < end:
            found.append((max(start, allowed[position][0]), min(end, allowed[position][1])))
            position += 1
    return found


def without(ranges: list[Range], excluded: Sequence[Range]) -> list[Range]:
    """The ranges with the excluded ones cut out; both in order, the excluded few."""
    for low, high in excluded:
        first = bisect.bisect_left(ranges, low, key=lambda r: r[1] - 1)
        last = bisect.bisect_left(ranges, high, key=lambda r: r[0])
        if first < last:
            outer = (ranges[first][0], low), (high, ranges[last - 1][1])
            ranges = [*ranges[:first], *(r for r in outer if r[0] < r[1]), *ranges[last:]]
    return ranges
