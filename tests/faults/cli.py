"""`python -m faults`: runs of the fault campaign, a line each, and what came of all of them.

python -m faults --runs 1000 --seed 1    half of them of the matrix, each stratum its share; half by chance
python -m faults --matrix                all cases of the matrix, which takes hours
python -m faults --only NAME             cases by name, as in Commit/source/* or chance/4711; of more than
                                             --runs N some
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from programs.status import build

from faults import chance, evidence
from faults.campaign import Campaign
from faults.fault import Case
from faults.matrix import matrix, stratum
from faults.verdict import Verdict

OUTPUT: Final = Path(__file__).resolve().parents[2] / "build" / "faults"
_LOOKED_THROUGH: Final = 10  # cases for each quick one
_CHANCE: Final = re.compile(r"chance/(\d+)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="faults", description=__doc__, formatter_class=form)
    parser.add_argument("--runs", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which cases, and in which order")
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="evidence of every run, also where all is well")
    parser.add_argument("--list", action="store_true", help="print the cases' names and end")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="K/N",
        help="one of N of all that is asked for",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="evidence of violations")
    return parser.parse_args(arguments)


def sample(seed: int, count: int) -> list[Case]:
    """So many cases of the matrix: strata in turn, so that none is left out before another has two."""
    order = random.Random(seed)
    strata: dict[str, list[Case]] = {}
    for case in matrix():
        strata.setdefault(stratum(case), []).append(case)
    groups = list(strata.values())
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    turns = itertools.zip_longest(*groups)
    return list(itertools.islice((case for turn in turns for case in turn if case is not None), count))


def quick(seed: int, runs: int) -> list[Case]:
    """Some of `mixed` that take no long time."""
    found = (case for case in mixed(seed, _LOOKED_THROUGH * runs) if case.quick)
    return list(itertools.islice(found, runs))


def mixed(seed: int, runs: int) -> list[Case]:
    """Half of the matrix, half by chance, each by its own seed."""
    of_matrix = sample(seed, runs - runs // 2)
    by_chance = [chance.case(seed * 1_000_000 + number) for number in range(runs // 2)]
    pairs = itertools.zip_longest(of_matrix, by_chance)
    return [case for pair in pairs for case in pair if case is not None]


def named(patterns: Iterable[str]) -> Iterator[Case]:
    for pattern in patterns:
        found = _CHANCE.fullmatch(pattern)
        if found:
            yield chance.case(int(found[1]))
        else:
            yield from (case for case in matrix() if fnmatch.fnmatchcase(case.name, pattern))


def cases(options: argparse.Namespace) -> list[Case]:
    if options.only:
        found = list(named(options.only))
        return (
            found if len(found) <= options.runs else random.Random(options.seed).sample(found, options.runs)
        )
    return matrix() if options.matrix else mixed(options.seed, options.runs)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a run was violated."""
    options = parse(arguments)
    part, parts = map(int, options.part.split("/"))
    wanted = cases(options)[part - 1 :: parts]
    if options.list:
        print("\n".join(case.name for case in wanted))
        return 0
    build()
    verdicts: list[Verdict] = []
    try:
        with Campaign(options.keep) as campaign:
            for number, case in enumerate(wanted, 1):
                verdict = campaign.run(case)
                verdicts.append(verdict)
                print(evidence.line(number, verdict), flush=True)
                evidence.keep(options.output, verdict)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if verdicts:
        print("\n" + evidence.table(verdicts))
    return int(any(verdict.problems for verdict in verdicts))
