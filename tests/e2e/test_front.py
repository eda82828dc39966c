"""The agent's front on the source host: whatever becomes of engine, link or tool, there is one true report.

A program in the engine's place plays it; the destination is a real sshd with a script as the agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from e2e.private_sshd import DEADLINE, PrivateSshd

from agent import supervisor as module
from agent.api import Event, Finished, Log, Report, Request, StateChanged
from agent.supervisor import Supervisor

ENGINE = Path(__file__).with_name("stand_in_engine.py")


class Front:
    """A supervisor at work, and what it wrote."""

    def __init__(self, request: Request, scenario: str) -> None:
        self.events: list[Event] = []
        self._waiting: list[tuple[Callable[[Event], bool], asyncio.Future[None]]] = []
        command = [sys.executable, str(ENGINE), scenario]
        self.supervisor = Supervisor(request, self._write, (command, dict(os.environ)))

    def _write(self, event: Event, line: bytes) -> None:
        assert msgspec.json.decode(line, type=Event) == event
        self.events.append(event)
        for test, future in self._waiting:
            if test(event) and not future.done():
                future.set_result(None)

    async def saw(self, test: Callable[[Event], bool]) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((test, future))
        if not any(map(test, self.events)):
            await asyncio.wait_for(future, DEADLINE)

    @property
    def report(self) -> Report:
        """The one final report."""
        finals = [event for event in self.events if isinstance(event, Finished)]
        assert len(finals) == 1
        return finals[0].report

    def said(self, words: str) -> bool:
        return any(isinstance(event, Log) and words in event.message for event in self.events)


def request_for(
    server: PrivateSshd, pid: int, script: str = "cat >/dev/null", operation: str = "move"
) -> Request:
    return msgspec.convert(
        {"operation": operation, "pid": pid, "destination": "there", "ssh": server.options(script)},
        Request,
        from_attributes=True,
    )


def played(request: Request, scenario: str) -> Front:
    """A migration from beginning to end."""

    async def play() -> Front:
        front = Front(request, scenario)
        await asyncio.wait_for(front.supervisor.run(), DEADLINE)
        return front

    return asyncio.run(play())


def in_state(state: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StateChanged) and event.state == state


def given_up(request: Request, scenario: str, when: str) -> Front:
    """A migration that somebody gives up as soon as it is in the state `when`."""

    async def play() -> Front:
        front = Front(request, scenario)
        running = asyncio.ensure_future(front.supervisor.run())
        await front.saw(in_state(when))
        front.supervisor.abort("a person said so")
        await asyncio.wait_for(running, DEADLINE)
        return front

    return asyncio.run(play())


@pytest.mark.parametrize(
    ("scenario", "outcome"),
    [
        (":crash", "refused"),
        ("examining,offering:crash", "refused"),
        ("preparing:crash", "rolled-back"),
        ("preparing,pre-copy:crash", "rolled-back"),
        ("pre-copy,freezing:crash", "rolled-back"),
        ("freezing:kills-source", "in-doubt"),
        ("freezing,committed:crash", "in-doubt"),
        ("freezing,committed,live:crash", "migrated"),
    ],
)
def test_an_engine_that_dies_leaves_a_true_report(
    server: PrivateSshd, sleeper: subprocess.Popen[bytes], scenario: str, outcome: str
) -> None:
    front = played(request_for(server, sleeper.pid), scenario)
    assert front.report.outcome == outcome
    assert front.report.error is not None
    assert front.report.error.kind == "crash" and "signal 9" in front.report.error.message
    assert front.report.source.pid == sleeper.pid
    if scenario.endswith("kills-source"):
        assert "is gone" in front.report.error.message
    assert "nothing is left of it here" in front.report.error.message  # it had no journal


@pytest.mark.parametrize(("state", "outcome"), [("freezing", "rolled-back"), ("committing", "in-doubt")])
def test_an_engine_that_hangs_while_the_process_stands_still_is_ended(
    server: PrivateSshd,
    sleeper: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    outcome: str,
) -> None:
    """Before that it may hang: the process runs."""
    monkeypatch.setattr(module, "STILL_PATIENCE", 0.2)
    request = request_for(server, sleeper.pid)
    options = msgspec.structs.replace(request.options, freeze_timeout_ms=100.0)
    front = played(msgspec.structs.replace(request, options=options), f"{state}:deaf")
    assert front.report.outcome == outcome and front.report.error is not None
    assert "has done nothing for 0 s while the process stood still" in front.report.error.message


def test_a_check_whose_engine_dies_has_touched_nothing(
    server: PrivateSshd, sleeper: subprocess.Popen[bytes]
) -> None:
    front = played(request_for(server, sleeper.pid, operation="check"), "examining,preparing:crash")
    assert front.report.outcome == "refused"


def test_an_engine_that_fails_is_quoted(server: PrivateSshd, sleeper: subprocess.Popen[bytes]) -> None:
    front = played(request_for(server, sleeper.pid), "pre-copy:fails")
    assert front.report.error is not None
    assert "status 70: division by zero" in front.report.error.message


def test_nonsense_is_logged_and_survived(server: PrivateSshd, sleeper: subprocess.Popen[bytes]) -> None:
    front = played(request_for(server, sleeper.pid), "pre-copy:nonsense")
    assert front.report.outcome == "migrated"
    assert front.said("no event")


def test_only_the_first_report_counts(server: PrivateSshd, sleeper: subprocess.Popen[bytes]) -> None:
    front = played(request_for(server, sleeper.pid), "live:twice")
    assert front.report.outcome == "migrated"
    assert front.said("twice")


def test_the_reason_why_the_link_ended_is_in_the_report(
    server: PrivateSshd, sleeper: subprocess.Popen[bytes]
) -> None:
    request = request_for(server, sleeper.pid, "echo no space left >&2; exit 3")
    front = played(request, "pre-copy:link")
    assert front.report.outcome == "rolled-back"
    error = front.report.error
    assert error is not None
    assert (error.kind, error.where) == ("agent-failed", "link")
    assert "there" in error.message and "status 3: no space left" in error.message
    assert front.said("there: no space left")


def test_an_agent_that_is_not_installed_there(server: PrivateSshd, sleeper: subprocess.Popen[bytes]) -> None:
    request = request_for(server, sleeper.pid, "exec /nonexistent/migrate-agent")
    error = played(request, "offering:link").report.error
    assert error is not None and error.kind == "agent-not-found"


def test_a_destination_out_of_reach_touches_nothing(sleeper: subprocess.Popen[bytes]) -> None:
    """The engine must not even hear of it: it would have crashed the report if it had."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    request = Request(operation="move", pid=sleeper.pid, destination=f"127.0.0.1:{port}")
    front = played(request, "pre-copy:crash")
    assert front.report.outcome == "refused"
    assert front.report.error is not None and front.report.error.kind == "connection-refused"
    assert not any(isinstance(event, StateChanged) for event in front.events)


