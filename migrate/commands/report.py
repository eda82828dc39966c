"""`migrate report`: how a migration went, also long after."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent.api import Finished, MigrationRecord
from migrate import job
from migrate.errors import ExitCode, Failure
from migrate.options import Common, common_options, place_argument, required_id
from migrate.targets import Place

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@place_argument
@click.option("--svg", type=_FILE, help="Draw rounds and pause into this file.")
@click.option("--html", type=_FILE, help="Write a page with the picture and all figures.")
@common_options
def report(place: Place, svg: Path | None, html: Path | None, common: Common) -> None:
    """Print the report of a finished migration, as `move` did.

    Exits as `move` did, too. Pictures need matplotlib (pip install 'migrate[plot]').
    """
    id = required_id(place)
    record = job.with_agent(place.host, common, lambda agent: agent.migration(id))
    if record.report is None:
        message = f"{id}: there is no report, it is {record.status}"
        raise Failure("not-finished", message, "source", ExitCode.REFUSED)
    if svg is not None:
        _write(svg, record, "svg")
    if html is not None:
        _write(html, record, "html")
    sys.exit(job.present(Finished(report=record.report), common.json))


def _write(path: Path, record: MigrationRecord, form: str) -> None:
    try:
        import migrate.picture as picture  # noqa: PLR0402 - mypy knows the module by this name only
    except ImportError as error:
        message = f"a picture needs matplotlib ({error}): pip install 'migrate[plot]'"
        raise Failure("usage", message, "coordinator", ExitCode.USAGE) from error
    try:
        path.write_text(picture.svg(record) if form == "svg" else picture.page(record), encoding="utf-8")
    except OSError as error:
        raise Failure("usage", f"{path}: {error.strerror}", "coordinator", ExitCode.USAGE) from error
