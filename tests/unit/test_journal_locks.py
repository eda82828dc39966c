"""Locks of migrations that are over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import journal, states
from agent.journal import Arrival, Entry, Task


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "runtime", lambda: tmp_path / "migrate")


def test_the_lock_of_a_migration_that_is_over_is_swept() -> None:
    """Who held it may have been killed after the entry was gone, and before the lock was."""
    me = Task.of(os.getpid())
    entry = Entry.begin("0" * 26, states.Destination.HELD, Arrival(process=me, agent=me))
    lock = entry.path.with_suffix(".lock")
    with journal.put_in_order("incoming", entry.migration):
        journal.sweep_locks("incoming")
        assert lock.exists()
    entry.remove()
    journal.sweep_locks("incoming")
    assert not lock.exists()


def test_where_nothing_ever_was() -> None:
    journal.sweep_locks("outgoing")
