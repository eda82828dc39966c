"""The agent's service on real hosts: driven by curl, by many tools at once, bereft of each of its parts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.support import DONE, REFUSED, ROLLED_BACK, UNREACHABLE, Hosts, Place, Workload
from lab.fixture import until
from unit.test_unit_file import capabilities

SOCKET = "/run/migrate/agent.sock"
SLOW = ("--bandwidth", "10MB")  # pre-copy of the workload takes some seconds


@pytest.fixture
def workload(lab: Hosts, place: Place) -> Iterator[Workload]:
    """Memory that does not compress, so that a limit of the link is one of pre-copy."""
    started = Workload.start(lab, place, "heartbeat", "--megabytes", 64)
    yield started
    lab.kill(started.host, started.pid)


def curl(lab: Hosts, host: str, path: str, *options: str) -> Any:
    """An answer of the service that runs on the host."""
    words = ["curl", "-sS", "--unix-socket", SOCKET, f"http://agent{path}", *options]
    return json.loads(lab.run(host, *words))


def status(lab: Hosts, place: str = "alpha", asking: str = "client") -> list[dict[str, Any]]:
    listed = json.loads(lab.run(asking, "migrate", "status", place, "--json"))
    found: list[dict[str, Any]] = listed["migrations"]
    return found


def under_way(lab: Hosts, workload: Workload, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A slow move in pre-copy, started by a tool on alpha, and its name as another host is told."""
    known = {each["id"] for each in status(lab)}
    tool = lab.attend("alpha", "migrate", "move", workload.pid, "beta", "--json", *SLOW, *options)

    def in_precopy() -> str | None:
        new = [each for each in status(lab) if each["id"] not in known]
        return new[0]["id"] if new and new[0]["state"] == "pre-copy" else None

    return tool, until(in_precopy, "pre-copy", 60)


