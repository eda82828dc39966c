"""How a person sees many moves: tables, and what stands in the way of each that could not be made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agent.api import ErrorInfo, Report
from agent.hook_api import DrainedProcess, DrainReport, Result, Status, Tried
from migrate import report, units
from migrate.plan.outcome import MoveResult, PlanReport
from migrate.text import clean

_STYLES: Final = {
    "ready": "green",
    "migrated": "green",
    "refused": "red",
    "rolled-back": "yellow",
    "in-doubt": "bold red",
    "not-started": "dim",
    "not-covered": "dim",
}
_HEADLINES: Final[dict[Result, str]] = {
    "ready": "nothing stands in the way",
    "migrated": "all moved",
    "refused": "what is listed as refused, or as not started, was not touched",
    "rolled-back": "what is listed as rolled back runs on where it was",
    "in-doubt": "in doubt: look at both hosts before anything else",
}


def of_plan(plan: PlanReport) -> RenderableType:
    """The table of moves, and under it what stood in the way."""
    table = _table("move", "pid", "from", "to")
    for each in plan.moves:
        pid = "" if each.process is None else str(each.process.pid)
        table.add_row(
            clean(each.name), pid, each.source, _arrived(each.destination, each.report), *_how(each)
        )
    details = [part for each in plan.moves for part in _of_move(each)]
    return Group(_headline(plan.outcome, [each.status for each in plan.moves], plan.error), table, *details)


def of_drain(drain: DrainReport, all: bool) -> RenderableType:
    """The same for a host that was to be emptied; processes that the plan does not cover only with `all`."""
    table = _table("process", "pid", "rule", "to")
    covered = [each for each in drain.processes if each.status != "not-covered"]
    for each in drain.processes if all else covered:
        name, pid = clean(each.process.name), str(each.process.pid)
        to = "" if each.destination is None else clean(each.destination.host)
        table.add_row(name, pid, clean(each.rule or ""), _arrived(to, each.report), *_how(each))
    left = (
        f"{len(drain.processes) - len(covered)} processes of {clean(drain.host)} are not covered by the plan"
    )
    details = [part for each in covered for part in _of_process(each)]
    headline = _headline(drain.outcome, [each.status for each in covered], drain.error)
    return Group(headline, table, Text(left, style="dim"), *details)


def _table(*names: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True, justify="right" if name == "pid" else "left")
    table.add_column("outcome", no_wrap=True)
    for name in ("pause", "total", "on the link"):
        table.add_column(name, no_wrap=True, justify="right")
    return table


def _headline(outcome: Result, statuses: Sequence[Status], error: ErrorInfo | None) -> Text:
    words = _HEADLINES[outcome]
    if outcome not in ("ready", "migrated"):
        counts: Counter[str] = Counter(statuses)
        words = f"{', '.join(f'{count} {status}' for status, count in counts.items())}: {words}"
    return Text(
        words + (f"\n{clean(error.message)}" if error is not None else ""), style=f"bold {_STYLES[outcome]}"
    )


def _arrived(host: str, report: Report | None) -> str:
    pid = report.destination.pid if report is not None else None
    return clean(host) if pid is None else f"{clean(host)}:{pid}"


def _how(each: MoveResult | DrainedProcess) -> tuple[RenderableType, ...]:
    status = Text(each.status, style=_STYLES[each.status])
    report = each.report
    if report is None or report.pause_ms is None:
        return status, "", "", ""
    return (
        status,
        units.milliseconds(report.pause_ms),
        units.seconds(report.total_s),
        units.size(report.bytes_sent),
    )


def _of_move(each: MoveResult) -> Iterable[RenderableType]:
    """Why it was not made."""
    if each.check is not None and each.status == "refused" and each.report is None:
        yield Text(f"\n{clean(each.name)}:", style="bold")
        yield Padding(report.of_check(each.check), (0, 0, 0, 2))
    elif each.report is not None and each.status != "migrated":
        yield Text(f"\n{clean(each.name)}:", style="bold")
        yield Padding(report.of_move(each.report), (0, 0, 0, 2))


def _of_process(each: DrainedProcess) -> Iterable[RenderableType]:
    if each.status == "refused":
        for tried in each.tried:
            way = f" -> {clean(tried.destination)}" if tried.destination else ""
            yield Text(f"\n{clean(each.process.name)} {each.process.pid}{way}:", style="bold")
            yield Padding(_of_tried(tried), (0, 0, 0, 2))
    elif each.report is not None and each.status != "migrated":
        yield Padding(report.of_move(each.report), (1, 0, 0, 2))


def _of_tried(tried: Tried) -> RenderableType:
    if tried.check is not None:
        return report.of_check(tried.check)
    assert tried.error is not None
    return Text(clean(f"{tried.error.kind}: {tried.error.message}"), style="red")
