"""Drives one migration or check from the person's side: starts the source agent, asks, listens, gives up
cleanly.

    request -> agent (over SSH, or a subprocess here) -> events -> Finished or Checked

Whatever goes wrong, the answer is one Finished or Checked. What happened to a process whose agent went
silent is not known here: then the outcome is "in-doubt", unless the request never left.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import shlex
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import msgspec

from agent import launch
from agent.api import (
    Checked,
    Endpoint,
    ErrorInfo,
    Event,
    Finished,
    Log,
    Outcome,
    Report,
    Request,
    SshOptions,
    StateChanged,
)
from migrate.errors import ExitCode, Failure
from transport.link_errors import LinkError
from transport.process import AgentProcess, ProcessEnd, run_local
from transport.target import HostTarget

ABORT: Final = b'{"abort": true}'
GOODBYE_TIMEOUT: Final = 10.0  # seconds that an agent may take to end after its report
DEFAULT_AGENT: Final = SshOptions().agent_command

_events = msgspec.json.Decoder(Event)
_OUTCOMES: Final = frozenset(map(str, Outcome))
_ALONE: Final = (
    "an agent left alone rolls back unless it has committed: `migrate ps` shows where the process is"
)
T = TypeVar("T")


class Interrupted(Exception):
    """A person wants this to end."""


async def start_agent(
    host: HostTarget | None, ssh: SshOptions, argv: list[str], on_line: Callable[[str], None]
) -> AgentProcess:
    """`migrate-agent ARGV` on `host`, or here (None). Failure if it cannot be started."""
    try:
        if host is not None:
            from transport.ssh import run_agent

            return await run_agent(host, ssh, argv, on_line)
        command, environment = launch.module("agent.main")
        if ssh.agent_command != DEFAULT_AGENT:
            command = shlex.split(ssh.agent_command)
        return await run_local([*command, *argv], environment, on_line)
    except LinkError as error:
        raise Failure.of_link(error) from error
    except OSError as error:
        message = f"the agent cannot be started: {error}"
        raise Failure("agent-not-found", message, "coordinator", ExitCode.UNREACHABLE) from error


class Coordinator:
    """One request. `on_event` sees everything but the final answer, which `run` returns."""

    def __init__(
        self, source: HostTarget | None, ssh: SshOptions, request: Request, on_event: Callable[[Event], None]
    ) -> None:
        self._source = source
        self._ssh = ssh
        self._request = request
        self._on_event = on_event
        self._agent: AgentProcess | None = None
        self._state = ""
        self._asked = False
        self._interrupts = 0
        self._running: asyncio.Future[Any] | None = None

    async def run(self) -> Finished | Checked:
        """Ask, and listen until the answer; a first interrupt gives up cleanly, a second leaves at once."""
        try:
            self._agent = await self._interruptible(
                start_agent(self._source, self._ssh, ["source"], self._on_agent_line)
            )
            return await self._interruptible(self._converse(self._agent))
        except Failure as failure:
            return Finished(report=self._report(Outcome.REFUSED, failure.info))
        except Interrupted:
            return self._left()

    async def close(self) -> None:
        """Let the agent end; what it still says is passed on."""
        if self._agent is None:
            return
        self._agent.close_input()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drain(self._agent), GOODBYE_TIMEOUT)
        self._agent.kill()

    def interrupt(self) -> None:
        """A person pressed Ctrl-C, or something like it."""
        self._interrupts += 1
        if self._interrupts == 1 and self._agent is not None:
            self._say(
                "warning", "giving up; waiting until the process runs on undisturbed (again: leave at once)"
            )
            self._agent.send(ABORT)
        elif self._running is not None:
            self._running.cancel()

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        self._running = asyncio.ensure_future(work)
        try:
            return await self._running  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            if not self._interrupts:
                raise
            raise Interrupted from None
        finally:
            self._running = None

    async def _converse(self, agent: AgentProcess) -> Finished | Checked:
        agent.send(msgspec.json.encode(self._request))
        self._asked = True
        async for line in agent.lines():
            event = self._decode(line)
            if isinstance(event, Finished | Checked):
                return event
            if isinstance(event, StateChanged):
                self._state = event.state
            self._on_event(event)
        return self._silence(await agent.wait())

    async def _drain(self, agent: AgentProcess) -> None:
        async for line in agent.lines():
            self._on_event(self._decode(line))
        await agent.wait()

    def _decode(self, line: bytes) -> Event:
        """A line as an event. What a login script prints in between is no event, and no reason to stop."""
        try:
            event: Event = _events.decode(line)
            return event
        except msgspec.MsgspecError:
            text = line.decode("utf-8", "replace")
            return Log(level="warning", message=f"not from the agent: {text}")

    def _silence(self, end: ProcessEnd) -> Finished:
        """The agent, or the connection to it, ended without an answer."""
        error = end.error()
        outcome = self._outcome(certain=end.lost is None and not self._state)
        message = str(error)
        if outcome is Outcome.IN_DOUBT:
            message = f"{message}; {_ALONE}"
        return Finished(
            report=self._report(outcome, ErrorInfo(kind=error.kind, message=message, where="source"))
        )

    def _left(self) -> Finished:
        """Nobody wanted to wait for the answer."""
        outcome = self._outcome(certain=False)
        message = f"interrupted; {_ALONE}" if outcome is Outcome.IN_DOUBT else "interrupted"
        info = ErrorInfo(kind="aborted", message=message, where="coordinator")
        return Finished(report=self._report(outcome, info))

    def _outcome(self, certain: bool) -> Outcome:
        """What can be said without the agent's answer; `certain`: it never began."""
        if self._state in _OUTCOMES:
            return Outcome(self._state)
        if self._state == "live":
            return Outcome.MIGRATED
        untouched = certain or not self._asked or self._request.operation == "check"
        return Outcome.REFUSED if untouched else Outcome.IN_DOUBT

    def _report(self, outcome: Outcome, error: ErrorInfo) -> Report:
        host = platform.node() if self._source is None else self._source.host
        return Report(
            outcome=outcome,
            source=Endpoint(host=host, pid=self._request.pid),
            destination=Endpoint(host=self._request.destination),
            error=error,
        )

    def _on_agent_line(self, line: str) -> None:
        host = platform.node() if self._source is None else str(self._source)
        self._say("info", f"{host}: {line}")

    def _say(self, level: str, message: str) -> None:
        self._on_event(msgspec.convert({"event": "log", "level": level, "message": message}, Log))


def handle_interrupts(coordinator: Coordinator) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, coordinator.interrupt)
