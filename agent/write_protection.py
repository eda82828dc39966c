"""Pages a running process wrote, by userfaultfd's asynchronous write-protection read through PAGEMAP_SCAN.

A mapping that appeared, moved or was replaced since it was registered is not watched; all that is in
it counts as written. So does all of a watched mapping that another one moved beside: mremap(2) makes one of
the two and takes the watch off it, while its pages keep their marks and may be written without a fault. Such
marks would hide writes from the moment it is watched again, so they are taken off then.
What is no longer there is found by what is: every scan yields the pages present, and the caller compares.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

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
from agent.tracking import Range, Scan, intersection, merged, without

_THERE: Final = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
_FOREIGN: Final = PAGE_IS_FILE | PAGE_IS_PFNZERO
_WATCHED: Final = "uw"  # VM_UFFD_WP, proc(5)


class WriteProtection:
    """A `tracking.Tracker`: the kernel marks writes by itself, and the process is never stopped for a scan.

    `uffd`: of the process, its handshake done. It is closed with this.
    """

    def __init__(self, pid: int, uffd: int) -> None:
        self._pagemap = Pagemap(pid)
        self._uffd = uffd
        self._guard = _guard_supported(self._pagemap)
        self._doubtful: list[Range] = []  # watched, with marks that may be older than the watch

    @property
    def incremental(self) -> bool:
        return True

    def watch(self, lines: Sequence[MapsLine]) -> None:
        """Register all mappings that are not; the lines are smaps'."""
        doubtful: list[Range] = []
        for line in lines:
            extent = line.start, line.end
            if _WATCHED in line.vmflags and not intersection([extent], self._doubtful):
                continue
            if userfaultfd.register(self._uffd, *extent) and not userfaultfd.unprotect(self._uffd, *extent):
                doubtful.append(extent)
        self._doubtful = doubtful

    def scan(self, files: Sequence[Range], excluded: Sequence[Range], protect: bool) -> Scan:
        """As `Tracker.scan`; what was written is protected again in the same step.

        Only in `files` the kernel is asked whether a page is the file's own: that costs five times the rest.
        """
        written, present, guards = self._protect() if protect else self._look()
        if self._doubtful:
            written = merged([*written, *self._doubtful])
        own = [r for low, high in files for r in self._own(low, high)]
        present = without(merged([*without(present, files), *own]), excluded)
        return Scan(present, intersection(written, present), without(guards, excluded))

    def _protect(self) -> tuple[list[Range], list[Range], list[Range]]:
        """Written and protected again; there; guards."""
        written = self._written()
        # what is not watched is written, whatever marks its pages may carry
        unwatched = self._there(0, TASK_SIZE, inverted=PAGE_IS_WPALLOWED)
        written = merged([*written, *((s, e) for s, e, _ in unwatched)])
        present, guards = list[Range](), list[Range]()
        for start, end, categories in self._there(0, TASK_SIZE, returned=self._guard):
            (guards if categories else present).append((start, end))
        return written, present, guards

    def _look(self) -> tuple[list[Range], list[Range], list[Range]]:
        """The same where nothing is protected: in one walk over the page tables."""
        written, present, guards = list[Range](), list[Range](), list[Range]()
        returned = PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED | self._guard
        for start, end, categories in self._there(0, TASK_SIZE, returned=returned):
            if categories & self._guard:
                guards.append((start, end))
                continue
            present.append((start, end))
            if categories & (PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED) != PAGE_IS_WPALLOWED:
                written.append((start, end))
        return written, present, guards

    def _own(self, start: int, end: int) -> list[Range]:
        """Pages in a mapping of a file that are no longer the file's."""
        found: list[Range] = []
        for low, high, categories in self._there(start, end, inverted=_FOREIGN, returned=PAGE_IS_SWAPPED):
            holes = self._pagemap.markers(low, high) if categories else []
            found += without([(low, high)], holes)
        return found

    def _written(self) -> list[Range]:
        """The kernel's short way also takes holes for written and would protect them, a marker for each."""
        regions = self._pagemap.scan(
            0,
            TASK_SIZE,
            any_of=_THERE,
            required=PAGE_IS_WRITTEN,
            returned=PAGE_IS_WRITTEN,
            write_protect=True,
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
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1


def _guard_supported(pagemap: Pagemap) -> int:
    """PAGE_IS_GUARD where the kernel knows it (Linux 6.15), else 0."""
    try:
        list(pagemap.scan(0, 4096, any_of=_THERE | PAGE_IS_GUARD, returned=PAGE_IS_GUARD))
    except OSError:
        return 0
    return PAGE_IS_GUARD
