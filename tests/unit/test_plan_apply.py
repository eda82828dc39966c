"""`migrate plan` and `migrate hook` as scripts and people meet them; a stand-in plays checks and moves."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from unit.sleepers import Sleepers
from unit.stand_in_agent import BLOCKER
from unit.stand_in_service import STAND_IN, until

from agent.hook_api import Select, Selected, Selection, Status
from agent.server.places import SOCKET_VARIABLE, STATE_VARIABLE
from migrate.errors import ExitCode
from migrate.plan.apply import Member
from migrate.plan.model import Move
from migrate.plan.outcome import worst

ROOT = Path(__file__).parents[2]
DEADLINE = 120.0


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket and records of a test's own; the service that it started has ended when it is over."""
    with tempfile.TemporaryDirectory(prefix="agent-") as made:
        monkeypatch.setenv(SOCKET_VARIABLE, f"{made}/agent.sock")
        monkeypatch.setenv(STATE_VARIABLE, made)
        yield Path(made)
        until(lambda: not Path(made, "agent.sock.lock").exists(), "the service ends by itself")


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[Sleepers]:
    made = Sleepers(tmp_path)
    yield made
    made.close()


def command(*arguments: object, scenario: str = "by-destination") -> list[str]:
    agent = ["--agent-command", shlex.join([sys.executable, str(STAND_IN), scenario])]
    return [sys.executable, "-m", "migrate.cli", *map(str, arguments), *agent]


def run(*arguments: object, scenario: str = "by-destination") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, scenario=scenario),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def write(here: Path, moves: list[dict[str, Any]], **rest: object) -> Path:
    file = here / "plan.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "moves": moves, **rest}))
    return file


def to(sleepers: Sleepers, *destinations: str) -> list[dict[str, Any]]:
    """A move of a process of its own to each destination: "checked.migrated" is what check and move play."""
    pids = [sleepers.start("sleeper") for _ in destinations]
    return [
        {"name": f"m{n}", "select": {"pid": pid}, "source": "local", "destination": destination}
        for n, (pid, destination) in enumerate(zip(pids, destinations, strict=True))
    ]


def only_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    return json.loads(done.stdout)


def statuses(report: dict[str, Any]) -> list[str]:
    return [each["status"] for each in report["moves"]]


@pytest.mark.parametrize(
    ("destinations", "settings", "expected", "outcome", "code"),
    [
        (("checked.migrated",) * 2, {}, ["migrated"] * 2, "migrated", ExitCode.DONE),
        (("checked.migrated",) * 2, {"parallel": 2}, ["migrated"] * 2, "migrated", ExitCode.DONE),
        # one of them is refused by its check: nothing is touched
        (
            ("checked.migrated", "blocked.migrated", "checked.migrated"),
            {},
            ["not-started", "refused", "not-started"],
            "refused",
            ExitCode.REFUSED,
        ),
        (
            ("checked.migrated", "blocked.migrated", "checked.migrated"),
            {"on_failure": "continue"},
            ["migrated", "refused", "migrated"],
            "refused",
            ExitCode.REFUSED,
        ),
        # one fails on its way: what comes after it is not started
        (
            ("checked.migrated", "checked.rolled-back", "checked.migrated"),
            {},
            ["migrated", "rolled-back", "not-started"],
            "rolled-back",
            ExitCode.ROLLED_BACK,
        ),
        (
            ("checked.in-doubt", "checked.rolled-back", "checked.refused"),
            {"on_failure": "continue", "parallel": 2},
            ["in-doubt", "rolled-back", "refused"],
            "in-doubt",
            ExitCode.IN_DOUBT,
        ),
    ],
)
def test_what_comes_of_a_plan(
    sleepers: Sleepers,
    tmp_path: Path,
    destinations: tuple[str, ...],
    settings: dict[str, Any],
    expected: list[str],
    outcome: str,
    code: ExitCode,
) -> None:
    done = run("plan", "apply", write(tmp_path, to(sleepers, *destinations), defaults=settings), "--json")
    report = only_json(done)
    assert (statuses(report), report["outcome"], done.returncode) == (expected, outcome, code), done.stderr
    assert [each["destination"] for each in report["moves"]] == list(destinations)
    for each in report["moves"]:
        moved = each["status"] not in ("not-started", "refused")
        assert (each["report"] is not None) is (moved or each["destination"].endswith(".refused"))
        assert each["process"]["name"] == "sleeper" and each["check"]["command"] == "redis-server"


