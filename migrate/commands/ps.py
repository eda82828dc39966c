"""`migrate ps`: what runs on a host, and what of it could be moved."""

from __future__ import annotations

import click

from migrate import job, report
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
    processes = job.with_agent(host, common, lambda agent: agent.processes(measure))
    if common.json:
        job.print_json(processes)
    else:
        report.console().print(report.of_processes(processes))
