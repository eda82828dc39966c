"""`migrate status`: which migrations run on a host, and which there were."""

from __future__ import annotations

import click

from migrate import job, report
from migrate.options import Common, common_options, place_argument
from migrate.targets import Place


@click.command()
@place_argument
@click.option(
    "--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="List so many at most."
)
@common_options
def status(place: Place, limit: int, common: Common) -> None:
    """List the migrations of a host, the newest first, or say how far one of them is.

    They are known to the host that the process is moved from, which keeps a record of the last 1,000.
    """
    if place.id is None:
        listed = job.with_agent(place.host, common, lambda agent: agent.migrations(limit))
        if common.json:
            job.print_json(listed)
        else:
            report.console().print(report.of_migrations(listed.migrations))
        return
    id = place.id
    record = job.with_agent(place.host, common, lambda agent: agent.migration(id))
    if common.json:
        job.print_json(record)
    else:
        report.console().print(report.of_record(record))
