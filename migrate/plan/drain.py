"""A drain, watched from the outside to its end, also if that end is not heard of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from agent.api import ErrorInfo, Event, Log, StateChanged
from agent.hook_api import (
    Drain,
    Drained,
    DrainedProcess,
    DrainProgress,
    DrainReport,
    DrainSettled,
    DrainStarted,
)
from agent.states import UNTOUCHED
from migrate.client import Agent, Lost
from migrate.coordinator import on_interrupt
from migrate.errors import Failure
from migrate.plan.outcome import worst

_ALONE: Final = "an agent left alone rolls back what it has not committed: `migrate status` shows it"


class DrainWatch:
    """`on_event` gets each event with the name of what it is about."""

    def __init__(self, agent: Agent, wanted: Drain, on_event: Callable[[str, Event], None]) -> None:
        self._agent = agent
        self._wanted = wanted
        self._on_event = on_event
        self._processes: dict[int, DrainedProcess] = {}
        self._begun: set[int] = set()  # those of which more than a check is under way
        self._aborting: asyncio.Task[None] | None = None

    async def run(self) -> DrainReport:
        """Until it is over; Failure if it was not begun.

        The first interrupt asks for the end, a second leaves at once.
        """
        watching = asyncio.ensure_future(self._watch())
        on_interrupt(lambda: self._interrupt(watching))
        try:
            return await watching
        except asyncio.CancelledError:
            if self._aborting is None:
                raise
            return self._unheard(
                ErrorInfo(kind="aborted", message=f"interrupted; {_ALONE}", where="coordinator")
            )
        except Lost as lost:
            return self._unheard(msgspec.structs.replace(lost.info, message=f"{lost}; {_ALONE}"))

    async def _watch(self) -> DrainReport:
        async for event in self._agent.drain(self._wanted):
            if isinstance(event, Drained):
                return event.report
            self._take(event)
        message = f"{self._agent.name}: the drain ended without a report; {_ALONE}"
        return self._unheard(ErrorInfo(kind="agent-failed", message=message, where="source"))

    def _take(self, event: DrainStarted | DrainProgress | DrainSettled) -> None:
        if isinstance(event, DrainStarted):
            self._processes = {each.process.pid: each for each in event.processes}
        elif isinstance(event, DrainProgress):
            if isinstance(event.of, StateChanged) and event.of.state not in UNTOUCHED:
                self._begun.add(event.pid)
            self._on_event(f"{self._name(event.pid)} -> {event.destination}", event.of)
        else:
            settled = event.process
            self._processes[settled.process.pid] = settled
            if settled.status != "migrated":  # that one's own events have said so
                self._on_event(self._name(settled.process.pid), StateChanged(state=settled.status))

    def _name(self, pid: int) -> str:
        return f"{self._processes[pid].process.name} {pid}"

    def _interrupt(self, watching: asyncio.Future[DrainReport]) -> None:
        if self._aborting is not None:
            watching.cancel()
            return
        self._say("giving up; waiting until what is on its way runs on undisturbed (again: leave at once)")
        self._aborting = asyncio.ensure_future(self._abort())

    async def _abort(self) -> None:
        try:
            await self._agent.abort_drain()
        except Failure as failure:
            self._say(f"it cannot be given up: {failure}")

    def _say(self, message: str) -> None:
        self._on_event(self._agent.name, Log(level="warning", message=message))

    def _unheard(self, error: ErrorInfo) -> DrainReport:
        """What can be said without the agent's last word."""
        processes = tuple(
            msgspec.structs.replace(each, status="in-doubt")
            if each.status == "not-started" and pid in self._begun
            else each
            for pid, each in self._processes.items()
        )
        outcome = worst((each.status for each in processes), "refused")
        return DrainReport(outcome=outcome, host=self._agent.name, processes=processes, error=error)
