"""The front of one migration on the source host: what stands between the person's tool, the engine and the
destination.

    migrate --stdin/stdout--> Supervisor --Request, SIGTERM--> worker (the engine, a process of its own)
                                  |        <---- events ------    |
                                  +-- SSH to the destination -- socketpair

The front reads the request, starts the worker while it connects, hands over the request once the link
stands (a link that cannot be opened has touched nothing), forwards the worker's events, and makes a
truthful report if the worker cannot.

Giving up: the end of standard input, a line `{"abort": true}`, SIGTERM, SIGINT and SIGHUP all mean the
same. Before the point of no return the worker is asked to roll back (SIGTERM), after EOF_GRACE seconds it
reads the end of its link, and after KILL_GRACE it is killed, which lets the process run on as well: the
kernel detaches it. After that point nothing is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from agent import launch, settlement
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
from agent.reconnecting import reopen
from agent.renewal import Giving
from agent.server.store import new_id
from agent.states import FROZEN, LIVE, NO_RETURN, UNTOUCHED, Source
from transport.link import Link, socket_pair
from transport.link_errors import ConnectionLost, LinkError
from transport.process import LINE_LIMIT
from transport.target import parse_host

EOF_GRACE: Final = 5.0
KILL_GRACE: Final = 30.0
REASON_TIMEOUT: Final = 3.0  # seconds that a broken link may take to say why
DEATH_TIMEOUT: Final = 1.0  # seconds that a killed process may take to disappear
STILL: Final = FROZEN | {Source.COMMITTING}
STILL_PATIENCE: Final = 10.0  # seconds beyond the freeze's own limit
VERIFYING: Final = 10  # times as long: all memory is read

_events = msgspec.json.Decoder(Event)
_encoder = msgspec.json.Encoder()


class Supervisor:
    """One request from beginning to end. `write` takes each event as a line of JSON."""

    def __init__(
        self,
        request: Request,
        write: Callable[[Event, bytes], None],
        worker: tuple[list[str], dict[str, str]] | None = None,
        name: str | None = None,
    ) -> None:
        """`worker` is the command and environment of the engine's process, if not our own; `name` the
        migration's.
        """
        self._request = request
        self._name = name or new_id()
        self._command, self._environment = worker or launch.module("agent.worker")
        self._write = write
        self._state = ""
        self._last_error = ""
        self._final = False
        self._aborting = asyncio.Event()
        self._abort_reason = ""
        self._link: Link | None = None
        self._renewals = Giving()
        self._reconnecting: asyncio.Future[None] | None = None
        self._lost: ErrorInfo | None = None  # why there is no other link
        self._worker: Process | None = None
        self._birth = procfs.born(request.pid)

    def abort(self, reason: str) -> None:
        """Somebody does not want this migration any more. The second time changes nothing."""
        self._abort_reason = self._abort_reason or reason
        self._aborting.set()

    async def run(self) -> None:
        """Do everything; exactly one Finished or Checked has been written when this returns."""
        ours, theirs = socket_pair()
        worker, events = await self._start_worker(theirs)
        try:
            self._link = await self._open_link(ours)
            if self._link is not None and worker.stdin is not None:
                await self._work(worker, events)
        finally:
            await self._stop(worker)

    async def _start_worker(self, link: socket.socket) -> tuple[Process, asyncio.StreamReader]:
        reading, writing = os.pipe()
        worker = await asyncio.create_subprocess_exec(
            *self._command,
            str(link.fileno()),
            str(writing),
            str(self._renewals.theirs.fileno()),
            self._name,
            stdin=PIPE,
            stdout=2,  # nothing but events may reach our own standard output
            env=self._environment,
            pass_fds=(link.fileno(), writing, self._renewals.theirs.fileno()),
            start_new_session=True,
        )
        link.close()
        self._renewals.theirs.close()
        os.close(writing)
        events = asyncio.StreamReader(limit=LINE_LIMIT)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(events), os.fdopen(reading, "rb", buffering=0)
        )
        self._worker = worker
        return worker, events

    async def _open_link(self, ours: socket.socket) -> Link | None:
        """The link to the destination; None if there is none, which has been reported then."""
        from transport.ssh import open_link

        target = parse_host(self._request.destination)
        opening = asyncio.ensure_future(open_link(target, self._request.ssh, ours, self._on_destination_line))
        aborting = asyncio.ensure_future(self._aborting.wait())
        await asyncio.wait([opening, aborting], return_when=asyncio.FIRST_COMPLETED)
        aborting.cancel()
        if not opening.done():
            opening.cancel()
            await asyncio.wait([opening])
            self._refuse("aborted", self._abort_reason, "coordinator")
            return None
        try:
            return opening.result()
        except LinkError as error:
            self._refuse(error.kind, str(error), "link")
            return None

    async def _work(self, worker: Process, events: asyncio.StreamReader) -> None:
        assert worker.stdin is not None
        worker.stdin.write(_encoder.encode(self._request) + b"\n")
        worker.stdin.close()
        nagging = asyncio.ensure_future(self._press_on(worker))
        try:
            while line := await self._next_line(worker, events):
                await self._on_event(line)
            await worker.wait()
        finally:
            nagging.cancel()
        if not self._final:
            await self._report_crash(worker)

    async def _next_line(self, worker: Process, events: asyncio.StreamReader) -> bytes:
        """b"" at the end. An engine that hangs while the process stands still is ended."""
        options = self._request.options
        patience = options.freeze_timeout_ms / 1000 + STILL_PATIENCE * (VERIFYING if options.verify else 1)
        reading = asyncio.ensure_future(events.readline())
        done, _ = await asyncio.wait([reading], timeout=patience if self._state in STILL else None)
        if not done:
            self._last_error = f"it has done nothing for {patience:.0f} s while the process stood still"
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
        return await reading

    async def _press_on(self, worker: Process) -> None:
        """Once asked to abort.

        SIGTERM, the end of the link, SIGKILL; each only before the point of no return.
        """
        await self._aborting.wait()
        for wait, action in (
            (0.0, worker.terminate),
            (EOF_GRACE, self._link.end_incoming if self._link else worker.terminate),
            (KILL_GRACE - EOF_GRACE, worker.kill),
        ):
            await asyncio.sleep(wait)
            if self._final:
                return
            if self._state in NO_RETURN | LIVE:
                self._say("warning", f"too late to give up ({self._abort_reason}): {self._state}")
                return
            with contextlib.suppress(ProcessLookupError):
                action()

    async def _on_event(self, line: bytes) -> None:
        try:
            event = _events.decode(line)
        except MALFORMED as error:
            self._say("error", f"the engine said something that is no event: {error}")
            return
        if isinstance(event, StateChanged):
            self._state = event.state
            if event.state == Source.RECONNECTING:
                self._reconnecting = asyncio.ensure_future(self._reconnect())
        elif isinstance(event, Log) and event.level == "error":
            self._last_error = event.message
        elif isinstance(event, Finished):
            event = await self._with_link_reason(event)
            if event.report.outcome is Outcome.IN_DOUBT:
                event = await self._settled(event)
        if isinstance(event, Finished | Checked):
            self._finish(event)
        else:
            self._write(event, line.rstrip(b"\n"))

    async def _with_link_reason(self, finished: Finished) -> Finished:
        """The engine only sees that its link ended; why is known here."""
        error = finished.report.error
        if error is None or error.where != "link" or self._link is None:
            return finished
        if self._lost is not None:
            return Finished(report=msgspec.structs.replace(finished.report, error=self._lost))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._link.wait(), REASON_TIMEOUT)
        if self._link.end is None:
            return finished
        reason = self._link.end.error()
        better = ErrorInfo(kind=reason.kind, message=str(reason), where="link")
        return Finished(report=msgspec.structs.replace(finished.report, error=better))

    async def _reconnect(self) -> None:
        """Give the engine another link, or the reason why there is none."""
        assert self._link is not None
        patience = self._request.options.reconnect_ms / 1000
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._link.wait(), REASON_TIMEOUT)
        end = self._link.end
        if end is None:
            self._link.abort()  # nothing moves on it
        broken = (
            end.error() if end is not None else ConnectionLost(self._request.destination, "it is stalled")
        )
        if end is not None and end.lost is None:  # the agent has ended, and the shadow with it
            self._no_link(broken.kind, str(broken))
            return
        target = parse_host(self._request.destination)
        try:
            self._link, theirs = await reopen(
                target, self._request.ssh, self._name, patience, self._on_destination_line
            )
        except LinkError as error:
            self._no_link(broken.kind, f"{broken}; not reached again within {patience:g} s: {error}")
        except OSError as error:
            self._no_link(broken.kind, f"{broken}; no other link can be made: {error}")
        else:
            self._renewals.give(theirs)

    def _no_link(self, kind: str, why: str) -> None:
        self._lost = ErrorInfo(kind=kind, message=why, where="link")
        self._renewals.refuse(why)

    async def _settled(self, finished: Finished) -> Finished:
        """The engine does not know what became of the copy: ask until somebody does."""
        report = finished.report
        assert report.error is not None and self._worker is not None
        self._say_state("in-doubt", report.error.message)
        await self._worker.wait()
        done = await settlement.settle(self._name, partial(self._say, "warning"))
        message = f"{report.error.message}; {done.message}"
        error = msgspec.structs.replace(report.error, message=message)
        return Finished(
            report=msgspec.structs.replace(report, outcome=done.outcome or report.outcome, error=error)
        )

    async def _report_crash(self, worker: Process) -> None:
        """The worker is gone without a report: say what can be known about the two copies."""
        code = worker.returncode or 0
        message = f"the engine's process ended {f'by signal {-code}' if code < 0 else f'with status {code}'}"
        if self._last_error:
            message = f"{message}: {self._last_error}"
        done = await settlement.settle(self._name, partial(self._say, "warning"))
        message = f"{message}; {done.message}"
        outcome = done.outcome
        if outcome is None:  # it had no journal yet, and so had touched nothing; or the guardian came first
            outcome = self._outcome_by_state()
            if outcome is Outcome.ROLLED_BACK and await self._source_is_gone():
                outcome = Outcome.IN_DOUBT
                message = f"{message}; process {self._request.pid} is gone"
        error = ErrorInfo(kind="crash", message=message, where="source")
        self._finish(Finished(report=self._report(outcome, error)))

    def _outcome_by_state(self) -> Outcome:
        """What the last state that was seen says about a worker that is gone."""
        if self._state in LIVE:
            return Outcome.MIGRATED
        if self._state in NO_RETURN:
            return Outcome.IN_DOUBT
        untouched = self._state in UNTOUCHED or self._request.operation == "check"
        return Outcome.REFUSED if untouched else Outcome.ROLLED_BACK

    async def _source_is_gone(self) -> bool:
        """Whether the process did not survive: it dies with the worker from the moment of commit.

        "committed" may not have been said by then, and the death of a large process takes a moment.
        """
        deadline = asyncio.get_running_loop().time() + (DEATH_TIMEOUT if self._state in FROZEN else 0.0)
        while True:
            gone = procfs.born(self._request.pid) != self._birth
            if gone or asyncio.get_running_loop().time() >= deadline:
                return gone
            await asyncio.sleep(0.02)

    def _report(self, outcome: Outcome, error: ErrorInfo) -> Report:
        return Report(
            outcome=outcome,
            source=Endpoint(host=platform.node(), pid=self._request.pid),
            destination=Endpoint(host=self._request.destination),
            bytes_sent=self._link.bytes_sent if self._link else 0,
            error=error,
        )

    def _refuse(self, kind: str, message: str, where: str) -> None:
        error = msgspec.convert({"kind": kind, "message": message, "where": where}, ErrorInfo)
        self._finish(Finished(report=self._report(Outcome.REFUSED, error)))

    def _finish(self, event: Finished | Checked) -> None:
        if self._final:
            self._say("error", "the engine reported twice")
            return
        self._final = True
        self._write(event, _encoder.encode(event))

    def _on_destination_line(self, line: str) -> None:
        self._say("info", f"{self._request.destination}: {line}")

    def _say_state(self, state: str, detail: str) -> None:
        self._state = state
        event = StateChanged(state=state, detail=detail)
        self._write(event, _encoder.encode(event))

    def _say(self, level: str, message: str) -> None:
        event = msgspec.convert({"event": "log", "level": level, "message": message}, Log)
        self._write(event, _encoder.encode(event))

    async def _stop(self, worker: Process) -> None:
        """Leave nothing behind: a worker that never got a request reads the end of its input and ends."""
        if worker.stdin is not None:
            worker.stdin.close()
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self._renewals.close()
        if self._link is not None:
            end = await self._link.close()
            if not end.clean:
                self._say("debug", str(end.error()))
        await worker.wait()


def handle_signals(supervisor: Supervisor) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.abort, f"{number.name} received")
