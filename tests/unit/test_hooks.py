"""The drain hook, over HTTP as a scheduler calls it; a stand-in plays what checks and moves come to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.sleepers import Sleepers
from unit.stand_in_agent import BLOCKER
from unit.stand_in_service import Service, until

NODE = os.uname().nodename


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service.playing("by-destination", tmp_path / "service")
    yield running
    if running.process.poll() is None:
        running.close()


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[Sleepers]:
    made = Sleepers(tmp_path)
    yield made
    made.close()


def plan(*destinations: str, name: str = "drained-one", **more: object) -> dict[str, Any]:
    return {"version": 1, "drain": [{"select": {"name": name}, "destinations": list(destinations)}], **more}


def drain(service: Service, plan: dict[str, Any], **more: object) -> dict[str, Any]:
    report: dict[str, Any] = service.good("POST", "/v1/hooks/drain", {"plan": plan, **more})
    return report


def covered(report: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {each["process"]["pid"]: each for each in report["processes"] if each["status"] != "not-covered"}


def error(answer: tuple[int, Any]) -> tuple[int, str, str]:
    status, body = answer
    return status, body["error"]["kind"], body["error"]["message"]


def test_all_that_a_rule_is_about_is_moved_and_nothing_else(service: Service, sleepers: Sleepers) -> None:
    first, second, other = (
        sleepers.start("drained-one"),
        sleepers.start("drained-one"),
        sleepers.start("stays"),
    )
    report = drain(service, plan("checked.migrated"))
    assert (report["outcome"], report["host"], report["error"]) == ("migrated", NODE, None)
    moved = covered(report)
    assert sorted(moved) == sorted([first, second])
    for pid, each in moved.items():
        assert each["status"] == "migrated"
        assert each["rule"] == each["process"]["name"] == "drained-one"
        assert each["report"]["outcome"] == "migrated"
        record = service.good("GET", f"/v1/migrations/{each['migration']}")
        assert record["request"]["pid"] == pid and record["request"]["destination"] == "checked.migrated"
    (left,) = (each for each in report["processes"] if each["process"]["pid"] == other)
    assert (left["status"], left["rule"], left["report"]) == ("not-covered", None, None)
    assert service.process.pid not in [each["process"]["pid"] for each in report["processes"]]


def test_the_first_destination_that_can_take_it(service: Service, sleepers: Sleepers) -> None:
    pid = sleepers.start("drained-one")
    places = (NODE, "dies-at-once", "blocked.rolled-back", "checked.migrated", "checked.rolled-back")
    each = covered(drain(service, plan(*places)))[pid]
    assert [tried["destination"] for tried in each["tried"]] == list(places[1:4])
    failed, blocked, good = each["tried"]
    assert failed["error"]["kind"] == "agent-failed" and failed["check"] is None
    assert blocked["check"]["blockers"] == [BLOCKER] and blocked["error"] is None
    assert good["check"]["blockers"] == [] and each["status"] == "migrated"


@pytest.mark.parametrize(
    ("destinations", "outcome"),
    [
        (("checked.migrated", "checked.rolled-back"), "rolled-back"),
        (("checked.rolled-back", "checked.in-doubt"), "in-doubt"),
        (("checked.migrated", "blocked"), "refused"),
        (("checked.migrated", "checked.refused"), "refused"),
    ],
)
def test_one_that_cannot_leave_does_not_hold_up_the_others(
    service: Service, sleepers: Sleepers, destinations: tuple[str, str], outcome: str
) -> None:
    """Whatever comes of it; the worst is what came of the host."""
    pids = [sleepers.start(f"drained-{number}") for number in range(2)]
    rules = [{"select": {"name": f"drained-{n}"}, "destinations": d} for n, d in enumerate(destinations)]
    report = drain(service, {"version": 1, "drain": rules[::-1]})
    assert report["outcome"] == outcome
    wanted = [each.split(".")[-1].replace("blocked", "refused") for each in destinations]
    assert [covered(report)[pid]["status"] for pid in pids] == wanted


def test_moves_of_a_plan_from_this_host_count_too(service: Service, sleepers: Sleepers) -> None:
    pid, other = sleepers.start("moved-one"), sleepers.start("moved-two")
    moves = [
        {
            "select": {"name": "moved-one"},
            "source": f"root@{NODE}",
            "destination": "checked.migrated",
            "name": "first",
        },
        {"select": {"pid": other}, "source": "elsewhere", "destination": "checked.migrated"},
    ]
    report = drain(service, {"version": 1, "moves": moves})
    assert list(covered(report)) == [pid] and covered(report)[pid]["rule"] == "first"
    report = drain(service, {"version": 1, "moves": moves}, host="elsewhere:22", dry_run=True)
    assert sorted(covered(report)) == sorted([pid, other])
    moves[1]["source"] = "local"
    assert list(covered(drain(service, {"version": 1, "moves": moves}, dry_run=True))) == [pid]
    report = drain(service, {"version": 1, "moves": moves}, host="local", dry_run=True)
    assert sorted(covered(report)) == sorted([pid, other])


def test_a_move_is_for_one_process(service: Service, sleepers: Sleepers) -> None:
    pids = [sleepers.start("twin"), sleepers.start("twin")]
    move = {"select": {"name": "twin"}, "source": NODE, "destination": "checked.migrated"}
    report = drain(service, {"version": 1, "moves": [move]})
    assert sorted(covered(report)) == pids and report["outcome"] == "refused"
    assert {each["tried"][0]["error"]["kind"] for each in covered(report).values()} == {"ambiguous"}
    assert service.good("GET", "/v1/migrations")["migrations"] == []


def test_nowhere_to_go(service: Service, sleepers: Sleepers) -> None:
    pid = sleepers.start("drained-one")
    each = covered(drain(service, plan(NODE)))[pid]
    assert each["status"] == "refused" and each["tried"][0]["error"]["kind"] == "no-destination"


def test_other_destinations_than_the_plans(service: Service, sleepers: Sleepers) -> None:
    pid = sleepers.start("drained-one")
    each = covered(drain(service, plan("blocked"), destinations=["checked.migrated"]))[pid]
    assert each["status"] == "migrated" and len(each["tried"]) == 1


def test_nothing_to_do_is_done(service: Service) -> None:
    report = drain(service, plan("beta", name="nobody-is-called-so"))
    assert report["outcome"] == "migrated" and covered(report) == {}
    assert drain(service, plan("beta", name="nobody-is-called-so"), dry_run=True)["outcome"] == "ready"


def test_a_dry_run_moves_nothing(service: Service, sleepers: Sleepers) -> None:
    pid = sleepers.start("drained-one")
    report = drain(service, plan("blocked", "checked.migrated"), dry_run=True)
    each = covered(report)[pid]
    assert (report["outcome"], each["status"]) == ("ready", "ready")
    assert each["destination"] == {"host": "checked.migrated", "pid": None} and each["report"] is None
    assert service.good("GET", "/v1/migrations")["migrations"] == []


def test_options_and_ssh_of_the_plan(service: Service, sleepers: Sleepers) -> None:
    sleepers.start("drained-one")
    defaults = {
        "limits": {"bandwidth": "100mbit"},
        "ssh": {"identity": "/key", "agent_command": "other-agent"},
    }
    report = drain(
        service, plan("checked.migrated", defaults=defaults), auth_socket="/agent", reached_at="10.0.0.1"
    )
    (each,) = covered(report).values()
    request = service.good("GET", f"/v1/migrations/{each['migration']}")["request"]
    assert request["options"]["bandwidth"] == 12_500_000 and request["reached_at"] == "10.0.0.1"
    assert request["ssh"] == {
        "identity": ["/key"], "config": [], "agent_command": "other-agent", "auth_socket": "/agent"
    }  # fmt: skip


def test_a_plan_of_this_host(service: Service, sleepers: Sleepers, tmp_path: Path) -> None:
    pid = sleepers.start("drained-one")
    file = tmp_path / "drain.yaml"
    file.write_text(json.dumps(plan("checked.migrated")))
    report = service.good("POST", "/v1/hooks/drain", {"plan_file": str(file)})
    assert covered(report)[pid]["status"] == "migrated"
    file.write_text("version: 1\ndrain:\n- select: {nam: x}\n  destinations: []\n")
    status, kind, message = error(service.ask("POST", "/v1/hooks/drain", {"plan_file": str(file)}))
    assert (status, kind) == (400, "bad-plan")
    assert [line.partition(": ")[0] for line in message.splitlines()] == [f"{file}:3:12", f"{file}:4:17"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not a request"),
        (b"[" * 100_000, "not a request"),
        ({}, "exactly one of plan and plan_file"),
        ({"plan": {}, "plan_file": "/x"}, "exactly one of plan and plan_file"),
        ({"plan": {}, "colour": "red"}, "colour"),
        ({"plan_file": "plan.yaml"}, "is not an absolute path"),
        ({"plan_file": "/nonexistent/plan.yaml"}, "/nonexistent/plan.yaml: No such file"),
        ({"plan_file": "/etc"}, "/etc: Is a directory"),
        ({"plan_file": "/\0"}, "null byte"),
        ({"plan": {}, "host": "a/b"}, "is not a host name"),
        ({"plan": {}, "destinations": ["a b"]}, "is not a host name"),
        ({"plan": {}, "reached_at": "alpha"}, "does not appear to be an IPv4 or IPv6 address"),
        ({"plan": {"version": 1, "drain": [{"x": 1}]}}, "plan:drain[0].x: there is no key 'x' here"),
    ],
)
def test_what_is_no_request(service: Service, body: object, words: str) -> None:
    status, kind, message = error(service.ask("POST", "/v1/hooks/drain", body))
    assert status == 400 and kind in ("bad-request", "bad-plan")
    assert words in message


def test_every_event_for_those_who_accept_lines(service: Service, sleepers: Sleepers) -> None:
    pid = sleepers.start("drained-one")
    with service.stream("POST", "/v1/hooks/drain", {"plan": plan("checked.noise")}) as lines:
        events = list(lines)
    assert [each["event"] for each in events] == ["started", "process", "settled", "drained"]
    started, happened, settled, drained = events
    assert {each["status"] for each in started["processes"]} == {"not-started", "not-covered"}
    assert happened == {
        "event": "process", "pid": pid, "destination": "checked.noise",
        "of": {"event": "state", "state": "pre-copy", "detail": ""},
    }  # fmt: skip
    assert settled["process"] == covered(drained["report"])[pid]


def running(service: Service) -> list[dict[str, Any]]:
    listed = service.good("GET", "/v1/migrations")["migrations"]
    return [each for each in listed if each["status"] == "running" and each["state"] == "pre-copy"]


def test_one_drain_at_a_time_and_its_end(service: Service, sleepers: Sleepers) -> None:
    pids = [sleepers.start("drained-one"), sleepers.start("drained-one")]
    assert error(service.ask("POST", "/v1/hooks/drain/abort"))[:2] == (409, "conflict")
    with service.stream("POST", "/v1/hooks/drain", {"plan": plan("checked.waits")}) as lines:
        until(lambda: running(service), "the first move is under way")
        assert error(service.ask("POST", "/v1/hooks/drain", {"plan": plan("beta")}))[:2] == (409, "conflict")
        now = service.good("POST", "/v1/hooks/drain/abort")
        assert [each["status"] for each in covered(now).values()] == ["not-started", "not-started"]
        *_, drained = lines
    report = drained["report"]
    assert report["outcome"] == "rolled-back" and report["error"]["message"] == "aborted by request"
    assert [covered(report)[pid]["status"] for pid in pids] == ["rolled-back", "not-started"]
    assert drain(service, plan("beta", name="nobody-is-called-so"))["outcome"] == "migrated"


def test_two_at_a_time(service: Service, sleepers: Sleepers) -> None:
    for _ in range(3):
        sleepers.start("drained-one")
    two_at_once = plan("checked.waits", defaults={"parallel": 2})
    with service.stream("POST", "/v1/hooks/drain", {"plan": two_at_once}) as lines:
        until(lambda: len(running(service)) == 2, "two moves are under way")
        service.good("POST", "/v1/hooks/drain/abort")
        *_, drained = lines
    statuses = sorted(each["status"] for each in covered(drained["report"]).values())
    assert statuses == ["not-started", "rolled-back", "rolled-back"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_whoever_hangs_up_ends_it_unless_it_was_to_go_on(
    service: Service, sleepers: Sleepers, goes_on: bool
) -> None:
    pid = sleepers.start("drained-one")
    policy = "continue" if goes_on else "abort"
    with service.stream("POST", "/v1/hooks/drain", {"plan": plan("checked.waits"), "on_disconnect": policy}):
        (one,) = until(lambda: running(service), "the move is under way")
    if goes_on:
        assert running(service)
        assert list(covered(service.good("POST", "/v1/hooks/drain/abort"))) == [pid]
    path = f"/v1/migrations/{one['id']}"
    record = until(lambda: (found := service.good("GET", path))["status"] == "finished" and found)
    reason = record["report"]["error"]["message"]
    assert reason == ("aborted by request" if goes_on else "nobody waits for its answer any more")


def test_a_service_that_ends_starts_nothing_more(service: Service, sleepers: Sleepers) -> None:
    pids = [sleepers.start("drained-one"), sleepers.start("drained-one")]
    with service.stream("POST", "/v1/hooks/drain", {"plan": plan("checked.waits")}) as lines:
        until(lambda: running(service), "the first move is under way")
        service.process.terminate()
        *_, drained = lines
    report = drained["report"]
    assert [covered(report)[pid]["status"] for pid in pids] == ["rolled-back", "not-started"]
    service.process.communicate()


def test_selecting(service: Service, sleepers: Sleepers) -> None:
    pid = sleepers.start("single")
    found = service.good("POST", "/v1/select", {"name": "single"})
    assert [each["pid"] for each in found["processes"]] == [pid] and found["why"] == ""
    none = service.good("POST", "/v1/select", {"pidfile": "/nonexistent"})
    assert none == {"processes": [], "why": "/nonexistent: No such file or directory"}
    assert service.good("POST", "/v1/select", {"pidfile": "/\0"})["why"] == "/\0: embedded null byte"
    assert "not an absolute path" in service.good("POST", "/v1/select", {"pidfile": "run/x.pid"})["why"]
    for body in ({}, {"pid": 1, "name": "x"}, {"user": "x"}, b"[" * 100_000):
        assert error(service.ask("POST", "/v1/select", body))[:2] == (400, "bad-request")
