"""`migrate ps`: what runs on a host, and what of it could be moved."""

from __future__ import annotations

import asyncio
import sys

import click
import msgspec

from agent.api import Log, ProcessInfo
from migrate import job, progress, report
from migrate.coordinator import start_agent
from migrate.errors import ExitCode, Failure
from migrate.logfile import LogFile
from migrate.options import HOST, Common, common_options
from transport.target import HostTarget


@click.command()
@click.argument("host", type=HOST, metavar="[[USER@]HOST[:PORT]]", required=False)
@click.option(
    "--measure/--no-measure", default=True, show_default=True, help="Watch each process for its dirty rate."
)
@common_options
def ps(host: HostTarget | None, measure: bool, common: Common) -> None:
    """List processes with memory, threads, sockets, dirty rate, and what stands in the way of moving them.

    The dirty rate is how many bytes of memory a process changes in a second: a move has to be faster than
    that.
    """
    log = job.open_log(common)
    try:
        processes = asyncio.run(_collect(host, measure, common, log))
    finally:
        log.close()
    if common.json:
        job.print_json(processes)
    else:
        report.console().print(report.of_processes(processes))
    sys.exit(ExitCode.DONE)


async def _collect(host: HostTarget | None, measure: bool, common: Common, log: LogFile) -> list[ProcessInfo]:
    shown = progress.PlainLines(sys.stderr, progress.threshold(common.verbose, common.quiet))

    def on_line(line: str) -> None:
        event = Log(level="info", message=line)
        log.write(event)
        shown.show(event)

    agent = await start_agent(host, common.ssh, ["ps", "--measure" if measure else "--no-measure"], on_line)
    agent.close_input()
    processes = [msgspec.json.decode(line, type=ProcessInfo) async for line in agent.lines()]
    end = await agent.wait()
    agent.kill()
    if not end.clean:
        error = end.error()
        raise Failure(error.kind, str(error), "source", ExitCode.UNREACHABLE)
    return processes
