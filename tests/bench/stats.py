"""Medians with their spread, and numbers as people read them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """The median of some samples, with the least and the greatest."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of those that could be measured; None if none could."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.median(known), min(known), max(known), len(known))


def number(value: float) -> str:
    """Three significant digits, never an exponent: 0.123, 12.3, 1,230."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    for bound, digits in ((0.995, 3), (9.995, 2), (99.95, 1)):
        if magnitude < bound:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def written(found: Spread | None, scale: float = 1.0) -> str:
    """`median (low..high)`, times `scale`; a dash for nothing, the median alone where it is all."""
    if found is None:
        return "–"
    median = number(found.median * scale)
    if found.count == 1:
        return median
    return f"{median} ({number(found.low * scale)}..{number(found.high * scale)})"
