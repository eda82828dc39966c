"""What was aimed at, and whether a run reached it: from its figures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from bench.results import Case, Run, Sample
from bench.stats import number, spread
from bench.table import Table, good

MEASURED: Final = "not measured"


class Aim(msgspec.Struct, frozen=True):
    """`value` is to be at most `limit`, or at least if `least`; None if the run has not what it takes."""

    name: str
    unit: str
    limit: float
    value: Callable[[Run], float | None]
    least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


def _case(run: Run, name: str) -> Case | None:
    return next((case for case in run.cases if case.name == name and good(case)), None)


def _median(run: Run, name: str, of: Callable[[Sample], float | None]) -> float | None:
    case = _case(run, name)
    found = spread(map(of, good(case))) if case else None
    return found.median if found else None


def _gap(name: str) -> Callable[[Run], float | None]:
    return lambda run: _median(run, name, lambda sample: sample.gap_ms)


def _growth(run: Run) -> float | None:
    """Milliseconds of the gap for each GiB more, between the smallest and the largest memory."""
    small, large = _gap("memory/64MiB/50")(run), _gap("memory/4GiB/50")(run)
    if small is None or large is None:
        return None
    return (large - small) / (4 - 1 / 16)


def _ssh(run: Run, link: str) -> float | None:
    """What ssh carries, MB/s: by the faster of its ciphers."""
    rates = [
        spread(each.values) for each in run.limits if each.name in (f"ssh, {link}", f"ssh aes128-gcm, {link}")
    ]
    return max((each.median for each in rates if each), default=None)


def _share_of_ssh(name: str, link: str) -> Callable[[Run], float | None]:
    def share(run: Run) -> float | None:
        rate, ssh = _median(run, name, lambda sample: sample.throughput), _ssh(run, link)
        return 100 * rate / 1e6 / ssh if rate and ssh else None

    return share


def _percent(name: str, of: Callable[[Sample], float | None]) -> Callable[[Run], float | None]:
    def percent(run: Run) -> float | None:
        found = _median(run, name, of)
        return None if found is None else 100 * found

    return percent


AIMS: Final = (
    Aim("1 GiB, 50 MB/s written: longest gap", "ms", 20, _gap("memory/1GiB/50")),
    Aim("each GiB more at 50 MB/s: longest gap grows by", "ms", 8, _growth),
    Aim("small process (16 MiB, one thread): longest gap", "ms", 15, _gap("threads/1")),
    Aim("1,000 threads: longest gap", "ms", 150, _gap("threads/1000")),
    Aim("1,000 connections: longest gap", "ms", 150, _gap("connections/1000")),
    Aim(
        "1,000 connections: a client waits",
        "ms",
        150,
        lambda run: _median(run, "connections/1000", lambda sample: sample.wait_ms),
    ),
    Aim(
        "incompressible memory: throughput of ssh's",
        "%",
        80,
        _share_of_ssh("content/incompressible", "unlimited"),
        least=True,
    ),
    Aim("the same at 1 Gbit/s", "%", 80, _share_of_ssh("links/1gbit", "1gbit"), least=True),
    Aim("the same at 100 Mbit/s", "%", 80, _share_of_ssh("links/100mbit", "100mbit"), least=True),
    Aim(
        "compressible memory: throughput of ssh's",
        "%",
        100,
        _share_of_ssh("content/compressible", "unlimited"),
        least=True,
    ),
    Aim(
        "1 GiB, 50 MB/s written: writes slower in pre-copy",
        "%",
        5,
        _percent("memory/1GiB/50", lambda sample: sample.slowdown),
    ),
    Aim(
        "the same with a thread that computes: it is slower in pre-copy",
        "%",
        5,
        _percent("slowdown/computing", lambda sample: sample.spin_slowdown),
    ),
)


def table(run: Run, aims: Iterable[Aim] = AIMS) -> Table:
    return Table("aims", ["aim", "limit", "measured", "reached"], [_row(aim, aim.value(run)) for aim in aims])


def _row(aim: Aim, value: float | None) -> list[str]:
    limit = f"{'≥' if aim.least else '≤'} {number(aim.limit)} {aim.unit}"
    if value is None:
        return [aim.name, limit, MEASURED, "–"]
    return [aim.name, limit, f"{number(value)} {aim.unit}", "yes" if aim.reached(value) else "**no**"]
