"""Whole programs moved between two engines of one host: no ssh, no network.

The copy lives in its own pid namespace. The program's output goes to a file, which both copies have.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from unit.children import compiled, ended, gone, wait_for

from agent import destination, source
from agent.api import (
    Checked,
    CheckResult,
    Event,
    Finished,
    MoveOptions,
    Outcome,
    Report,
    Request,
    StateChanged,
)
from agent.server.store import new_id


class Moving:
    """A compiled program and where it is now, by what it writes."""

    def __init__(self, directory: Path, text: str, *arguments: str | Path) -> None:
        self.output = directory / "output"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [compiled(text, "-pthread"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
            )
        self.pid = self.process.pid
        self.copies: list[int] = []

    def lines(self) -> list[str]:
        """What it has said so far, whole lines."""
        return self.output.read_text(errors="surrogateescape").split("\n")[:-1]

    def until(self, condition: Callable[[], bool]) -> None:
        wait_for(lambda: condition() or ended(self.pid), "the program")
        assert condition(), self.lines()[-5:]

    def progress(self) -> None:
        """It goes on."""
        start = len(self.lines())
        wait_for(lambda: len(self.lines()) > start + 3, "the program to go on")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.copies:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: gone(pid), "the copy to end")  # type: ignore[misc]


class Program(Moving):
    """One that goes wherever it is moved."""

    def __init__(self, directory: Path, text: str, *arguments: str) -> None:
        super().__init__(directory, text, *arguments)
        self.reports: list[Report] = []

    def wait_for(self, line: str) -> None:
        """Until it says so; what it says instead of that, and ends with, is shown."""
        wait_for(lambda: line in self.lines() or ended(self.pid), line)
        assert line in self.lines(), self.lines()[-5:]

    def next_lines(self, count: int) -> list[str]:
        """What it says from now on; the first line may be half said already, and is left out."""
        start = len(self.lines()) + 1
        wait_for(lambda: len(self.lines()) >= start + count or ended(self.pid), "more lines")
        return self.lines()[start : start + count]

    def move(self, prepare: Callable[[], None] = lambda: None, **options: object) -> Report:
        """It must move; `prepare` is done in the destination's process before it serves."""
        report = self.try_to_move(prepare, **options)
        assert report.outcome is Outcome.MIGRATED, (report.error, report.blockers)
        assert report.destination.pid is not None
        self.pid = report.destination.pid
        return report

    def try_to_move(self, prepare: Callable[[], None] = lambda: None, **options: object) -> Report:
        """How it went, which may be badly."""
        report = Move(self, MoveOptions(**options), prepare=prepare).report  # type: ignore[arg-type]
        assert report is not None
        self.reports.append(report)
        return report

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)


class Destination:
    """The other end, in a process of its own."""

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self.link, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.link.close()
                prepare()
                destination.serve(theirs.fileno(), os.dup(theirs.fileno()))
            finally:
                os._exit(0)
        theirs.close()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        wait_for(lambda: ended(self.pid), "the destination to end")

    def close(self) -> None:
        """It ends by itself when the link is closed."""
        wait_for(lambda: ended(self.pid), "the destination to end")
        os.waitpid(self.pid, 0)


class Move:
    """One migration: what was emitted, and what came of it. `on_state` is called in each state it enters."""

    def __init__(
        self,
        program: Moving | int,
        options: MoveOptions,
        on_state: Callable[[Move, str], None] = lambda *_: None,
        aborted: Callable[[Move], bool] = lambda _: False,
        prepare: Callable[[], None] = lambda: None,
        operation: str = "move",
        owner: int | None = None,
    ) -> None:
        self.name = new_id()
        self.events: list[Event] = []
        self.states: list[str] = []
        self._on_state = on_state
        self.destination = Destination(prepare)
        pid = program if isinstance(program, int) else program.pid
        request = Request(operation=operation, pid=pid, destination="here", options=options, owner=owner)  # type: ignore[arg-type]
        try:
            source.run(request, self.destination.link, self._emit, lambda: aborted(self), self.name)
        finally:
            gc.enable()
            gc.unfreeze()
            self.destination.close()
        if isinstance(program, Moving) and self.report is not None and self.report.destination.pid:
            program.copies.append(self.report.destination.pid)

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StateChanged):
            self.states.append(event.state)
            self._on_state(self, event.state)

    @property
    def report(self) -> Report | None:
        return next((e.report for e in self.events if isinstance(e, Finished)), None)

    @property
    def checked(self) -> CheckResult | None:
        return next((e.result for e in self.events if isinstance(e, Checked)), None)

    @property
    def migrated(self) -> Report:
        assert self.report is not None and self.report.outcome is Outcome.MIGRATED, self.report
        return self.report

    def rolled_back(self, kind: str, where: str) -> str:
        """It was rolled back for this reason; the message."""
        assert self.report is not None and self.report.error is not None
        assert (self.report.outcome, self.report.error.kind) == (Outcome.ROLLED_BACK, kind), self.report.error
        assert self.report.error.where == where
        assert [type(e) for e in self.events].count(Finished) == 1
        if self.report.destination.pid:
            wait_for(lambda: gone(self.report.destination.pid or 0), "the shadow to end")  # type: ignore[union-attr]
        return self.report.error.message


def try_to_move(pid: int, prepare: Callable[[], None] = lambda: None, **options: object) -> Report:
    """Any process; how it went."""
    report = Move(pid, MoveOptions(**options), prepare=prepare).report  # type: ignore[arg-type]
    assert report is not None
    return report


@contextlib.contextmanager
def running(directory: Path, text: str, *arguments: str) -> Iterator[Program]:
    """A program that has said "ready"."""
    program = Program(directory, text, *arguments)
    try:
        program.wait_for("ready")
        yield program
    finally:
        program.close()
