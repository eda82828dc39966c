"""`python -m fuzz.worker TARGET SECONDS DIRECTORY`: one target, guided by the code that its input reaches.

A process of its own (atheris), with a limit on its address space: whatever decoding allocates beyond that is
a crash. So is any exception that the target lets through, and input that takes longer than TIMEOUT. Crashes
are written to DIRECTORY as they are found, one of each place, and the run goes on; the figures are in
DIRECTORY/figures.json.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

import atheris
import msgspec

ROOM = 512 << 20  # bytes of address space that decoding may take, whatever the input
MAX_INPUT = 1 << 16
TIMEOUT = 20  # seconds
MEASURED = 32  # one run of so many is measured by tracemalloc, which makes it slow

with atheris.instrument_imports(include=["agent", "transport", "migrate"]):
    from fuzz.target import Target, allowed, peak_of
    from fuzz.targets import TARGETS


class Figures(msgspec.Struct):
    """How a run of one target went."""

    target: str
    executions: int = 0
    understood: int = 0
    seconds: float = 0.0
    peak: int = 0  # bytes, the most that one input made it allocate
    slowest_ms: float = 0.0  # of a CPU
    crashes: dict[str, str] = {}  # place -> file


class Run:
    """Counts, and keeps what went wrong."""

    def __init__(self, target: Target, directory: Path) -> None:
        self._target = target
        self._directory = directory
        self._began = self._written = time.monotonic()
        self.figures = Figures(target.name)

    def one(self, data: bytes) -> None:
        figures = self.figures
        figures.executions += 1
        began = time.process_time()
        try:
            if figures.executions % MEASURED:
                figures.understood += self._target.run(data)
            else:
                self._measure(data)
        except Exception as error:
            self._keep(error, data)
        figures.slowest_ms = max(figures.slowest_ms, (time.process_time() - began) * 1000)
        now = time.monotonic()
        if now - self._written > 0.5:
            self._write(now)

    def _measure(self, data: bytes) -> None:
        peak = peak_of(self._target, data)
        self.figures.peak = max(self.figures.peak, peak)
        if peak > allowed(self._target, data):
            raise MemoryError(f"{peak} bytes for {len(data)}")

    def _keep(self, error: Exception, data: bytes) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {last.filename}:{last.lineno}"
        if place not in self.figures.crashes:
            file = self._directory / f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
            file.write_bytes(data)
            file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
            self.figures.crashes[place] = file.name
            self._write(time.monotonic())

    def _write(self, now: float) -> None:
        self._written = now
        self.figures.seconds = now - self._began
        (self._directory / "figures.json").write_bytes(msgspec.json.encode(self.figures))


def mutator(target: Target) -> Any:
    """Most changes know the form of the input, the others are libFuzzer's."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        data = bytes(data)
        if random.random() < 0.25:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, random)[:max_size]

    return mutate


def _limit() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))


def main() -> None:
    name, seconds, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    target = TARGETS[name]
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    run = Run(target, directory)
    options = [
        str(corpus),
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT}",
        f"-timeout={TIMEOUT}",
        f"-artifact_prefix={directory}/",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options], run.one, custom_mutator=mutator(target))
    _limit()
    atheris.Fuzz()


if __name__ == "__main__":
    main()
