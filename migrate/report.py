"""Reports for people: what became of a migration, what stands in the way of one, what runs on a host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import IO, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agent.api import (
    Blocker,
    CheckResult,
    Endpoint,
    ErrorInfo,
    MigrationRecord,
    Notice,
    Outcome,
    Phase,
    ProcessInfo,
    Report,
    Round,
)
from migrate import units
from migrate.text import clean

WIDTH_WITHOUT_TERMINAL: Final = 140

_HEADLINE: Final = {
    Outcome.MIGRATED: ("migrated", "bold green"),
    Outcome.REFUSED: ("refused: nothing was touched, the process runs on where it is", "bold red"),
    Outcome.ROLLED_BACK: ("rolled back: the process runs on where it was", "bold yellow"),
    Outcome.IN_DOUBT: ("in doubt: look at both hosts before anything else", "bold red"),
}

_SHOWN: Final = 3  # of things that stand in the way for the same reason


def console(file: IO[str] | None = None) -> Console:
    """Standard output, as wide as it is; wide enough for tables where it is no terminal."""
    found = Console(highlight=False, markup=False, file=file)
    if not found.is_terminal:
        found.width = WIDTH_WITHOUT_TERMINAL
    return found


def of_move(report: Report) -> RenderableType:
    """A finished migration."""
    headline, style = _HEADLINE[report.outcome]
    way = f"{_endpoint(report.source)} -> {_endpoint(report.destination)}"
    parts: list[RenderableType] = [Text.assemble((headline, style), f"   {way}")]
    if report.error is not None:
        parts.append(_error(report.error))
    parts += [_facts(_move_facts(report)), *_blockers(report.blockers), *_notices(report.notices)]
    if report.rounds:
        parts.append(_rounds(report.rounds))
    if report.phases:
        parts.append(_phases(report.phases))
    return Group(*parts)


def of_check(result: CheckResult) -> RenderableType:
    """What would happen."""
    way = f"{_endpoint(result.source)} -> {_endpoint(result.destination)}"
    if result.blockers:
        headline = Text.assemble(("cannot be moved", "bold red"), f"   {way}")
    else:
        headline = Text.assemble(("can be moved", "bold green"), f"   {way}")
    parts = [headline, _facts(_check_facts(result)), *_blockers(result.blockers), *_notices(result.notices)]
    return Group(*parts)


def of_processes(processes: Iterable[ProcessInfo]) -> Table:
    """The processes of a host."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("pid", "memory", "threads", "sockets", "dirty rate"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("user", no_wrap=True)
    table.add_column("movable", min_width=32)
    table.add_column("command", no_wrap=True, overflow="ellipsis", max_width=44)
    for process in processes:
        table.add_row(
            str(process.pid),
            units.size(process.memory_bytes),
            str(process.threads),
            str(process.sockets),
            "" if process.dirty_rate is None else units.rate(process.dirty_rate),
            Text(clean(process.user)),
            _movable(process.blockers),
            Text(clean(process.command)),
        )
    return table


