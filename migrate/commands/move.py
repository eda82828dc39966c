"""`migrate move`: does it."""

from __future__ import annotations

import sys

import click
import msgspec

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
@click.option("--detach", is_flag=True, help="Only start it, print its name, and let it go on alone.")
@click.option("--keep-going", is_flag=True, help="Let it go on if this command ends before it does.")
@common_options
def move(
    process: ProcessTarget,
    destination: HostTarget,
    common: Common,
    detach: bool,
    keep_going: bool,
    **parameters: object,
) -> None:
    """Move a running process to another host.

    Without SRC the process is one of this host. Ctrl-C gives up: the process runs on where it was, unless it
    has already moved; the report says which. What could not be moved whole is refused before anything is
    touched. The move belongs to this command: if it is gone for 5 seconds the process stays where it is, but
    for --detach and --keep-going.

    DEST is reached from SRC, with SRC's SSH keys and ssh_config; --identity and --ssh-config are for
    connections from here.
    """
    request = job.request_for("move", process, destination, to_move_options(parameters), common)
    if detach or keep_going:
        request = msgspec.structs.replace(request, on_disconnect="continue")
    sys.exit((job.start if detach else job.run)(request, process.host, common))
