"""A run as tables: what each kind of step cost the process, and what grew."""

from __future__ import annotations

from bench.stats import number, spread
from bench.table import Table

from endurance.growth import Growth
from endurance.series import Done, Run
from endurance.steps import FAILURES, SUCCESS

_HEADER = ["step", "times", "ended as", "longest gap, ms: median", "most", "client waits, ms: median", "most"]


def costs(run: Run) -> Table:
    """By kind, in the order of a move; the first row is the process left alone."""
    kinds = [kind.name for kind in (SUCCESS, *FAILURES)]
    rows = [_row(name, [one for one in run.done if one.kind == name]) for name in kinds]
    idle = ["none", str(len(run.idle_ms)), "", *_cells(run.idle_ms), "", ""]
    return Table("what a step costs", _HEADER, [idle, *(row for row in rows if row)])


def _row(name: str, done: list[Done]) -> list[str]:
    if not done:
        return []
    outcomes = "; ".join(sorted({one.outcome for one in done}))
    gaps, waits = _cells([one.gap_ms for one in done]), _cells([one.wait_ms for one in done])
    return [name, str(len(done)), outcomes, *gaps, *waits]


def _cells(values: list[float] | tuple[float, ...]) -> list[str]:
    found = spread(values)
    return [number(found.median), number(found.high)] if found else ["–", "–"]


def growth(run: Run) -> Table:
    header = ["figure", "first quarter", "last quarter", "at most", ""]
    return Table("what grows", header, [_growth(each) for each in run.growth])


def _growth(found: Growth) -> list[str]:
    allowed = "any" if found.allowed is None else _exact(found.allowed)
    return [found.figure, _exact(found.first), _exact(found.last), allowed, "GROWS" if found.grown else ""]


def _exact(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.1f}"
