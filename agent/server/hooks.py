"""What schedulers call, and what plans find their processes with: routes of their own, in `routes.ROUTES`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from typing import Any, Final

import msgspec
from aiohttp import web

from agent.api import ErrorInfo
from agent.front import BadRequest
from agent.hook_api import Drain, DrainEvent, DrainReport, Select, Selection
from agent.server import selection
from agent.server.drain import Draining
from agent.server.failures import Failed
from agent.server.registry import Conflict
from agent.server.route import REGISTRY, Route, answer_json, answer_lines, body_of, wants_lines
from migrate.plan.model import Plan
from migrate.plan.parse import InvalidPlan, parse, parse_object
from migrate.plan.tree import MAX_BYTES
from transport.target import parse_host

_log = logging.getLogger(__name__)


class Drains:
    """The one that is under way, if any."""

    def __init__(self) -> None:
        self._current: tuple[Draining, asyncio.Task[None]] | None = None

    @property
    def current(self) -> Draining:
        """Conflict if there is none."""
        if self._current is None or self._current[1].done():
            raise Conflict("this host is not being drained")
        return self._current[0]

    def begin(self, draining: Draining) -> asyncio.Task[None]:
        """Conflict while there is another one."""
        if self._current is not None and not self._current[1].done():
            raise Conflict("this host is being drained already")
        task = asyncio.create_task(draining.run())
        task.add_done_callback(_log_failure)
        self._current = (draining, task)
        return task


def _log_failure(task: asyncio.Task[None]) -> None:
    """Whoever reads lines only sees that the last one is missing."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("the drain failed", exc_info=error)


DRAINS: Final = web.AppKey("drains", Drains)


async def select(request: web.Request) -> web.Response:
    wanted = body_of(await request.read(), Select)
    must_select(wanted)
    return answer_json(await asyncio.to_thread(selection.find, wanted))


def must_select(wanted: Select) -> None:
    """BadRequest if it is no selector."""
    if sum(value is not None for value in msgspec.structs.astuple(wanted)) != 1:
        raise BadRequest("not a selector: exactly one of pid, pidfile and name")


async def drain(request: web.Request) -> web.StreamResponse:
    """The report, or for those who accept it every event; whoever closes the connection may end it."""
    wanted = body_of(await request.read(), Drain)
    draining = Draining(request.app[REGISTRY], plan_of(wanted), wanted)
    task = request.app[DRAINS].begin(draining)
    try:
        if wants_lines(request):
            return await answer_lines(request, draining.stream.follow())
        async for _ in draining.stream.follow():
            pass
        await task
        return answer_json(draining.report)
    finally:
        if wanted.on_disconnect == "abort":
            draining.abort("nobody waits for its answer any more")


async def abort_drain(request: web.Request) -> web.Response:
    draining = request.app[DRAINS].current
    draining.abort("aborted by request")
    return answer_json(draining.snapshot(), 202)


def plan_of(wanted: Drain) -> Plan:
    """The plan that was sent, or named; BadRequest, Failed with all that is wrong with it."""
    try:
        for host in (*(wanted.destinations or ()), *([wanted.host] if wanted.host else [])):
            parse_host(host)
        if wanted.reached_at is not None:
            ipaddress.ip_address(wanted.reached_at)
    except ValueError as error:
        raise BadRequest(f"not a request: {error}") from None
    if (wanted.plan is None) == (wanted.plan_file is None):
        raise BadRequest("not a request: exactly one of plan and plan_file")
    if wanted.plan_file is None:
        return _read(wanted.plan)
    return _read_file(wanted.plan_file)


def _read(plan: dict[str, Any] | None) -> Plan:
    try:
        return parse_object(plan)
    except InvalidPlan as error:
        raise _bad_plan(error, "plan") from None


def _read_file(path: str) -> Plan:
    if not os.path.isabs(path):
        raise BadRequest(f"plan_file: {path!r} is not an absolute path")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            return parse(file.read(MAX_BYTES + 1))
    except (OSError, ValueError) as error:
        raise BadRequest(f"plan_file: {path}: {getattr(error, 'strerror', None) or error}") from None
    except InvalidPlan as error:
        raise _bad_plan(error, path) from None


def _bad_plan(error: InvalidPlan, name: str) -> Failed:
    message = "\n".join(f"{name}:{problem}" for problem in error.problems)
    return Failed(400, ErrorInfo(kind="bad-plan", message=message, where="source"))


ROUTES: Final = (
    Route(
        "POST",
        "/v1/select",
        select,
        "Which processes of this host are meant; `why` there are none, if there are none.",
        body=Select,
        answer=Selection,
        errors=(400, 403, 413),
    ),
    Route(
        "POST",
        "/v1/hooks/drain",
        drain,
        "Empty this host: move away what a plan says may move, and say what came of each process.",
        "The plan is an object as in docs/plans.md, or a file of this host. The moves are migrations of this "
        "service. With `Accept: application/x-ndjson` the answer is every event, a line each, to the last "
        "one, `drained`. If the request says `on_disconnect: abort` (the default), closing the connection "
        "rolls back what runs and starts nothing more. 409 while another one is under way.",
        body=Drain,
        answer=DrainReport,
        stream=DrainEvent,
        errors=(400, 403, 409, 413),
    ),
    Route(
        "POST",
        "/v1/hooks/drain/abort",
        abort_drain,
        "Ask for the end of a drain: "
        "what runs is rolled back if it is not too late, nothing more is started.",
        "The answer is how things are now; what comes of it is in the drain's own answer. "
        "409 if there is none.",
        status=202,
        answer=DrainReport,
        errors=(403, 409),
    ),
)
