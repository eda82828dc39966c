"""Pictures of migrations: every round and step is in them, and a report without any still has one."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from xml.etree import ElementTree

import msgspec
import pytest
from unit.test_report import MIGRATED

from agent.api import Endpoint, MigrationRecord, Outcome, Phase, Report, Request
from migrate import picture

NOW = datetime(2024, 5, 17, 12, 0, tzinfo=UTC)
PHASES = (
    Phase(name="stop", ms=1.0, where="source"),
    Phase(name="scan", ms=3.0, where="source"),
    Phase(name="wait for ready", ms=10.0, where="source"),
    Phase(name="commit", ms=6.0, where="source"),
    Phase(name="descriptors", ms=2.0, where="destination"),
    Phase(name="threads", ms=5.0, where="destination"),
    Phase(name="take over network", ms=3.0, where="destination"),
    Phase(name="resume", ms=1.0, where="destination"),
)


def record(report: Report | None) -> MigrationRecord:
    return MigrationRecord(
        id="01ARZ3NDEKTSV4RRFFQ69G5FAV",
        request=Request(operation="move", pid=1234, destination="<beta>"),
        status="running" if report is None else "finished",
        state="",
        created=NOW,
        report=report,
    )


REPORT = msgspec.structs.replace(MIGRATED, phases=PHASES)


def words(drawing: str) -> str:
    """The text of an SVG document, which must be well-formed."""
    return " ".join("".join(ElementTree.fromstring(drawing.encode()).itertext()).split())


def test_every_step_is_named_with_its_time() -> None:
    text = words(picture.svg(record(REPORT)))
    for phase in PHASES:
        assert f"{phase.ms:.2f} ms {phase.name}" in text or f"{phase.ms:.1f} ms {phase.name}" in text
    assert "alpha:1234 to beta: migrated, pause 14.8 ms" in text


def test_every_round_has_its_bar_as_wide_as_it_took() -> None:
    above = picture.figure(record(REPORT)).axes[0]
    bars = [patch for patch in above.patches if patch.get_width() > 0]  # type: ignore[attr-defined]
    assert [bar.get_width() for bar in bars] == pytest.approx([done.seconds for done in REPORT.rounds])  # type: ignore[attr-defined]
    assert [bar.get_height() for bar in bars] == pytest.approx([1024.0, 12 * 4096 / (1 << 20)])  # type: ignore[attr-defined]


def test_steps_of_the_destination_end_when_the_source_hears_of_them() -> None:
    lane = {phase.name: (start, end) for phase, start, end in picture._destination(PHASES, PHASES[:4])}
    assert lane == {
        "descriptors": (7.0, 9.0),
        "threads": (9.0, 14.0),
        "take over network": (16.0, 19.0),
        "resume": (19.0, 20.0),
    }


@pytest.mark.parametrize(
    "report",
    [
        None,
        Report(outcome=Outcome.REFUSED, source=Endpoint(host="<alpha>"), destination=Endpoint(host="beta")),
        msgspec.structs.replace(REPORT, rounds=()),
        msgspec.structs.replace(REPORT, phases=()),
        msgspec.structs.replace(REPORT, phases=PHASES[4:], pause_ms=None),
    ],
)
def test_what_is_not_there_is_not_drawn(report: Report | None) -> None:
    words(picture.svg(record(report)))
    picture.page(record(report))


def test_a_page_has_the_picture_and_the_figures_and_nothing_that_acts() -> None:
    hostile = msgspec.structs.replace(REPORT, source=Endpoint(host="<script>alert(1)</script>", pid=1))
    page = picture.page(record(hostile))
    assert page.startswith("<!DOCTYPE html>") and "<svg" in page
    assert "<script" not in page and "on the link" in page
    assert not re.search(r'(?:src|href)="https?:', page)


def test_nobody_pays_for_pictures_that_are_not_asked_for() -> None:
    code = "import sys, migrate.cli; sys.exit('matplotlib' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
