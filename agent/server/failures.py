"""What goes wrong with a request, as an answer: a status, and an `ErrorBody` whatever it is."""

from __future__ import annotations

import logging
import platform
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from aiohttp import web

from agent.api import ErrorBody, ErrorInfo
from agent.front import BadRequest
from agent.server.registry import Closing, Conflict

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# The kinds of error that the service itself answers with; those of a check come from the engine and the link.
KINDS: Final = {
    400: "bad-request",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    409: "conflict",
    413: "too-large",
    500: "internal",
    502: "check-failed",
    503: "shutting-down",
}


class Failed(Exception):
    """Answer with `status` and this error."""

    def __init__(self, status: int, error: ErrorInfo) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error


def answer(status: int, error: ErrorInfo) -> web.Response:
    body = msgspec.json.encode(ErrorBody(error=error))
    return web.Response(status=status, body=body, content_type="application/json")


@web.middleware
async def as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Make every failure an answer of one shape."""
    try:
        return await handler(request)
    except Failed as failed:
        return answer(failed.status, failed.error)
    except (BadRequest, KeyError, Conflict, Closing) as error:
        return _own(*_of_ours(error))
    except web.HTTPException as error:
        return _own(error.status, _of_http(request, error))
    except Exception as error:
        _log.exception("%s %s", request.method, request.path)
        return _own(500, f"{type(error).__name__}: {error}")


def _of_ours(error: Exception) -> tuple[int, str]:
    if isinstance(error, KeyError):
        return 404, f"there is no migration {error.args[0]} on {platform.node()}"
    return {BadRequest: 400, Conflict: 409, Closing: 503}[type(error)], str(error)


def _own(status: int, message: str) -> web.Response:
    return answer(status, ErrorInfo(kind=KINDS.get(status, "http"), message=message, where="source"))


def _of_http(request: web.Request, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPNotFound):
        return f"there is nothing at {request.path}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return (
            f"{request.path} is not for {request.method}, but for {', '.join(sorted(error.allowed_methods))}"
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return "the body is too large"
    return error.reason
