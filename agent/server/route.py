"""What a route is, and the shapes of answers: what routes.py and hooks.py have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from agent.bounds import MALFORMED
from agent.front import BadRequest
from agent.server.registry import Registry

NDJSON: Final = "application/x-ndjson"
REGISTRY: Final = web.AppKey("registry", Registry)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Parameter(msgspec.Struct, frozen=True):
    """One that a route understands, with its JSON schema."""

    name: str
    place: str  # "path" or "query"
    schema: dict[str, Any]
    description: str


class Route(msgspec.Struct, frozen=True):
    """`answer` and `body` are types of agent/api.py; `stream` is that of a line, where lines are answered."""

    method: str
    path: str
    handler: Handler
    summary: str
    description: str = ""
    status: int = 200
    answer: Any = None
    stream: Any = None
    body: Any = None
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[int, ...] = ()
    everyone: bool = False  # not only root: the handler asks `access` whose the thing is


def body_of(data: bytes, kind: type[T]) -> T:
    """What was sent; BadRequest."""
    try:
        return msgspec.json.decode(data, type=kind)
    except MALFORMED as error:
        raise BadRequest(f"not a request: {error}") from None


def answer_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def wants_lines(request: web.Request) -> bool:
    """Whether the client accepts events, a line each."""
    return NDJSON in request.headers.get("Accept", "")


async def answer_lines(request: web.Request, lines: AsyncIterator[bytes]) -> web.StreamResponse:
    """One line after another, until there are no more or nobody reads them."""
    response = web.StreamResponse(headers={"Content-Type": NDJSON, "Cache-Control": "no-store"})
    async with aclosing(lines):  # type: ignore[type-var]
        await response.prepare(request)
        async for line in lines:
            await response.write(line + b"\n")
    await response.write_eof()
    return response
