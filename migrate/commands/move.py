"""`migrate move`: does it."""

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
def move(process: ProcessTarget, destination: HostTarget, common: Common, **parameters: object) -> None:
    """Move a running process to another host.

    Without SRC the process is one of this host. Ctrl-C gives up: the process runs on where it was, unless
    it has already moved; the report says which. What could not be moved whole is refused before anything is
    touched.

    DEST is reached from SRC, with SRC's SSH keys and ssh_config; --identity and --ssh-config are for
    connections from here.
    """
    sys.exit(job.run("move", process, destination, to_move_options(parameters), common))
