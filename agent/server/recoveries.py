"""What other agents of this host have left, put in order: when the service starts, and now and then.

Departures whose engine has ended are recovered (`agent.recovery`), arrivals whose agent has ended are
settled. A migration that runs is its front's, until that has ended.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from agent import journal, settle, settlement
from agent.journal import Departure
from agent.server.registry import Registry

PAUSE: Final = 30.0  # seconds between two looks

_log = logging.getLogger(__name__)


class Recoveries:
    """The task of a service."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._said: dict[str, str] = {}

    @property
    def waiting(self) -> bool:
        """Whether there is something that could not be put in order yet."""
        return bool(self._said)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._look()
            except (OSError, ValueError) as error:
                _log.error("what other agents have left: %s", error)
            await asyncio.sleep(PAUSE)

    async def _look(self) -> None:
        await asyncio.to_thread(settle.sweep)
        for role in ("outgoing", "incoming"):
            journal.sweep_locks(role)
        for entry in list(journal.every(Departure)):
            if not entry.content.agent.lives() and not self._registry.is_running(entry.migration):
                await self._recover(entry.migration)

    async def _recover(self, migration: str) -> None:
        done = await settlement.recover(migration)
        if self._said.get(migration) != done.message:
            _log.warning("%s: left by another agent: %s", migration, done.message)
        if journal.state_of("outgoing", migration) is not None:
            self._said[migration] = done.message
        else:
            self._said.pop(migration, None)
        self._registry.recovered(migration, done)
