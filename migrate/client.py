"""A host's agent, as Python: everything that its HTTP API offers, here or over ssh.

    async with Agent(parse_host("root@alpha"), SshOptions(), say=lambda level, message: ...) as agent:
        record = await agent.create(Request(operation="move", pid=1234, destination="beta"))
        async for event in agent.events(record.id):
            ...  # the last one is a Finished with the report

A service is started on the host if none runs (`migrate-agent connect`). Any number of calls may be under
way at once; over ssh they share one connection. What cannot be done is a `Failure` with a stable kind, a
message for a person and an exit code: before anything was asked for (no such host, another version of the
agent), or as the agent's own answer (no such migration, too late to abort). `Lost`, one of them, means
that the connection broke after something was asked for: whether it was done is not known, and a new Agent
can find out.

`agent/api.py` has the types; the API's document is at /v1/openapi.json.
"""

from __future__ import annotations

import os
import platform
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import aiohttp
import msgspec

from agent.api import (
    Connected,
    ErrorBody,
    Event,
    Health,
    MigrationList,
    MigrationRecord,
    ProcessInfo,
    Request,
    Resolve,
    SshOptions,
)
from agent.bounds import MALFORMED
from agent.hook_api import Drain, DrainEvent, DrainReport, Select, Selection
from migrate.channel import Connector, Lost, way_to
from migrate.errors import LINK_KINDS, ExitCode, Failure
from transport.lines import LineBuffer
from transport.process import LINE_LIMIT
from transport.target import HostTarget

__all__ = ["Agent", "Failure", "Level", "Lost", "Say"]

Level = Literal["debug", "info", "warning", "error"]
Say = Callable[[Level, str], None]
NDJSON: Final = "application/x-ndjson"
_BASE: Final = "http://agent"
_FOREVER: Final = aiohttp.ClientTimeout(total=None)
_event = msgspec.json.Decoder(Event)
_drain_event = msgspec.json.Decoder(DrainEvent)
T = TypeVar("T")


