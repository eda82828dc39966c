"""The two ends of `migrate-agent source`: the request and aborts coming in, events going out.

The service starts one for each migration (`agent/server`), and is at the other ends.

Both use threads of their own with plain blocking calls: standard input and output may be anything (a pipe,
a terminal, a file), and a reader that is slow or asleep must never hold up a migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import platform
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from agent.api import (
    PROTOCOL_VERSION,
    Endpoint,
    ErrorInfo,
    Event,
    Finished,
    Outcome,
    Progress,
    Report,
    Request,
)
from agent.bounds import MALFORMED
from agent.server import places
from agent.server.store import Store
from agent.supervisor import Supervisor, handle_signals
from transport.lines import LineBuffer
from transport.target import parse_host

MAX_WAITING: Final = 64  # events that wait for a slow reader before Progress is dropped
MAX_LINE: Final = 4 << 20  # bytes of a request
DRAIN_TIMEOUT: Final = 10.0
EXIT_BAD_REQUEST: Final = 2


class BadRequest(Exception):
    """What came on standard input is not a request that this agent understands."""


class EventWriter:
    """Lines to a descriptor, written by a thread; never waits. A reader that is gone is no error here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.final: Finished | None = None
        self.broken = False  # nobody reads any more
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, event: Event, line: bytes) -> None:
        if isinstance(event, Finished):
            self.final = event
        if not (isinstance(event, Progress) and self._lines.qsize() > MAX_WAITING):
            self._lines.put(line + b"\n")

    def close(self) -> None:
        """Wait until everything is written, DRAIN_TIMEOUT seconds at most."""
        self._lines.put(None)
        self._thread.join(DRAIN_TIMEOUT)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except OSError:
                self.broken = True
                return


def read_lines(fd: int) -> Iterator[bytes]:
    """Whole lines from a descriptor until its end; nothing is read ahead of need. LineTooLong, an OSError."""
    lines = LineBuffer(MAX_LINE)
    while data := os.read(fd, 65536):
        yield from lines.feed(data)


class Input:
    """What the person's tool says: one request, then perhaps an abort, in a thread that reads `fd`."""

    def __init__(self, fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.request: asyncio.Future[Request] = self._loop.create_future()
        self.abort: asyncio.Future[str] = self._loop.create_future()
        threading.Thread(target=self._run, args=(fd,), daemon=True).start()

    def _run(self, fd: int) -> None:
        reason = "the tool that asked for it is gone (end of standard input)"
        try:
            for line in read_lines(fd):
                self._tell(self._on_line, line)
        except OSError as error:
            reason = f"standard input: {error.strerror}"
        self._tell(self._on_end, reason)

    def _tell(self, function: Callable[[Any], None], argument: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: everything is over
            self._loop.call_soon_threadsafe(function, argument)

    def _on_line(self, line: bytes) -> None:
        if not self.request.done():
            try:
                self.request.set_result(parse_request(line))
            except BadRequest as error:
                self.request.set_exception(error)
        elif (reason := abort_reason(line)) is not None and not self.abort.done():
            self.abort.set_result(reason)

    def _on_end(self, reason: str) -> None:
        if not self.request.done():
            self.request.set_exception(BadRequest("no request came on standard input"))
        if not self.abort.done():
            self.abort.set_result(reason)


def parse_request(line: bytes) -> Request:
    """BadRequest."""
    try:
        request = msgspec.json.decode(line, type=Request)
    except MALFORMED as error:
        raise BadRequest(f"not a request: {error}") from None
    validate(request)
    return request


def validate(request: Request) -> None:
    """BadRequest if there is no such host, or it is of another version."""
    try:
        parse_host(request.destination)
        for address in (*(request.options.addresses or ()), *filter(None, [request.reached_at])):
            ipaddress.ip_address(address)
    except ValueError as error:
        raise BadRequest(f"not a request: {error}") from None
    if request.version != PROTOCOL_VERSION:
        raise BadRequest(
            f"the tool speaks version {request.version} of the protocol, this agent {PROTOCOL_VERSION}: "
            "install the same version of migrate on both"
        )


def abort_reason(line: bytes) -> str | None:
    """Why, if the line is a wish to abort."""
    try:
        message = msgspec.json.decode(line)
    except MALFORMED:
        return None
    if not isinstance(message, dict) or message.get("abort") is not True:
        return None
    return str(message.get("reason") or "aborted by request")


async def serve(
    reading: int,
    writing: int,
    worker: tuple[list[str], dict[str, str]] | None = None,
    name: str | None = None,
) -> int:
    """One migration, `name`: a Request from `reading`, Events to `writing`. The exit status.

    `worker` is the command and environment of the engine's process, if not our own.
    """
    writer = EventWriter(writing)
    incoming = Input(reading)
    try:
        supervisor = Supervisor(await incoming.request, writer.write, worker, name)
        handle_signals(supervisor)
        incoming.abort.add_done_callback(lambda future: supervisor.abort(future.result()))
        await supervisor.run()
    except BadRequest as error:
        event = Finished(report=_refused(str(error)))
        writer.write(event, msgspec.json.encode(event))
        return EXIT_BAD_REQUEST
    finally:
        writer.close()
    if writer.broken and name is not None and writer.final is not None:
        Store(places.default().reports).finish(name, writer.final.report)  # its service has died
    return 0


def _refused(message: str) -> Report:
    return Report(
        outcome=Outcome.REFUSED,
        source=Endpoint(host=platform.node()),
        destination=Endpoint(host=""),
        error=ErrorInfo(kind="bad-request", message=message, where="source"),
    )