def test_a_check_says_everything_and_moves_nothing(sleepers: Sleepers, tmp_path: Path) -> None:
    moves = to(sleepers, "blocked.migrated", "checked.migrated", "dies-at-once.migrated")
    moves[1]["select"] = {"pidfile": str(tmp_path / "none.pid")}
    moves.append({"select": {"name": "sleeper"}, "source": "local", "destination": "checked.migrated"})
    file = write(tmp_path, moves)
    done = run("plan", "check", file, "--json")
    report = only_json(done)
    assert (done.returncode, report["outcome"]) == (ExitCode.REFUSED, "refused")
    assert statuses(report) == ["refused"] * 4
    blocked, missing, failed, ambiguous = report["moves"]
    assert blocked["check"]["blockers"] == [BLOCKER] and blocked["report"] is None
    assert missing["report"]["error"]["kind"] == "no-such-process"
    assert "none.pid: No such file" in missing["report"]["error"]["message"]
    assert failed["report"]["error"]["kind"] == "agent-failed"
    assert ambiguous["report"]["error"]["kind"] == "ambiguous" and ambiguous["name"] == "sleeper on local"
    table = run("plan", "check", file)
    assert table.returncode == ExitCode.REFUSED
    for words in ("4 refused", "its peer stays", "none.pid", "select one by its pid"):
        assert words in table.stdout
    assert "check of m0: " not in table.stdout


def test_nothing_in_the_way(sleepers: Sleepers, tmp_path: Path) -> None:
    file = write(tmp_path, to(sleepers, "checked.migrated"))
    done = run("plan", "check", file, "--json")
    assert (done.returncode, only_json(done)["outcome"], statuses(only_json(done))) == (0, "ready", ["ready"])
    assert "nothing stands in the way" in run("plan", "check", file).stdout


def test_progress_says_which_move_it_is_about(sleepers: Sleepers, tmp_path: Path) -> None:
    log = tmp_path / "log"
    file = write(tmp_path, to(sleepers, "checked.noise", "checked.noise"))
    done = run("plan", "apply", file, "--log-file", log)
    assert done.returncode == 0 and "all moved" in done.stdout
    begun = [line for line in done.stderr.splitlines() if "pre-copy" in line]
    assert begun == ["m0: pre-copy", "m1: pre-copy"]
    events = [json.loads(line.partition(" ")[2]) for line in log.read_text().splitlines()]
    assert [each["about"] for each in events if each["event"] == "finished"] == ["m0", "m1"]
    assert {each["about"] for each in events if each["event"] == "checked"} == {"check of m0", "check of m1"}


