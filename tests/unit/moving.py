"""Whole programs moved between two engines of one host: no ssh, no network. The copy lives in its own pid namespace.

The program's output goes to a file, which both copies have.
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
from agent.api import Finished, MoveOptions, Outcome, Report, Request


class Program:
    """A compiled program and where it is now."""

    def __init__(self, directory: Path, text: str, *arguments: str) -> None:
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
        self.reports: list[Report] = []

    def lines(self) -> list[str]:
        """What it has said so far, whole lines."""
        return self.output.read_text(errors="surrogateescape").split("\n")[:-1]

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
        self.copies.append(self.pid)
        return report

    def try_to_move(self, prepare: Callable[[], None] = lambda: None, **options: object) -> Report:
        """How it went, which may be badly."""
        report = try_to_move(self.pid, prepare, **options)
        self.reports.append(report)
        return report

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.copies:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: gone(pid), "the copy to end")  # type: ignore[misc]


def try_to_move(pid: int, prepare: Callable[[], None] = lambda: None, **options: object) -> Report:
    """Any process; `prepare` is done in the destination's before it serves."""
    found: list[Report] = []

    def emit(event: object) -> None:
        if isinstance(event, Finished):
            found.append(event.report)

    request = Request(operation="move", pid=pid, destination="here", options=MoveOptions(**options))  # type: ignore[arg-type]
    with destination_process(prepare) as link:
        try:
            source.run(request, link, emit, lambda: False)
        finally:
            gc.enable()
            gc.unfreeze()
    return found[0]


@contextlib.contextmanager
def destination_process(prepare: Callable[[], None] = lambda: None) -> Iterator[socket.socket]:
    """A destination agent as a child; our end of the link to it."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            prepare()
            destination.serve(theirs.fileno(), os.dup(theirs.fileno()))
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield ours
    finally:
        wait_for(lambda: ended(pid), "the destination to end")
        os.waitpid(pid, 0)


@contextlib.contextmanager
def running(directory: Path, text: str, *arguments: str) -> Iterator[Program]:
    """A program that has said "ready"."""
    program = Program(directory, text, *arguments)
    try:
        program.wait_for("ready")
        yield program
    finally:
        program.close()
