"""The generated part of docs/performance.md: what the committed run gives, and nothing else."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from bench import aims, table
from bench.machine import ROOT
from bench.results import Ran, Run, load

PAGE: Final = ROOT / "docs" / "performance.md"
RUN: Final = ROOT / "docs" / "bench" / "lab.json"
BEGIN: Final = "<!-- begin: from docs/bench/lab.json by `python -m bench.docs` -->\n"
END: Final = "<!-- end -->\n"


def render(run: Run) -> str:
    """The part between the markers."""
    parts = [_about(run), table.markdown(aims.table(run)), *map(table.markdown, table.tables(run))]
    return "\n\n".join(parts) + "\n"


def _about(run: Run) -> str:
    return about(run) + "\n- figures: median (least..greatest) of the samples; the file has each of them"


def about(run: Ran) -> str:
    """What was run, when and where, as a list."""
    machine = run.machine
    changed = " with changes" if run.changed else ""
    return "\n".join(
        [
            f"- command: `{run.command}`, {run.seconds / 60:.0f} minutes",
            f"- date: {run.date}, commit {run.commit}{changed}; load average at the beginning: {run.load}",
            f"- machine: {machine.cores} cores of {machine.cpu}, {machine.memory / 2**30:.0f} GiB, Linux "
            f"{machine.kernel}, Python {machine.python}, {machine.openssh}; both hosts and the client on it",
        ]
    )


def replaced(page: str, part: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `part` between its markers; ValueError if it has not exactly one pair."""
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError("the page needs one pair of markers")
    before, rest = page.split(begin)
    return before + begin + part + end + rest.split(end)[1]


def current(page: Path = PAGE, run: Path = RUN) -> bool:
    text = page.read_text()
    return text == replaced(text, render(load(run)))


def write(page: Path = PAGE, run: Path = RUN) -> None:
    page.write_text(replaced(page.read_text(), render(load(run))))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only say whether the page is what the run gives"
    )
    if parser.parse_args().check:
        return 0 if current() else 1
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
