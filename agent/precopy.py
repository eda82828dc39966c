"""Pre-copy: whether to send another round or to freeze. Pure policy, fed with numbers, no I/O.

A round sends what the process wrote while the round before was on its way. The pause is estimated as what
would have to be sent in it at the measured throughput, plus the fixed cost of a freeze. Rounds go on as long
as they make the pause clearly shorter, and end when the limit is kept and another round would gain little, or
when they gain nothing at all.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

PAGE: Final = 4096
GAIN: Final = 0.7  # another round pays if it leaves less than this share of what is dirty now
SMALL: Final = 128  # pages: no round is worth its overhead below this
STUCK_ROUNDS: Final = 4  # rounds without gain before giving up on convergence


class Decision(enum.Enum):
    CONTINUE = "another round"
    FREEZE = "freeze: the pause is short enough"
    FREEZE_STUCK = "freeze: rounds no longer make it shorter"


class Measured(msgspec.Struct, frozen=True):
    """One finished round: bytes of memory sent, how long that took, and what was dirty at its end."""

    memory_bytes: int
    seconds: float
    dirty_pages: int


class Convergence:
    """The history of one migration's rounds."""

    def __init__(self, downtime_limit_ms: float, max_rounds: int, fixed_cost_ms: float) -> None:
        self._limit = downtime_limit_ms
        self._max_rounds = max_rounds
        self._fixed = fixed_cost_ms
        self._history: list[Measured] = []
        self._throughput = 0.0  # bytes of memory per second, the best estimate

    def record(self, measured: Measured) -> None:
        self._history.append(measured)
        # small rounds measure latency, not throughput
        if measured.memory_bytes >= 1 << 20 and measured.seconds > 0:
            self._throughput = measured.memory_bytes / measured.seconds

    @property
    def throughput(self) -> float:
        return self._throughput or 100e6

    def estimated_pause_ms(self, dirty_pages: int) -> float:
        return self._fixed + 1000.0 * dirty_pages * PAGE / self.throughput

    def decide(self) -> Decision:
        """After `record`: go on or freeze."""
        now = self._history[-1].dirty_pages
        short_enough = self.estimated_pause_ms(now) <= self._limit
        if len(self._history) >= self._max_rounds:
            return Decision.FREEZE if short_enough else Decision.FREEZE_STUCK
        if short_enough and (now <= SMALL or not self._gaining()):
            return Decision.FREEZE
        if not short_enough and self._stuck():
            return Decision.FREEZE_STUCK
        return Decision.CONTINUE

    def _gaining(self) -> bool:
        """Whether the last round left clearly less than the one before it found."""
        if len(self._history) < 2:
            return True
        return self._history[-1].dirty_pages < GAIN * self._history[-2].dirty_pages

    def _stuck(self) -> bool:
        if len(self._history) <= STUCK_ROUNDS:
            return False
        best_before = min(m.dirty_pages for m in self._history[:-STUCK_ROUNDS])
        return min(m.dirty_pages for m in self._history[-STUCK_ROUNDS:]) > GAIN * best_before
