"""One migration as the service sees it: its events, who reads them, and what happens when nobody does.

Every event but Progress is kept, in order, and has its number: a reader starts with any of them and misses
none. Of Progress only the latest is of interest, and only while nothing else has happened since; so a slow
reader gets fewer of them, and no reader holds up anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent.api import (
    Event,
    Finished,
    Log,
    MigrationRecord,
    Progress,
    Report,
    Request,
)
from agent.server.front import Front, Program
from agent.states import LIVE, NO_RETURN

DESERTED_AFTER: Final = 5.0  # seconds without a reader before a move that wants one is given up
MAX_EVENTS: Final = 20_000  # kept of one migration; further messages (nothing else) are dropped


class TooLate(Exception):
    """It cannot be aborted any more."""


class Stream:
    """The events of one request, for any number of readers at once."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.over = False
        self.readers = 0
        self._progress: bytes | None = None
        self._changed = asyncio.Event()

    def add(self, event: msgspec.Struct, line: bytes) -> None:
        if isinstance(event, Progress):
            self._progress = line
        elif len(self.lines) < MAX_EVENTS or not isinstance(event, Log):
            self._progress = None
            self.lines.append(line)
        self._notify()

    def end(self) -> None:
        self.over = True
        self._notify()

    async def follow(self, start: int = 0) -> AsyncIterator[bytes]:
        """Lines of JSON from event number `start` on, until there will be no more."""
        position, shown = start, b""
        while True:
            changed = self._changed
            while position < len(self.lines):
                position += 1
                yield self.lines[position - 1]
            progress = self._progress
            if progress is not None and progress is not shown:
                shown = progress
                yield progress
            elif self.over:
                return
            else:
                await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Migration:
    """A move from the request to the report. `on_event` is told everything but Progress, for the log."""

    def __init__(
        self,
        id: str,
        request: Request,
        on_event: Callable[[str, Event], None],
        program: Program,
        deserted_after: float = DESERTED_AFTER,
    ) -> None:
        self.id = id
        self.request = request
        self.stream = Stream()
        self.created = datetime.now(UTC)
        self._finished: datetime | None = None
        self._on_event = on_event
        self._front = Front(request, self._take, program, id)
        self._patience = deserted_after
        self._timer: asyncio.TimerHandle | None = None

    @property
    def report(self) -> Report | None:
        final = self._front.final
        return final.report if isinstance(final, Finished) else None

    @property
    def record(self) -> MigrationRecord:
        return MigrationRecord(
            id=self.id,
            request=self.request,
            status="running" if self._finished is None else "finished",
            state=self._front.state,
            created=self.created,
            finished=self._finished,
            report=self.report,
        )

    async def run(self) -> None:
        """Until everything is over, and the stream of events has its end."""
        self._expect_readers()
        try:
            await self._front.run()
        finally:
            self._finished = self._finished or datetime.now(UTC)
            self._forget_timer()
            self.stream.end()

    def abort(self, reason: str) -> None:
        """Ask for it to be rolled back; TooLate past the point of no return.

        The report says what came of it.
        """
        if self.report is not None:
            raise TooLate("it is over")
        if self._front.state in NO_RETURN | LIVE:
            raise TooLate(f"it is past the point of no return: {self._front.state}")
        self._front.abort(reason)

    async def watch(self, start: int = 0) -> AsyncIterator[bytes]:
        """Its events for somebody whose presence counts."""
        self.stream.readers += 1
        self._forget_timer()
        try:
            async for line in self.stream.follow(start):
                yield line
        finally:
            self.stream.readers -= 1
            self._expect_readers()

    def _take(self, event: Event, line: bytes) -> None:
        if isinstance(event, Finished):
            self._finished = datetime.now(UTC)
        if not isinstance(event, Progress):
            self._on_event(self.id, event)
        self.stream.add(event, line)

    def _expect_readers(self) -> None:
        if self.request.on_disconnect == "abort" and not self.stream.readers and self.report is None:
            self._forget_timer()
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._deserted)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _deserted(self) -> None:
        try:
            self.abort(f"nobody has watched it for {self._patience:g} s, and it was not to go on alone")
        except TooLate:
            return
