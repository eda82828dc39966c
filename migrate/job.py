"""What `check` and `move` have in common: one request, watched from the beginning to its answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import msgspec

from agent.api import Checked, Event, Finished, MoveOptions, Request
from migrate import errors, progress, report
from migrate.coordinator import Coordinator, handle_interrupts
from migrate.errors import ExitCode, Failure
from migrate.logfile import LogFile
from migrate.options import Common, request_ssh
from migrate.targets import ProcessTarget
from transport.target import HostTarget


def run(
    operation: str, process: ProcessTarget, destination: HostTarget, options: MoveOptions, common: Common
) -> ExitCode:
    """Carry out a check or a move, print its answer, return the exit code."""
    request = msgspec.convert(
        {"operation": operation, "pid": process.pid, "destination": str(destination)}, Request
    )
    request = msgspec.structs.replace(request, options=options, ssh=request_ssh(common, process.host))
    log = open_log(common)
    try:
        return asyncio.run(_run(request, process.host, common, log))
    finally:
        log.close()


def open_log(common: Common) -> LogFile:
    try:
        return LogFile(common.log_file)
    except OSError as error:
        message = f"--log-file: {common.log_file}: {error.strerror}"
        raise Failure("usage", message, "coordinator", ExitCode.USAGE) from error


async def _run(request: Request, source: HostTarget | None, common: Common, log: LogFile) -> ExitCode:
    shown = progress.presenter(common.verbose, common.quiet)
    try:
        coordinator = Coordinator(source, common.ssh, request, _both(log, shown))
        handle_interrupts(coordinator)
        answer = await coordinator.run()
        log.write(answer)
    finally:
        shown.close()
    code = present(answer, common.json)
    await coordinator.close()
    return code


def _both(log: LogFile, shown: progress.Presenter) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        log.write(event)
        shown.show(event)

    return on_event


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
