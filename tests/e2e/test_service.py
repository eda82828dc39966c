"""From the client over a real ssh connection to the service, its front and a stand-in engine, and back."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from e2e.private_sshd import DEADLINE, PrivateSshd, session_of
from lab.fixture import until

from agent.api import Event, Finished, Log, Outcome, Report, Request, SshOptions, StateChanged
from agent.server.places import SOCKET_VARIABLE, STATE_VARIABLE
from migrate.client import Agent, Failure
from migrate.coordinator import Coordinator
from migrate.watch import Watch
from transport.target import HostTarget

FRONT = Path(__file__).with_name("stand_in_front.py")
ROOT = Path(__file__).parents[2]
THERE = HostTarget("there")
T = TypeVar("T")


class Host:
    """The far side of the sshd: an agent whose engine plays a scenario."""

    def __init__(self, server: PrivateSshd, here: Path) -> None:
        self.server = server
        self.here = here
        self.said: list[str] = []

    def agent(self, scenario: str) -> SshOptions:
        """How to reach it; what it prints before it is an agent is a login script's."""
        words = [sys.executable, str(FRONT), scenario]
        exports = {
            SOCKET_VARIABLE: str(self.here / "agent.sock"),
            STATE_VARIABLE: str(self.here / "state"),
            "PYTHONPATH": str(ROOT),
        }
        lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
        return self.server.options("\n".join([*lines, "echo Welcome!", f'exec {shlex.join(words)} "$@"']))

    @asynccontextmanager
    async def connected(self, scenario: str) -> AsyncIterator[Agent]:
        async with Agent(
            THERE, self.agent(scenario), lambda level, message: self.said.append(message)
        ) as agent:
            yield agent

    def request(self, pid: int, **more: object) -> Request:
        """A move to another sshd's agent, which swallows what it gets."""
        fields = {
            "operation": "move",
            "pid": pid,
            "destination": "there",
            "ssh": self.server.options("cat >/dev/null"),
        }
        return msgspec.convert({**fields, **more}, Request, from_attributes=True)


@pytest.fixture
def host(server: PrivateSshd, tmp_path: Path) -> Iterator[Host]:
    yield Host(server, tmp_path)
    until(lambda: not (tmp_path / "agent.sock.lock").exists(), "the service ends by itself")


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 2 * DEADLINE)

    return asyncio.run(bounded())


async def in_state(agent: Agent, id: str, state: str) -> None:
    async for event in agent.events(id):
        if isinstance(event, StateChanged) and event.state == state:
            return
    raise AssertionError(f"it never was in {state}")


async def report_of(agent: Agent, id: str) -> Report:
    events = [event async for event in agent.events(id)]
    finals = [event for event in events if isinstance(event, Finished)]
    assert len(finals) == 1
    return finals[0].report


def test_through_everything(host: Host, sleeper: subprocess.Popen[bytes]) -> None:
    """Who asks knows from ssh by which address; what a login script says is shown."""

    async def work() -> None:
        async with host.connected("examining,pre-copy,freezing,committed,live:twice") as agent:
            record = await agent.create(host.request(sleeper.pid))
            assert record.request.reached_at == "127.0.0.1"
            states = [e.state async for e in agent.events(record.id) if isinstance(e, StateChanged)]
            assert states == ["examining", "pre-copy", "freezing", "committed", "live"]
            assert (await report_of(agent, record.id)).outcome is Outcome.MIGRATED

    run(work())
    assert host.said.count("not from the agent: Welcome!") >= 1


@pytest.mark.parametrize(
    ("scenario", "outcome"),
    [
        (":crash", "refused"),
        ("preparing,pre-copy:crash", "rolled-back"),
        ("freezing,committed:crash", "in-doubt"),
        ("freezing,committed,live:crash", "migrated"),
    ],
)
def test_an_engine_that_dies_leaves_a_true_record(
    host: Host, sleeper: subprocess.Popen[bytes], scenario: str, outcome: str
) -> None:
    async def work() -> None:
        async with host.connected(scenario) as agent:
            id = (await agent.create(host.request(sleeper.pid))).id
            report = await report_of(agent, id)
            assert report.outcome == outcome
            assert report.error is not None and "signal 9" in report.error.message
            assert (await agent.migration(id)).report == report

    run(work())


def test_an_abort_gets_through_to_the_engine_and_its_reason_back(
    host: Host, sleeper: subprocess.Popen[bytes]
) -> None:
    async def work() -> None:
        async with host.connected("pre-copy:waits") as agent:
            id = (await agent.create(host.request(sleeper.pid))).id
            await in_state(agent, id, "pre-copy")
            await agent.abort(id)
            report = await report_of(agent, id)
            assert report.outcome is Outcome.ROLLED_BACK
            assert report.error is not None and report.error.message == "aborted by request"

    run(work())


