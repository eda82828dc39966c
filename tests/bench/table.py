"""A run as tables: one of moves and one of phases per benchmark, one of limits; as text and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from bench.results import Case, Limit, Run, Sample
from bench.stats import number, spread, written

GIB: Final = 1 << 30

Rows = list[list[str]]
Render = Callable[["Table"], str]


class Table(msgspec.Struct, frozen=True):
    title: str
    header: list[str]
    rows: Rows
    notes: list[str] = []


class Column(msgspec.Struct, frozen=True):
    name: str
    value: Callable[[Sample], float | None]
    scale: float = 1.0


def _cpu(sample: Sample) -> float | None:
    """Of both agents, for each GiB of the process's memory."""
    if sample.cpu_source_s is None or sample.cpu_destination_s is None or not sample.memory:
        return None
    return (sample.cpu_source_s + sample.cpu_destination_s) * GIB / sample.memory


def _cpu_seconds(sample: Sample) -> float | None:
    if sample.cpu_source_s is None or sample.cpu_destination_s is None:
        return None
    return sample.cpu_source_s + sample.cpu_destination_s


COLUMNS: Final = (
    Column("longest gap, ms", lambda s: s.gap_ms),
    Column("gap of the move, ms", lambda s: s.move_gap_ms),
    Column("client waits, ms", lambda s: s.wait_ms),
    Column("pause, ms", lambda s: s.pause_ms),
    Column("stop before, ms", lambda s: s.stop_ms),
    Column("total, s", lambda s: s.total_s),
    Column("rounds", lambda s: float(s.rounds)),
    Column("sent, MB", lambda s: float(s.sent), 1e-6),
    Column("first round, MB/s", lambda s: s.throughput, 1e-6),
    Column("on the link, MB/s", lambda s: s.link_rate, 1e-6),
    Column("CPU, s", _cpu_seconds),
    Column("CPU, s per GiB", _cpu),
    Column("writes slower, %", lambda s: s.slowdown, 100),
    Column("computes slower, %", lambda s: s.spin_slowdown, 100),
    Column("idle gap, ms", lambda s: s.idle_gap_ms),
)


def good(case: Case) -> list[Sample]:
    return [sample for sample in case.samples if sample.outcome == "migrated"]


def benchmarks(run: Run) -> dict[str, list[Case]]:
    """The cases that were run, by benchmark, in their order."""
    found: dict[str, list[Case]] = {}
    for case in run.cases:
        found.setdefault(case.benchmark, []).append(case)
    return found


def moves(name: str, cases: list[Case]) -> Table:
    """Medians (least..greatest); a column without any value is left out."""
    shown = [column for column in COLUMNS if any(_measured(column, case) for case in cases)]
    rows = [
        [_label(case), str(len(good(case))), *(_cell(column, case) for column in shown)] for case in cases
    ]
    return Table(
        f"{name}: moves", [name, "samples", *(column.name for column in shown)], rows, _failures(cases)
    )


def _label(case: Case) -> str:
    return f"{case.x}, {case.series}" if case.benchmark == "memory" else case.x


def _measured(column: Column, case: Case) -> bool:
    return any(column.value(sample) is not None for sample in good(case))


def _cell(column: Column, case: Case) -> str:
    return written(spread(column.value(sample) for sample in good(case)), column.scale)


def _failures(cases: Iterable[Case]) -> list[str]:
    notes = []
    for case in cases:
        bad = [sample for sample in case.samples if sample.outcome != "migrated"]
        for text in sorted({f"{sample.outcome}: {sample.error}" for sample in bad}):
            count = sum(f"{sample.outcome}: {sample.error}" == text for sample in bad)
            notes.append(f"{case.name}: {count} of {len(case.samples)} failed, {text}")
    return notes


def phases(name: str, cases: list[Case]) -> Table | None:
    """Median milliseconds of the source's steps, in their order; the destination's lie inside of them."""
    moved = [case for case in cases if good(case)]
    names = list(
        dict.fromkeys(p.name for case in moved for s in good(case) for p in s.phases if p.where == "source")
    )
    if not names:
        return None
    rows = [[_label(case), *(_phase(case, phase) for phase in names)] for case in moved]
    return Table(f"{name}: steps of the pause, ms", [name, *names], rows)


def _phase(case: Case, name: str) -> str:
    found = spread(
        sum(p.ms for p in sample.phases if p.name == name and p.where == "source") for sample in good(case)
    )
    return number(found.median) if found else "–"


def limits(found: Iterable[Limit]) -> Table:
    rows = [[each.name, each.error or written(spread(each.values)), each.unit, each.how] for each in found]
    return Table("limits", ["limit", "median", "unit", "how"], rows)


def tables(run: Run) -> list[Table]:
    found = [limits(run.limits)] if run.limits else []
    for name, cases in benchmarks(run).items():
        steps = phases(name, cases)
        found += [moves(name, cases), *([steps] if steps else [])]
    return found


def text(table: Table) -> str:
    """Columns as wide as they must be, headers broken at their words."""
    heads = [name.split(" ") for name in table.header]
    height = max(map(len, heads))
    top = [[words[i] if i < len(words) else "" for words in heads] for i in range(height)]
    widths = [max(len(row[i]) for row in [*top, *table.rows]) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in top
    ]
    lines.append("  ".join("-" * width for width in widths))
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table.rows
    ]
    return "\n".join([table.title, *lines, *table.notes])


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**", "", _line(table.header), _line(["---"] * len(table.header))]
    lines += [_line(row) for row in table.rows]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