def of_migrations(records: Iterable[MigrationRecord]) -> RenderableType:
    """A list of them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("migration", "started", "pid", "to", "state"):
        table.add_column(name, no_wrap=True, justify="right" if name == "pid" else "left")
    table.add_column("pause", justify="right", no_wrap=True)
    for record in records:
        pause = record.report.pause_ms if record.report is not None else None
        table.add_row(
            record.id,
            _when(record.created),
            str(record.request.pid),
            Text(clean(record.request.destination)),
            _how_far(record),
            "" if pause is None else units.milliseconds(pause),
        )
    return table if table.row_count else Text("there are none")


def of_record(record: MigrationRecord) -> RenderableType:
    """One of them, in short."""
    facts = [
        ("migration", record.id),
        ("process", str(record.request.pid)),
        ("to", clean(record.request.destination)),
        ("started", _when(record.created)),
        ("ended", _when(record.finished) if record.finished else ""),
        ("state", _how_far(record).plain),
    ]
    if record.status == "running":
        alone = {"abort": "it is given up", "continue": "it goes on"}
        facts.append(("if nobody watches", alone[record.request.on_disconnect]))
    parts: list[RenderableType] = [_facts([fact for fact in facts if fact[1]])]
    if record.report is not None and record.report.error is not None:
        parts.append(_error(record.report.error))
    return Group(*parts)


def _when(time: datetime) -> str:
    return time.astimezone().isoformat(sep=" ", timespec="seconds")


def _how_far(record: MigrationRecord) -> Text:
    if record.report is not None:
        outcome = record.report.outcome
        return Text(outcome, style=_HEADLINE[outcome][1])
    if record.status == "lost":
        return Text("lost: the agent's service ended before it did", style="bold red")
    return Text(clean(record.state) or "connecting")


def _movable(blockers: Sequence[Blocker]) -> Text:
    if not blockers:
        return Text("yes", style="green")
    return Text(clean("no: " + ", ".join(sorted({b.kind for b in blockers}))))


def _endpoint(endpoint: Endpoint) -> str:
    host = clean(endpoint.host) or "?"
    return host if endpoint.pid is None else f"{host}:{endpoint.pid}"


def _error(error: ErrorInfo) -> Text:
    where = "" if error.where == "coordinator" else f" ({error.where})"
    return Text(clean(f"{error.kind}{where}: {error.message}"), style="red")


def _move_facts(report: Report) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if report.pause_ms is not None:
        facts.append(("pause", units.milliseconds(report.pause_ms)))
    if report.longest_stop_ms is not None:
        facts.append(("longest stop before it", units.milliseconds(report.longest_stop_ms)))
    if report.total_s:
        facts.append(("total", units.seconds(report.total_s)))
    if report.memory_bytes:
        facts.append(("memory", units.size(report.memory_bytes)))
    if report.bytes_sent:
        facts.append(("on the link", f"{units.size(report.bytes_sent)}{_ratio(report)}"))
    if report.address_moved:
        facts.append(("addresses moved", ", ".join(map(clean, report.address_moved))))
    if report.verified_pages is not None:
        facts.append(("verified", f"{units.count(report.verified_pages)} pages are the same on both sides"))
    return facts


def _ratio(report: Report) -> str:
    if not report.memory_bytes:
        return ""
    return f" ({report.bytes_sent / report.memory_bytes:.1%} of the memory)"


def _check_facts(result: CheckResult) -> list[tuple[str, str]]:
    facts = [
        ("command", clean(result.command)),
        ("memory", f"{units.size(result.memory_bytes)} in {units.count(result.mappings)} mappings"),
        ("threads", units.count(result.threads)),
        ("descriptors", units.count(result.descriptors)),
        ("connections", units.count(result.connections)),
        ("changed pages by", clean(result.dirty_tracking)),
    ]
    if result.addresses:
        facts.append(("addresses to move", ", ".join(map(clean, result.addresses))))
    return facts


def _facts(facts: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def _blockers(blockers: Sequence[Blocker]) -> list[RenderableType]:
    if not blockers:
        return []
    parts: list[RenderableType] = [Text(f"\nwhat stands in the way ({len(blockers)}):", style="bold")]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for blocker in blockers:
        alike.setdefault((blocker.kind, blocker.why, blocker.hint), []).append(blocker.what)
    for (kind, why, hint), things in alike.items():
        for what in things[:_SHOWN]:
            parts.append(Text.assemble("  ", (clean(what), "bold"), f"  [{clean(kind)}]"))
        if len(things) > _SHOWN:
            parts.append(Text(f"  and {len(things) - _SHOWN} more"))
        parts.append(Padding(Text(clean(why)), (0, 0, 0, 6)))
        if hint:
            parts.append(Padding(Text(clean(f"-> {hint}"), style="dim"), (0, 0, 0, 6)))
    return parts


def _notices(notices: Sequence[Notice]) -> list[RenderableType]:
    if not notices:
        return []
    head = Text("\nwhat will not be quite the same:", style="bold")
    return [head, *(Text(clean(f"  {n.message}  [{n.kind}]")) for n in notices)]


def _rounds(rounds: Sequence[Round]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title="rounds (the last one is the pause's)", title_justify="left"
    )
    for name in ("round", "pages", "discarded", "on the link", "time", "dirty rate before"):
        table.add_column(name, justify="right", no_wrap=True)
    for done in rounds:
        table.add_row(
            str(done.number),
            units.count(done.pages_sent),
            units.count(done.pages_discarded),
            units.size(done.bytes),
            units.seconds(done.seconds),
            units.rate(done.dirty_rate) if done.dirty_rate else "",
        )
    return table


def _phases(phases: Sequence[Phase]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="inside the pause", title_justify="left")
    table.add_column("phase")
    table.add_column("source", justify="right", no_wrap=True)
    table.add_column("destination", justify="right", no_wrap=True)
    for phase in phases:
        spent = units.milliseconds(phase.ms)
        table.add_row(Text(clean(phase.name)), *((spent, "") if phase.where == "source" else ("", spent)))
    return table