def test_giving_up_while_connecting(sleeper: subprocess.Popen[bytes]) -> None:
    """A destination that accepts and says nothing."""

    async def play(port: int) -> Front:
        request = Request(operation="move", pid=sleeper.pid, destination=f"127.0.0.1:{port}")
        front = Front(request, "pre-copy:crash")
        running = asyncio.ensure_future(front.supervisor.run())
        visitor, _ = await asyncio.to_thread(silent.accept)
        with visitor:
            front.supervisor.abort("a person said so")
            await asyncio.wait_for(running, DEADLINE)
        return front

    with socket.create_server(("127.0.0.1", 0)) as silent:
        front = asyncio.run(play(silent.getsockname()[1]))
    assert front.report.outcome == "refused"
    assert front.report.error is not None
    assert (front.report.error.kind, front.report.error.message) == ("aborted", "a person said so")


def test_giving_up_asks_the_engine(server: PrivateSshd, sleeper: subprocess.Popen[bytes]) -> None:
    front = given_up(request_for(server, sleeper.pid), "pre-copy:waits", "pre-copy")
    assert front.report.outcome == "rolled-back"
    assert front.report.error is not None and front.report.error.message == "from the engine"


def test_an_engine_that_does_not_listen_reads_the_end_of_its_link(
    server: PrivateSshd, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EOF_GRACE", 0.2)
    front = given_up(request_for(server, sleeper.pid), "pre-copy:eof", "pre-copy")
    assert front.report.outcome == "rolled-back"
    assert front.report.error is not None and front.report.error.message == "from the engine"


def test_an_engine_that_does_nothing_is_killed(
    server: PrivateSshd, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EOF_GRACE", 0.1)
    monkeypatch.setattr(module, "KILL_GRACE", 0.2)
    front = given_up(request_for(server, sleeper.pid), "pre-copy:deaf", "pre-copy")
    assert front.report.outcome == "rolled-back"
    assert front.report.error is not None and "signal 9" in front.report.error.message
    assert sleeper.poll() is None


def test_after_the_point_of_no_return_giving_up_changes_nothing(
    server: PrivateSshd, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine ends only when its link does, and the link when the destination does, by a file of ours."""
    monkeypatch.setattr(module, "EOF_GRACE", 0.05)
    monkeypatch.setattr(module, "KILL_GRACE", 0.1)
    go = server.here / "go-on"

    async def play() -> Front:
        request = request_for(server, sleeper.pid, f"while ! test -e {go}; do sleep 0.05; done")
        front = Front(request, "freezing,committed:ends-late")
        running = asyncio.ensure_future(front.supervisor.run())
        await front.saw(in_state("committed"))
        front.supervisor.abort("a person said so")
        await front.saw(lambda event: isinstance(event, Log) and "too late" in event.message)
        go.touch()
        await asyncio.wait_for(running, DEADLINE)
        return front

    assert asyncio.run(play()).report.outcome == "migrated"


# The program itself, `migrate-agent source`.


def agent(stdin: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "agent.main", "source"]
    return subprocess.Popen(command, cwd=root, stdin=stdin, stdout=subprocess.PIPE, text=True)


def last_event(process: subprocess.Popen[str], text: str) -> dict[str, Any]:
    out, _ = process.communicate(text, timeout=DEADLINE)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no request"),
        ("{}\n", "not a request"),
        ("hello\n", "not a request"),
        ('{"operation":"move","pid":1,"destination":"a b"}\n', "not a host name"),
        ('{"operation":"move","pid":1,"destination":"beta","version":99}\n', "version 99"),
    ],
)
def test_what_is_no_request_is_refused(line: str, words: str) -> None:
    with agent() as process:
        event = last_event(process, line)
    assert event["report"]["outcome"] == "refused"
    assert event["report"]["error"]["kind"] == "bad-request" and words in event["report"]["error"]["message"]
    assert process.returncode == 2


@pytest.mark.parametrize("way", ["end of input", "abort", "SIGTERM", "SIGINT", "SIGHUP"])
def test_every_way_of_giving_up(way: str) -> None:
    """The destination accepts and says nothing, so that there is time for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent, agent() as process:
        assert process.stdin is not None and process.stdout is not None
        destination = f"127.0.0.1:{silent.getsockname()[1]}"
        request = Request(operation="check", pid=os.getpid(), destination=destination)
        process.stdin.write(msgspec.json.encode(request).decode() + "\n")
        process.stdin.flush()
        visitor, _ = silent.accept()
        with visitor:
            give_up(process, way)
            event = json.loads(process.stdout.readline())
        assert event["report"]["error"]["kind"] == "aborted"
        process.communicate(timeout=DEADLINE)


def give_up(process: subprocess.Popen[str], way: str) -> None:
    assert process.stdin is not None
    if way == "abort":
        process.stdin.write('{"abort": true}\n')
        process.stdin.flush()
    elif way == "end of input":
        process.stdin.close()
        process.stdin = None
    else:
        process.send_signal(signal.Signals[way])


def test_nothing_is_left_running(server: PrivateSshd, sleeper: subprocess.Popen[bytes]) -> None:
    """Neither an engine nor a command on the destination outlives the front."""
    mark = server.here / "destination-pid"
    played(request_for(server, sleeper.pid, f"echo $$ >{mark}; exec cat >/dev/null"), "pre-copy:crash")
    pid = int(mark.read_text())
    deadline = time.monotonic() + DEADLINE
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
