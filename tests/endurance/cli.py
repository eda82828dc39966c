"""`python -m endurance`: a process is moved again and again by the same services; does anything grow?

Each second move fails, by a seed. After each there must be one live copy that is well, with its client, and
nothing may be left over; in the end the services, the hosts and the process must hold no more than in the
beginning, and the pause must be what it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from bench import machine, table
from faults import evidence
from faults.campaign import Campaign
from programs.status import build

from endurance import docs, tables
from endurance.series import Run, Series
from endurance.steps import steps

OUTPUT: Final = machine.ROOT / "build" / "endurance"
MOVES: Final = 200


def parse(arguments: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="endurance", description=__doc__, formatter_class=form)
    parser.add_argument("--moves", type=int, default=MOVES, metavar="N", help=f"default {MOVES}")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="what fails, and where")
    parser.add_argument("--json", action="store_true", help="the whole run on standard output, no tables")
    parser.add_argument("--publish", action="store_true", help="put a run without problems into docs/, too")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="the run, and evidence")
    parser.add_argument(
        "--command", default=shlex.join(["endurance", *arguments]), help="what to call this run"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Run:
    began, date, load = time.monotonic(), datetime.now(UTC), os.getloadavg()[0]
    commit, changed = machine.commit()
    with Campaign(services=True) as campaign:
        series = Series(campaign, lambda line: print(line, file=sys.stderr, flush=True))
        try:
            wrong = series.run(steps(options.seed, options.moves))
            if wrong is not None:
                evidence.keep(options.output, wrong)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
    return Run(
        command=options.command,
        date=date.strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit,
        changed=changed,
        machine=machine.machine(),
        load=round(load, 2),
        seed=options.seed,
        steps=options.moves,
        seconds=round(time.monotonic() - began, 1),
        idle_ms=tuple(series.idle),
        done=tuple(series.done),
        samples=tuple(series.samples),
    )


def show(found: Run) -> str:
    parts = [table.text(tables.costs(found)), table.text(tables.growth(found))]
    said = [f"PROBLEM {text}" for text in found.problems] or ["nothing grows, every step ended as it must"]
    head = f"{len(found.done)} steps in {found.seconds / 60:.0f} minutes, seed {found.seed}"
    return "\n\n".join([*parts, "\n".join([head, *said])])


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if anything is not as it must be."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    build()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(found))
    (options.output / "endurance.json").write_bytes(text)
    print(text.decode() if options.json else show(found))
    if options.publish and not found.problems:
        docs.publish(found)
    return int(bool(found.problems))