class Agent:
    """The agent of `host`, of this one for None. `say` gets what is said besides answers, for a person."""

    def __init__(self, host: HostTarget | None, ssh: SshOptions, say: Say) -> None:
        self.host = host
        name = platform.node() if host is None else str(host)
        self._way = way_to(host, ssh, lambda line: say("info", f"{name}: {line}"))
        self._say = say
        self._connector: Connector | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Connect, and see that it is of our version; Failure."""
        self._connector = Connector(self._way, self._on_noise)
        self._session = aiohttp.ClientSession(
            base_url=_BASE,
            connector=self._connector,
            timeout=_FOREVER,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        try:
            await self.health()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up. What runs and was not to go on alone is given up by the agent."""
        if self._session is not None and self._connector is not None:
            await self._session.close()
            await self._connector.hang_up()
        await self._way.close()

    @property
    def name(self) -> str:
        """The host, for messages."""
        return self._way.name

    async def health(self) -> Health:
        """Who answers."""
        return await self._get("/v1/health", Health)

    async def processes(self, measure: bool) -> list[ProcessInfo]:
        """What runs on the host; with `measure` each one's dirty rate."""
        return await self._get("/v1/processes", list[ProcessInfo], measure=str(int(measure)))

    async def check(self, request: Request) -> AsyncIterator[Event]:
        """What a move would meet: events, the last one a Checked, or a Finished if it failed."""
        body = msgspec.json.encode(self._completed(request))
        async for event in self._events("POST", "/v1/check", data=body, headers={"Accept": NDJSON}):
            yield event

    async def create(self, request: Request) -> MigrationRecord:
        """Start a move. See `Request.on_disconnect` for what happens if nobody reads its events."""
        body = msgspec.json.encode(self._completed(request))
        async with self._ask("POST", "/v1/migrations", data=body) as answer:
            return msgspec.json.decode(await _read(answer), type=MigrationRecord)

    async def events(self, id: str, start: int = 0) -> AsyncIterator[Event]:
        """Everything that happens to a move from event number `start` on; ends when it is over.

        Every event but Progress has a number, from 0.
        """
        async for event in self._events("GET", f"/v1/migrations/{id}/events", params={"from": str(start)}):
            yield event

    async def migration(self, id: str) -> MigrationRecord:
        """One move, with its report if it is over."""
        return await self._get(f"/v1/migrations/{id}", MigrationRecord)

    async def migrations(self, limit: int = 50, before: str | None = None) -> MigrationList:
        """Moves, the newest first."""
        page = {} if before is None else {"before": before}
        return await self._get("/v1/migrations", MigrationList, limit=str(limit), **page)

    async def abort(self, id: str) -> MigrationRecord:
        """Ask for a move to be rolled back; Failure if it is too late. Its report says what came of it."""
        async with self._ask("POST", f"/v1/migrations/{id}/abort") as answer:
            return msgspec.json.decode(await _read(answer), type=MigrationRecord)

    async def resolve(self, id: str, wanted: Resolve) -> MigrationRecord:
        """Settle a move that is in doubt; Failure if it is not."""
        body = msgspec.json.encode(wanted)
        async with self._ask("POST", f"/v1/migrations/{id}/resolve", data=body) as answer:
            return msgspec.json.decode(await _read(answer), type=MigrationRecord)

    async def select(self, select: Select) -> Selection:
        """Which processes are meant."""
        async with self._ask("POST", "/v1/select", data=msgspec.json.encode(select)) as answer:
            return msgspec.json.decode(await _read(answer), type=Selection)

    async def drain(self, wanted: Drain) -> AsyncIterator[DrainEvent]:
        """Empty the host: events, the last one a Drained."""
        keys = _auth_socket() if self.host is None else None
        wanted = msgspec.structs.replace(wanted, reached_at=self._reached_at(), auth_socket=keys)
        body, headers = msgspec.json.encode(wanted), {"Accept": NDJSON}
        async for event in self._decoded(_drain_event, "POST", "/v1/hooks/drain", data=body, headers=headers):
            yield event

    async def abort_drain(self) -> DrainReport:
        """Ask for the end of the drain that is under way; how things are now."""
        async with self._ask("POST", "/v1/hooks/drain/abort") as answer:
            return msgspec.json.decode(await _read(answer), type=DrainReport)

    def _on_noise(self, line: str) -> None:
        self._say("warning", f"not from the agent: {line}")

    async def _get(self, path: str, kind: type[T], **query: str) -> T:
        async with self._ask("GET", path, params=query) as answer:
            return msgspec.json.decode(await _read(answer), type=kind)

    async def _events(self, method: str, path: str, **options: Any) -> AsyncIterator[Event]:
        async for event in self._decoded(_event, method, path, **options):
            yield event

    async def _decoded(
        self, decoder: msgspec.json.Decoder[T], method: str, path: str, **options: Any
    ) -> AsyncIterator[T]:
        async with self._ask(method, path, **options) as answer:
            lines = LineBuffer(LINE_LIMIT)
            async for data in answer.content.iter_any():
                for line in lines.feed(data):
                    yield decoder.decode(line)

    @asynccontextmanager
    async def _ask(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is no error. Failure: the agent's own; Lost: the connection broke."""
        assert self._session is not None and self._connector is not None
        try:
            async with self._session.request(method, path, **options) as answer:
                if answer.status >= 400:
                    raise failure(answer.status, await _read(answer))
                yield answer
        except (aiohttp.ClientError, ConnectionError, *MALFORMED) as error:
            raise await self._connector.why(error) from error

    def _completed(self, request: Request) -> Request:
        """With what only this end knows: by which address the host is reached, and what is where here."""
        ssh = absolute(request.ssh) if self.host is None else request.ssh
        return msgspec.structs.replace(request, ssh=ssh, reached_at=self._reached_at())

    def _reached_at(self) -> str | None:
        assert self._connector is not None
        connected: Connected | None = self._connector.connected
        known = connected.reached_at if connected is not None else None
        return known or self._way.reached_at()


def absolute(ssh: SshOptions) -> SshOptions:
    """The service is elsewhere, in another directory and session: name files and ssh-agent in full."""
    return msgspec.structs.replace(
        ssh,
        identity=tuple(str(Path(file).expanduser().absolute()) for file in ssh.identity),
        config=tuple(str(Path(file).expanduser().absolute()) for file in ssh.config),
        auth_socket=_auth_socket(),
    )


def _auth_socket() -> str | None:
    return os.environ.get("SSH_AUTH_SOCK") or None


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """A whole answer; ConnectionError for one that nobody means."""
    data = bytearray()
    async for part in answer.content.iter_any():
        data += part
        if len(data) > LINE_LIMIT:
            raise ConnectionError(f"an answer of more than {LINE_LIMIT} bytes")
    return bytes(data)


def failure(status: int, body: bytes) -> Failure:
    error = msgspec.json.decode(body, type=ErrorBody).error
    code = ExitCode.INTERNAL if status == 500 else ExitCode.REFUSED
    return Failure(
        error.kind, error.message, error.where, ExitCode.UNREACHABLE if error.kind in LINK_KINDS else code
    )


