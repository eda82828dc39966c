"""What is shown while a migration runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agent.api import Event, Log, Progress, Round, RoundFinished, StateChanged
from migrate.progress import LiveLine, PlainLines, threshold

ROUND = RoundFinished(
    round=Round(number=2, pages_sent=1234, pages_discarded=0, bytes=1 << 20, seconds=0.25, dirty_rate=5e6),
    remaining_pages=17,
    estimated_pause_ms=21.5,
)
PROGRESS = Progress(
    round=3, pages_done=1000, pages_total=5000, bytes_sent=1 << 20, rate=1 << 20, estimated_pause_ms=33.0
)
EVENTS: tuple[Event, ...] = (
    StateChanged(state="pre-copy"),
    PROGRESS,
    ROUND,
    Log(level="debug", message="d-message"),
    Log(level="info", message="i-message"),
    Log(level="warning", message="w-message"),
    Log(level="error", message="e-message"),
)


def plain(verbose: int = 0, quiet: bool = False) -> str:
    stream = io.StringIO()
    lines = PlainLines(stream, threshold(verbose, quiet), quiet)
    for event in EVENTS:
        lines.show(event)
    lines.close()
    return stream.getvalue()


def test_plain_lines_tell_states_rounds_and_warnings() -> None:
    assert plain().splitlines() == [
        "pre-copy",
        "round 2: 1,234 pages, 1.00 MiB on the link in 250 ms; 17 pages remain, pause would be 21.5 ms",
        "warning: w-message",
        "error: e-message",
    ]


@pytest.mark.parametrize(
    ("verbose", "quiet", "shown"),
    [
        (0, False, "we"),
        (1, False, "iwe"),
        (2, False, "diwe"),
        (5, False, "diwe"),
        (0, True, "e"),
        (2, True, "e"),
    ],
)
def test_how_much_is_said(verbose: int, quiet: bool, shown: str) -> None:
    text = plain(verbose, quiet)
    assert [name for name in "diwe" if f"{name}-message" in text] == list(shown)
    assert ("pre-copy" in text) is not quiet


def test_a_long_round_shows_life_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("migrate.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = PlainLines(stream, threshold(0, False))
    for now in range(0, 21):
        clock[0] = float(now)
        lines.show(PROGRESS)
    expected = "round 3: 1,000 of 5,000 pages, 1.00 MiB/s, 15.6 MiB remain"
    assert stream.getvalue().splitlines() == [expected] * 4


def terminal(stream: io.StringIO) -> Console:
    """One that can move its cursor, whatever the tests are run from."""
    return Console(
        file=stream,
        force_terminal=True,
        width=160,
        color_system=None,
        markup=False,
        highlight=False,
        _environ={"TERM": "xterm"},
    )


def live() -> str:
    stream = io.StringIO()
    console = terminal(stream)
    line = LiveLine(console, threshold(0, False))
    for event in EVENTS:
        line.show(event)
        line.refresh()
    line.close()
    return stream.getvalue()


def test_the_live_line_shows_round_pages_rate_rest_and_pause() -> None:
    text = live()
    for part in (
        "pre-copy",
        "round 3",
        "1,000/5,000 pages",
        "1.00 MiB/s",
        "15.6 MiB remain",
        "pause ≈ 33.0 ms",
    ):
        assert part in text
    assert "round 2: 1,234 pages" in text
    assert "warning: w-message" in text and "i-message" not in text


def test_the_live_line_gives_the_cursor_back() -> None:
    text = live()
    assert 0 < text.count("\x1b[?25l") == text.count("\x1b[?25h")


def test_messages_from_elsewhere_cannot_command_the_terminal() -> None:
    stream = io.StringIO()
    console = terminal(stream)
    line = LiveLine(console, threshold(0, False))
    line.show(Log(level="error", message="\x1b]0;owned\x07[red]x[/red]"))
    line.show(StateChanged(state="copying", detail="\x1b]0;owned\x07[red]x[/red]"))
    line.refresh()
    line.close()
    assert "\x1b]0;" not in stream.getvalue()
    assert "[red]x[/red]" in stream.getvalue()
