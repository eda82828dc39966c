"""The API's document (OpenAPI 3.1), made of the table of routes and the structs that they take and answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from agent import version
from agent.api import ErrorBody
from agent.server.failures import KINDS

if TYPE_CHECKING:
    from agent.server.route import Route

REFERENCE: Final = "#/components/schemas/{name}"
_NDJSON: Final = "application/x-ndjson"
_ABOUT: Final = (
    "What `migrate` and everybody else drives an agent by, over a unix socket that is root's alone. "
    "Unknown fields of a request are refused."
)


def document(routes: Iterable[Route]) -> dict[str, Any]:
    routes = tuple(routes)
    types = [t for route in routes for t in (route.answer, route.stream, route.body) if t is not None]
    schemas, components = msgspec.json.schema_components([*types, ErrorBody], ref_template=REFERENCE)
    known = dict(zip(map(str, [*types, ErrorBody]), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, known)
    made = {
        "openapi": "3.1.0",
        "info": {"title": "migrate-agent", "version": version.installed(), "description": _ABOUT},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    # defaults are tuples, JSON has lists
    return msgspec.json.decode(msgspec.json.encode(made), type=dict[str, Any])


def _operation(route: Route, known: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.answer is not None:
        content["application/json"] = {"schema": known[str(route.answer)]}
    if route.stream is not None:
        content[_NDJSON] = {"schema": known[str(route.stream)]}
    made: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "responses": {str(route.status): {"description": "Done.", "content": content}},
    }
    for status in route.errors:
        made["responses"][str(status)] = {
            "description": f"`{KINDS[status]}`, or a kind of its own",
            "content": {"application/json": {"schema": known[str(ErrorBody)]}},
        }
    if route.description:
        made["description"] = route.description
    if route.parameters:
        made["parameters"] = [
            {
                "name": p.name,
                "in": p.place,
                "required": p.place == "path",
                "schema": p.schema,
                "description": p.description,
            }
            for p in route.parameters
        ]
    if route.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": known[str(route.body)]}},
        }
    return made
