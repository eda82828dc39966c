"""Records of migrations in files: names in the order of time, replaced in one step, the oldest removed."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.api import MigrationRecord, Request
from agent.server.places import UnsafeDirectory
from agent.server.store import ID, Store, new_id


def record(id: str, state: str = "") -> MigrationRecord:
    request = Request(operation="move", pid=1, destination="beta")
    return MigrationRecord(id=id, request=request, status="running", state=state, created=datetime.now(UTC))


def test_names_are_ulids_in_the_order_of_time() -> None:
    names = []
    for _ in range(20):
        names.append(new_id())
        time.sleep(0.002)  # the time in a name is in milliseconds
    assert names == sorted(names) and all(map(ID.fullmatch, names))
    digits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    milliseconds = sum(digits.index(c) << 5 * i for i, c in enumerate(reversed(names[-1]))) >> 80
    assert abs(milliseconds - time.time() * 1000) < 60_000


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store, id = Store(tmp_path / "state" / "reports"), new_id()
    store.save(record(id), [])
    store.save(record(id, "live"), [b'{"event":"state","state":"live"}', b"{}"])
    found = store.load(id)
    assert found is not None
    assert found.record.state == "live"
    assert [bytes(each) for each in found.events] == [b'{"event":"state","state":"live"}', b"{}"]
    assert store.load(new_id()) is None


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    store, id = Store(tmp_path / "reports"), new_id()
    store.save(record(id), [])
    (tmp_path / "reports" / f"{id}.new").mkdir()
    with pytest.raises(OSError):
        store.save(record(id, "live"), [])
    found = store.load(id)
    assert found is not None and found.record.state == ""


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "reports")
    names = [f"{number:026d}" for number in range(10)]
    for name in names:
        store.save(record(name), [])
    store.prune(keep=3)
    assert store.ids() == names[:-4:-1]


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "a" * 26, "8" + "0" * 25])
def test_no_name_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not the name"):
        Store(tmp_path / "reports").load(name)


def test_a_directory_of_others_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeDirectory, match="by others"):
        Store(tmp_path / "open" / "reports")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafeDirectory, match="not a directory of our own"):
        Store(tmp_path / "link" / "reports")