def ended(tool: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, err = tool.communicate(timeout=120)
    assert out, err
    return tool.returncode, json.loads(out)


def report_of(lab: Hosts, id: str) -> dict[str, Any]:
    """Of a migration from alpha, once it has one."""

    def finished() -> dict[str, Any] | None:
        record = json.loads(lab.run("client", "migrate", "status", "alpha", id, "--json"))
        report: dict[str, Any] | None = record["report"]
        return report

    found: dict[str, Any] = until(finished, "the report", 90)
    return found


def assert_runs_on(workload: Workload) -> None:
    until(workload.untraced, "the process to be let go")
    workload.assert_well()
    until(lambda: not workload.lab.agents("alpha") and not workload.lab.agents("beta"), "nothing is left", 60)


def test_a_move_by_curl(lab: Hosts, workload: Workload) -> None:
    """Through a service that is there on demand: created, followed to its end, on record afterwards."""
    lab.run("alpha", "sh", "-c", "migrate-agent connect </dev/null")
    assert len(lab.services("alpha")) == 1
    assert curl(lab, "alpha", "/v1/health")["running"] == 0
    request = {"operation": "move", "pid": workload.pid, "destination": "beta", "on_disconnect": "continue"}
    check = {**request, "operation": "check"}
    assert curl(lab, "alpha", "/v1/check", "-d", json.dumps(check))["blockers"] == []
    created = curl(lab, "alpha", "/v1/migrations", "-d", json.dumps(request))
    url = f"http://agent/v1/migrations/{created['id']}/events"
    lines = lab.run("alpha", "curl", "-sSN", "--unix-socket", SOCKET, url)
    events = [json.loads(line) for line in lines.splitlines()]
    states = [each["state"] for each in events if each["event"] == "state"]
    assert states[:3] == ["examining", "offering", "preparing"] and states[-1] == "migrated"
    assert events[-1]["report"]["outcome"] == "migrated"
    workload.host, workload.pid = "beta", events[-1]["report"]["destination"]["pid"]
    workload.assert_only_here("alpha", request["pid"])  # type: ignore[arg-type]
    workload.assert_well()
    assert curl(lab, "alpha", f"/v1/migrations/{created['id']}")["report"] == events[-1]["report"]
    assert "/v1/migrations" in curl(lab, "alpha", "/v1/openapi.json")["paths"]


def test_a_second_tool_sees_it_and_gives_it_up(lab: Hosts, workload: Workload) -> None:
    tool, id = under_way(lab, workload)
    with lab.attend("client", "migrate", "attach", id, "alpha", "--json") as watching:
        until(lambda: "attach" in " ".join(lab.processes("client").values()), "the second tool")
        lab.run("client", "migrate", "abort", id, "alpha")
        assert ended(watching)[0] == ROLLED_BACK
    code, report = ended(tool)
    assert (code, report["error"]["message"]) == (ROLLED_BACK, "aborted by request")
    assert_runs_on(workload)
    assert lab.ask("client", "migrate", "abort", id, "alpha").returncode == REFUSED


def test_a_tool_that_is_killed_takes_its_move_with_it(lab: Hosts, workload: Workload) -> None:
    tool, id = under_way(lab, workload)
    (pid,) = lab.agents("alpha", "coordinator")
    lab.kill("alpha", pid)
    report = report_of(lab, id)
    assert report["outcome"] == "rolled-back" and "nobody has watched" in report["error"]["message"]
    tool.wait(60)
    assert_runs_on(workload)


def test_a_tool_that_is_killed_leaves_a_move_that_is_to_go_on(lab: Hosts, workload: Workload) -> None:
    tool, id = under_way(lab, workload, "--keep-going")
    (pid,) = lab.agents("alpha", "coordinator")
    lab.kill("alpha", pid)
    report = report_of(lab, id)
    assert report["outcome"] == "migrated"
    tool.wait(60)
    source, workload.host, workload.pid = workload.pid, "beta", report["destination"]["pid"]
    workload.assert_only_here("alpha", source)
    workload.assert_well()


def test_a_detached_move_is_attached_to_from_elsewhere(lab: Hosts, workload: Workload) -> None:
    record = json.loads(
        lab.run("client", "migrate", "move", f"alpha:{workload.pid}", "beta", "--detach", "--json")
    )
    code, report = ended(lab.attend("client", "migrate", "attach", "alpha", record["id"], "--json"))
    assert (code, report["outcome"]) == (DONE, "migrated")
    assert json.loads(lab.run("client", "migrate", "report", "alpha", record["id"], "--json")) == report
    source, workload.host, workload.pid = workload.pid, "beta", report["destination"]["pid"]
    workload.assert_only_here("alpha", source)


def test_a_service_that_is_killed_leaves_the_process_running(lab: Hosts, workload: Workload) -> None:
    tool, id = under_way(lab, workload)
    (pid,) = lab.services("alpha")
    lab.kill("alpha", pid)
    code, report = ended(tool)
    assert code == ROLLED_BACK and report["outcome"] == "rolled-back"  # by the next service
    assert_runs_on(workload)
    (record,) = [each for each in status(lab) if each["id"] == id]
    assert (record["status"], record["report"]) == ("finished", report)


def test_a_service_on_demand_leaves_nothing_behind(lab: Hosts) -> None:
    for pid in lab.services("beta"):
        lab.kill("beta", pid, "TERM")
    until(lambda: not lab.services("beta"), "the end of the service")
    lab.run("beta", "rm", "-rf", "/run/migrate")
    lab.start("beta", "migrate-agent", "serve", "--idle-exit", "0.5")
    until(lambda: lab.ask("beta", "test", "-S", SOCKET).returncode == 0, "the service")
    until(lambda: not lab.services("beta"), "idle exit")
    assert lab.run("beta", "ls", "-A", "/run/migrate") == ""


def test_a_service_with_the_capabilities_of_the_unit(lab: Hosts, workload: Workload) -> None:
    """What configs/migrate-agent.service leaves it is enough for a move there and back."""
    for host in ("alpha", "beta"):
        for pid in lab.services(host):
            lab.kill(host, pid, "TERM")
        until(lambda host=host: not lab.services(host), "the end of the services")  # type: ignore[misc]
        limited = ("setpriv", "--no-new-privs", f"--bounding-set=-all,{bounding(lab, host)}")
        lab.start(host, *limited, "migrate-agent", "serve")
        until(lambda host=host: lab.ask(host, "test", "-S", SOCKET).returncode == 0, "the service")  # type: ignore[misc]
    try:
        for destination in ("beta", "alpha"):
            source = workload.host
            (service,) = lab.services(source)
            assert "NoNewPrivs:\t1" in lab.run(source, "cat", f"/proc/{service}/status")
            workload.move(destination)
            assert lab.services(source) == [service]
        workload.assert_well()
    finally:
        for host in ("alpha", "beta"):
            for pid in lab.services(host):
                lab.kill(host, pid, "TERM")


def bounding(lab: Hosts, host: str) -> str:
    """Those of the unit's capabilities that root of this machine has at all."""
    line = next(s for s in lab.run(host, "cat", "/proc/self/status").splitlines() if s.startswith("CapBnd:"))
    names = lab.run(host, "capsh", f"--decode={line.split()[1]}").partition("=")[2].strip().split(",")
    here = {name.upper() for name in names}
    return ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities() if name in here)


