"""One picture for each benchmark: what the workload felt, and the steps of the pause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatter

from bench.results import Case, Run
from bench.stats import Spread, spread
from bench.table import benchmarks, good


def draw(run: Run, directory: Path) -> list[Path]:
    """One SVG a benchmark into `directory`; those of which nothing moved have none."""
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for name, cases in benchmarks(run).items():
        moved = [case for case in cases if good(case)]
        if moved:
            found.append(_draw(name, moved, directory / f"{name}.svg", f"{run.date}, commit {run.commit}"))
    return found


def _draw(name: str, cases: list[Case], path: Path, caption: str) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(1, 1.2), layout="constrained")
    _gaps(left, name, cases)
    _steps(right, cases)
    figure.suptitle(f"{name}: what the process felt of a move")
    figure.text(0.995, 0.985, caption, ha="right", va="top", fontsize=6, color="gray")
    figure.savefig(path)
    plt.close(figure)
    return path


def _gaps(axes: Any, name: str, cases: list[Case]) -> None:
    """Medians with least and greatest, one line a series."""
    places = list(dict.fromkeys(case.x for case in cases))
    for series in dict.fromkeys(case.series for case in cases):
        points = [(places.index(c.x), s) for c in cases if c.series == series and (s := _gap(c))]
        error = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
        axes.errorbar(
            [x for x, _ in points], [s.median for _, s in points], error, marker="o", capsize=4, label=series
        )
    axes.set_xticks(range(len(places)), places)
    axes.set(xlabel=name, ylabel="longest gap between heartbeats, ms", yscale="log")
    for shown in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        shown(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)


def _gap(case: Case) -> Spread | None:
    return spread(sample.gap_ms for sample in good(case))


def _steps(axes: Any, cases: list[Case]) -> None:
    """The medians of the steps, one on the other."""
    names = list(
        dict.fromkeys(p.name for c in cases for s in good(c) for p in s.phases if p.where == "source")
    )
    labels = [case.name.partition("/")[2] for case in cases]
    base = [0.0] * len(cases)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, name in enumerate(names):
        widths = [_step(case, name) for case in cases]
        axes.barh(labels, widths, left=base, label=name, color=colours[index % len(colours)])
        base = [a + b for a, b in zip(base, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="pause, ms: its steps on the source, medians")
    axes.legend(fontsize=7, ncols=2)


def _step(case: Case, name: str) -> float:
    found = spread(sum(p.ms for p in s.phases if p.name == name and p.where == "source") for s in good(case))
    return found.median if found else 0.0
