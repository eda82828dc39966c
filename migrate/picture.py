"""One migration as a picture: its rounds, and the steps of its pause at both ends.

The only module that needs matplotlib; nothing else imports it before a picture is asked for.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from agent.api import MigrationRecord, Phase, Report, Round
from migrate import units
from migrate.text import clean

PAGE: Final = 4096
MIB: Final = 1 << 20
SENT, DIRTY, PAUSE = "#4c78a8", "#e45756", "#f2cf5b"
# Paul Tol's "muted" and "light" colours, told apart by everybody; a step has the same at both ends.
COLOURS: Final = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499"),
    *("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00", "#bbbbbb"),
)
AFTER_COMMIT: Final = frozenset({"take over network", "resume"})  # of the destination's steps; others: before
LETTER: Final = 0.0115  # of the pause's width, in the lanes
_STYLE: Final[Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "migrate",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure(record: MigrationRecord) -> Figure:
    """The picture; it has as many parts as the report has to tell of."""
    report = record.report
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(10, 6.4), layout="constrained")
        made.suptitle(title(record), fontsize=11, x=0.01, ha="left", weight="bold")
        if report is None or not (report.rounds or report.phases):
            made.text(0.5, 0.5, "it ended before there was anything to draw", ha="center", color="gray")
            return made
        parts: list[tuple[int, Callable[[Axes], None]]] = []
        if report.rounds:
            parts.append((5, lambda axes: _draw_rounds(axes, report.rounds)))
        if report.phases:
            parts.append((4, lambda axes: _draw_pause(axes, report)))
        grid = made.subplots(len(parts), 1, height_ratios=[h for h, _ in parts], squeeze=False)
        for (_, draw), (axes,) in zip(parts, grid, strict=True):
            draw(axes)
    return made


def title(record: MigrationRecord) -> str:
    report = record.report
    if report is None:
        return f"process {record.request.pid} to {clean(record.request.destination)}: {record.status}"
    words = (
        f"{clean(report.source.host)}:{report.source.pid} to "
        f"{clean(report.destination.host)}: {report.outcome}"
    )
    pause = "" if report.pause_ms is None else f", pause {units.milliseconds(report.pause_ms)}"
    return f"{words}{pause}, {units.seconds(report.total_s)} in all"


def svg(record: MigrationRecord) -> str:
    """The picture as an SVG document."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure(record).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def page(record: MigrationRecord) -> str:
    """A page of its own: the picture and the report."""
    from migrate.report import console, of_move, of_record

    drawing = svg(record)
    words = io.StringIO()
    shown = console(words)
    shown.print(of_record(record))
    if record.report is not None:
        shown.print(of_move(record.report))
    heading = html.escape(title(record))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        "<style>body { font-family: sans-serif; margin: 2em; max-width: 72em } "
        "svg { width: 100%; height: auto }</style>\n"
        f"{drawing[drawing.index('<svg') :]}\n<pre>{html.escape(words.getvalue())}</pre>\n</html>\n"
    )


def _draw_rounds(axes: Axes, rounds: Sequence[Round]) -> None:
    """Each round as a bar as wide as it took; over them the rate at which the process wrote."""
    starts = [sum(before.seconds for before in rounds[:index]) for index in range(len(rounds))]
    for start, done in zip(starts, rounds, strict=True):
        last = done is rounds[-1]
        height = done.pages_sent * PAGE / MIB
        axes.bar(start, height, done.seconds, align="edge", color=PAUSE if last else SENT, edgecolor="white")
    whole = sum(done.seconds for done in rounds) or 1.0
    for start, done in zip(starts, rounds, strict=True):
        if done.seconds > 0.05 * whole:
            middle, height = start + done.seconds / 2, done.pages_sent * PAGE / MIB
            axes.annotate(str(done.number), (middle, height), (0, 2), textcoords="offset points", ha="center")
    axes.set(xlabel="seconds since pre-copy began", ylabel="memory sent, MiB", title="Rounds")
    axes.set_xlim(0, whole)
    axes.margins(y=0.12)
    rate = axes.twinx()
    rate.spines["right"].set_visible(True)
    rates = [done.dirty_rate / MIB for done in rounds]
    # a round tells what was written while the one before it ran
    rate.step(starts, [*rates[1:], rates[-1]], where="post", color=DIRTY, marker=".", linewidth=1.5)
    rate.set_ylabel("written by the process, MiB/s", color=DIRTY)
    rate.set_ylim(bottom=0, top=max(*rates, 1.0) * 1.15)
    key = {"a round's pages": SENT, "the pause's": PAUSE, "dirty rate": DIRTY}
    handles = [Patch(color=colour, label=label) for label, colour in key.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.09, 1.0), frameon=False)


def _draw_pause(axes: Axes, report: Report) -> None:
    """Two lanes. The source's steps follow each other; of the destination's only the last's end is known."""
    source = [phase for phase in report.phases if phase.where == "source"]
    lanes = {"source": _from(0.0, source), "destination": _destination(report.phases, source)}
    whole = max([end for lane in lanes.values() for _, _, end in lane] or [1.0])
    names = list(dict.fromkeys(phase.name for phase in report.phases))
    handles = []
    for position, (where, lane) in zip((1, 0), lanes.items(), strict=True):
        handles.append(Patch(alpha=0, label=where))
        for phase, start, end in lane:
            colour = COLOURS[names.index(phase.name) % len(COLOURS)]
            axes.barh(position, end - start, 0.62, start, color=colour, edgecolor="white", linewidth=0.6)
            name, spent = clean(phase.name), units.milliseconds(phase.ms)
            handles.append(Patch(color=colour, label=f"{spent}  {name}"))
            if end - start > LETTER * whole * max(len(name), len(spent)):
                middle = ((start + end) / 2, position)
                axes.text(
                    *middle, f"{name}\n{spent}", ha="center", va="center", fontsize=8, color=_ink(colour)
                )
    axes.set_yticks([0, 1], ["destination", "source"])
    axes.set(xlabel="milliseconds since the process was stopped", title="Inside the pause", ylim=(-0.5, 1.5))
    axes.set_xlim(0, whole * 1.01)
    if report.pause_ms is not None:
        axes.axvline(report.pause_ms, color="black", linewidth=1, linestyle=":")
        axes.text(report.pause_ms, 1.52, "runs again ", ha="right", va="bottom", fontsize=8)
    place = (1.005, 1.2)
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=place, frameon=False, fontsize=7.5, handlelength=1
    )


Lane = list[tuple[Phase, float, float]]


def _from(start: float, phases: Sequence[Phase]) -> Lane:
    """One after another."""
    lane: Lane = []
    for phase in phases:
        lane.append((phase, start, start + phase.ms))
        start += phase.ms
    return lane


def _destination(phases: Sequence[Phase], source: Sequence[Phase]) -> Lane:
    """Laid so that those before "ready" end with the source's wait for it, those after it with the commit."""
    ends = {phase.name: end for phase, _, end in _from(0.0, source)}
    last = max(ends.values(), default=0.0)
    theirs = [phase for phase in phases if phase.where == "destination"]
    before = [phase for phase in theirs if phase.name not in AFTER_COMMIT]
    after = [phase for phase in theirs if phase.name in AFTER_COMMIT]
    lane: Lane = []
    for group, end in ((before, ends.get("wait for ready", last)), (after, ends.get("commit", last))):
        lane += _from(max(0.0, end - sum(phase.ms for phase in group)), group)
    return lane


def _ink(colour: str) -> str:
    """Black or white, whichever can be read on it (ITU-R BT.601 luma)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