def test_an_agent_of_another_version(lab: Hosts, place: Place) -> None:
    health = {"version": "9.9", "protocol": 99, "host": "alpha", "pid": 1, "running": 0}
    other = place.path / "other-agent"
    other.write_text(f"#!/bin/sh\necho 'migrate-agent connected {json.dumps({'health': health})}'\ncat\n")
    other.chmod(0o755)
    done = lab.ask("client", "migrate", "move", "alpha:1", "beta", "--json", "--agent-command", other)
    assert done.returncode == REFUSED
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "version" and "version 9.9 with protocol 99" in error["message"]


def test_a_host_that_nobody_vouches_for(lab: Hosts, place: Place) -> None:
    config = place.path / "ssh_config"
    config.write_text("UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\n")
    for command in (("ps", "alpha"), ("status", "alpha"), ("move", "alpha:1", "beta")):
        done = lab.ask("client", "migrate", *command, "--json", "--ssh-config", config)
        assert done.returncode == UNREACHABLE
        error = json.loads(done.stdout)["error"]
        assert error["kind"] == "host-key-unknown" and "SHA256:" in error["message"]


def test_the_address_that_the_tool_came_by_stays(lab: Hosts, workload: Workload) -> None:
    """Refused for a tool elsewhere, which would lose the host; it, not the service, knows by what address."""
    extra = "10.77.0.201"
    lab.run("alpha", "ip", "address", "add", f"{extra}/32", "dev", "eth0")
    try:
        options = ("beta", "--address", extra, "--json")
        lines = lab.run("client", "cat", "/root/.ssh/known_hosts").splitlines()
        key = next(line for line in lines if "alpha" in line)
        known = Path(workload.status.parent, "known_hosts")
        known.write_text(f"{extra} {' '.join(key.split()[1:])}\n")
        config = Path(workload.status.parent, "ssh_config")
        config.write_text(f"UserKnownHostsFile {known}\n")
        refused = lab.ask(
            "client", "migrate", "check", f"{extra}:{workload.pid}", *options, "--ssh-config", config
        )
        assert "address-carries-link" in refused.stdout, refused.stdout + refused.stderr
        allowed = lab.ask("client", "migrate", "check", f"alpha:{workload.pid}", *options)
        assert allowed.returncode == DONE, allowed.stdout + allowed.stderr
    finally:
        lab.run("alpha", "ip", "address", "del", f"{extra}/32", "dev", "eth0")
