"""What a run found, as its JSON file holds it: every single sample, and all that is needed to repeat it.

Sizes are bytes, durations milliseconds if the name ends in `_ms`, seconds if in `_s`, rates are a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

FORMAT: Final = 1


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran. All hosts of the lab share it."""

    cpu: str
    cores: int
    memory: int
    kernel: str
    python: str
    openssh: str


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is moved: tests/programs/heartbeat and its options."""

    megabytes: int = 16
    rate: float = 0.0  # MB a second that it writes, in whole pages at random places
    fill: str = "random"
    mappings: int = 1
    threads: int = 1  # in all, apart from its own two or three
    connections: int = 0
    spin: bool = False  # with a thread that computes all the time


class Phase(msgspec.Struct, frozen=True):
    name: str
    where: str
    ms: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One move. What is None could not be measured: it failed, or there was nothing to measure."""

    outcome: str
    error: str = ""
    gap_ms: float | None = None  # the workload's longest without a heartbeat, while the command ran
    move_gap_ms: float | None = None  # the one after which it found itself on the other host
    idle_gap_ms: float | None = None  # the longest in the second before: what the machine does by itself
    wait_ms: float | None = None  # of a client for its answer, at the longest
    pause_ms: float | None = None  # by the agents' clock
    stop_ms: float | None = None  # the longest stop before the pause
    phases: tuple[Phase, ...] = ()
    total_s: float | None = None  # by the agents' clock
    command_s: float | None = None  # `migrate move` from start to end
    precopy_s: float | None = None
    rounds: int = 0
    memory: int = 0
    sent: int = 0
    throughput: float | None = None  # of memory in the first round
    link_rate: float | None = None  # of bytes on the link in the first round
    cpu_source_s: float | None = None
    cpu_destination_s: float | None = None
    slowdown: float | None = None  # of what it writes, during pre-copy: 0.05 is 5 %
    spin_slowdown: float | None = None  # of what it computes


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a benchmark's table, and its samples."""

    benchmark: str
    name: str
    series: str  # which line of the picture
    x: str  # where on it
    workload: Workload
    bandwidth: str | None = None  # of each host's link, as tc(8) writes it
    at_most: int | None = None  # samples: what takes minutes is not repeated as often
    samples: tuple[Sample, ...] = ()


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine does without us."""

    name: str
    unit: str
    values: tuple[float, ...]
    error: str = ""
    how: str = ""


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What was run, when and where."""

    command: str
    date: str  # UTC
    commit: str
    changed: bool  # whether the checkout had changes that were not committed
    seconds: float
    load: float  # what else ran when it began: the load average of a minute
    machine: Machine


class Run(Ran, frozen=True, kw_only=True):
    format: int = FORMAT
    limits: tuple[Limit, ...]
    cases: tuple[Case, ...]


def load(path: Path) -> Run:
    """The run that a file holds; msgspec.ValidationError if it is not one, of this format."""
    run = msgspec.json.decode(path.read_bytes(), type=Run)
    if run.format != FORMAT:
        raise msgspec.ValidationError(f"{path}: format {run.format}, not {FORMAT}")
    return run


def save(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
