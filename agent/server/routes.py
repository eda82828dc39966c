"""What the service answers to: one table of routes, and the function behind each.

`openapi.py` makes the document of the same table, so that it names every route and nothing else.
"""

from __future__ import annotations

import ipaddress
import os
import platform
from typing import Any, Final

import msgspec
from aiohttp import web

from agent import version
from agent.api import (
    PROTOCOL_VERSION,
    Checked,
    CheckResult,
    ErrorInfo,
    Event,
    Finished,
    Health,
    MigrationList,
    MigrationRecord,
    ProcessInfo,
    Request,
    Resolve,
)
from agent.front import BadRequest, validate
from agent.server import access, hooks
from agent.server.access import Users
from agent.server.failures import Failed, as_json
from agent.server.registry import Registry
from agent.server.route import REGISTRY, Parameter, Route, answer_json, answer_lines, body_of, wants_lines
from agent.server.store import ID
from transport.process import run_local

MAX_BODY: Final = 1 << 20
MAX_LIMIT: Final = 200
_TRUTH: Final = {"1": True, "true": True, "0": False, "false": False}


def application(registry: Registry, users: Users | None = None) -> web.Application:
    """`users`: what those may who are not root, where the socket lets them in."""
    app = web.Application(middlewares=[as_json], client_max_size=MAX_BODY)
    app[REGISTRY] = registry
    app[access.USERS] = users or Users(gid=-1)
    app[hooks.DRAINS] = hooks.Drains()
    for route in ROUTES:
        handler = route.handler if route.everyone else access.only_privileged(route.handler)
        app.router.add_route(route.method, route.path, handler)
    return app


async def health(request: web.Request) -> web.Response:
    return answer_json(
        Health(
            version=version.installed(),
            protocol=PROTOCOL_VERSION,
            host=platform.node(),
            pid=os.getpid(),
            running=request.app[REGISTRY].running,
        )
    )


async def document(request: web.Request) -> web.Response:
    from agent.server.openapi import document as make

    return answer_json(make(ROUTES))


async def processes(request: web.Request) -> web.Response:
    """In a process of its own: it looks at everything that runs here, and for a while."""
    measure = _choice(request, "measure", _TRUTH, True)
    argv, environment = request.app[REGISTRY].program
    said: list[str] = []
    options = ["--measure" if measure else "--no-measure"]
    if (uid := access.caller(request)) is not None:
        options += ["--owner", str(uid)]
    process = await run_local([*argv, "ps", *options], environment, said.append)
    try:
        lines = [line async for line in process.lines()]
        end = await process.wait()
    finally:
        process.kill()
    if not end.clean:
        error = msgspec.structs.replace(end, host=platform.node()).error()
        raise Failed(500, ErrorInfo(kind=error.kind, message=str(error), where="source"))
    return answer_json([msgspec.json.decode(line, type=ProcessInfo) for line in lines])


async def check(request: web.Request) -> web.StreamResponse:
    """The result, or for those who accept it every event; whoever closes the connection gives it up."""
    front, stream = request.app[REGISTRY].check(await _request(request, "check"))
    try:
        if wants_lines(request):
            return await answer_lines(request, stream.follow())
        async for _ in stream.follow():
            pass
    finally:
        front.abort("the tool that asked for it is gone")
    if isinstance(front.final, Checked):
        return answer_json(front.final.result)
    raise _check_failed(front.final)


def _check_failed(final: Finished | None) -> Failed:
    error = final.report.error if final is not None else None
    return Failed(
        502, error or ErrorInfo(kind="check-failed", message="it ended without a result", where="source")
    )


async def create(request: web.Request) -> web.Response:
    record = request.app[REGISTRY].create(await _request(request, "move"))
    return answer_json(record, 201, {"Location": f"/v1/migrations/{record.id}"})


async def migrations(request: web.Request) -> web.Response:
    limit = _number(request, "limit", 50, 1, MAX_LIMIT)
    before = request.query.get("before")
    if before is not None and not ID.fullmatch(before):
        raise BadRequest(f"before: {before!r} is not the name of a migration")
    return answer_json(request.app[REGISTRY].page(limit, before, access.caller(request)))


async def migration(request: web.Request) -> web.Response:
    return answer_json(_record(request))


async def abort(request: web.Request) -> web.Response:
    record = _record(request)
    return answer_json(request.app[REGISTRY].abort(record.id, "aborted by request"), 202)


async def resolve(request: web.Request) -> web.Response:
    wanted = body_of(await request.read(), Resolve)
    return answer_json(await request.app[REGISTRY].resolve(_id(request), wanted.live))


async def events(request: web.Request) -> web.StreamResponse:
    start = _number(request, "from", 0, 0, 1 << 31)
    record = _record(request)  # now, while there can be another answer than a stream
    return await answer_lines(request, request.app[REGISTRY].events(record.id, start))


