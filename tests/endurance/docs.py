"""The generated part of docs/performance.md about failed moves: what the committed run gives."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from bench import docs, table
from bench.machine import ROOT

from endurance import tables
from endurance.series import Run

RUN: Final = ROOT / "docs" / "bench" / "endurance.json"
BEGIN: Final = "<!-- begin: from docs/bench/endurance.json by `make endurance PUBLISH=1` -->\n"
END: Final = "<!-- end of endurance -->\n"


def load(path: Path = RUN) -> Run:
    return msgspec.json.decode(path.read_bytes(), type=Run)


def render(run: Run) -> str:
    """The part between the markers."""
    return (
        "\n\n".join([docs.about(run), *map(table.markdown, (tables.costs(run), tables.growth(run)))]) + "\n"
    )


def replaced(page: str, run: Run) -> str:
    return docs.replaced(page, render(run), BEGIN, END)


def publish(run: Run) -> None:
    RUN.write_bytes(msgspec.json.encode(run))
    docs.PAGE.write_text(replaced(docs.PAGE.read_text(), run))
