"""`migrate abort`: gives up somebody's migration."""

from __future__ import annotations

import click

from migrate import job
from migrate.options import Common, common_options, place_argument, required_id
from migrate.targets import Place


@click.command()
@place_argument
@common_options
def abort(place: Place, common: Common) -> None:
    """Ask for a running migration to be rolled back.

    Refused (exit 3) when it is too late. What came of it: `migrate attach` or `migrate report`.
    """
    id = required_id(place)
    record = job.with_agent(place.host, common, lambda agent: agent.abort(id))
    if common.json:
        job.print_json(record)
    else:
        print(f"asked {place.host or 'this host'} to give up {record.id} ({record.state or 'connecting'})")