def _record(request: web.Request) -> MigrationRecord:
    """The migration that is meant; KeyError if there is none, or it is somebody else's."""
    return request.app[REGISTRY].get(_id(request), access.caller(request))


def _id(request: web.Request) -> str:
    id = request.match_info["id"]
    if not ID.fullmatch(id):
        raise BadRequest(f"{id!r} is not the name of a migration")
    return id


async def _request(request: web.Request, operation: str) -> Request:
    wanted = body_of(await request.read(), Request)
    try:
        for address in wanted.options.addresses or ():
            ipaddress.ip_address(address)
    except ValueError as error:
        raise BadRequest(f"not a request: {error}") from None
    validate(wanted)
    if wanted.operation != operation:
        raise BadRequest(f"{request.path} is for {operation!r}, not for {wanted.operation!r}")
    return access.permitted(request, wanted)


def _number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 10 or not low <= int(text) <= high:
        raise BadRequest(f"{name}: {text!r} is not a number from {low} to {high}")
    return int(text)


def _choice(request: web.Request, name: str, choices: dict[str, bool], default: bool) -> bool:
    text = request.query.get(name)
    if text is not None and text not in choices:
        raise BadRequest(f"{name}: {text!r} is none of {', '.join(choices)}")
    return default if text is None else choices[text]


_ID = Parameter(
    "id", "path", {"type": "string", "pattern": f"^{ID.pattern}$"}, "The name of a migration, a ULID."
)
ROUTES: Final = (
    Route("GET", "/v1/health", health, "Who answers, how much is going on.", answer=Health, everyone=True),
    Route("GET", "/v1/openapi.json", document, "This document.", answer=dict[str, Any], everyone=True),
    Route(
        "GET",
        "/v1/processes",
        processes,
        "The processes of this host, and what stands in the way of moving each.",
        parameters=(
            Parameter(
                "measure",
                "query",
                {"enum": [*_TRUTH], "default": "1"},
                "Whether to watch each for its dirty rate; "
                "it is stopped twice for that, about a millisecond each.",
            ),
        ),
        answer=list[ProcessInfo],
        errors=(400, 500),
        everyone=True,
    ),
    Route(
        "POST",
        "/v1/check",
        check,
        "What a move would meet; touches nothing.",
        "With `Accept: application/x-ndjson` the answer is every event, a line each, to the last one, "
        "`checked` or `finished`. Closing the connection gives it up.",
        body=Request,
        answer=CheckResult,
        stream=Event,
        errors=(400, 403, 413, 502, 503),
        everyone=True,
    ),
    Route(
        "POST",
        "/v1/migrations",
        create,
        "Start a move.",
        "If the request says `on_disconnect: abort` (the default), the move is given up when nobody has read "
        "its events for 5 s and it is not past the point of no return.",
        status=201,
        body=Request,
        answer=MigrationRecord,
        errors=(400, 403, 409, 413, 503),
        everyone=True,
    ),
    Route(
        "GET",
        "/v1/migrations",
        migrations,
        "The moves of this host, the newest first; the last 1,000 are kept.",
        parameters=(
            Parameter(
                "limit",
                "query",
                {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 50},
                "At most so many.",
            ),
            Parameter("before", "query", _ID.schema, "Only older ones: `next` of the page before."),
        ),
        answer=MigrationList,
        errors=(400,),
        everyone=True,
    ),
    Route(
        "GET",
        "/v1/migrations/{id}",
        migration,
        "One move: what was asked, how far it is, and the report when it is over.",
        parameters=(_ID,),
        answer=MigrationRecord,
        errors=(400, 404),
        everyone=True,
    ),
    Route(
        "POST",
        "/v1/migrations/{id}/abort",
        abort,
        "Ask for a move to be rolled back; its report says what came of it.",
        "409 past the point of no return, and when it is over.",
        status=202,
        parameters=(_ID,),
        answer=MigrationRecord,
        errors=(400, 404, 409),
        everyone=True,
    ),
    Route(
        "POST",
        "/v1/migrations/{id}/resolve",
        resolve,
        "Settle a move that is in doubt: by asking its destination, or by the word of somebody who knows.",
        "409 where there is no doubt.",
        parameters=(_ID,),
        body=Resolve,
        answer=MigrationRecord,
        errors=(400, 403, 404, 409, 413),
    ),
    Route(
        "GET",
        "/v1/migrations/{id}/events",
        events,
        "Everything that happens to a move, a line each, from its beginning to its end.",
        "Every event but `progress` has a number, from 0, in the order of the stream; `progress` is for "
        "those who are there when it happens.",
        parameters=(
            _ID,
            Parameter(
                "from",
                "query",
                {"type": "integer", "minimum": 0, "default": 0},
                "The first event wanted; "
                "for those who were cut off: how many they have seen, `progress` apart.",
            ),
        ),
        stream=Event,
        errors=(400, 404),
        everyone=True,
    ),
    *hooks.ROUTES,
)
