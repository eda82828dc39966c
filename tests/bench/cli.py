"""The command line: run the cases, say how it goes, write the JSON file, the tables and the pictures."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from programs.status import build

from bench import aims, criu, docs, limits, machine, matrix, table
from bench.measure import Accounted, sample
from bench.results import Case, Limit, Run, Sample, save

OUTPUT: Final = machine.ROOT / "build" / "bench"
REPEAT: Final = 5
QUICK_REPEAT: Final = 2
BUSY: Final = 0.5
FAILURES: Final = 2  # of one case, and the rest of its samples are not tried


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure moves on a lab of two hosts; for root."
    )
    parser.add_argument("--quick", action="store_true", help="some of the cases, two samples each")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="cases by name, as in threads/1000"
    )
    parser.add_argument("--repeat", type=int, metavar="N", help=f"samples of each case (default {REPEAT})")
    parser.add_argument("--no-limits", action="store_true", help="leave out what the machine does without us")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--command", default=shlex.join(["bench", *arguments]), help="what to call this run")
    parser.add_argument("--publish", action="store_true", help="put the run and its tables into docs/, too")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    return parser.parse_args(arguments)


class Progress:
    """One line a step, with the time since the beginning."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.0f} s] {text}", file=sys.stderr, flush=True)

    def sample(self, name: str, number: int, of: int, found: Sample) -> None:
        if found.outcome != "migrated":
            return self.say(f"{name} {number}/{of}: {found.outcome}: {found.error}")
        figures = (
            f"gap {found.gap_ms:.1f} ms",
            f"pause {found.pause_ms:.1f} ms",
            f"total {found.total_s:.1f} s",
        )
        wait = () if found.wait_ms is None else (f"clients {found.wait_ms:.1f} ms",)
        return self.say(f"{name} {number}/{of}: {', '.join([*figures, *wait])}")


def samples(hosts: Accounted, case: Case, repeat: int, progress: Progress) -> Case:
    found: list[Sample] = []
    repeat = min(repeat, case.at_most or repeat)
    while len(found) < repeat and sum(each.outcome != "migrated" for each in found) < FAILURES:
        found.append(sample(hosts, case))
        progress.sample(case.name, len(found), repeat, found[-1])
    return msgspec.structs.replace(case, samples=tuple(found))


def by_link(cases: list[Case]) -> Iterator[tuple[str | None, list[Case]]]:
    """Neighbours that need the same kind of lab."""
    for bandwidth, group in itertools.groupby(cases, lambda case: case.bandwidth):
        yield bandwidth, list(group)


class Measuring:
    """What was found so far: an interrupted run shows what it has."""

    def __init__(self, repeat: int, with_limits: bool) -> None:
        self.repeat = repeat
        self.limits: list[Limit] | None = [] if with_limits else None
        self.cases: list[Case] = []
        self.progress = Progress()
        self._piped: set[str | None] = set()

    def run(self, cases: list[Case]) -> None:
        self.progress.say(f"{len(cases)} cases, {self.repeat} samples each")
        if self.limits is not None:
            self.progress.say("limits of memory, criu")
            self.limits += [*limits.memory(self.repeat), *criu.limits(self.repeat)]
        for bandwidth, group in by_link(cases):
            with Accounted(bandwidth) as hosts:
                self._pipe(hosts, bandwidth)
                for case in group:
                    self.cases.append(samples(hosts, case, self.repeat, self.progress))

    def _pipe(self, hosts: Accounted, bandwidth: str | None) -> None:
        """How fast ssh is on this kind of link, once."""
        if self.limits is None or bandwidth in self._piped:
            return
        self._piped.add(bandwidth)
        self.progress.say(f"limits of ssh, {bandwidth or 'unlimited'}")
        self.limits += limits.ssh(hosts.lab, bandwidth, self.repeat)


def run(options: argparse.Namespace, cases: list[Case]) -> Run:
    began, load, (commit, changed) = datetime.now(UTC), os.getloadavg()[0], machine.commit()
    repeat = options.repeat or (QUICK_REPEAT if options.quick else REPEAT)
    measuring = Measuring(repeat, not options.no_limits)
    if load > BUSY:
        measuring.progress.say(
            f"the machine is busy, load average {load:.1f}: the figures will be worse than they need be"
        )
    try:
        measuring.run(cases)
    except KeyboardInterrupt:
        measuring.progress.say("interrupted")
    return Run(
        command=options.command,
        date=began.strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit,
        changed=changed,
        seconds=round(time.monotonic() - measuring.progress.began, 1),
        load=round(load, 2),
        machine=machine.machine(),
        limits=tuple(measuring.limits or ()),
        cases=tuple(measuring.cases),
    )


def show(found: Run, output: Path) -> None:
    from bench import pictures

    for each in (aims.table(found), *table.tables(found)):
        print(f"\n{table.text(each)}")
    print(f"\n{output / 'bench.json'}")
    for path in pictures.draw(found, output):
        print(path)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if every sample moved; 1 if one did not; 2: wrong usage."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        cases = matrix.chosen(tuple(options.only), options.quick)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    build()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # both end it with what it has
    found = run(options, cases)
    save(found, options.output / "bench.json")
    show(found, options.output)
    if options.publish:
        docs.RUN.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(options.output / "bench.json", docs.RUN)
        docs.write()
    return 0 if all(each.outcome == "migrated" for case in found.cases for each in case.samples) else 1
