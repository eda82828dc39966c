"""What a person sees while a migration runs.

A live line on a terminal, plain lines elsewhere; always on standard error.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Final, Protocol, TextIO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from agent.api import Event, Log, Progress, RoundFinished, StateChanged
from migrate import units
from migrate.text import clean

PLAIN_INTERVAL: Final = 5.0  # seconds between two progress lines where nobody can overwrite the last one
PAGE: Final = 4096
_LEVELS: Final = {"debug": 0, "info": 1, "warning": 2, "error": 3}
_STYLES: Final = {"warning": "yellow", "error": "red"}


class Presenter(Protocol):
    """Takes every event of a migration, in order."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


def describe_state(event: StateChanged) -> str:
    return clean(f"{event.state} {event.detail}".rstrip())


def describe_round(event: RoundFinished) -> str:
    """One finished round in a line."""
    done = event.round
    return (
        f"round {done.number}: {units.count(done.pages_sent)} pages, {units.size(done.bytes)} on the link in "
        f"{units.seconds(done.seconds)}; {units.count(event.remaining_pages)} pages remain, "
        f"pause would be {units.milliseconds(event.estimated_pause_ms)}"
    )


def describe_progress(event: Progress) -> str:
    """The middle of a round in a line."""
    remaining = max(0, event.pages_total - event.pages_done)
    return (
        f"round {event.round}: {units.count(event.pages_done)} of {units.count(event.pages_total)} pages, "
        f"{units.rate(event.rate)}, {units.size(remaining * PAGE)} remain"
    )


def threshold(verbose: int, quiet: bool) -> int:
    """The lowest level of a log message that is shown."""
    return _LEVELS["error"] if quiet else max(0, _LEVELS["warning"] - verbose)


class PlainLines:
    """A line for each state and round, and some within a long one; `about` begins each, if many speak."""

    def __init__(self, stream: TextIO, level: int, quiet: bool = False, about: str = "") -> None:
        self._stream = stream
        self._level = level
        self._quiet = quiet
        self._prefix = f"{clean(about)}: " if about else ""
        self._last = time.monotonic()

    def show(self, event: Event) -> None:
        if isinstance(event, Log):
            if _LEVELS[event.level] >= self._level:
                self._line(f"{event.level}: {clean(event.message)}")
        elif self._quiet:
            return
        elif isinstance(event, StateChanged):
            self._line(describe_state(event))
        elif isinstance(event, RoundFinished):
            self._line(describe_round(event))
        elif isinstance(event, Progress) and time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._line(describe_progress(event))

    def close(self) -> None:
        """Nothing is left to undo."""

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        print(self._prefix + text, file=self._stream, flush=True)


class LiveLine:
    """One line that renews itself, with finished rounds and messages above it."""

    def __init__(self, console: Console, level: int) -> None:
        self._console = console
        self._level = level
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[what]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task("connecting", total=None, what="")
        self._pause = ""
        self._bar.start()

    def show(self, event: Event) -> None:
        if isinstance(event, Log):
            if _LEVELS[event.level] >= self._level:
                text = f"{event.level}: {clean(event.message)}"
                self._console.print(Text(text, style=_STYLES.get(event.level, "dim")))
        elif isinstance(event, StateChanged):
            self._update(clean(event.state), None, 0, clean(event.detail))
        elif isinstance(event, RoundFinished):
            self._pause = f", pause ≈ {units.milliseconds(event.estimated_pause_ms)}"
            self._console.print(Text(describe_round(event), style="dim"))
        elif isinstance(event, Progress):
            self._show_progress(event)

    def refresh(self) -> None:
        """Draw the line now, not at the next tick."""
        self._bar.refresh()

    def close(self) -> None:
        self._bar.stop()

    def _show_progress(self, event: Progress) -> None:
        if event.estimated_pause_ms is not None:
            self._pause = f", pause ≈ {units.milliseconds(event.estimated_pause_ms)}"
        remaining = max(0, event.pages_total - event.pages_done) * PAGE
        what = (
            f"{units.count(event.pages_done)}/{units.count(event.pages_total)} pages, "
            f"{units.rate(event.rate)}, {units.size(remaining)} remain{self._pause}"
        )
        self._update(f"round {event.round}", event.pages_total, event.pages_done, what)

    def _update(self, description: str, total: int | None, done: int, what: str) -> None:
        self._bar.update(self._task, description=description, total=total, completed=done, what=what)


class JsonLines:
    """A line of JSON for each event and when it was seen, for machines that follow; `about`: whose it is."""

    def __init__(self, stream: TextIO, level: int, quiet: bool = False, about: str = "") -> None:
        self._stream = stream
        self._level = level
        self._quiet = quiet
        self._about = {"about": about} if about else {}

    def show(self, event: Event) -> None:
        if isinstance(event, Log):
            if _LEVELS[event.level] < self._level:
                return
        elif self._quiet:
            return
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        line = {"time": now, **self._about, **msgspec.to_builtins(event)}
        print(msgspec.json.encode(line).decode(), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left to undo."""


def presenter(verbose: int, quiet: bool, form: str = "text", live: bool = True, about: str = "") -> Presenter:
    """What suits standard error. `live`: there will be progress, of one migration; `about`: which of many."""
    level = threshold(verbose, quiet)
    if form == "json":
        return JsonLines(sys.stderr, level, quiet, about)
    if quiet or not live or not sys.stderr.isatty():
        return PlainLines(sys.stderr, level, quiet, about)
    return LiveLine(Console(stderr=True, highlight=False, markup=False), level)
