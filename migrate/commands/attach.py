"""`migrate attach`: shows a migration that runs, as `move` does."""

from __future__ import annotations

import asyncio
import sys

import click

from agent.api import Finished, MigrationRecord
from migrate import job
from migrate.client import Agent
from migrate.coordinator import on_interrupt
from migrate.errors import ExitCode, Failure
from migrate.options import Common, common_options, place_argument, required_id
from migrate.targets import Place
from migrate.watch import Watch


@click.command()
@place_argument
@common_options
def attach(place: Place, common: Common) -> None:
    """Watch a running migration to its end, and print its report.

    Ctrl-C only stops watching. `migrate abort` gives it up.
    """
    id = required_id(place)
    with job.Audience(common, live=True) as audience:
        sys.exit(asyncio.run(_attach(place, id, common, audience)))


async def _attach(place: Place, id: str, common: Common, audience: job.Audience) -> ExitCode:
    async def connect() -> Agent:
        return await Agent(place.host, common.ssh, audience.say).__aenter__()

    watch = Watch(await connect(), id, connect, audience.on_event)
    try:
        record = await watch.agent.migration(id)
        if record.status == "lost":
            raise Failure("not-found", f"{id}: its service ended before it did", "source", ExitCode.REFUSED)
        answer = await _until_interrupted(watch, record)
    finally:
        await watch.agent.close()
    audience.on_event(answer)
    audience.stop_showing()
    return job.present(answer, common.json)


async def _until_interrupted(watch: Watch, record: MigrationRecord) -> Finished:
    watching = asyncio.ensure_future(watch.run())
    on_interrupt(watching.cancel)
    try:
        return await watching
    except asyncio.CancelledError:
        goes_on = record.request.on_disconnect == "continue"
        alone = "it goes on" if goes_on else "without anybody it is given up in 5 s"
        message = f"not watched any more; {alone}"
        raise Failure("interrupted", message, "coordinator", ExitCode.REFUSED) from None
