"""The command as scripts and people meet it: exit codes, one JSON object whatever happens, Ctrl-C.

A stand-in speaks for the agent, so that only the tool is under test.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.server.places import SOCKET_VARIABLE, STATE_VARIABLE
from migrate.cli import cli
from migrate.errors import MEANING, ExitCode

STAND_IN = Path(__file__).with_name("stand_in_agent.py")
ROOT = Path(__file__).parents[2]
DEADLINE = 30.0


def command(*arguments: str, scenario: str | None = None) -> list[str]:
    agent = (
        [] if scenario is None else ["--agent-command", shlex.join([sys.executable, str(STAND_IN), scenario])]
    )
    return [sys.executable, "-m", "migrate.cli", *arguments, *agent]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket and records of a test's own; the service that it started has ended when it is over."""
    with tempfile.TemporaryDirectory(prefix="agent-") as made:
        socket = Path(made, "agent.sock")
        monkeypatch.setenv(SOCKET_VARIABLE, str(socket))
        monkeypatch.setenv(STATE_VARIABLE, made)
        yield Path(made)
        until(service_ended)


def service_ended() -> bool:
    return not Path(os.environ[SOCKET_VARIABLE] + ".lock").exists()


_playing: list[str | None] = []  # the scenario of the last command


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(*arguments: str, scenario: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A service plays one scenario: for another one, the last must have ended."""
    if _playing != [scenario]:
        until(service_ended)
        _playing[:] = [scenario]
    return subprocess.run(
        command(*arguments, scenario=scenario),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def only_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Standard output, which must be exactly one JSON value on one line."""
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("scenario", "code"),
    [
        ("migrated", ExitCode.DONE),
        ("refused", ExitCode.REFUSED),
        ("rolled-back", ExitCode.ROLLED_BACK),
        ("in-doubt", ExitCode.IN_DOUBT),
    ],
)
def test_each_outcome_has_its_exit_code_and_report(scenario: str, code: ExitCode) -> None:
    done = run("move", "1", "beta", "--json", scenario=scenario)
    assert done.returncode == code
    report = only_json(done)
    assert report["outcome"] == scenario
    for field in (
        "pause_ms",
        "total_s",
        "memory_bytes",
        "bytes_sent",
        "rounds",
        "phases",
        "address_moved",
        "error",
    ):
        assert field in report


def test_a_table_without_json() -> None:
    done = run("move", "1", "beta", scenario="migrated")
    assert done.returncode == 0
    assert "migrated   alpha:1 -> beta:2" in done.stdout


def test_check_prints_what_would_happen() -> None:
    free = run("check", "1", "beta", "--json", scenario="checked")
    assert free.returncode == ExitCode.DONE
    assert only_json(free)["command"] == "redis-server"
    blocked = run("check", "1", "beta", scenario="blocked")
    assert blocked.returncode == ExitCode.REFUSED
    assert "its peer stays" in blocked.stdout


def test_ps_is_a_list() -> None:
    done = run("ps", "--json", scenario="ps")
    assert done.returncode == 0
    assert [process["pid"] for process in only_json(done)] == [7]
    assert "no: unix-socket" in run("ps", scenario="ps").stdout


def test_ps_of_an_agent_that_fails_is_no_list() -> None:
    done = run("ps", "--json", scenario="ps-fails")
    assert done.returncode == ExitCode.UNREACHABLE
    assert only_json(done)["error"]["kind"] == "agent-failed"


def test_the_request_carries_every_option(tmp_path: Path) -> None:
    path = tmp_path / "request"
    options = (
        "--downtime-limit 20ms --max-rounds 7 --freeze-timeout 1s --reconnect 0s --bandwidth 100mbit "
        "--compression none --compression-level 3 --address 10.0.0.9 --address FD00:0::9 --verify "
        "--leave-stopped --copy-files -i /some/key -F /some/config"
    )
    done = run(
        "move", "77", "me@[fd00::2]:2222", *options.split(), scenario="migrated", STAND_IN_REQUEST=str(path)
    )
    assert done.returncode == 0, done.stderr
    request = json.loads(path.read_text())
    assert (request["operation"], request["pid"], request["destination"]) == ("move", 77, "me@[fd00::2]:2222")
    assert request["options"] == {
        "downtime_limit_ms": 20.0,
        "max_rounds": 7,
        "freeze_timeout_ms": 1000.0,
        "reconnect_ms": 0.0,
        "bandwidth": 12_500_000,
        "compression": "none",
        "compression_level": 3,
        "addresses": ["10.0.0.9", "fd00::9"],
        "verify": True,
        "leave_stopped": True,
        "copy_files": True,
    }
    assert request["ssh"]["identity"] == ["/some/key"] and request["ssh"]["config"] == ["/some/config"]


