"""Following a running process's writes: what a scan tells, and arithmetic on ranges of pages.

Two ways of it have the same interface: `agent.write_protection` and `agent.soft_dirty`;
`agent.dirty_tracking` chooses.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

import msgspec

from agent.kernel.procfs import MapsLine

Range = tuple[int, int]


class Scan(msgspec.Struct):
    """What one scan found: ranges with content of their own, what was written of them, and guard pages."""

    present: list[Range]
    written: list[Range]
    guards: list[Range]


class Tracker(Protocol):
    """Follows one process's writes. `close` ends it and leaves no trace in the process."""

    @property
    def incremental(self) -> bool:
        """Whether it can tell what was written; if not, everything counts as written in every scan."""

    def watch(self, lines: Sequence[MapsLine]) -> None:
        """From now on follow all these mappings, lines of smaps; those that are already stay as they are."""

    def scan(self, files: Sequence[Range], excluded: Sequence[Range], protect: bool) -> Scan:
        """Look at the whole address space; with `protect`, the next tells only what is written from now on.

        Without it, this scan takes nothing back. `files` are the mappings of files, where only pages that are
        no longer the file's count. Neither files nor excluded ranges overlap, both are in order.
        """

    def close(self) -> None: ...


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
