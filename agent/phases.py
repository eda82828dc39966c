"""A stopwatch for the steps inside the pause."""

from __future__ import annotations

import time
from typing import Literal

from agent.api import Phase


class Phases:
    """Consecutive steps: each `mark` ends one, begun where the one before ended."""

    def __init__(self, where: Literal["source", "destination"]) -> None:
        self._where: Literal["source", "destination"] = where
        self._last = time.perf_counter()
        self._found: dict[str, float] = {}

    def begin(self) -> None:
        """What was before this moment was waiting, and is nobody's."""
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """End a step; one that comes several times is added up."""
        now = time.perf_counter()
        self._found[name] = self._found.get(name, 0.0) + now - self._last
        self._last = now

    def taken(self) -> tuple[Phase, ...]:
        return tuple(Phase(name=n, ms=round(s * 1000, 3), where=self._where) for n, s in self._found.items())
