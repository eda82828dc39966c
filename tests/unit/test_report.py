"""Reports for people: everything that matters is in them, and nothing in them can command a terminal."""

from __future__ import annotations

import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType

from agent.api import (
    Blocker,
    CheckResult,
    Endpoint,
    ErrorInfo,
    Notice,
    Outcome,
    Phase,
    ProcessInfo,
    Report,
    Round,
)
from migrate import report
from migrate.text import clean

MIGRATED = Report(
    outcome=Outcome.MIGRATED,
    source=Endpoint(host="alpha", pid=1234),
    destination=Endpoint(host="beta", pid=77),
    pause_ms=14.842,
    longest_stop_ms=0.926,
    total_s=2.5273,
    memory_bytes=1 << 30,
    bytes_sent=1 << 28,
    rounds=(
        Round(number=1, pages_sent=262_144, pages_discarded=0, bytes=1 << 28, seconds=2.1, dirty_rate=0.0),
        Round(number=2, pages_sent=12, pages_discarded=3, bytes=4096, seconds=0.001, dirty_rate=52e6),
    ),
    phases=(
        Phase(name="stop", ms=0.07, where="source"),
        Phase(name="rebuild", ms=6.5, where="destination"),
    ),
    address_moved=("10.77.0.9", "fd00::9"),
    verified_pages=262_144,
    notices=(Notice(kind="affinity", message="it may run on 2 processors instead of 8"),),
)

BLOCKERS = (
    Blocker(kind="unix-socket", what="fd 7 (socket:[4711])", why="its peer stays", hint="close it"),
    Blocker(kind="child-processes", what="3 children", why="only one process moves"),
)


def rendered(part: RenderableType) -> str:
    """What a person reads, without trailing blanks."""
    stream = io.StringIO()
    report.console(stream).print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_a_migration_tells_everything() -> None:
    text = rendered(report.of_move(MIGRATED))
    for expected in (
        "migrated   alpha:1234 -> beta:77",
        "14.8 ms",
        "0.93 ms",
        "2.53 s",
        "1.00 GiB",
        "256 MiB (25.0% of the memory)",
        "262,144",
        "49.6 MiB/s",
        "10.77.0.9, fd00::9",
        "it may run on 2 processors instead of 8",
    ):
        assert expected in text


def test_phases_stand_under_their_host() -> None:
    lines = rendered(report.of_move(MIGRATED)).splitlines()
    stop = next(line for line in lines if line.split()[:1] == ["stop"])
    rebuild = next(line for line in lines if line.split()[:1] == ["rebuild"])
    assert stop.index("0.07 ms") < rebuild.index("6.50 ms")


@pytest.mark.parametrize("outcome", list(Outcome))
def test_each_outcome_says_where_the_process_is(outcome: Outcome) -> None:
    text = rendered(report.of_move(msgspec.structs.replace(MIGRATED, outcome=outcome)))
    words = {
        Outcome.MIGRATED: "migrated",
        Outcome.REFUSED: "nothing was touched",
        Outcome.ROLLED_BACK: "runs on where it was",
        Outcome.IN_DOUBT: "look at both hosts",
    }
    assert words[outcome] in text


def test_an_error_has_its_kind_its_place_and_its_words() -> None:
    error = ErrorInfo(kind="timeout", message="no Ready in time", where="destination")
    text = rendered(report.of_move(Report(outcome=Outcome.ROLLED_BACK, source=Endpoint(host="a"),
                                          destination=Endpoint(host="b"), error=error)))  # fmt: skip
    assert "timeout (destination): no Ready in time" in text


def test_every_blocker_is_named_with_reason_and_advice() -> None:
    result = CheckResult(
        source=Endpoint(host="alpha", pid=1),
        destination=Endpoint(host="beta"),
        command="redis-server",
        memory_bytes=5,
        threads=1,
        mappings=2,
        descriptors=3,
        connections=4,
        dirty_tracking="userfaultfd",
        blockers=BLOCKERS,
    )
    text = rendered(report.of_check(result))
    assert "cannot be moved   alpha:1 -> beta" in text
    assert "what stands in the way (2):" in text
    for part in (
        "fd 7 (socket:[4711])",
        "[unix-socket]",
        "its peer stays",
        "-> close it",
        "[child-processes]",
    ):
        assert part in text
    free = rendered(report.of_check(msgspec.structs.replace(result, blockers=())))
    assert "can be moved" in free and "stands in the way" not in free


def test_what_stands_in_the_way_for_one_reason_is_said_once() -> None:
    alike = [Blocker(kind="inotify", what=f"fd {n}", why="an inotify instance", hint="") for n in range(8)]
    other = Blocker(kind="stopped", what="pid 7", why="it is stopped", hint="continue it")
    blockers = (*alike[:4], other, *alike[4:])
    text = rendered(
        report.of_move(
            Report(
                outcome=Outcome.REFUSED,
                source=Endpoint(host="a"),
                destination=Endpoint(host="b"),
                blockers=blockers,
            )
        )
    )
    assert "what stands in the way (9):" in text
    assert text.count("an inotify instance") == 1 and "and 5 more" in text
    assert "fd 2 " in text and "fd 3 " not in text and "pid 7" in text



def test_processes_are_listed_with_what_stops_them() -> None:
    free = ProcessInfo(
        pid=7,
        command="redis",
        user="redis",
        memory_bytes=1 << 30,
        threads=4,
        sockets=9,
        dirty_rate=1e6,
        blockers=(),
    )
    stuck = msgspec.structs.replace(free, pid=8, dirty_rate=None, blockers=BLOCKERS)
    lines = rendered(report.of_processes([free, stuck])).splitlines()
    first = next(line for line in lines if line.split()[:1] == ["7"])
    assert first.split() == ["7", "1.00", "GiB", "4", "9", "977", "KiB/s", "redis", "yes", "redis"]
    second = next(line for line in lines if line.split()[:1] == ["8"])
    assert "no: child-processes" in second and "/s" not in second


@given(st.text())
def test_clean_text_cannot_command_a_terminal(text: str) -> None:
    assert clean(text).isprintable()
    if text.isprintable():
        assert clean(text) == text


def test_names_from_elsewhere_are_cleaned() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J[bold]x[/bold]"
    blocker = Blocker(kind=evil, what=evil, why=evil, hint=evil)
    error = ErrorInfo(kind=evil, message=evil, where="link")
    endpoint = Endpoint(host=evil, pid=1)
    notice = Notice(kind=evil, message=evil)
    text = rendered(
        report.of_move(
            Report(
                outcome=Outcome.REFUSED,
                source=endpoint,
                destination=endpoint,
                error=error,
                blockers=(blocker,),
                notices=(notice,),
                address_moved=(evil,),
                phases=(Phase(name=evil, ms=1.0, where="source"),),
            )
        )
    )
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]x[/bold]" in text  # shown, not obeyed
