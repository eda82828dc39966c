"""Watching one migration to its end, also when the connection to its agent breaks and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from agent.api import Event, Finished, Log, Progress, StateChanged
from migrate.client import Agent, Lost
from migrate.errors import ExitCode, Failure

RETRY_FOR: Final = 20.0  # seconds
RETRY_EVERY: Final = 1.0
RECOVERED_IN: Final = 45.0  # engines that nobody can ask any more have rolled back by then

Connect = Callable[[], Awaitable[Agent]]


class Watch:
    """The migration `id`. `on_event` sees everything but the last, which `run` returns."""

    def __init__(self, agent: Agent, id: str, connect: Connect, on_event: Callable[[Event], None]) -> None:
        """`connect` makes another connection to the same agent."""
        self.agent = agent
        self.id = id
        self.state = ""
        self._connect = connect
        self._on_event = on_event
        self._seen = 0
        self._events: AsyncIterator[Event] | None = None

    async def run(self) -> Finished:
        """Until it is over. Lost if its agent cannot be found again, or has forgotten it."""
        while True:
            try:
                return await self._follow()
            except Lost as lost:
                self._on_event(Log(level="warning", message=f"{lost}; trying again"))
                await self._reconnect(lost)
                if (ended := await self._make_sure(lost)) is not None:
                    return ended

    async def finish(self) -> None:
        """After the end: what is still said, until its processes are gone."""
        if self._events is not None:
            async for event in self._events:
                self._on_event(event)

    async def _follow(self) -> Finished:
        self._events = self.agent.events(self.id, self._seen)
        async for event in self._events:
            if not isinstance(event, Progress):
                self._seen += 1
            if isinstance(event, Finished):
                return event
            if isinstance(event, StateChanged):
                self.state = event.state
            self._on_event(event)
        raise _lost(f"{self.agent.name}: the events of the migration ended without a report")

    async def _reconnect(self, lost: Lost) -> None:
        """The same agent again; `lost` if there is no way."""
        await self.agent.close()
        deadline = asyncio.get_running_loop().time() + RETRY_FOR
        while True:
            try:
                self.agent = await self._connect()
                return
            except Failure:
                if asyncio.get_running_loop().time() > deadline:
                    raise lost from None
            await asyncio.sleep(RETRY_EVERY)

    async def _make_sure(self, lost: Lost) -> Finished | None:
        """That it is still known. One that a killed service left to itself ends by itself, or is put in
        order.
        """
        deadline = asyncio.get_running_loop().time() + RECOVERED_IN
        while True:
            try:
                record = await self.agent.migration(self.id)
            except Failure:
                raise lost from None
            if record.status == "running":
                return None
            if record.report is not None:  # of its events, those of a killed service are lost
                return Finished(report=record.report)
            if asyncio.get_running_loop().time() > deadline:
                what = "the agent's service ended, and left the migration to itself"
                raise _lost(f"{self.agent.name}: {what}")
            await asyncio.sleep(RETRY_EVERY)


def _lost(message: str) -> Lost:
    return Lost("agent-failed", message, "source", ExitCode.UNREACHABLE)
