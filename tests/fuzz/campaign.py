"""`python -m fuzz.campaign [--minutes N] [--only TARGET ...]`: each target for its share of the time.

What came of it is printed as a table; what was found stays in build/fuzz/TARGET, inputs that reach new code
in its corpus, where the next campaign begins. The status is 1 if anything crashed, hung or took too much
memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import msgspec
from fuzz.targets import TARGETS
from fuzz.worker import ROOM, TIMEOUT, Figures

BUILD = Path(__file__).parent.parent.parent / "build" / "fuzz"
GRACE = 2 * TIMEOUT


def run(name: str, seconds: int) -> Figures:
    """One target, in a process of its own."""
    directory = BUILD / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "figures.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "fuzz.worker", name, str(seconds), str(directory)]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            status = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    figures = _figures(name, directory)
    if status:
        figures.crashes[f"ended with status {status}"] = "log"
    return figures


def _figures(name: str, directory: Path) -> Figures:
    try:
        return msgspec.json.decode((directory / "figures.json").read_bytes(), type=Figures)
    except FileNotFoundError:
        return Figures(name)


HEAD = ("target", "executions", "a second", "understood", "corpus", "crashes", "peak KiB", "slowest ms")


def row(figures: Figures) -> tuple[str, ...]:
    count = figures.executions
    return (
        figures.target,
        f"{count:,}",
        f"{count / (figures.seconds or 1):,.0f}",
        f"{100 * figures.understood / (count or 1):.0f} %",
        f"{len(list((BUILD / figures.target / 'corpus').glob('*'))):,}",
        str(len(figures.crashes)),
        f"{figures.peak / 1024:,.0f}",
        f"{figures.slowest_ms:.0f}",
    )


def show(cells: tuple[str, ...]) -> None:
    first, *rest = cells
    print(f"{first:14}" + "".join(f"{cell:>12}" for cell in rest), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", action="append", choices=sorted(TARGETS), metavar="TARGET")
    options = parser.parse_args()
    names = options.only or list(TARGETS)
    seconds = max(1, int(options.minutes * 60 / len(names)))
    print(f"{len(names)} targets, {seconds} s each; an input may take {ROOM >> 20} MiB and {TIMEOUT} s")
    show(HEAD)
    found = []
    for name in names:
        found.append(run(name, seconds))
        show(row(found[-1]))
    for figures in found:
        for place, file in figures.crashes.items():
            print(f"{figures.target}: {place}: {BUILD / figures.target / file}")
    print(f"{sum(f.executions for f in found):,} executions, {sum(len(f.crashes) for f in found)} crashes")
    return int(any(figures.crashes for figures in found))


if __name__ == "__main__":
    sys.exit(main())
