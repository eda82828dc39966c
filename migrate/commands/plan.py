"""`migrate plan`: many moves, as a file says."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from migrate import job
from migrate.coordinator import on_interrupt
from migrate.options import Common, common_options
from migrate.plan import command, show
from migrate.plan.apply import PlanRun
from migrate.plan.outcome import PlanReport, of_plan
from migrate.report import console

plan_argument = click.argument("file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")


@click.group()
def plan() -> None:
    """Check or make the moves of a plan, a YAML file (docs/plans.md says what may be in it)."""


@plan.command()
@plan_argument
@common_options
def check(file: Path, common: Common) -> None:
    """Say what is wrong with a plan, and what stands in the way of its moves, all at once; touch nothing.

    Exits with 2 if the file is no plan, with 3 if anything stands in the way.
    """
    _run(file, common, PlanRun.check)


@plan.command()
@plan_argument
@common_options
def apply(file: Path, common: Common) -> None:
    """Make the moves of a plan.

    All of them are checked first. If one cannot be made nothing is touched, unless the plan says
    `on_failure: continue`. Ctrl-C rolls back what runs and starts nothing more.
    """
    _run(file, common, PlanRun.apply)


def _run(file: Path, common: Common, work: Callable[[PlanRun], Awaitable[PlanReport]]) -> None:
    found = command.load(file, common)

    async def carry_out() -> PlanReport:
        run = PlanRun(found, command.reached_by(found, common), audience.on_event)
        on_interrupt(run.interrupt)
        return await work(run)

    with command.Audience(common) as audience:
        result = asyncio.run(carry_out())
    if common.json:
        job.print_json(result)
    else:
        console().print(show.of_plan(result))
    sys.exit(of_plan(result))
