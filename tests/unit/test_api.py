"""The agent's HTTP API: what it answers, what it refuses, what becomes of a migration that nobody watches."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from unit.stand_in_agent import CHECK as RESULT
from unit.stand_in_service import CHECK, MOVE, Service, until

from agent.api import PROTOCOL_VERSION
from agent.server.openapi import document
from agent.server.routes import MAX_BODY, ROUTES
from agent.server.store import ID

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts services; each has ended in order when the test is over."""
    running: list[Service] = []

    def started(scenario: str, **options: Any) -> Service:
        running.append(Service.playing(scenario, tmp_path / str(len(running)), **options))
        return running[-1]

    yield started
    for service in running:
        if service.process.poll() is None:
            service.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for the questions that change nothing: every migration is done at once."""
    running = Service.playing("migrated", tmp_path_factory.mktemp("service"))
    yield running
    running.close()


def error(answer: tuple[int, Any]) -> tuple[int, str]:
    """Status and kind of an answer that is an error, in the one shape of all of them."""
    status, body = answer
    assert set(body) == {"error"} and set(body["error"]) == {"kind", "message", "where"}
    assert body["error"]["message"]
    return status, body["error"]["kind"]


# What is asked and answered.


def test_health(service: Service) -> None:
    health = service.good("GET", "/v1/health")
    assert (health["protocol"], health["pid"]) == (PROTOCOL_VERSION, service.process.pid)
    assert health["running"] == 0
    assert health["version"] and health["host"] == os.uname().nodename


def test_a_move_from_the_request_to_the_report(service: Service) -> None:
    created = service.good("POST", "/v1/migrations", MOVE)
    assert ID.fullmatch(created["id"]) and created["report"] is None
    assert created["request"]["pid"] == 4711 and created["request"]["on_disconnect"] == "abort"
    (finished,) = service.events(created["id"])
    assert finished["event"] == "finished" and finished["report"]["outcome"] == "migrated"
    record = service.good("GET", f"/v1/migrations/{created['id']}")
    assert record["status"] == "finished" and record["report"] == finished["report"]
    assert record["finished"] >= record["created"] == created["created"]


def test_where_it_was_created_is_said(service: Service) -> None:
    from contextlib import closing

    from unit.stand_in_service import Connection

    with closing(Connection(service.places.socket)) as connection:
        connection.request("POST", "/v1/migrations", json.dumps(MOVE))
        answer = connection.getresponse()
        record = json.loads(answer.read())
        assert (answer.status, answer.getheader("Location")) == (201, f"/v1/migrations/{record['id']}")


def test_the_newest_migrations_come_first_and_in_pages(start: Start) -> None:
    service = start("migrated")
    ids = []
    for pid in range(1, 6):
        ids.append(service.good("POST", "/v1/migrations", {**MOVE, "pid": pid})["id"])
        service.events(ids[-1])
    found = service.good("GET", "/v1/migrations")["migrations"]
    assert [each["id"] for each in found] == sorted(ids, reverse=True)
    listed: list[int] = []
    page = service.good("GET", "/v1/migrations?limit=2")
    while page["next"] is not None:
        listed += [each["request"]["pid"] for each in page["migrations"]]
        page = service.good("GET", f"/v1/migrations?limit=2&before={page['next']}")
    listed += [each["request"]["pid"] for each in page["migrations"]]
    assert sorted(listed) == [1, 2, 3, 4, 5]


def test_a_check_is_a_result(start: Start) -> None:
    service = start("checked")
    empty: dict[str, Any] = {"addresses": [], "blockers": [], "notices": []}
    assert service.good("POST", "/v1/check", CHECK) == {**RESULT, **empty}
    assert service.good("GET", "/v1/migrations")["migrations"] == []


def test_a_check_is_a_stream_for_those_who_accept_it(start: Start) -> None:
    with start("checked").stream("POST", "/v1/check", CHECK) as events:
        (checked,) = events
    assert checked["event"] == "checked" and checked["result"]["command"] == "redis-server"


def test_a_check_that_fails_is_an_error(start: Start) -> None:
    assert error(start("dies-at-once").ask("POST", "/v1/check", CHECK)) == (502, "agent-failed")


def test_processes(start: Start) -> None:
    (process,) = start("ps").good("GET", "/v1/processes?measure=0")
    assert process["pid"] == 7 and process["blockers"][0]["kind"] == "unix-socket"
    assert error(start("ps-fails").ask("GET", "/v1/processes")) == (500, "agent-failed")


# What is refused.


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("GET", "/", None, 404, "not-found"),
        ("GET", "/v2/health", None, 404, "not-found"),
        ("DELETE", "/v1/health", None, 405, "method-not-allowed"),
        ("POST", "/v1/migrations", b"", 400, "bad-request"),
        ("POST", "/v1/migrations", b"[]", 400, "bad-request"),
        ("POST", "/v1/migrations", b"\xff", 400, "bad-request"),
        ("POST", "/v1/migrations", CHECK, 400, "bad-request"),
        ("POST", "/v1/check", MOVE, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "pid": "1"}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "destination": "a b"}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "nonsense": 1}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "options": {"speed": 9}}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "ssh": {"password": "x"}}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "on_disconnect": "shrug"}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "reached_at": "alpha"}, 400, "bad-request"),
        ("POST", "/v1/migrations", {**MOVE, "version": 1}, 400, "bad-request"),
        ("POST", "/v1/migrations", b" " * (MAX_BODY + 1), 413, "too-large"),
        ("GET", "/v1/migrations?limit=0", None, 400, "bad-request"),
        ("GET", "/v1/migrations?limit=1000", None, 400, "bad-request"),
        ("GET", "/v1/migrations?limit=many", None, 400, "bad-request"),
        ("GET", "/v1/migrations?before=..", None, 400, "bad-request"),
        ("GET", f"/v1/migrations/{UNKNOWN}", None, 404, "not-found"),
        ("GET", f"/v1/migrations/{UNKNOWN}/events", None, 404, "not-found"),
        ("POST", f"/v1/migrations/{UNKNOWN}/abort", None, 404, "not-found"),
        ("GET", "/v1/migrations/..%2f..%2fetc%2fpasswd", None, 400, "bad-request"),
        ("GET", f"/v1/migrations/{UNKNOWN.lower()}", None, 400, "bad-request"),
        ("GET", f"/v1/migrations/{UNKNOWN}/events?from=-1", None, 400, "bad-request"),
        ("GET", "/v1/processes?measure=maybe", None, 400, "bad-request"),
    ],
)
def test_refused(service: Service, method: str, path: str, body: object, status: int, kind: str) -> None:
    assert error(service.ask(method, path, body)) == (status, kind)
    assert service.good("GET", "/v1/health")["running"] == 0


def test_the_message_names_what_is_wrong(service: Service) -> None:
    _, answer = service.ask("POST", "/v1/migrations", {**MOVE, "options": {"speed": 9}})
    assert "`speed`" in answer["error"]["message"] and "$.options" in answer["error"]["message"]
    _, answer = service.ask("POST", "/v1/migrations", {**MOVE, "version": 1})
    assert f"version 1 of the protocol, this agent {PROTOCOL_VERSION}" in answer["error"]["message"]


def test_one_process_is_moved_once_at_a_time(start: Start) -> None:
    service = start("waits")
    first = service.good("POST", "/v1/migrations", MOVE)["id"]
    status, answer = service.ask("POST", "/v1/migrations", MOVE)
    assert status == 409 and first in answer["error"]["message"]
    service.good("POST", f"/v1/migrations/{first}/abort")
    service.events(first)
    service.good("POST", "/v1/migrations", MOVE)


# The document.


def test_the_document_is_valid() -> None:
    validate(document(ROUTES))


def test_the_document_is_served_and_names_every_route_and_nothing_else(service: Service) -> None:
    served = service.good("GET", "/v1/openapi.json")
    assert served == json.loads(json.dumps(document(ROUTES)))
    named = {(method.upper(), path) for path, item in served["paths"].items() for method in item}
    assert named == {(route.method, route.path) for route in ROUTES}
    for method, path in named:
        if path != "/v1/openapi.json" and "{" not in path and method == "GET":
            assert service.ask(method, path)[0] == 200 or path == "/v1/processes"


def test_requests_of_the_document_are_strict() -> None:
    schemas = document(ROUTES)["components"]["schemas"]
    for name in ("Request", "MoveOptions", "SshOptions"):
        assert schemas[name]["additionalProperties"] is False


def test_answers_are_as_the_document_says(service: Service) -> None:
    from jsonschema import Draft202012Validator

    schemas = document(ROUTES)
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    service.events(id)
    for path, name in (
        ("/v1/health", "Health"),
        ("/v1/migrations", "MigrationList"),
        (f"/v1/migrations/{id}", "MigrationRecord"),
    ):
        schema = {"$ref": f"#/components/schemas/{name}", "components": schemas["components"]}
        Draft202012Validator(schema).validate(service.good("GET", path))


# Events, readers, aborts.


def test_many_readers_see_the_same_from_where_they_want(start: Start) -> None:
    service = start("waits")
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    path = f"/v1/migrations/{id}/events"
    with service.stream("GET", path) as first, service.stream("GET", path) as second:
        state = {"event": "state", "state": "pre-copy", "detail": ""}
        assert {**next(first), "detail": ""} == state == {**next(second), "detail": ""}
        assert service.good("GET", f"/v1/migrations/{id}")["state"] == "pre-copy"
        assert service.good("GET", "/v1/health")["running"] == 1
        assert service.ask("POST", f"/v1/migrations/{id}/abort")[0] == 202
        (last,), (same,) = first, second
    assert last == same and last["report"]["error"]["message"] == "aborted by request"
    everything = service.events(id)
    assert everything[1:] == service.events(id, 1) == [last]
    assert service.events(id, 99) == []


def test_an_abort_that_comes_too_late_is_a_conflict(start: Start) -> None:
    service = start("committed")
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    until(lambda: service.good("GET", f"/v1/migrations/{id}")["state"] == "committed")
    status, answer = service.ask("POST", f"/v1/migrations/{id}/abort")
    assert status == 409 and "point of no return: committed" in answer["error"]["message"]
    service.process.kill()
    service.process.communicate()


def test_an_abort_after_the_end_is_a_conflict(service: Service) -> None:
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    service.events(id)
    assert error(service.ask("POST", f"/v1/migrations/{id}/abort")) == (409, "conflict")


def test_a_move_that_nobody_watches_is_given_up(start: Start) -> None:
    service = start("waits", deserted_after=0.3)
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    report = until(lambda: service.good("GET", f"/v1/migrations/{id}")["report"])
    assert report["outcome"] == "rolled-back" and "nobody has watched" in report["error"]["message"]


def test_a_reader_that_goes_is_missed(start: Start) -> None:
    service = start("waits", deserted_after=0.3)
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    with service.stream("GET", f"/v1/migrations/{id}/events") as events:
        next(events)
    report = until(lambda: service.good("GET", f"/v1/migrations/{id}")["report"])
    assert "nobody has watched" in report["error"]["message"]


def test_a_move_that_is_to_go_on_goes_on(start: Start) -> None:
    """Another one, started later and watched by nobody either, is given up before this one is."""
    service = start("waits", deserted_after=0.3)
    id = service.good("POST", "/v1/migrations", {**MOVE, "on_disconnect": "continue"})["id"]
    other = service.good("POST", "/v1/migrations", {**MOVE, "pid": 1})["id"]
    until(lambda: service.good("GET", f"/v1/migrations/{other}")["report"])
    assert service.good("GET", f"/v1/migrations/{id}")["status"] == "running"
    service.good("POST", f"/v1/migrations/{id}/abort")
    assert service.events(id)[-1]["report"]["outcome"] == "rolled-back"


def test_a_check_that_nobody_waits_for_ends(start: Start) -> None:
    """It has no end of its own: that the service can end shows that nothing was left."""
    service = start("waits")
    with service.stream("POST", "/v1/check", CHECK) as events:
        next(events)
    assert "ended" in service.close()


@pytest.mark.parametrize(
    ("scenario", "outcome", "words"),
    [("dies-at-once", "refused", "status 3"), ("dies", "in-doubt", "status 9: something is wrong here")],
)
def test_a_front_that_dies_leaves_a_true_report(
    start: Start, scenario: str, outcome: str, words: str
) -> None:
    service = start(scenario)
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    report = service.events(id)[-1]["report"]
    assert report["outcome"] == outcome and words in report["error"]["message"]
    assert (report["source"]["pid"], report["error"]["kind"]) == (4711, "agent-failed")


# Records.


def test_records_outlast_the_service(start: Start) -> None:
    service = start("noise")
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    events = service.events(id)
    record = until(lambda: (r := service.good("GET", f"/v1/migrations/{id}"))["status"] == "finished" and r)
    service.close()
    service.start()
    assert service.good("GET", f"/v1/migrations/{id}") == record
    assert service.events(id) == events and len(events) == 2
    assert service.events(id, 1) == events[1:]


def test_records_are_for_their_owner_alone(service: Service) -> None:
    service.events(service.good("POST", "/v1/migrations", MOVE)["id"])
    files = [*service.places.reports.iterdir(), service.places.socket, service.places.lock]
    assert files and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    directories = (service.places.reports, service.places.state, service.places.socket.parent)
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in directories} == {0o700}


def test_what_ran_when_a_service_was_killed_is_lost(start: Start) -> None:
    service = start("waits")
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    service.process.kill()
    service.process.communicate()
    service.start()
    record = service.good("GET", f"/v1/migrations/{id}")
    assert (record["status"], record["report"]) == ("lost", None)
    assert service.events(id) == []


def test_a_damaged_record_is_none(start: Start) -> None:
    service = start("migrated")
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    service.events(id)
    until(lambda: service.good("GET", "/v1/health")["running"] == 0)
    (service.places.reports / f"{id}.json").write_text('{"record": ')
    (service.places.reports / "README").write_text("not a record")
    assert service.good("GET", "/v1/migrations") == {"migrations": [], "next": None}
    assert error(service.ask("GET", f"/v1/migrations/{id}")) == (404, "not-found")
