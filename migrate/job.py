"""What the commands have in common: an agent spoken to, events shown and logged, an answer printed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from agent.api import Checked, Event, Finished, Log, MoveOptions, Request
from migrate import errors, progress, report
from migrate.client import Agent, Level
from migrate.coordinator import Coordinator, on_interrupt
from migrate.errors import ExitCode, Failure
from migrate.logfile import LogFile
from migrate.options import Common, request_ssh
from migrate.targets import ProcessTarget
from transport.target import HostTarget

T = TypeVar("T")


class Audience:
    """Whoever sees events: the person at standard error, and the log file."""

    def __init__(self, common: Common, live: bool) -> None:
        """`live`: with progress. Failure if the log file cannot be written to."""
        try:
            self._log = LogFile(common.log_file)
        except OSError as error:
            message = f"--log-file: {common.log_file}: {error.strerror}"
            raise Failure("usage", message, "coordinator", ExitCode.USAGE) from error
        self._shown = progress.presenter(common.verbose, common.quiet, common.log_format, live)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_showing()
        self._log.close()

    def on_event(self, event: Event) -> None:
        self._log.write(event)
        if not isinstance(event, Finished | Checked):
            self._shown.show(event)

    def say(self, level: Level, message: str) -> None:
        self.on_event(Log(level=level, message=message))

    def stop_showing(self) -> None:
        """Leave the screen to the answer."""
        self._shown.close()


def run(request: Request, source: HostTarget | None, common: Common) -> ExitCode:
    """Carry out a check or a move, print its answer, return the exit code."""
    with Audience(common, live=True) as audience:
        return asyncio.run(_run(request, source, common, audience))


def start(request: Request, source: HostTarget | None, common: Common) -> ExitCode:
    """Start a move that goes on alone, and say its name."""

    async def ask(agent: Agent) -> ExitCode:
        record = await agent.create(request)
        if common.json:
            print_json(record)
        else:
            place = "" if source is None else f" {source}"
            print(f"{record.id}: follow it with `migrate attach {record.id}{place}`")
        return ExitCode.DONE

    return with_agent(source, common, ask)


def with_agent(host: HostTarget | None, common: Common, work: Callable[[Agent], Awaitable[T]]) -> T:
    """What `work` makes of the agent of `host`; Failure."""

    async def connected() -> T:
        async with Agent(host, common.ssh, audience.say) as agent:
            return await work(agent)

    with Audience(common, live=False) as audience:
        return asyncio.run(connected())


def request_for(
    operation: str, process: ProcessTarget, destination: HostTarget, options: MoveOptions, common: Common
) -> Request:
    request = msgspec.convert(
        {"operation": operation, "pid": process.pid, "destination": str(destination)}, Request
    )
    return msgspec.structs.replace(request, options=options, ssh=request_ssh(common, process.host))


async def _run(request: Request, source: HostTarget | None, common: Common, audience: Audience) -> ExitCode:
    coordinator = Coordinator(source, common.ssh, request, audience.on_event)
    on_interrupt(coordinator.interrupt)
    answer = await coordinator.run()
    audience.on_event(answer)
    audience.stop_showing()
    code = present(answer, common.json)
    await coordinator.close()
    return code


def present(answer: Finished | Checked, as_json: bool) -> ExitCode:
    """Print the answer on standard output; what it means as an exit code."""
    if isinstance(answer, Checked):
        if as_json:
            print_json(answer.result)
        else:
            report.console().print(report.of_check(answer.result))
        return errors.of_check(answer.result)
    if as_json:
        print_json(answer.report)
    else:
        report.console().print(report.of_move(answer.report))
    return errors.of_report(answer.report)


def print_json(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()
