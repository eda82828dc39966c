"""`migrate-agent`.

What a host runs for `migrate`. Started over SSH or as a subprocess; speaks JSON lines, see agent/api.py.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

import click

from agent.api import PROTOCOL_VERSION


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The part of migrate that works on a host. People use `migrate`; this is what it starts."""


@main.command()
def source() -> None:
    """Check or move a process of this host: a Request on standard input, Events on standard output.

    The end of standard input, a line {"abort": true}, SIGTERM, SIGINT or SIGHUP abort what has not been
    committed.
    """
    import asyncio

    from agent.front import serve

    sys.exit(asyncio.run(serve(0, 1)))


@main.command()
def destination() -> None:
    """Receive a process: binary frames on standard input and output."""
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)  # a stray print must not damage the stream
    from agent.destination import serve

    serve(reading, writing)


@main.command()
@click.option(
    "--measure/--no-measure", default=True, help="Watch each process for a moment to tell its dirty rate."
)
def ps(measure: bool) -> None:
    """The processes of this host: one ProcessInfo as JSON a line."""
    import msgspec

    from agent import inventory

    encoder = msgspec.json.Encoder()
    for info in inventory.processes(measure):
        sys.stdout.buffer.write(encoder.encode(info) + b"\n")
        sys.stdout.buffer.flush()


@main.command()
def version() -> None:
    """The installed version, and that of the protocol between the tool and the agent."""
    click.echo(f"migrate-agent {_version()}, protocol {PROTOCOL_VERSION}")


def _version() -> str:
    try:
        return metadata.version("migrate")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
