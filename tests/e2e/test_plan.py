"""Plans and the drain hook on a lab of three hosts: processes really move, or nothing is touched."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from e2e.support import (
    DONE,
    REFUSED,
    ROLLED_BACK,
    SERVICE,
    UNREACHABLE,
    USAGE,
    Hosts,
    Moved,
    Place,
    Workload,
)
from lab.fixture import until
from programs.status import BUILD, wait_for_status

from agent.hook_api import DrainReport

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SOCKET = "/run/migrate/agent.sock"
HOSTS = ("alpha", "beta", "gamma")
STAND_IN = ROOT / "tests" / "unit" / "stand_in_agent.py"


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    with Hosts("plan", hosts=3) as hosts:
        yield hosts


class Beats:
    """Workloads on the lab's hosts, each with a status of its own; none outlives its test."""

    def __init__(self, lab: Hosts, place: Place) -> None:
        self.lab, self.place = lab, place
        self._made: list[Workload] = []

    def start(self, host: str, program: str = "heartbeat") -> Workload:
        name = f"{program}-{len(self._made)}"
        status = self.place.path / f"{name}.status"
        files = ("--status", status, "--log", self.place.path / f"{name}.log")
        options = [*files, "--megabytes", "8", "--rate", "2"]
        pid = self.lab.start(host, BUILD / "heartbeat", *options)
        assert wait_for_status(status)["host"] == host
        self._made.append(Workload(self.lab, host, pid, status=status))
        return self._made[-1]

    def arrived(self, workload: Workload, host: str, pid: int) -> None:
        """It is in the other host by the kernel's word, and goes on there."""
        source, before = workload.host, workload.pid
        workload.host, workload.pid = host, pid
        workload.assert_only_here(source, before)
        workload.assert_well()

    def untouched(self, *workloads: Workload) -> None:
        for each in workloads:
            assert self.lab.alive(each.host, each.pid) and each.untraced()
            each.assert_well()

    def close(self) -> None:
        for each in self._made:
            self.lab.kill(each.host, each.pid)


@pytest.fixture
def beats(three: Hosts, place: Place) -> Iterator[Beats]:
    made = Beats(three, place)
    yield made
    made.close()
    for host in (*HOSTS, "client"):
        until(functools.partial(no_agents, three, host), f"the agents of {host} have ended")


def no_agents(lab: Hosts, host: str) -> bool:
    return not lab.agents(host)


def write(place: Place, moves: list[dict[str, Any]], **rest: object) -> Path:
    file = place.path / "plan.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "moves": moves, **rest}, sort_keys=False))
    return file


def move(select: dict[str, Any], source: str, destination: str, **rest: object) -> dict[str, Any]:
    return {"select": select, "source": source, "destination": destination, **rest}


