"""The client's view of an agent here, and what it makes of one that breaks, or is of another version."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from unit.stand_in_service import DEADLINE, STAND_IN, until

from agent.api import (
    PROTOCOL_VERSION,
    Checked,
    Event,
    Finished,
    Log,
    Outcome,
    Request,
    SshOptions,
    StateChanged,
)
from agent.server.places import SOCKET_VARIABLE, STATE_VARIABLE
from migrate.client import Agent, Failure, Lost
from migrate.errors import ExitCode
from migrate.watch import Watch

T = TypeVar("T")
MOVE = Request(operation="move", pid=4711, destination="beta")
CHECK = Request(operation="check", pid=4711, destination="beta")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    socket = tmp_path / "agent.sock"
    monkeypatch.setenv(SOCKET_VARIABLE, str(socket))
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN.parents[2]))
    yield
    until(lambda: not (tmp_path / "agent.sock.lock").exists(), "the service ends by itself")


said: list[tuple[str, str]] = []


def agent(scenario: str) -> Agent:
    said.clear()
    command = shlex.join([sys.executable, str(STAND_IN), scenario])
    return Agent(
        None, SshOptions(agent_command=command), lambda level, message: said.append((level, message))
    )


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, DEADLINE)

    return asyncio.run(bounded())


def with_agent(scenario: str, work: Callable[[Agent], Awaitable[T]]) -> T:
    async def connected() -> T:
        async with agent(scenario) as connection:
            return await work(connection)

    return run(connected())


def test_everything_at_once() -> None:
    """A stream is read while another call is made: each has a connection of its own."""

    async def work(agent: Agent) -> None:
        record = await agent.create(MOVE)
        events: list[Event] = []
        async for event in agent.events(record.id):
            events.append(event)
            if isinstance(event, StateChanged):
                health, listed, one = await asyncio.gather(
                    agent.health(), agent.migrations(), agent.migration(record.id)
                )
                assert health.running == 1 and listed.migrations == (one,)
                assert (await agent.abort(record.id)).id == record.id
        last = events[-1]
        assert isinstance(last, Finished) and last.report.outcome is Outcome.ROLLED_BACK
        assert [event async for event in agent.events(record.id, 1)] == [last]
        with pytest.raises(Failure, match="it is over") as caught:
            await agent.abort(record.id)
        assert (caught.value.info.kind, caught.value.code) == ("conflict", ExitCode.REFUSED)

    with_agent("waits", work)


def test_a_check_is_events_to_the_result() -> None:
    async def work(agent: Agent) -> list[Event]:
        return [event async for event in agent.check(CHECK)]

    (checked,) = with_agent("checked", work)
    assert isinstance(checked, Checked)


def test_files_are_named_in_full_to_a_service_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/keys")
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.1 50000 192.0.2.2 22")
    ssh = SshOptions(identity=("key", "~/key"), config=("../config",))

    async def work(agent: Agent) -> Request:
        request = Request(operation="move", pid=1, destination="beta", ssh=ssh)
        return (await agent.create(request)).request

    request = with_agent("migrated", work)
    here = Path.cwd()
    assert request.ssh.identity == (str(here / "key"), os.path.expanduser("~/key"))
    assert request.ssh.config == (f"{here}/../config",)
    assert (request.ssh.auth_socket, request.reached_at) == ("/tmp/keys", "192.0.2.2")


def test_what_a_login_script_prints_is_shown() -> None:
    with_agent("noise", lambda agent: agent.health())
    assert said == [("warning", "not from the agent: Welcome to alpha!")]


def test_an_agent_of_another_version_is_refused_by_both_names() -> None:
    words = f"version 9.9 with protocol 99, this is .* with protocol {PROTOCOL_VERSION}"
    with pytest.raises(Failure, match=words) as c:
        with_agent("another-version", lambda agent: agent.health())
    assert (c.value.info.kind, c.value.code) == ("version", ExitCode.REFUSED)


def test_an_agent_that_is_older_than_the_service_is_refused() -> None:
    with pytest.raises(Failure, match="an older version, with a protocol below 2") as caught:
        with_agent("older", lambda agent: agent.health())
    assert caught.value.info.kind == "version"


def test_a_service_that_is_killed_is_lost_and_its_migration_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch finds a new service, which knows that the migration is not its own, and never hears of its
    end.
    """
    monkeypatch.setattr("migrate.watch.RECOVERED_IN", 0.5)

    async def work(agent: Agent) -> None:
        async def connect() -> Agent:
            return await again.__aenter__()

        pid, record = (await agent.health()).pid, await agent.create(MOVE)
        seen: list[Event] = []

        def on_event(event: Event) -> None:
            seen.append(event)
            if isinstance(event, StateChanged):
                os.kill(pid, 9)

        watch = Watch(agent, record.id, connect, on_event)
        try:
            with pytest.raises(Lost, match="left the migration to itself"):
                await watch.run()
            assert (await watch.agent.health()).pid != pid
        finally:
            await watch.agent.close()
        assert watch.state == "pre-copy"
        assert any(isinstance(event, Log) and "trying again" in event.message for event in seen)

    again = agent("waits")
    with_agent("waits", work)


def test_a_watch_goes_on_where_a_connection_broke() -> None:
    """The service lives on; what is between it and the client dies in the middle."""

    async def work(agent: Agent) -> None:
        async def connect() -> Agent:
            return await again.__aenter__()

        record = await agent.create(MOVE)
        states: list[str] = []

        def on_event(event: Event) -> None:
            if isinstance(event, StateChanged):
                states.append(event.state)
                for child in children():
                    os.kill(child, 9)
            elif isinstance(event, Log) and "trying again" in event.message:
                asyncio.get_running_loop().call_later(
                    0.5, lambda: asyncio.ensure_future(again.abort(record.id))
                )

        watch = Watch(agent, record.id, connect, on_event)
        try:
            finished = await watch.run()
        finally:
            await watch.agent.close()
        assert states == ["pre-copy"]
        assert finished.report.outcome is Outcome.ROLLED_BACK

    again = agent("waits")
    with_agent("waits", work)


def children() -> list[int]:
    """Our own; here those are `connect`s, and the service that the first of them started is none."""
    found = []
    for task in os.listdir("/proc/self/task"):
        found += Path(f"/proc/self/task/{task}/children").read_text().split()
    return [int(pid) for pid in found if b"connect" in Path(f"/proc/{pid}/cmdline").read_bytes()]