def interrupted(file: Path, when: str, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """A command that gets Ctrl-C once it has said `when`."""
    with subprocess.Popen(
        command(*arguments, file, "--json"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if when in line:
                process.send_signal(signal.SIGINT)
                break
        output, rest = process.communicate(timeout=DEADLINE)
    return process.returncode, json.loads(output), said + rest


def test_ctrl_c_rolls_back_what_runs_and_starts_nothing_more(sleepers: Sleepers, tmp_path: Path) -> None:
    moves = to(sleepers, "checked.migrated", "checked.waits", "checked.migrated")
    file = write(tmp_path, moves, defaults={"on_failure": "continue"})
    code, report, said = interrupted(file, "m1: pre-copy", "plan", "apply")
    assert statuses(report) == ["migrated", "rolled-back", "not-started"]
    assert (code, report["outcome"]) == (ExitCode.ROLLED_BACK, "rolled-back")
    assert report["error"]["message"] == "interrupted; 1 of 3 moves were not started"
    assert "giving up" in said


def test_ctrl_c_while_checking_touches_nothing(sleepers: Sleepers, tmp_path: Path) -> None:
    code, report, _ = interrupted(
        write(tmp_path, to(sleepers, "waits.migrated")), "check of m0: ", "plan", "apply"
    )
    assert (code, statuses(report)) == (ExitCode.REFUSED, ["not-started"])


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("version: 1\nmoves:\n  - select: {pid: x}\n    sorce: alpha\n")
    for name in ("check", "apply"):
        done = run("plan", name, file, "--json")
        assert done.returncode == ExitCode.USAGE
        assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == [
            f"{file}:{place}" for place in ("3:5", "3:5", "3:19", "4:5")
        ]
        report = only_json(done)
        assert report["outcome"] == "refused" and report["error"]["kind"] == "bad-plan"
        assert report["problems"][2] == {
            "file": str(file), "line": 3, "column": 19, "path": "moves[0].select.pid",
            "message": "here must be a whole number from 1 to 4194304, not 'x'",
        }  # fmt: skip
    assert run("hook", "drain", "local", "--plan", file).returncode == ExitCode.USAGE


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run("plan", "check", tmp_path / "none.yaml", "--json")
    assert done.returncode == ExitCode.USAGE
    assert "none.yaml: No such file" in only_json(done)["error"]["message"]
    assert run("plan", "check", tmp_path, "--json").returncode == ExitCode.USAGE


def test_an_agent_of_another_version(sleepers: Sleepers, tmp_path: Path) -> None:
    file = write(tmp_path, to(sleepers, "beta", "beta"))
    done = run("plan", "apply", file, "--json", scenario="another-version")
    report = only_json(done)
    assert [each["report"]["error"]["kind"] for each in report["moves"]] == ["version", "version"]
    assert "install the same version" in report["moves"][0]["report"]["error"]["message"]
    drained = run("hook", "drain", "local", "--plan", file, "--json", scenario="another-version")
    assert (done.returncode, drained.returncode) == (ExitCode.REFUSED, ExitCode.REFUSED)
    assert only_json(drained)["error"]["kind"] == "version"


def test_a_check_that_fails_is_a_host_out_of_reach(sleepers: Sleepers, tmp_path: Path) -> None:
    done = run("plan", "apply", write(tmp_path, to(sleepers, "dies-at-once.migrated")), "--json")
    assert done.returncode == ExitCode.UNREACHABLE
    assert only_json(done)["moves"][0]["report"]["error"]["kind"] == "agent-failed"


def test_the_command_line_is_stronger_than_the_plan(sleepers: Sleepers, tmp_path: Path) -> None:
    """The stand-in is named on the command line; the plan's agent does not exist."""
    file = write(
        tmp_path, to(sleepers, "checked.migrated"), defaults={"ssh": {"agent_command": "/nonexistent"}}
    )
    assert run("plan", "apply", file).returncode == 0


# The hook.


def drain_plan(here: Path, *destinations: str) -> Path:
    return write(here, [], drain=[{"select": {"name": "drained-one"}, "destinations": list(destinations)}])


def test_a_host_is_emptied(sleepers: Sleepers, tmp_path: Path) -> None:
    pid = sleepers.start("drained-one")
    done = run("hook", "drain", "local", "--plan", drain_plan(tmp_path, "blocked", "checked.noise"))
    assert done.returncode == 0, done.stderr
    assert "all moved" in done.stdout and "are not covered by the plan" in done.stdout
    assert f"drained-one {pid} -> checked.noise: pre-copy" in done.stderr


def test_a_host_that_is_not_emptied(sleepers: Sleepers, tmp_path: Path) -> None:
    sleepers.start("drained-one")
    file = drain_plan(tmp_path, "blocked")
    done = run("hook", "drain", "local", "--plan", file)
    assert done.returncode == ExitCode.REFUSED and "its peer stays" in done.stdout
    done = run("hook", "drain", "local", "--plan", file, "--json", "--to", "checked.migrated", "--dry-run")
    assert done.returncode == 0 and only_json(done)["outcome"] == "ready"


def test_ctrl_c_ends_a_drain(sleepers: Sleepers, tmp_path: Path) -> None:
    sleepers.start("drained-one")
    sleepers.start("drained-one")
    file = drain_plan(tmp_path, "checked.waits")
    code, report, _ = interrupted(file, ": pre-copy", "hook", "drain", "local", "--plan")
    found = [each["status"] for each in report["processes"] if each["status"] != "not-covered"]
    assert (code, found) == (ExitCode.ROLLED_BACK, ["rolled-back", "not-started"])


def test_a_service_that_is_killed_leaves_a_drain_in_doubt(
    sleepers: Sleepers, tmp_path: Path, home: Path
) -> None:
    sleepers.start("drained-one")
    file = drain_plan(tmp_path, "checked.waits")
    with subprocess.Popen(
        command("hook", "drain", "local", "--plan", file, "--json"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert any(": pre-copy" in line for line in process.stderr)
        health = subprocess.run(
            ["curl", "-sS", "--unix-socket", home / "agent.sock", "http://agent/v1/health"],
            capture_output=True, check=True,
        )  # fmt: skip
        os.kill(json.loads(health.stdout)["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE)
    report = json.loads(output)
    assert (process.returncode, report["outcome"]) == (ExitCode.IN_DOUBT, "in-doubt")
    assert [each["status"] for each in report["processes"] if each["rule"]] == ["in-doubt"]
    (home / "agent.sock.lock").unlink()


# The parts.

ONE = Selected(pid=7, name="redis", command="redis", user="root", started=100)
LATER = Selected(pid=7, name="redis", command="redis", user="root", started=200)
OTHER = Selected(pid=8, name="redis", command="redis", user="root", started=300)


@pytest.mark.parametrize(
    ("found", "kind"),
    [((ONE,), None), ((OTHER, ONE), None), ((LATER,), "process-changed"), ((OTHER,), "process-changed"),
     ((), "no-such-process")],
)  # fmt: skip
def test_before_a_move_it_must_be_the_process_that_was_checked(
    found: tuple[Selected, ...], kind: str | None
) -> None:
    """Another one of its name may have come meanwhile, by another move of the plan."""
    member = Member(Move(select=Select(name="redis"), source="alpha", destination="beta"))
    member.take_selection(Selection(processes=(ONE,)))
    assert member.process == ONE and member.report is None
    member.take_selection(Selection(processes=found, why="it is gone"))
    assert member.status == ("not-started" if kind is None else "refused")
    if kind is not None:
        assert member.report is not None and member.report.error is not None
        assert member.report.error.kind == kind


@pytest.mark.parametrize(
    ("found", "together"),
    [
        (["migrated", "not-covered"], "migrated"),
        (["migrated", "not-started"], "refused"),
        (["ready", "ready"], "ready"),
        (["ready", "refused"], "refused"),
        (["refused", "rolled-back", "migrated"], "rolled-back"),
        (["refused", "rolled-back", "in-doubt"], "in-doubt"),
        (["not-covered"], "migrated"),
        ([], "migrated"),
    ],
)
def test_in_doubt_wins(found: list[Status], together: str) -> None:
    assert worst(found) == together
