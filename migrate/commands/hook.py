"""`migrate hook`: what a cluster's scheduler calls."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import msgspec

from agent.api import Log, SshOptions
from agent.hook_api import Drain, DrainReport
from migrate import job
from migrate.client import Agent, Level, absolute
from migrate.errors import Failure
from migrate.options import HOST, Common, common_options
from migrate.plan import command, show
from migrate.plan.drain import DrainWatch
from migrate.plan.model import LOCAL, Plan
from migrate.plan.outcome import of_drain
from migrate.plan.write import to_object
from migrate.report import console
from transport.target import HostTarget


@click.group()
def hook() -> None:
    """What a scheduler calls; over HTTP these are the agent's /v1/hooks."""


@hook.command()
@click.argument("host", type=HOST, metavar="[USER@]HOST[:PORT]")
@click.option(
    "--plan",
    "file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Whose drain rules, and moves from HOST, say what may leave and where to.",
)
@click.option(
    "--to",
    "destinations",
    multiple=True,
    type=HOST,
    metavar="HOST",
    help="Try these hosts instead of the plan's (repeatable, the best first).",
)
@click.option("--dry-run", is_flag=True, help="Check, and move nothing.")
@common_options
def drain(
    host: HostTarget, file: Path, destinations: tuple[HostTarget, ...], dry_run: bool, common: Common
) -> None:
    """Empty a host: move away what a plan says may move, and say what came of each process.

    HOST is `local` for this one. Each process goes to the first destination that can take it; one that cannot
    leave does not hold up the others. What no rule is about is left alone.
    """
    plan = command.load(file, common)
    wanted = Drain(
        plan=to_object(_as_seen_from(host, plan, command.reached_by(plan, common))),
        host=str(host),
        destinations=tuple(map(str, destinations)) or None,
        dry_run=dry_run,
    )
    with command.Audience(common) as audience:
        try:
            report = asyncio.run(_drain(host, wanted, command.reached_by(plan, common), audience))
        except Failure as failure:
            if not common.json:
                raise
            # not begun; for a scheduler it is still what became of its drain
            job.print_json(DrainReport(outcome="refused", host=str(host), processes=(), error=failure.info))
            sys.exit(failure.code)
    if common.json:
        job.print_json(report)
    else:
        console().print(show.of_drain(report, all=common.verbose > 0))
    sys.exit(of_drain(report))


def _as_seen_from(host: HostTarget, plan: Plan, ssh: SshOptions) -> Plan:
    """Key files and ssh_config are this host's; another one uses its own."""
    if host.host == LOCAL:
        return msgspec.structs.replace(plan, ssh=absolute(ssh))
    return msgspec.structs.replace(plan, ssh=SshOptions(agent_command=ssh.agent_command))


async def _drain(host: HostTarget, wanted: Drain, ssh: SshOptions, audience: command.Audience) -> DrainReport:
    def say(level: Level, message: str) -> None:
        audience.on_event(str(host), Log(level=level, message=message))

    async with Agent(None if host.host == LOCAL else host, ssh, say) as agent:
        return await DrainWatch(agent, wanted, audience.on_event).run()
