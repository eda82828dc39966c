"""`migrate check`: what a move would meet, without touching anything."""

from __future__ import annotations

import sys

import click

from migrate import job
from migrate.options import (
    Common,
    common_options,
    destination_argument,
    move_options,
    process_argument,
    to_move_options,
)
from migrate.targets import ProcessTarget
from transport.target import HostTarget


@click.command()
@process_argument
@destination_argument
@move_options
@common_options
def check(process: ProcessTarget, destination: HostTarget, common: Common, **parameters: object) -> None:
    """Say what stands in the way of moving a process, all of it at once; touch nothing.

    Takes the options of move, so that what is checked is what would be done. Exits with 3 if anything
    stands in the way.
    """
    request = job.request_for("check", process, destination, to_move_options(parameters), common)
    sys.exit(job.run(request, process.host, common))
