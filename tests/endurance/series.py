"""A run: one process, moved to and fro by the same two services, with every second move failing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Final

import msgspec
from bench.results import Ran
from faults import evidence
from faults.campaign import Campaign
from faults.hosts import first
from faults.verdict import Verdict

from endurance import growth, usage
from endurance.steps import SUCCESS, Step

_PROCESSES: Final = 20
IDLE_EVERY: Final = 10  # steps
SETTLE: Final = 2.0  # seconds
IDLE: Final = 2.0  # seconds in which nothing is done: what the machine does by itself


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A step and what came of it."""

    number: int
    kind: str
    fails: bool  # was meant to
    source: str
    fault: str
    outcome: str
    gap_ms: float  # the process's longest without a heartbeat
    wait_ms: float  # its client's longest for an answer
    pause_ms: float | None  # by the report, if it moved
    machine_ms: float  # what `work` took right before
    seconds: float  # of the command
    problems: tuple[str, ...]


class Run(Ran, frozen=True, kw_only=True):
    seed: int
    steps: int  # that were asked for
    idle_ms: tuple[float, ...]  # longest gaps while nothing is done
    done: tuple[Done, ...]
    samples: tuple[usage.Sample, ...]  # one after each step

    @property
    def growth(self) -> list[growth.Growth]:
        found = growth.growth(self.samples) if self.samples else []
        return [*found, *growth.drift(*self._pauses())]

    def _pauses(self) -> tuple[list[float], list[float]]:
        """Of the moves without a fault; and what the machine took before each."""
        moves = [(one.pause_ms, one.machine_ms) for one in self.done if one.kind == SUCCESS.name]
        known = [(pause, machine) for pause, machine in moves if pause is not None]
        return [pause for pause, _ in known], [machine for _, machine in known]

    @property
    def problems(self) -> list[str]:
        """Empty: all is as it must be."""
        found = [f"step {one.number}, {one.kind}: {text}" for one in self.done for text in one.problems]
        found += [
            f"{each.figure} grows: {each.first:g}, then {each.last:g}" for each in self.growth if each.grown
        ]
        if len(self.done) < self.steps:
            found.append(f"{len(self.done)} of {self.steps} steps were made")
        return found


class Series:
    """Makes steps until one goes wrong: after that the hosts are not what they were."""

    def __init__(self, campaign: Campaign, say: Callable[[str], None]) -> None:
        self.done: list[Done] = []
        self.samples: list[usage.Sample] = []
        self.idle: list[float] = []
        self._campaign = campaign
        self._say = say
        _, self._subject = campaign.up()
        self._services = {host.name: host.agents(["service"])[0].pid for host in campaign.hosts.values()}

    def run(self, steps: list[Step]) -> Verdict | None:
        """The verdict of the step that went wrong, if one did."""
        for step in steps:
            if step.number % IDLE_EVERY == 1:
                self._rest()
            machine = work()
            verdict = self._campaign.run(step.case)
            self.done.append(_done(step, verdict, machine))
            self._say(evidence.line(step.number, verdict))
            if verdict.problems:
                return verdict
            self.samples.append(self._sample())
        return None

    def _sample(self) -> usage.Sample:
        """When what ends by itself has ended, such as a socket that is being closed, or after a while."""
        before = self.samples[-1] if self.samples else {}
        found: usage.Sample = {}

        def more() -> list[str]:
            found.update(usage.sample(self._campaign.hosts.values(), self._services, self._subject))
            return usage.more(found, before)

        first(more, SETTLE)
        return found

    def _rest(self) -> None:
        self._subject.new_window()
        time.sleep(IDLE)
        self.idle.append(self._subject.gap_ms())


def work() -> float:
    """Milliseconds for some processes that start and end, one after another: how fast the machine is now."""
    began = time.perf_counter()
    for _ in range(_PROCESSES):
        subprocess.run(["true"], check=True)
    return (time.perf_counter() - began) * 1000


def _done(step: Step, verdict: Verdict, machine: float) -> Done:
    return Done(
        number=step.number,
        kind=step.kind.name,
        fails=step.kind is not SUCCESS,
        source=verdict.source,
        fault="; ".join(map(str, step.case.faults)),
        outcome=verdict.outcome,
        gap_ms=verdict.gap_ms,
        wait_ms=verdict.wait_ms,
        pause_ms=verdict.ended.report.get("pause_ms"),
        machine_ms=round(machine, 2),
        seconds=round(verdict.ended.seconds, 2),
        problems=tuple(map(str, verdict.problems)),
    )