def plan(lab: Hosts, action: str, file: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """`migrate plan` on a host that has no part in the moves: exit code, report, and what was said."""
    done = lab.ask("client", "migrate", "plan", action, file, "--json", *options, timeout=240)
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def statuses(report: dict[str, Any]) -> list[str]:
    return [each["status"] for each in report["moves"]]


def errors(report: dict[str, Any]) -> list[str]:
    return [each["report"]["error"]["kind"] for each in report["moves"]]


def new_pid(each: dict[str, Any]) -> int:
    return int(each["report"]["destination"]["pid"])


# Plans.


def test_three_moves_to_the_end(three: Hosts, beats: Beats, place: Place) -> None:
    """Around, two at a time: each host gives one and gets one; selected in each way that there is."""
    by_name, by_number, by_file = (beats.start(host) for host in HOSTS)
    three.run("gamma", "sh", "-c", f"echo {by_file.pid} >/run/worker.pid")
    moves = [
        move({"name": "heartbeat"}, "alpha", "beta", name="first"),
        move({"pid": by_number.pid}, "root@beta", "root@gamma", verify=True),
        move({"pidfile": "/run/worker.pid"}, three.address("gamma"), "alpha", compression="none"),
    ]
    file = write(place, moves, defaults={"parallel": 2, "limits": {"downtime_limit": "100ms"}})
    code, report, said = plan(three, "check", file)
    assert (code, report["outcome"], statuses(report)) == (DONE, "ready", ["ready"] * 3), said
    beats.untouched(by_name, by_number, by_file)
    code, report, said = plan(three, "apply", file)
    assert (code, report["outcome"], statuses(report)) == (DONE, "migrated", ["migrated"] * 3), said
    assert "first: live beta:" in said
    for workload, each in zip((by_name, by_number, by_file), report["moves"], strict=True):
        beats.arrived(workload, each["report"]["destination"]["host"], new_pid(each))
    assert [by_name.host, by_number.host, by_file.host] == ["beta", "gamma", "alpha"]
    assert report["moves"][1]["report"]["verified_pages"] > 0
    assert report["moves"][0]["report"]["verified_pages"] is None


def test_one_that_is_refused(three: Hosts, beats: Beats, place: Place) -> None:
    """Nothing is touched; unless the plan says to go on, then the others move."""
    first, refused, last = beats.start("alpha"), beats.start("beta"), beats.start("gamma")
    moves = [
        move({"pid": first.pid}, "alpha", "gamma"),
        move({"pid": refused.pid}, "beta", "gamma", address="10.77.0.222"),
        move({"pid": last.pid}, "gamma", "beta"),
    ]
    for action in ("check", "apply"):
        code, report, said = plan(three, action, write(place, moves))
        assert (code, report["outcome"]) == (REFUSED, "refused"), said
        others = {"check": "ready", "apply": "not-started"}[action]
        assert statuses(report) == [others, "refused", others]
        assert [b["kind"] for b in report["moves"][1]["check"]["blockers"]] == ["address-not-here"]
        beats.untouched(first, refused, last)
    code, report, said = plan(three, "apply", write(place, moves, defaults={"on_failure": "continue"}))
    assert (code, report["outcome"]) == (REFUSED, "refused"), said
    assert statuses(report) == ["migrated", "refused", "migrated"]
    beats.untouched(refused)
    beats.arrived(first, "gamma", new_pid(report["moves"][0]))
    beats.arrived(last, "beta", new_pid(report["moves"][2]))


def test_ctrl_c(three: Hosts, beats: Beats, place: Place) -> None:
    """What is on its way is rolled back, the rest is not started."""
    first, second = beats.start("alpha"), beats.start("beta")
    slow = {"limits": {"bandwidth": "100KiB"}}
    moves = [
        move({"pid": first.pid}, "alpha", "beta", name="slow"),
        move({"pid": second.pid}, "beta", "gamma"),
    ]
    file = write(place, moves, defaults=slow)
    running = three.attend("client", "migrate", "plan", "apply", file, "--json")
    assert running.stderr is not None
    assert any("slow: pre-copy" in line for line in running.stderr)
    named = [pid for pid, line in three.processes("client").items() if "migrate plan apply" in line]
    (coordinator,) = (pid for pid in named if "/lab exec " not in three.processes("client")[pid])
    three.kill("client", coordinator, "INT")
    output, _ = running.communicate(timeout=120)
    report = json.loads(output)
    assert (running.returncode, statuses(report)) == (ROLLED_BACK, ["rolled-back", "not-started"])
    assert report["error"]["message"] == "interrupted; 1 of 2 moves were not started"
    beats.untouched(first, second)


def test_a_file_that_is_no_plan(three: Hosts, place: Place) -> None:
    file = place.path / "plan.yaml"
    file.write_text("version: 1\nmoves:\n  - select: {name: x}\n    source: alpha\n    destination: [beta\n")
    code, report, said = plan(three, "apply", file)
    assert (code, report["error"]["kind"]) == (USAGE, "bad-plan")
    assert said.startswith(f"{file}:6:1: not YAML: ")
    file.write_text("version: 1\nmoves:\n  - select: {name: x}\n    source: alpha\n    destnation: beta\n")
    code, report, said = plan(three, "check", file)
    assert code == USAGE
    assert f"{file}:5:5: there is no key 'destnation' here; is 'destination' meant?" in said.splitlines()
    assert [problem["line"] for problem in report["problems"]] == [3, 5]


def test_hosts_and_processes_that_are_not_there(three: Hosts, beats: Beats, place: Place) -> None:
    here = beats.start("alpha")
    select = {"pid": here.pid}
    moves = [
        move(select, "nowhere", "beta"),
        move(select, "alpha", "nowhere"),
        move({"pid": 4_000_000}, "alpha", "beta"),
        move({"name": "nobody-is-called-so"}, "beta", "gamma"),
    ]
    code, report, _ = plan(three, "apply", write(place, moves))
    assert errors(report) == ["host-not-found", "host-not-found", "no-such-process", "no-such-process"]
    assert (code, statuses(report)) == (REFUSED, ["refused"] * 4)
    code, report, _ = plan(three, "apply", write(place, moves[:2]))
    assert code == UNREACHABLE
    beats.untouched(here)


def test_a_host_key_that_has_changed(three: Hosts, beats: Beats, place: Place) -> None:
    """On either way: from here to the source, and from the source to the destination."""
    here = beats.start("alpha")
    for asking, other in (("client", "alpha"), ("alpha", "beta")):
        known = three.run(asking, "sh", "-c", "cat ~/.ssh/known_hosts")
        false = re.sub(rf"^({other},\S+ \S+) \S+", rf"\1 {key_of(three, 'gamma')}", known, flags=re.M)
        assert false != known
        three.exec(asking, "sh", "-c", "cat >~/.ssh/known_hosts", input=false)
        try:
            code, report, _ = plan(three, "apply", write(place, [move({"pid": here.pid}, "alpha", "beta")]))
        finally:
            three.exec(asking, "sh", "-c", "cat >~/.ssh/known_hosts", input=known)
        assert (code, errors(report)) == (UNREACHABLE, ["host-key-changed"])
        assert other in report["moves"][0]["report"]["error"]["message"]
    beats.untouched(here)


def key_of(lab: Hosts, host: str) -> str:
    return lab.run(host, "cat", "/run/lab/ssh_host_ed25519_key.pub").split()[1]


def test_an_agent_of_another_version(three: Hosts, beats: Beats, place: Place) -> None:
    here = beats.start("alpha")
    python = three.run("alpha", "sh", "-c", "command -v python3").strip()
    agent = f"{python} {STAND_IN} another-version"
    file = write(
        place, [move({"pid": here.pid}, "alpha", "beta")], defaults={"ssh": {"agent_command": agent}}
    )
    code, report, _ = plan(three, "apply", file)
    assert (code, errors(report)) == (REFUSED, ["version"])
    message = report["moves"][0]["report"]["error"]["message"]
    assert "version 9.9 with protocol 99" in message and "install the same version" in message
    beats.untouched(here)


# The hook.


@pytest.fixture
def service(three: Hosts) -> Iterator[str]:
    """The agent's service on alpha, as a unit would run it."""
    for line in three.run("alpha", "ps", "-e", "-o", "pid=,args=").splitlines():
        if re.search("agent.main serve", line) and "/lab exec " not in line:
            three.kill("alpha", int(line.split()[0]), "TERM")
    until(lambda: three.ask("alpha", "test", "-e", SOCKET).returncode, "the service on demand has ended")
    pid = three.start("alpha", "migrate-agent", "serve")
    until(lambda: three.ask("alpha", "test", "-S", SOCKET).returncode == 0, "the service's socket")
    yield "alpha"
    three.kill("alpha", pid, "TERM")
    until(lambda: not three.alive("alpha", pid), "the service has ended")


def curl(lab: Hosts, place: Place, body: object, path: str = "/v1/hooks/drain") -> tuple[int, Any]:
    """What a scheduler does on the host itself: status and answer."""
    file = place.path / "body.json"
    file.write_text(json.dumps(body))
    form = ["--silent", "--show-error", "--unix-socket", SOCKET, "--write-out", "%{stderr}%{http_code}"]
    done = lab.ask("alpha", "curl", *form, "--data", f"@{file}", f"http://agent{path}", timeout=240)
    assert done.returncode == 0, done.stderr
    return int(done.stderr), json.loads(done.stdout)


def covered(report: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {each["process"]["pid"]: each for each in report["processes"] if each["status"] != "not-covered"}


@pytest.mark.usefixtures("service")
def test_two_processes_leave_a_host(three: Hosts, beats: Beats, place: Place) -> None:
    first, second = beats.start("alpha"), beats.start("alpha")
    stays = three.start("alpha", "sleep", "300")
    rules = {
        "version": 1,
        "drain": [{"select": {"name": "heartbeat"}, "destinations": [*HOSTS[:1], "nowhere", "beta"]}],
    }
    status, report = curl(three, place, {"plan": rules, "dry_run": True})
    assert (status, report["outcome"]) == (200, "ready")
    beats.untouched(first, second)
    status, report = curl(three, place, {"plan": rules})
    assert (status, report["outcome"], report["host"]) == (200, "migrated", "alpha")
    moved = covered(report)
    assert sorted(moved) == sorted([first.pid, second.pid])
    for workload in (first, second):
        each = moved[workload.pid]
        assert [tried["destination"] for tried in each["tried"]] == ["nowhere", "beta"]
        assert each["tried"][0]["error"]["kind"] == "host-not-found"
        assert each["report"]["pause_ms"] > 0
        url = f"http://agent/v1/migrations/{each['migration']}"
        record = three.run("alpha", "curl", "-sS", "--unix-socket", SOCKET, url)
        assert json.loads(record)["report"] == each["report"]
        beats.arrived(workload, "beta", new_pid(each))
    (left,) = (each for each in report["processes"] if each["process"]["pid"] == stays)
    assert left["status"] == "not-covered" and three.alive("alpha", stays)
    three.kill("alpha", stays)


@pytest.mark.usefixtures("service")
def test_what_cannot_leave_stays_and_says_why(three: Hosts, beats: Beats, place: Place) -> None:
    stuck, free = beats.start("alpha"), beats.start("alpha")
    rules = [
        {"select": {"pid": stuck.pid}, "destinations": ["beta", "gamma"], "address": "10.77.0.222"},
        {"select": {"name": "heartbeat"}, "destinations": ["gamma"]},
    ]
    status, report = curl(three, place, {"plan": {"version": 1, "drain": rules}})
    assert (status, report["outcome"]) == (200, "refused")
    answer = covered(report)[stuck.pid]
    assert answer["status"] == "refused"
    assert [tried["destination"] for tried in answer["tried"]] == ["beta", "gamma"]
    kinds = {b["kind"] for tried in answer["tried"] for b in tried["check"]["blockers"]}
    assert kinds == {"address-not-here"}
    beats.untouched(stuck)
    beats.arrived(free, "gamma", new_pid(covered(report)[free.pid]))


@pytest.mark.usefixtures("service")
def test_a_plan_of_the_host_that_is_none(three: Hosts, place: Place) -> None:
    file = place.path / "drain.yaml"
    file.write_text("version: 1\ndrain:\n  - select: {name: x}\n    destinations: [be/ta]\n  - {}\n")
    status, answer = curl(three, place, {"plan_file": str(file)})
    assert (status, answer["error"]["kind"]) == (400, "bad-plan")
    assert answer["error"]["message"].startswith(f"{file}:4:20: ")
    assert f"\n{file}:5:5: the key 'select' is missing" in answer["error"]["message"]
    status, answer = curl(three, place, {"plan": {"version": 3, "drain": []}})
    assert (status, answer["error"]["message"]) == (400, "plan:version: here must be 1, not 3")
    script = three.ask("alpha", CONFIGS / "hooks" / "drain-this-host", file)
    assert script.returncode == 2 and "bad-plan" in script.stderr


def test_a_host_emptied_from_elsewhere(three: Hosts, beats: Beats, place: Place) -> None:
    """The plan is read where the command runs; the host's service is started on demand."""
    moved, named = beats.start("beta"), beats.start("beta")
    file = write(
        place,
        [move({"pid": named.pid}, "root@beta", "alpha"), move({"name": "heartbeat"}, "gamma", "alpha")],
        drain=[{"select": {"name": "heartbeat"}, "destinations": ["beta", "gamma"]}],
    )
    done = three.ask("client", "migrate", "hook", "drain", "beta", "--plan", file, "--json", timeout=240)
    assert done.returncode == DONE, done.stdout + done.stderr
    report = json.loads(done.stdout)
    beats.arrived(moved, "gamma", new_pid(covered(report)[moved.pid]))
    beats.arrived(named, "alpha", new_pid(covered(report)[named.pid]))
    again = three.ask("client", "migrate", "hook", "drain", "beta", "--plan", file, timeout=240)
    assert again.returncode == DONE and "are not covered by the plan" in again.stdout
    nowhere = three.ask("client", "migrate", "hook", "drain", "nowhere", "--plan", file, "--json")
    assert nowhere.returncode == UNREACHABLE
    unreached = msgspec.json.decode(nowhere.stdout, type=DrainReport)
    assert (unreached.host, unreached.outcome, unreached.processes) == ("nowhere", "refused", ())
    assert unreached.error is not None and unreached.error.kind == "host-not-found"


# The examples.


class Cast:
    """Real processes for the parts that the examples name."""

    def __init__(self, lab: Hosts, beats: Beats, place: Place) -> None:
        self.lab, self.beats, self.place = lab, beats, place
        lab.run("alpha", "ip", "address", "add", f"{SERVICE}/24", "dev", "eth0")
        for host in (*HOSTS, "client"):  # who had it in another test is nobody's business any more
            lab.run(host, "ip", "neighbour", "flush", "to", SERVICE)
        options = ["--port", 6379, "--save", "", "--protected-mode", "no", "--dir", place.path]
        pid = lab.start("alpha", "redis-server", "--bind", SERVICE, "127.0.0.1", *options)
        self.redis = Moved(lab, "alpha", pid)
        until(self.answers, "redis-server")

    def answers(self) -> bool:
        return self.lab.ask("client", "redis-cli", "-h", SERVICE, "PING").stdout == "PONG\n"

    def real(self, name: str) -> Path:
        """An example with this lab's address and processes in the place of the example's."""
        text = (CONFIGS / "plans" / name).read_text()
        file = self.place.path / name
        file.write_text(text.replace("192.0.2.10", SERVICE).replace("name: simulation}", "name: heartbeat}"))
        return file

    def redis_at(self, host: str, pid: int) -> None:
        source, before = self.redis.host, self.redis.pid
        self.redis.host, self.redis.pid = host, pid
        self.redis.assert_only_here(source, before)
        until(self.answers, "redis-server answers where it is now")
        assert SERVICE in self.lab.run(host, "ip", "-4", "address", "show", "eth0")

    def close(self) -> None:
        self.lab.kill(self.redis.host, self.redis.pid)
        for host in HOSTS:
            self.lab.ask(host, "ip", "address", "del", f"{SERVICE}/24", "dev", "eth0")


@pytest.fixture
def cast(three: Hosts, beats: Beats, place: Place) -> Iterator[Cast]:
    made = Cast(three, beats, place)
    yield made
    made.close()


def test_there_is_a_test_for_every_example() -> None:
    assert {file.name for file in (CONFIGS / "plans").iterdir()} == {
        "one-service.yaml",
        "batch.yaml",
        "node-drain.yaml",
    }
    assert {file.name for file in (CONFIGS / "hooks").iterdir()} == {"drain-this-host", "slurm-drained"}


def test_the_example_of_one_service(three: Hosts, cast: Cast) -> None:
    code, report, said = plan(three, "apply", cast.real("one-service.yaml"))
    assert code == DONE, said
    assert report["moves"][0]["report"]["address_moved"] == [SERVICE]
    cast.redis_at("beta", new_pid(report["moves"][0]))


def test_the_example_of_a_batch(three: Hosts, beats: Beats, cast: Cast) -> None:
    worker, simulation = beats.start("alpha"), beats.start("beta")
    three.run("alpha", "sh", "-c", f"echo {worker.pid} >/run/worker.pid")
    code, report, said = plan(three, "apply", cast.real("batch.yaml"))
    assert (code, statuses(report)) == (DONE, ["migrated"] * 3), said
    for workload, each in zip((worker, simulation), report["moves"][1:], strict=True):
        beats.arrived(workload, "gamma", new_pid(each))
    cast.redis_at("beta", new_pid(report["moves"][0]))


@pytest.mark.usefixtures("service")
def test_the_example_of_a_drain_and_the_script_for_it(three: Hosts, beats: Beats, cast: Cast) -> None:
    simulation = beats.start("alpha")
    done = three.ask(
        "alpha", CONFIGS / "hooks" / "drain-this-host", cast.real("node-drain.yaml"), timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    beats.arrived(simulation, "gamma", new_pid(covered(report)[simulation.pid]))
    cast.redis_at("beta", new_pid(covered(report)[cast.redis.pid]))
    empty = three.ask(
        "alpha", CONFIGS / "hooks" / "drain-this-host", cast.real("node-drain.yaml"), timeout=240
    )
    assert empty.returncode == 0 and json.loads(empty.stdout)["outcome"] == "migrated"


@pytest.mark.usefixtures("service")
def test_the_script_says_that_something_stays(three: Hosts, beats: Beats, place: Place) -> None:
    here = beats.start("alpha")
    file = write(place, [], drain=[{"select": {"name": "heartbeat"}, "destinations": "nowhere"}])
    done = three.ask("alpha", CONFIGS / "hooks" / "drain-this-host", file, timeout=240)
    assert done.returncode == 1 and json.loads(done.stdout)["outcome"] == "refused"
    beats.untouched(here)


def test_the_script_for_slurm(three: Hosts, beats: Beats, cast: Cast, place: Place) -> None:
    """With stand-ins for Slurm's commands, of which the script needs two."""
    here = beats.start("alpha")
    commands = {
        "scontrol": 'case $1 in show) echo alpha; echo client;; *) echo "$*" >>"$0.log";; esac',
        "logger": 'echo "$*" >>"$0.log"',
    }
    for name, text in commands.items():
        program = place.path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    settings = [f"MIGRATE_PLAN={cast.real('node-drain.yaml')}", f"MIGRATE_LOG={place.path}/log"]
    words = ["env", *settings, "sh", "-c", f'PATH={place.path}:$PATH exec "$@"', "sh"]
    script = CONFIGS / "hooks" / "slurm-drained"
    done = three.ask("client", *words, script, "lab[1-2]", timeout=240)
    assert done.returncode == 0, done.stderr
    reports = sorted((place.path / "log").glob("drain-*.json"))
    assert [file.name.split("-")[1] for file in reports] == ["alpha", "client"]
    report = json.loads(reports[0].read_text())
    beats.arrived(here, "gamma", new_pid(covered(report)[here.pid]))
    cast.redis_at("beta", new_pid(covered(report)[cast.redis.pid]))
    assert "alpha is empty" in (place.path / "logger.log").read_text()
    assert not (place.path / "scontrol.log").exists()
    three.run("client", "sh", "-c", f"printf 'version: 1\\ndrain: [3]\\n' >{place.path}/bad.yaml")
    settings[0] = f"MIGRATE_PLAN={place.path}/bad.yaml"
    words = ["env", *settings, "sh", "-c", f'PATH={place.path}:$PATH exec "$@"', "sh"]
    assert three.ask("client", *words, script, "lab[1-2]").returncode == USAGE
    assert "NodeName=client Reason=migrate: not empty" in (place.path / "scontrol.log").read_text()