def test_past_the_point_of_no_return_an_abort_is_refused(
    host: Host, sleeper: subprocess.Popen[bytes]
) -> None:
    async def work() -> None:
        go = host.here / "go-on"
        script = host.server.options(f"while ! test -e {go}; do sleep 0.05; done")
        async with host.connected("freezing,committed:ends-late") as agent:
            id = (await agent.create(host.request(sleeper.pid, ssh=script))).id
            await in_state(agent, id, "committed")
            with pytest.raises(Failure, match="point of no return: committed"):
                await agent.abort(id)
            go.touch()
            assert (await report_of(agent, id)).outcome is Outcome.MIGRATED

    run(work())


def test_a_connection_that_is_cut_is_made_anew(host: Host, sleeper: subprocess.Popen[bytes]) -> None:
    """In the middle of it; the migration did not notice, and the report comes by the new one."""

    async def work() -> None:
        options = host.agent("pre-copy:waits")
        seen: list[Event] = []

        def on_event(event: Event) -> None:
            seen.append(event)
            if isinstance(event, StateChanged):
                for pid in processes(b"stand_in_front.py\0pre-copy:waits\0connect"):
                    os.kill(session_of(pid), 9)

        async def connect() -> Agent:
            agent = await Agent(THERE, options, lambda *_: None).__aenter__()
            asyncio.get_running_loop().call_later(
                0.3, lambda: aborts.append(asyncio.ensure_future(agent.abort(id)))
            )
            return agent

        aborts: list[asyncio.Future[object]] = []
        agent = await Agent(THERE, options, lambda *_: None).__aenter__()
        id = (await agent.create(host.request(sleeper.pid))).id
        watch = Watch(agent, id, connect, on_event)
        try:
            finished = await watch.run()
        finally:
            await watch.agent.close()
        assert finished.report.outcome is Outcome.ROLLED_BACK
        assert [e.state for e in seen if isinstance(e, StateChanged)] == ["pre-copy"]
        assert any(isinstance(e, Log) and "trying again" in e.message for e in seen)

    run(work())


def processes(command: bytes) -> list[int]:
    """Those whose command line has this in it."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command in words and b"sshd" not in words:
            found.append(int(pid))
    return found


def test_a_service_that_is_killed_has_its_migration_rolled_back(
    host: Host, sleeper: subprocess.Popen[bytes]
) -> None:
    """By the front, which reads the end of its input, and leaves its report for the next service."""

    async def work() -> Finished:
        killed: list[int] = []

        def on_event(event: Event) -> None:
            if isinstance(event, StateChanged) and not killed:
                killed.extend(processes(b"stand_in_front.py\0pre-copy:waits\0serve"))
                for pid in killed:
                    os.kill(pid, 9)

        request = host.request(sleeper.pid)
        coordinator = Coordinator(THERE, host.agent("pre-copy:waits"), request, on_event)
        answer = await coordinator.run()
        await coordinator.close()
        assert len(killed) == 1 and isinstance(answer, Finished)
        return answer

    report = run(work()).report
    assert report.outcome is Outcome.ROLLED_BACK
    until(lambda: not processes(b"stand_in_engine.py\0pre-copy:waits"), "the engine's end")
    until(lambda: not processes(b"stand_in_front.py\0pre-copy:waits\0source"), "the front's end")
    assert sleeper.poll() is None


def refusals(server: PrivateSshd) -> dict[str, Callable[[], None]]:
    return {
        "host-key-unknown": lambda: server.trust(None),
        "host-key-changed": lambda: server.trust("other_key"),
        "authentication-failed": lambda: server.accept("other_key"),
    }


@pytest.mark.parametrize("kind", ["host-key-unknown", "host-key-changed", "authentication-failed"])
def test_a_host_that_is_not_to_be_spoken_to(server: PrivateSshd, kind: str) -> None:
    refusals(server)[kind]()
    try:
        request = Request(operation="move", pid=1, destination="x")
        answer = run(Coordinator(THERE, server.options(), request, lambda _: None).run())
        assert isinstance(answer, Finished) and answer.report.outcome is Outcome.REFUSED
        assert answer.report.error is not None
        assert (answer.report.error.kind, answer.report.error.where) == (kind, "link")
    finally:
        server.accept("client_key")
        server.trust("host_key")


def test_a_host_without_an_agent(server: PrivateSshd) -> None:
    request = Request(operation="move", pid=1, destination="x")
    options = server.options("exec /nonexistent/migrate-agent")
    answer = run(Coordinator(THERE, options, request, lambda _: None).run())
    assert isinstance(answer, Finished) and answer.report.error is not None
    assert answer.report.error.kind == "agent-not-found" and "--agent-command" in answer.report.error.message
