"""What a workload recorded, 10 ms a line (tests/programs/common/load.h), and what it says of a move."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import msgspec


class Record(msgspec.Struct, frozen=True):
    at: float  # CLOCK_REALTIME
    pages: int  # written so far
    work: int  # done so far
    gap_ms: float  # the longest that ended since the record before
    host: str


Window = tuple[float, float]


def read(path: Path) -> list[Record]:
    return [parse(line) for line in path.read_text().splitlines()]


def parse(line: str) -> Record:
    at, pages, work, gap, host = line.split()
    return Record(float(at), int(pages), int(work), float(gap), host)


def within(trace: Iterable[Record], window: Window) -> list[Record]:
    return [record for record in trace if window[0] <= record.at <= window[1]]


def longest_gap(trace: Iterable[Record], window: Window) -> float | None:
    """Of those that ended in the window; None without a record."""
    return max((record.gap_ms for record in within(trace, window)), default=None)


def move_gap(trace: list[Record]) -> float | None:
    """The gap after which it found itself on another host; None if it never did."""
    for before, after in itertools.pairwise(trace):
        if before.host != after.host:
            return after.gap_ms
    return None


def slowdown(trace: list[Record], field: str, before: Window, during: Window) -> float | None:
    """How much slower `field` grew `during` than `before`, a share; None if nothing grew, or too briefly."""
    usual, then = _rate(within(trace, before), field), _rate(within(trace, during), field)
    if not usual or then is None:
        return None
    return 1 - then / usual


def _rate(records: list[Record], field: str) -> float | None:
    if len(records) < 5:
        return None
    first, last = records[0], records[-1]
    return float((getattr(last, field) - getattr(first, field)) / (last.at - first.at))
