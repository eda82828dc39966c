"""The endurance run: its steps, what it counts of processes, and that it notices what grows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from bench.docs import PAGE
from bench.results import Machine
from endurance import cli, docs, growth, tables, usage
from endurance.series import Done, Run
from endurance.steps import FAILURES, MOVED, STAYED, SUCCESS, steps
from faults.fault import Point
from faults.matrix import SENDERS
from lab.fixture import until

COUNT = 200
MACHINE = Machine(cpu="a", cores=2, memory=8 << 30, kernel="6.18", python="3.11.2", openssh="OpenSSH_9.2")


# --- steps ---


def test_every_second_step_fails_and_no_kind_comes_twice_before_all_have_come() -> None:
    made = steps(1, COUNT)
    assert [step.number for step in made] == list(range(1, COUNT + 1))
    assert all(step.kind is SUCCESS for step in made[::2])
    failing = [step.kind.name for step in made[1::2]]
    for first in range(0, len(failing) - len(FAILURES), len(FAILURES)):
        assert len(set(failing[first : first + len(FAILURES)])) == len(FAILURES)


def test_a_seed_is_a_sequence() -> None:
    assert _texts(3) == _texts(3) != _texts(4)


def _texts(seed: int) -> list[str]:
    return [f"{step.case}" for step in steps(seed, COUNT)]


def test_what_fails_is_at_many_points_and_all_of_them_exist() -> None:
    points = [f.at for step in steps(1, COUNT) for f in step.case.faults if isinstance(f.at, Point)]
    assert len(set(points)) > 30
    for point in points:
        moment, _, name = point.name.partition(":")
        if moment == "call":
            continue
        senders = SENDERS[name]
        assert (point.side in senders) == (moment != "after-receive"), point


# --- what a process has ---


def test_a_descriptor_a_thread_and_memory_are_seen() -> None:
    before = usage.process(os.getpid())
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    reader, writer = os.pipe()
    memory = bytearray(os.urandom(8 << 20))
    now = usage.process(os.getpid())
    over.set()
    thread.join()
    os.close(reader)
    os.close(writer)
    assert now["descriptors"] - before["descriptors"] == 2
    assert now["threads"] - before["threads"] == 1
    assert now["anonymous, KiB"] - before["anonymous, KiB"] > len(memory) / 1024 / 2
    assert set(usage.more(now, before)) == {"descriptors", "threads"}


def test_who_is_not_waited_for_is_a_zombie() -> None:
    before = usage.zombies(Path("/proc"))
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its end")
    assert usage.zombies(Path("/proc")) > before
    child.wait()


def test_sockets_are_those_of_the_namespace() -> None:
    assert usage.sockets("sockets: used 17\nTCP: inuse 4 orphan 0\n") == 17


# --- growth ---


def _series(figure: str, *values: float) -> growth.Growth:
    return growth.growth([{figure: value} for value in values])[0]


@pytest.mark.parametrize("every", [1, 10, 30])
def test_what_is_left_now_and_then_grows(every: int) -> None:
    leak = _series("a: descriptors", *(8.0 + n // every for n in range(COUNT)))
    assert leak.grown and leak.first < leak.last


def test_what_comes_and_goes_does_not_grow() -> None:
    quiet = [8.0, 9.0, 8.0, 30.0] * 50
    assert not _series("a: descriptors", *quiet).grown


def test_memory_may_settle_but_not_grow() -> None:
    warm = [20_000.0] * 10 + [40_000.0 + 4 * n for n in range(COUNT - 10)]
    assert not _series("a: anonymous, KiB", *warm).grown
    assert _series("a: anonymous, KiB", *(40_000.0 + 20 * n for n in range(COUNT))).grown


def test_records_are_kept() -> None:
    assert not _series(f"hosts: {usage.RECORDS}", *map(float, range(COUNT))).grown


def test_pauses_may_vary_but_not_drift() -> None:
    noisy = [20.0, 25.0, 18.0, 90.0] * 25
    worse = [20.0 + 0.3 * n for n in range(100)]
    assert [each.grown for each in growth.drift(noisy, [10.0] * 100)] == [False, False]
    assert [each.grown for each in growth.drift(worse, [10.0] * 100)] == [False, True]
    assert growth.drift([1.0, 1.0, 1.0, 9.0], [10.0] * 4) == []


def test_a_slower_machine_is_no_drift_and_a_faster_one_no_excuse() -> None:
    pauses, slower = [20.0] * 50 + [60.0] * 50, [10.0] * 50 + [25.0] * 50
    assert not growth.drift(pauses, slower)[1].grown
    assert growth.drift(pauses, [10.0] * 50 + [15.0] * 50)[1].grown
    assert growth.drift([20.0] * 50 + [31.0] * 50, [10.0] * 50 + [5.0] * 50)[1].grown


# --- what is said ---


def _done(number: int, kind: str, outcome: str, gap: float, *problems: str) -> Done:
    return Done(
        number=number,
        kind=kind,
        fails=kind != SUCCESS.name,
        source="alpha",
        fault="",
        outcome=outcome,
        gap_ms=gap,
        wait_ms=gap + 1,
        pause_ms=gap - 1 if outcome == MOVED else None,
        machine_ms=10.0,
        seconds=2.0,
        problems=problems,
    )


def _run(*done: Done, count: int | None = None) -> Run:
    return Run(
        command="make endurance",
        date="2026-01-02 03:04 UTC",
        commit="abc",
        changed=False,
        machine=MACHINE,
        load=0.1,
        seed=1,
        steps=len(done) if count is None else count,
        seconds=60.0,
        idle_ms=(2.0,),
        done=done,
        samples=tuple({"a: descriptors": 8.0} for _ in done),
    )


def test_the_costs_of_each_kind() -> None:
    aborted = "aborted in pre-copy"
    found = _run(*(_done(n, aborted, STAYED, gap) for n, gap in enumerate((3.0, 5.0, 40.0), 1)))
    rows = {row[0]: row[1:] for row in tables.costs(found).rows}
    assert rows == {
        "none": ["1", "", "2.00", "2.00", "", ""],
        aborted: ["3", STAYED, "5.00", "40.0", "6.00", "41.0"],
    }
    assert not found.problems and "PROBLEM" not in cli.show(found)


def test_what_went_wrong_is_said() -> None:
    found = _run(_done(1, SUCCESS.name, MOVED, 20.0, "copies: none at all"), count=3)
    assert found.problems == ["step 1, move: copies: none at all", "1 of 3 steps were made"]
    assert "PROBLEM 1 of 3" in cli.show(found)


def test_the_page_is_what_the_run_gives() -> None:
    page = PAGE.read_text()
    assert page == docs.replaced(page, docs.load()), "run: make endurance PUBLISH=1"


def test_a_run_comes_back_from_its_file_with_its_tables(tmp_path: Path) -> None:
    found = _run(_done(1, SUCCESS.name, MOVED, 20.0))
    path = tmp_path / "run.json"
    path.write_bytes(msgspec.json.encode(found))
    assert docs.load(path) == found
    page = docs.replaced(f"by hand\n{docs.BEGIN}old\n{docs.END}too\n", found)
    assert page.startswith("by hand\n") and page.endswith("too\n") and "| move | 1 |" in page
