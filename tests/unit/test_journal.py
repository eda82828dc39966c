"""Journals that cannot be read: named, and in nobody's way."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from agent import journal, settle
from agent.journal import Arrival, Entry, Task
from agent.server.places import RUNTIME_VARIABLE
from agent.server.store import new_id
from agent.states import Destination


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RUNTIME_VARIABLE, str(tmp_path))
    return tmp_path / "incoming"


def arrival() -> Entry[Arrival]:
    """Of an agent that has died, and its shadow with it."""
    dead = Task(os.getpid(), 1)
    return Entry.begin(new_id(), Destination.HELD, Arrival(process=dead, agent=dead))


@pytest.mark.parametrize("content", [b"", b"\x91" * 100_000, b"\x82\xa7process", b"\xc1", b"\x80"])
def test_one_that_is_damaged_keeps_no_other_from_being_settled(
    place: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first, damaged, last = arrival(), arrival(), arrival()
    damaged.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        settle.sweep()
    assert (first.path.exists(), damaged.path.exists(), last.path.exists()) == (False, True, False)
    (record,) = caplog.records
    assert damaged.migration in record.getMessage() and "damaged" in record.getMessage()


def test_a_state_that_there_is_not(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody's copy of one."""
    one = arrival()
    other = one.path.with_name(f"{new_id()}.bak")
    other.write_bytes(one.path.read_bytes())
    assert [entry.migration for entry in journal.every(Arrival)] == [one.migration]
    assert other.name.partition(".")[0] in caplog.text


NAME = "01M80RV7XHBT4W7BFHGFD60T2B"


@pytest.mark.parametrize("name", ["notes", "x.held", f"{NAME}.new", f"{NAME}.lock", f"{NAME}.rest"])
def test_files_that_are_no_entries(place: Path, name: str) -> None:
    one = arrival()
    one.path.with_name(name.format(new_id())).write_bytes(b"\xc1")
    assert [entry.migration for entry in journal.every(Arrival)] == [one.migration]


def test_a_damaged_one_is_not_settled_by_guess(place: Path) -> None:
    """Whoever asks for it is told; the process that it may be about is left alone."""
    one = arrival()
    one.path.write_bytes(b"\xc1")
    with pytest.raises(ValueError, match="the journal is damaged"):
        settle.settle(one.migration)


def test_a_process_of_no_number_is_damage(place: Path) -> None:
    """kill(2) takes -1 for all that there are."""
    one = arrival()
    packed = one.path.read_bytes()
    pid = b"\xa3pid" + (b"\xcd" if os.getpid() < 1 << 16 else b"\xce")
    at = packed.index(pid) + 4
    width = 3 if os.getpid() < 1 << 16 else 5
    one.path.write_bytes(packed[:at] + b"\xff" + packed[at + width :])
    with pytest.raises(ValueError, match="damaged"):
        journal.find(Arrival, one.migration)
