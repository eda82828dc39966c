"""Drives one migration or check from the person's side: asks the source's agent, listens, gives up cleanly.

    request -> agent (over SSH, or here) -> events -> Finished or Checked

Whatever goes wrong, the answer is one Finished or Checked. What happened to a process whose agent went
silent is not known here: then the outcome is "in-doubt", unless the request never left.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

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
)
from agent.states import LIVE
from migrate.client import Agent, Level, Lost
from migrate.errors import ExitCode, Failure
from migrate.watch import Watch
from transport.target import HostTarget

GOODBYE_TIMEOUT: Final = 10.0  # seconds that an agent may take to clean up after its report

_OUTCOMES: Final = frozenset(map(str, Outcome))
_ALONE: Final = (
    "an agent left alone rolls back unless it has committed: `migrate ps` shows where the process is"
)
T = TypeVar("T")


class Interrupted(Exception):
    """A person wants this to end."""


class Coordinator:
    """One request. `on_event` sees everything but the final answer, which `run` returns."""

    def __init__(
        self, source: HostTarget | None, ssh: SshOptions, request: Request, on_event: Callable[[Event], None]
    ) -> None:
        self._source = source
        self._ssh = ssh
        self._request = request
        self._on_event = on_event
        self._agent: Agent | None = None
        self._watch: Watch | None = None
        self._checking: AsyncIterator[Event] | None = None
        self._asked = False
        self._interrupts = 0
        self._running: asyncio.Future[Any] | None = None
        self._aborting: asyncio.Task[None] | None = None

    async def run(self) -> Finished | Checked:
        """Ask, and listen until the answer; a first interrupt gives up cleanly, a second leaves at once."""
        try:
            return await self._interruptible(self._carry_out())
        except Lost as lost:
            return self._silence(lost)
        except Failure as failure:
            return Finished(report=self._report(Outcome.REFUSED, failure.info))
        except Interrupted:
            return self._left()

    async def close(self) -> None:
        """Let the agent end; what is still said is passed on."""
        if self._interrupts < 2:
            with contextlib.suppress(TimeoutError, Failure):
                await asyncio.wait_for(self._finish(), GOODBYE_TIMEOUT)
        agent = self._watch.agent if self._watch is not None else self._agent
        if agent is not None:
            await agent.close()

    def interrupt(self) -> None:
        """A person pressed Ctrl-C, or something like it."""
        self._interrupts += 1
        if self._interrupts == 1 and self._asked and self._request.operation == "move":
            self._say(
                "warning", "giving up; waiting until the process runs on undisturbed (again: leave at once)"
            )
            if self._watch is not None:
                self._abort(self._watch)
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

    async def _connect(self) -> Agent:
        return await Agent(self._source, self._ssh, self._say).__aenter__()

    async def _carry_out(self) -> Finished | Checked:
        self._agent = await self._connect()
        if self._request.operation == "check":
            return await self._check(self._agent)
        self._asked = True
        record = await self._agent.create(self._request)
        self._watch = Watch(self._agent, record.id, self._connect, self._on_event)
        if self._interrupts:
            self._abort(self._watch)
        return await self._watch.run()

    async def _finish(self) -> None:
        if self._watch is not None:
            await self._watch.finish()
        elif self._checking is not None:
            async for event in self._checking:
                self._on_event(event)

    async def _check(self, agent: Agent) -> Finished | Checked:
        self._checking = agent.check(self._request)
        async for event in self._checking:
            if isinstance(event, Finished | Checked):
                return event
            self._on_event(event)
        raise Failure(
            "agent-failed", f"{agent.name}: the check ended without a result", "source", ExitCode.UNREACHABLE
        )

    def _abort(self, watch: Watch) -> None:
        async def abort() -> None:
            try:
                await watch.agent.abort(watch.id)
            except Failure as failure:
                self._say("warning", f"it cannot be given up: {failure}")

        self._aborting = asyncio.ensure_future(abort())

    def _silence(self, lost: Lost) -> Finished:
        """The agent, or the connection to it, ended without an answer."""
        outcome = self._outcome()
        message = f"{lost}; {_ALONE}" if outcome is Outcome.IN_DOUBT else str(lost)
        error = ErrorInfo(kind=lost.info.kind, message=message, where="source")
        return Finished(report=self._report(outcome, error))

    def _left(self) -> Finished:
        """Nobody wanted to wait for the answer."""
        outcome = self._outcome()
        message = f"interrupted; {_ALONE}" if outcome is Outcome.IN_DOUBT else "interrupted"
        info = ErrorInfo(kind="aborted", message=message, where="coordinator")
        return Finished(report=self._report(outcome, info))

    def _outcome(self) -> Outcome:
        """What can be said without the agent's answer."""
        state = self._watch.state if self._watch is not None else ""
        if state in _OUTCOMES:
            return Outcome(state)
        if state in LIVE:
            return Outcome.MIGRATED
        return Outcome.IN_DOUBT if self._asked else Outcome.REFUSED

    def _report(self, outcome: Outcome, error: ErrorInfo) -> Report:
        host = platform.node() if self._source is None else self._source.host
        return Report(
            outcome=outcome,
            source=Endpoint(host=host, pid=self._request.pid),
            destination=Endpoint(host=self._request.destination),
            error=error,
        )

    def _say(self, level: Level, message: str) -> None:
        self._on_event(Log(level=level, message=message))


def on_interrupt(action: Callable[[], object]) -> None:
    """Do this when a person, or the end of their session, wants us to end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, action)
