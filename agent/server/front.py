"""The process that carries out one request, and one true last event whatever becomes of it.

The front (`agent/front.py`) is a child with its standard input on a pipe of ours: when this service dies it
reads the end of it, and gives up unless it is too late.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from agent import settlement
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
    StateChanged,
)
from agent.bounds import MALFORMED
from agent.kernel import procfs
from agent.states import LIVE, UNTOUCHED
from transport.process import AgentProcess, ProcessEnd, run_local

GOODBYE_TIMEOUT: Final = 10.0  # seconds that a front may take to end after its last word
_OUTCOMES: Final = frozenset(map(str, Outcome))

OnEvent: TypeAlias = Callable[[Event, bytes], None]
Program: TypeAlias = tuple[list[str], dict[str, str]]  # command and environment of `migrate-agent`

_events = msgspec.json.Decoder(Event)
_encoder = msgspec.json.Encoder()


class Front:
    """One request on its way through a process of its own; `on_event` gets each event, and its JSON line."""

    def __init__(
        self, request: Request, on_event: OnEvent, program: Program, name: str | None = None
    ) -> None:
        self._request = request
        self._name = name
        self._options = ["--name", name] if name else []
        self._birth = procfs.born(request.pid)
        self._on_event = on_event
        self._program = program
        self._process: AgentProcess | None = None
        self._aborted = ""
        self.state = ""
        self.final: Finished | Checked | None = None

    async def run(self) -> None:
        """Until the front has ended: exactly one Finished or Checked has been passed on then.

        Cancelled, it is left to give up by itself.
        """
        try:
            end = await self._carry_out()
        except OSError as error:
            self._finish(
                self._failed(Outcome.REFUSED, "agent-failed", f"the front cannot be started: {error}")
            )
            return
        if self.final is None:
            self._finish(await self._silence(end))

    def abort(self, reason: str) -> None:
        """Ask it to give up; the second time changes nothing."""
        self._aborted = self._aborted or reason
        if self._process is not None:
            self._process.send(_encoder.encode({"abort": True, "reason": self._aborted}))

    async def _carry_out(self) -> ProcessEnd:
        argv, environment = self._program
        if self._request.ssh.auth_socket:
            environment = {**environment, "SSH_AUTH_SOCK": self._request.ssh.auth_socket}
        self._process = process = await run_local(
            [*argv, "source", *self._options], environment, self._on_stderr
        )
        try:
            process.send(_encoder.encode(self._request))
            if self._aborted:
                self.abort(self._aborted)
            async for line in process.lines():
                self._on_line(line)
            return await self._let_end(process)
        finally:
            process.close_input()

    def _on_line(self, line: bytes) -> None:
        event = self._decode(line)
        if isinstance(event, Finished | Checked):
            self._finish(event)
            return
        if isinstance(event, StateChanged):
            self.state = event.state
        self._pass_on(event)

    def _finish(self, event: Finished | Checked) -> None:
        if self.final is None:
            self.final = event = self._with_reason(event)
            self._pass_on(event)
            if self._process is not None:
                self._process.close_input()

    def _with_reason(self, event: Finished | Checked) -> Finished | Checked:
        """The engine knows only that it was asked to give up; why is known here."""
        error = event.report.error if isinstance(event, Finished) else None
        if error is None or error.kind != "aborted" or not self._aborted:
            return event
        error = msgspec.structs.replace(error, message=self._aborted)
        return Finished(report=msgspec.structs.replace(event.report, error=error))  # type: ignore[union-attr]

    async def _let_end(self, process: AgentProcess) -> ProcessEnd:
        try:
            return await asyncio.wait_for(process.wait(), GOODBYE_TIMEOUT)
        except TimeoutError:
            process.kill()
            return await process.wait()

    async def _silence(self, end: ProcessEnd) -> Finished:
        """It ended without an answer: find out what came of it."""
        error = msgspec.structs.replace(end, host=platform.node()).error()
        if self._name is None or self._request.operation == "check" or self.state in UNTOUCHED:
            return self._failed(Outcome.REFUSED, error.kind, str(error))
        done = await settlement.settle(
            self._name, lambda text: self._pass_on(Log(level="warning", message=text))
        )
        outcome = done.outcome or self._outcome()
        return self._failed(outcome, error.kind, f"{error}; {done.message}")

    def _outcome(self) -> Outcome:
        """Of a migration in which nothing is left to be done."""
        if self.state in _OUTCOMES:
            return Outcome(self.state)
        if self.state in LIVE:
            return Outcome.MIGRATED
        here = self._birth is not None and procfs.born(self._request.pid) == self._birth
        return Outcome.ROLLED_BACK if here else Outcome.IN_DOUBT

    def _failed(self, outcome: Outcome, kind: str, message: str) -> Finished:
        report = Report(
            outcome=outcome,
            source=Endpoint(host=platform.node(), pid=self._request.pid),
            destination=Endpoint(host=self._request.destination),
            error=ErrorInfo(kind=kind, message=message, where="source"),
        )
        return Finished(report=report)

    def _decode(self, line: bytes) -> Event:
        try:
            event: Event = _events.decode(line)
            return event
        except MALFORMED as error:
            return Log(level="warning", message=f"the front said something that is no event: {error}")

    def _on_stderr(self, line: str) -> None:
        self._pass_on(Log(level="info", message=f"{platform.node()}: {line}"))

    def _pass_on(self, event: Event) -> None:
        self._on_event(event, _encoder.encode(event))
