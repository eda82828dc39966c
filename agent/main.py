"""`migrate-agent`: what a host runs for `migrate`, which starts it over SSH or as a subprocess."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Literal

import click

from agent import version as versions
from agent.api import PROTOCOL_VERSION

if TYPE_CHECKING:
    from agent.server.access import Users


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The part of migrate that works on a host. People use `migrate`; this is what it starts."""


@main.command()
@click.option(
    "--idle-exit", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="End when unused so long."
)
@click.option("--verbose", "-v", count=True, help="Log what engines and agents say, not only states.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--group", metavar="NAME", help="Let this group's members use it for processes of their own.")
@click.option(
    "--allow-destination", multiple=True, metavar="HOST", help="Where they may move to; repeatable."
)
@click.option(
    "--allow-address", multiple=True, metavar="ADDRESS", help="Which addresses may move along; repeatable."
)
def serve(
    idle_exit: float | None,
    verbose: int,
    log_format: str,
    group: str | None,
    allow_destination: tuple[str, ...],
    allow_address: tuple[str, ...],
) -> None:
    """Be this host's service: an HTTP API on a unix socket, see `GET /v1/openapi.json` there.

    The socket is /run/migrate/agent.sock, records are in /var/lib/migrate, of root; MIGRATE_AGENT_SOCKET and
    MIGRATE_AGENT_STATE name others. Exits with 75 if there is one already.
    """
    from agent import launch
    from agent.server import log, places, service

    users = _users(group, allow_destination, allow_address)
    log.set_up(verbose, log_format)
    program = launch.module("agent.main")
    settings = service.Settings(places=places.default(), program=program, idle_exit=idle_exit, users=users)
    sys.exit(service.run(settings))


def _users(group: str | None, destinations: tuple[str, ...], addresses: tuple[str, ...]) -> Users | None:
    """What is allowed to whom; UsageError."""
    import grp
    import ipaddress

    from agent.server.access import Users
    from transport.target import parse_host

    if group is None:
        if destinations or addresses:
            raise click.UsageError("--allow-destination and --allow-address are for a --group")
        return None
    if os.geteuid() != 0:
        raise click.UsageError("--group: only root's service can be for others")
    try:
        for destination in destinations:
            parse_host(destination)
        for address in addresses:
            ipaddress.ip_address(address)
        return Users(gid=grp.getgrnam(group).gr_gid, destinations=destinations, addresses=addresses)
    except KeyError:
        raise click.UsageError(f"--group: there is no group {group!r}") from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@main.command()
def connect() -> None:
    """Connect standard input and output to this host's service, which is started if need be.

    `migrate` runs this over SSH. One that it starts ends when it was not used for 30 seconds.
    """
    from agent import launch
    from agent.server import connect as connecting
    from agent.server import places

    argv, environment = launch.module("agent.main")
    service = [*argv, "serve", "--idle-exit", str(connecting.IDLE_EXIT)]
    sys.exit(connecting.bridge(places.default(), service, environment))


@main.command()
@click.option("--name", help="The migration's, for the journals of both hosts; a new one otherwise.")
def source(name: str | None) -> None:
    """Check or move a process of this host: a Request on standard input, Events on standard output.

    The service starts one for each. The end of standard input, a line {"abort": true}, SIGTERM, SIGINT or
    SIGHUP abort what has not been committed.
    """
    import asyncio

    from agent import privileges
    from agent.front import serve

    privileges.enter(privileges.FRONT)
    sys.exit(asyncio.run(serve(0, 1, name=name)))


@main.command()
@click.option(
    "--resume", metavar="MIGRATION", help="Be the new connection of one whose source has lost its link."
)
def destination(resume: str | None) -> None:
    """Receive a process: binary frames on standard input and output."""
    from agent import privileges

    if resume is not None:
        from agent import doorway

        privileges.leave_starting(privileges.NOTHING)
        sys.exit(doorway.hand_over(resume))
    privileges.enter(privileges.DESTINATION)
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)  # a stray print must not damage the stream
    from agent import launch, settle
    from agent.destination import serve

    launch.raise_descriptor_limit()
    settle.sweep()
    serve(reading, writing)


@main.command()
@click.option(
    "--measure/--no-measure", default=True, help="Watch each process for a moment to tell its dirty rate."
)
@click.option("--owner", type=click.IntRange(0), metavar="UID", help="Only what is wholly this user's.")
def ps(measure: bool, owner: int | None) -> None:
    """The processes of this host: one ProcessInfo as JSON a line."""
    import msgspec

    from agent import inventory, privileges

    privileges.enter(privileges.ENGINE)
    encoder = msgspec.json.Encoder()
    for info in inventory.processes(measure, owner):
        sys.stdout.buffer.write(encoder.encode(info) + b"\n")
        sys.stdout.buffer.flush()


@main.command()
@click.argument("pid", type=click.IntRange(1))
@click.option(
    "--resume",
    is_flag=True,
    help="If it is stopped (in doubt), let it go on: you know that no copy of it runs.",
)
def cleanup(pid: int, resume: bool) -> None:
    """Undo what an agent that was killed has left in process PID, and say what that was.

    Nothing but the agent's own is touched. Exits with 75 for a process that an agent works on now,
    and for one that is stopped in doubt. Needed only where front and engine were killed together,
    or after being in doubt.
    """
    from agent import cleanup as cleaning
    from agent import privileges

    privileges.enter(privileges.ENGINE)
    sys.exit(cleaning.run(pid, resume=resume))


@main.command()
@click.argument("migration")
@click.option(
    "--live",
    type=click.Choice(["source", "destination"]),
    help="Where it lives, if you know it and the destination cannot be asked. A wrong word makes two of one.",
)
def recover(migration: str, live: Literal["source", "destination"] | None) -> None:
    """Put in order what is left of MIGRATION on this host, its source.

    What was not committed is undone. If it was, the destination is asked, and the process goes on here or its
    copy here is killed. Agents do this by themselves. Exits with 75 while it is in doubt or an agent works
    on it.
    """
    from agent import privileges, recovery

    privileges.enter(privileges.ENGINE)
    sys.exit(recovery.main(migration, live))


@main.command()
@click.argument("migration")
@click.option("--boot", default="", metavar="ID", help="The boot id that this host had when it began.")
def settle(migration: str, boot: str) -> None:
    """Say what became of MIGRATION on this host, its destination; the answer holds from then on.

    The source's agent runs this over SSH when it has lost the link. A shadow that was not committed is
    removed.
    """
    from agent import privileges
    from agent import settle as settling

    privileges.leave_starting(privileges.DESTINATION)
    sys.exit(settling.main(migration, boot))


@main.command()
def version() -> None:
    """The installed version, and that of the protocol between the tool and the agent."""
    click.echo(f"migrate-agent {versions.installed()}, protocol {PROTOCOL_VERSION}")


if __name__ == "__main__":
    main()