def test_addresses_default_to_the_connections_and_can_be_none(tmp_path: Path) -> None:
    path = tmp_path / "request"
    run("move", "1", "beta", scenario="migrated", STAND_IN_REQUEST=str(path))
    assert json.loads(path.read_text())["options"]["addresses"] is None
    run("move", "1", "beta", "--address", "none", scenario="migrated", STAND_IN_REQUEST=str(path))
    assert json.loads(path.read_text())["options"]["addresses"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("move", "alpha", "beta"), "not a process number"),
        (("move", "::1:5", "beta"), "brackets"),
        (("move", "1", "be/ta"), "not a host name"),
        (("move", "1", "-oProxyCommand=id"), "No such option"),
        (("move", "1", "beta", "--downtime-limit", "50"), "duration"),
        (("move", "1", "beta", "--bandwidth", "fast"), "not a rate"),
        (("move", "1", "beta", "--compression", "lzma"), "lzma"),
        (("move", "1", "beta", "--address", "alpha"), "not an IP address"),
        (("move", "1", "beta", "--address", "none", "--address", "10.0.0.1"), "cannot be combined"),
        (("move", "1", "beta", "--log-file", "/nonexistent/log"), "/nonexistent/log"),
        (("move", "1"), "Missing argument"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_a_wrong_command_line_touches_nothing(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    path = tmp_path / "request"
    done = run(*arguments, "--json", scenario="migrated", STAND_IN_REQUEST=str(path))
    assert done.returncode == ExitCode.USAGE
    assert words in done.stderr
    report = only_json(done)
    assert report["outcome"] == "refused" and report["error"]["kind"] == "usage"
    assert not path.exists()


def test_a_host_that_does_not_answer_is_one_json_object(free_port: int) -> None:
    done = run("move", f"127.0.0.1:{free_port}:1", "beta", "--json")
    assert done.returncode == ExitCode.UNREACHABLE
    report = only_json(done)
    assert report["outcome"] == "refused"
    assert report["error"]["kind"] == "connection-refused" and "sshd" in report["error"]["message"]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_agent_that_is_not_there() -> None:
    done = subprocess.run(
        command("move", "1", "beta", "--json", "--agent-command", "/nonexistent/agent"),
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.UNREACHABLE
    assert only_json(done)["error"]["kind"] == "agent-not-found"


def test_an_agent_that_never_began() -> None:
    done = run("move", "1", "beta", "--json", scenario="dies-at-once")
    report = only_json(done)
    assert (report["outcome"], report["error"]["kind"]) == ("refused", "agent-failed")
    assert "status 3" in report["error"]["message"]


def test_an_agent_that_dies_in_the_middle() -> None:
    """Nothing is left in the journal, and the process is there."""
    done = run("move", "1", "beta", "--json", scenario="dies")
    assert done.returncode == ExitCode.ROLLED_BACK
    report = only_json(done)
    assert report["outcome"] == "rolled-back"
    assert "status 9: something is wrong here" in report["error"]["message"]


def test_an_agent_that_dies_in_a_check_has_touched_nothing() -> None:
    done = run("check", "1", "beta", "--json", scenario="dies")
    assert only_json(done)["outcome"] == "refused"


def test_what_a_login_script_prints_does_not_matter() -> None:
    done = run("move", "1", "beta", "--json", scenario="noise")
    assert done.returncode == 0
    assert "Welcome to alpha!" in done.stderr


def test_the_log_file_has_every_event_with_its_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    run("move", "1", "beta", "--log-file", str(path), scenario="noise")
    lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
    assert [json.loads(text)["event"] for _, text in lines] == ["log", "state", "finished"]
    times = [time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S") for stamp, _ in lines]
    assert times == sorted(times)


def test_quiet_says_nothing_but_the_report() -> None:
    done = run("move", "1", "beta", "-q", "--json", scenario="noise")
    assert done.stderr == "" and only_json(done)["outcome"] == "migrated"


def test_ctrl_c_gives_up_cleanly() -> None:
    with interrupted("waits") as process:
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == ExitCode.ROLLED_BACK
    report = json.loads(out)
    assert (report["outcome"], report["error"]["message"]) == ("rolled-back", "aborted by request")
    assert "giving up" in err


def test_a_second_ctrl_c_leaves() -> None:
    with interrupted("deaf") as process:
        wait_for_line(process, "giving up")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == ExitCode.IN_DOUBT
    report = json.loads(out)
    assert (report["outcome"], report["error"]["kind"]) == ("in-doubt", "aborted")


def interrupted(scenario: str) -> subprocess.Popen[str]:
    """A move that has been told to stop while it was in pre-copy."""
    process = subprocess.Popen(
        command("move", "1", "beta", "--json", scenario=scenario),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_line(process, "pre-copy")
    process.send_signal(signal.SIGINT)
    return process


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never said")


def test_progress_as_json_is_an_event_a_line() -> None:
    done = run("move", "1", "beta", "--log-format", "json", "-v", scenario="noise")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["log", "state"]
    assert all(time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S") for line in lines)


def test_a_detached_move_has_a_name_by_which_it_is_found() -> None:
    done = run("move", "1", "beta", "--detach", scenario="waits")
    id, _, hint = done.stdout.partition(": ")
    assert done.returncode == 0 and f"migrate attach {id}" in hint
    record = only_json(run("status", id, "--json", scenario="waits"))
    assert record["request"]["on_disconnect"] == "continue" and record["status"] == "running"
    assert "it goes on" in run("status", id, scenario="waits").stdout
    unfinished = run("report", id, "--json", scenario="waits")
    assert unfinished.returncode == ExitCode.REFUSED
    assert only_json(unfinished)["error"]["kind"] == "not-finished"
    assert only_json(run("abort", id, "--json", scenario="waits"))["id"] == id
    attached = run("attach", id.lower(), "--json", scenario="waits")
    assert attached.returncode == ExitCode.ROLLED_BACK
    assert only_json(attached)["error"]["message"] == "aborted by request"
    again = run("abort", id, "--json", scenario="waits")
    assert again.returncode == ExitCode.REFUSED and only_json(again)["error"]["kind"] == "conflict"


def test_watching_can_be_left() -> None:
    id = run("move", "1", "beta", "--detach", scenario="waits").stdout.partition(":")[0]
    with subprocess.Popen(
        command("attach", id, "--json", scenario="waits"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_for_line(process, "pre-copy")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == ExitCode.REFUSED and "it goes on" in json.loads(out)["error"]["message"]
    assert only_json(run("status", id, "--json", scenario="waits"))["status"] == "running"
    run("abort", id, scenario="waits")


def test_reports_are_kept_and_drawn(tmp_path: Path) -> None:
    run("move", "1", "beta", scenario="rolled-back")
    run("move", "2", "beta", scenario="migrated")
    listed = only_json(run("status", "--json", scenario="migrated"))["migrations"]
    assert [each["request"]["pid"] for each in listed] == [2, 1]
    table = run("status", scenario="migrated").stdout
    assert "rolled-back" in table and listed[0]["id"] in table
    old = run("report", listed[1]["id"], "--json", scenario="migrated")
    assert old.returncode == ExitCode.ROLLED_BACK and only_json(old) == listed[1]["report"]
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    drawn = run("report", listed[0]["id"], "--svg", str(svg), "--html", str(html), scenario="migrated")
    assert drawn.returncode == 0 and "migrated   alpha:1 -> beta:2" in drawn.stdout
    assert "<svg" in svg.read_text() and html.read_text().startswith("<!DOCTYPE html>")
    nowhere = run("report", listed[0]["id"], "--svg", "/nonexistent/a.svg", scenario="migrated")
    assert nowhere.returncode == ExitCode.USAGE and "/nonexistent/a.svg" in nowhere.stderr


@pytest.mark.parametrize("words", [("report",), ("abort",), ("attach", "alpha"), ("status", "a", "b")])
def test_a_migration_is_named(words: tuple[str, ...]) -> None:
    assert run(*words).returncode == ExitCode.USAGE


@pytest.mark.parametrize(
    ("scenario", "words"), [("another-version", "protocol 99"), ("older", "an older version")]
)
def test_an_agent_of_another_version_is_refused(scenario: str, words: str) -> None:
    for arguments in (("move", "1", "beta"), ("check", "1", "beta"), ("ps",), ("status",)):
        done = run(*arguments, "--json", scenario=scenario)
        assert done.returncode == ExitCode.REFUSED
        error = only_json(done)["error"]
        assert error["kind"] == "version" and words in error["message"]


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"], standalone_mode=False)
    text = " ".join(capsys.readouterr().out.split())
    for code, meaning in MEANING.items():
        assert f"{int(code)} {meaning}" in text


@pytest.mark.parametrize("arguments", [("--version",), ("version",)])
def test_version(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 0 and done.stdout.startswith("migrate")


def test_exit_codes_are_what_is_documented() -> None:
    expected = {
        "DONE": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "ROLLED_BACK": 4,
        "IN_DOUBT": 5,
        "UNREACHABLE": 6,
    }
    assert {code.name: code.value for code in ExitCode} == expected
    assert set(MEANING) == set(ExitCode)


def test_an_error_of_ours_is_no_other_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from migrate import cli as module

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(module.cli, "main", broken)
    monkeypatch.setattr(sys, "argv", ["migrate", "move", "1", "beta", "--json"])
    main: Callable[[], None] = module.main
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == ExitCode.INTERNAL
    captured = capfd.readouterr()
    assert json.loads(captured.out)["error"] == {
        "kind": "internal",
        "message": "ZeroDivisionError: oops",
        "where": "coordinator",
    }
    assert "Traceback" in captured.err
