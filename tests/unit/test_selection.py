"""Which processes somebody means: by number, by a file with the number, by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.sleepers import Sleepers

from agent.hook_api import Select, Selection
from agent.server import selection

LONG = "a-name-of-more-than-15-bytes"


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[Sleepers]:
    made = Sleepers(tmp_path)
    yield made
    made.close()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a service that is not the sleepers' parent looked: what it started itself is not meant."""
    monkeypatch.setattr(selection, "_family", lambda pid: {pid})


def pids(**select: object) -> list[int]:
    return [each.pid for each in selection.find(Select(**select)).processes]  # type: ignore[arg-type]


@pytest.mark.usefixtures("elsewhere")
def test_by_name_all_of_them(sleepers: Sleepers) -> None:
    first, second, other = sleepers.start("twin"), sleepers.start("twin"), sleepers.start("single")
    assert pids(name="twin") == sorted([first, second])
    assert pids(name="single") == [other]
    assert pids(name="twi") == []
    found = selection.find(Select(name="nobody-is-called-so"))
    assert found.why == "no process is called 'nobody-is-called-so'"


@pytest.mark.usefixtures("elsewhere")
def test_the_kernels_name_is_short_the_files_is_not(sleepers: Sleepers) -> None:
    pid = sleepers.start(LONG)
    assert pids(name=LONG) == pids(name=LONG[:15]) == [pid]
    assert selection.find(Select(name=LONG)).processes[0].name == LONG[:15]


@pytest.mark.usefixtures("elsewhere")
def test_by_number(sleepers: Sleepers) -> None:
    pid = sleepers.start("single")
    (found,) = selection.find(Select(pid=pid)).processes
    assert (found.pid, found.name, found.command.rpartition(" ")[2]) == (pid, "single", "300")
    assert selection.is_still(found)
    sleepers.end(pid)
    assert not selection.is_still(found)
    assert selection.find(Select(pid=pid)).why == f"there is no process {pid}"


@pytest.mark.usefixtures("elsewhere")
def test_by_a_file(sleepers: Sleepers, tmp_path: Path) -> None:
    pid = sleepers.start("single")
    file = tmp_path / "single.pid"
    for text in (f"{pid}", f"{pid}\n", f"  {pid}  \n\n"):
        file.write_text(text)
        assert pids(pidfile=str(file)) == [pid]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no process number in it"),
        ("-1", "there is no process number in it"),
        ("12 13", "there is no process number in it"),
        ("1" * 1000, "there is no process number in it"),
        ("\u0661", "there is no process number in it"),  # a digit, of another script
        ("4194305", "there is no process 4194305"),
    ],
)
def test_a_file_with_something_else(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "some.pid"
    file.write_text(text)
    assert selection.find(Select(pidfile=str(file))) == Selection(processes=(), why=f"{file}: {why}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = selection.find(Select(pidfile=str(tmp_path / "none")))
    assert missing.why == f"{tmp_path}/none: No such file or directory"
    assert selection.find(Select(pidfile=str(tmp_path))).why == f"{tmp_path}: Is a directory"
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it: it must not be waited for
    assert "there is no process number in it" in selection.find(Select(pidfile=str(tmp_path / "fifo"))).why


def test_the_dead_and_the_kernels_are_not_meant(sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_family", lambda pid: {pid})
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert pids(pid=process.pid) == []
    process.wait()
    assert 2 not in [each.pid for each in selection.processes() if not each.command]


def test_what_we_started_ourselves_is_not_meant(sleepers: Sleepers) -> None:
    pid = sleepers.start("own-child")
    assert pids(name="own-child") == pids(pid=pid) == []
    assert not {pid, os.getpid()} & {each.pid for each in selection.processes()}


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["/usr/local/bin/migrate-agent", "connect"], True),
        (["/venv/bin/python3.11", "/venv/bin/migrate", "hook", "drain"], True),
        ([sys.executable, "-P", "-m", "agent.main", "connect"], True),
        ([sys.executable, "-m", "agent.worker", "3", "4"], True),
        ([sys.executable, "manage.py", "migrate"], False),
        ([sys.executable, "-m", "http.server", "migrate"], False),
        ([sys.executable], False),
        ([sys.executable, "-m"], False),
        (["redis-server"], False),
    ],
)
def test_our_own_programs(arguments: list[str], ours: bool) -> None:
    assert selection._is_ours(arguments) is ours
