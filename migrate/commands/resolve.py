"""`migrate resolve`: ends a doubt."""

from __future__ import annotations

from typing import Literal

import click

from agent.api import Outcome, Resolve
from migrate import job
from migrate.errors import ExitCode
from migrate.options import Common, common_options, place_argument, required_id
from migrate.targets import Place


@click.command()
@place_argument
@click.option(
    "--live",
    type=click.Choice(["source", "destination"]),
    help="Where the process lives, if you know it. Without this the destination is asked once more.",
)
@common_options
def resolve(place: Place, live: Literal["source", "destination"] | None, common: Common) -> None:
    """Put in order a migration that is in doubt.

    Agents ask the destination by themselves, for as long as it takes. Only if that host will not come back
    you have to decide: `--live source` lets the stopped copy on the source go on, `--live destination`
    kills it. A wrong word makes two copies of one, or none: `migrate status` shows what is known.
    """
    id = required_id(place)
    record = job.with_agent(place.host, common, lambda agent: agent.resolve(id, Resolve(live=live)))
    if common.json:
        job.print_json(record)
    elif record.report is not None:
        error = record.report.error
        print(f"{record.id}: {record.report.outcome}{f': {error.message}' if error else ''}")
    if record.report is None or record.report.outcome is Outcome.IN_DOUBT:
        raise SystemExit(ExitCode.IN_DOUBT)
