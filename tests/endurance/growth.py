"""Whether figures grow: the last quarter of a run against the first. Pure arithmetic.

Of a count the least of each quarter: what is left for good never goes away again, what takes its time does.
Of memory and of pauses the median. The warm-up, in which a service loads what it needs, counts for nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from endurance.usage import MEMORY, RECORDS, Sample

WARM_UP: Final = 0.1  # of all samples
LEAST_WARM_UP: Final = 4  # samples
PAUSE_RATIO: Final = 1.5
_FEW: Final = 16  # pauses: a median of less than four says little
_MEMORY_RATIO, _MEMORY_MORE = 1.02, 512.0  # KiB
# What the workload maps at a moment differs from the moment before.
_MAPPINGS_MORE: Final = 2.0
# It has one more where its number was taken.
_NAMESPACES_MORE: Final = 1.0

Middle = Callable[[Sequence[float]], float]


class Growth(msgspec.Struct, frozen=True):
    figure: str
    first: float  # of the first quarter after the warm-up
    last: float  # of the last one
    allowed: float | None  # the most that `last` may be; None: any number

    @property
    def grown(self) -> bool:
        return self.allowed is not None and self.last > self.allowed


def quarters(values: Sequence[float], of: Middle) -> tuple[float, float]:
    """`of` the first and the last quarter, of at least one value each."""
    size = max(1, len(values) // 4)
    return of(values[:size]), of(values[-size:])


def settled(count: int) -> int:
    """How many of so many samples are the warm-up; one at least is left."""
    return min(max(LEAST_WARM_UP, round(count * WARM_UP)), count - 1)


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Of every figure, of at least one sample."""
    kept = samples[settled(len(samples)) :]
    return [_growth(figure, [sample[figure] for sample in kept]) for figure in kept[0]]


def _growth(figure: str, values: Sequence[float]) -> Growth:
    if figure.endswith(MEMORY):
        first, last = quarters(values, statistics.median)
        return Growth(figure, first, last, first * _MEMORY_RATIO + _MEMORY_MORE)
    first, last = quarters(values, min)
    return Growth(figure, first, last, _most(figure, first))


def _most(figure: str, first: float) -> float | None:
    if figure.endswith(RECORDS):
        return None  # the service keeps the newest 1,000
    if figure.endswith("mappings"):
        return first + _MAPPINGS_MORE
    if figure.endswith("namespaces within"):
        return first + _NAMESPACES_MORE
    return first


def drift(pauses: Sequence[float], machine: Sequence[float]) -> list[Growth]:
    """Of the pauses of undisturbed moves, ms; nothing if they are too few to say.

    `machine`: what the same work took it before each of these moves, ms. A pause may be longer by as much as
    the machine is slower, for others may be using it.
    """
    if len(pauses) < _FEW:
        return []
    before, after = quarters(machine, statistics.median)
    first, last = quarters(pauses, statistics.median)
    most = first * PAUSE_RATIO * max(1.0, after / before)
    return [Growth("the machine, ms", before, after, None), Growth("pause, ms", first, last, most)]
