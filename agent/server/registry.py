"""The migrations of this host: those that run, and those that are on record."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import platform
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import msgspec

from agent import settlement
from agent.api import (
    Endpoint,
    ErrorInfo,
    Event,
    Log,
    MigrationList,
    MigrationRecord,
    Report,
    Request,
)
from agent.recovery import Live, Recovery
from agent.server.front import Front, Program
from agent.server.migration import DESERTED_AFTER, Migration, Stream, TooLate
from agent.server.store import Store, Stored, new_id


class Conflict(Exception):
    """It cannot be done as things are; the message says why."""


class Closing(Exception):
    """The service is about to end and begins nothing new."""


class Registry:
    """Starts, finds and lists migrations, each a process of `program`. `on_event` gets each, for the log."""

    def __init__(
        self,
        store: Store,
        on_event: Callable[[str, Event], None],
        program: Program,
        deserted_after: float = DESERTED_AFTER,
    ) -> None:
        self._store = store
        self._on_event = on_event
        self.program = program
        self._deserted_after = deserted_after
        self._running: dict[str, Migration] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def running(self) -> int:
        return sum(not migration.stream.over for migration in self._running.values())

    @property
    def busy(self) -> bool:
        """Whether anything goes on, checks too."""
        return bool(self._tasks)

    def create(self, request: Request) -> MigrationRecord:
        """Start it; Conflict if the process is on its way already, Closing."""
        self._must_be_open()
        for other in self._running.values():
            if other.request.pid == request.pid and other.report is None:
                raise Conflict(f"process {request.pid} is being moved already: {other.id}")
        migration = Migration(new_id(), request, self._on_event, self.program, self._deserted_after)
        self._save(migration)
        self._running[migration.id] = migration
        self._begin(self._carry_out(migration))
        return migration.record

    def check(self, request: Request) -> tuple[Front, Stream]:
        """Start one; it is not on record. The stream ends when the front has. Closing."""
        self._must_be_open()
        stream = Stream()
        front = Front(request, stream.add, self.program)
        self._begin(front.run()).add_done_callback(lambda _: stream.end())
        return front, stream

    def get(self, id: str, owner: int | None = None) -> MigrationRecord:
        """KeyError, also if it is not `owner`'s (None: anybody's)."""
        running = self._running.get(id)
        record = running.record if running is not None else self._stored(id).record
        if owner is not None and record.request.owner != owner:
            raise KeyError(id)
        return record

    def abort(self, id: str, reason: str) -> MigrationRecord:
        """Ask for its end; KeyError, Conflict if that is not possible any more."""
        running = self._running.get(id)
        if running is None:
            self._stored(id)
            raise Conflict("it is over")
        try:
            running.abort(reason)
        except TooLate as error:
            raise Conflict(str(error)) from None
        return running.record

    def is_running(self, id: str) -> bool:
        return id in self._running and not self._running[id].stream.over

    async def resolve(self, id: str, live: Live | None) -> MigrationRecord:
        """Settle it; KeyError, Conflict if there is no doubt."""
        if self.is_running(id):
            raise Conflict("it is not over")
        record = self.get(id)
        done = await settlement.recover(id, live)
        if done.outcome is None:
            how = record.report.outcome if record.report is not None else record.status
            raise Conflict(f"it is not in doubt: {how}, and {done.message}")
        self.recovered(id, done)
        return self.get(id)

    def recovered(self, id: str, done: Recovery) -> None:
        """What became of a migration that had no end, or one in doubt."""
        if done.outcome is None:
            return
        stored = self._store.load(id)
        if stored is None:  # of another service's time, and removed since
            return
        report = stored.record.report or Report(
            outcome=done.outcome,
            source=Endpoint(host=platform.node(), pid=stored.record.request.pid),
            destination=Endpoint(host=stored.record.request.destination),
        )
        error = ErrorInfo(kind="recovered", message=done.message, where="source")
        self._store.finish(id, msgspec.structs.replace(report, outcome=done.outcome, error=error))

    async def events(self, id: str, start: int) -> AsyncIterator[bytes]:
        """Its events as lines of JSON, those to come too if it runs; KeyError."""
        running = self._running.get(id)
        if running is None:
            for stored in self._stored(id).events[start:]:
                yield bytes(stored)
            return
        async for line in running.watch(start):
            yield line

    def page(self, limit: int, before: str | None, owner: int | None = None) -> MigrationList:
        """At most `limit`, the newest first, of those older than `before`; if given, only `owner`'s."""
        ids = sorted({*self._store.ids(), *self._running}, reverse=True)
        records = list(itertools.islice(self._records(ids, before, owner), limit + 1))
        more = records[limit - 1].id if len(records) > limit else None
        return MigrationList(migrations=tuple(records[:limit]), next=more)

    def _records(self, ids: list[str], before: str | None, owner: int | None) -> Iterator[MigrationRecord]:
        for id in ids:
            if before is None or id < before:
                with contextlib.suppress(KeyError):
                    yield self.get(id, owner)

    async def close(self, reason: str) -> None:
        """Give up everything that runs and wait until it has ended: rolled back, or committed and done."""
        self._closing = True
        for migration in self._running.values():
            try:
                migration.abort(reason)
            except TooLate:
                continue
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _must_be_open(self) -> None:
        if self._closing:
            raise Closing("this service is about to end")

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _carry_out(self, migration: Migration) -> None:
        try:
            await migration.run()
        finally:
            if self._save(migration):
                del self._running[migration.id]

    def _save(self, migration: Migration) -> bool:
        """Whether it is on record; if not, it stays in memory."""
        try:
            self._store.save(migration.record, migration.stream.lines)
            self._store.prune()
        except OSError as error:
            self._on_event(migration.id, Log(level="error", message=f"its record cannot be written: {error}"))
            return False
        return True

    def _stored(self, id: str) -> Stored:
        """KeyError. What ran when a service ended, and does not run any more, is lost."""
        found = self._store.load(id)
        if found is None:
            raise KeyError(id)
        if found.record.status == "running":
            found = Stored(msgspec.structs.replace(found.record, status="lost"), found.events)
        return found
