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
        self._found: list[Phase] = []

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self._found.append(Phase(name=name, ms=round((now - self._last) * 1000, 3), where=self._where))
        self._last = now

    def taken(self) -> tuple[Phase, ...]:
        return tuple(self._found)
