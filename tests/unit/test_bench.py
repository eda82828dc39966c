"""The measurement itself: statistics, tables, aims, the page made of a run, and the workloads it needs."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench import aims, cli, criu, docs, machine, matrix, measure, pictures, stats, table, trace
from bench.results import Case, Limit, Machine, Phase, Run, Sample, Workload, load, save
from lab.fixture import until
from programs.status import build, read_status, wait_for_status

PROGRAMS = build()
MACHINE = Machine(cpu="a|b", cores=2, memory=8 << 30, kernel="6.18", python="3.11.2", openssh="OpenSSH_9.2")


def moved(gap: float, **more: Any) -> Sample:
    phases = (
        Phase("stop", "source", gap / 4),
        Phase("commit", "source", gap / 2),
        Phase("resume", "destination", 1.0),
    )
    return Sample(outcome="migrated", gap_ms=gap, pause_ms=gap - 1, phases=phases, **more)


def case(name: str, *samples: Sample) -> Case:
    benchmark, _, x = name.partition("/")
    return Case(benchmark=benchmark, name=name, series="s", x=x, workload=Workload(), samples=samples)


def a_run(*cases: Case, limits: tuple[Limit, ...] = ()) -> Run:
    return Run(
        command="make bench",
        date="2026-01-02 03:04 UTC",
        commit="abc",
        changed=False,
        seconds=90.0,
        load=0.1,
        machine=MACHINE,
        limits=limits,
        cases=cases,
    )


# --- statistics ---


def test_spread_is_of_what_was_measured() -> None:
    assert stats.spread([None, None]) is None
    assert stats.spread([3.0, None, 1.0, 10.0]) == stats.Spread(3.0, 1.0, 10.0, 3)
    assert stats.spread([1.0, 2.0]) == stats.Spread(1.5, 1.0, 2.0, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1234, "0.123"),
        (-0.5, "-0.500"),
        (0.9996, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.6, "1,235"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert stats.number(value) == text


def test_written() -> None:
    assert stats.written(None) == "–"
    assert stats.written(stats.spread([0.02]), 100) == "2.00"
    assert stats.written(stats.spread([1, 2, 30])) == "2.00 (1.00..30.0)"


# --- traces ---

TRACE = [
    trace.parse(line)
    for line in (
        *(f"{100 + i / 100} {i * 10} 0 0.2 alpha" for i in range(100)),
        *(f"{101 + i / 100} {1000 + i * 5} 0 {3.5 if i == 40 else 0.3} alpha" for i in range(50)),
        "101.52 1250 0 17.25 beta",
        "101.53 1260 0 90 beta",
    )
]


def test_gaps() -> None:
    assert trace.longest_gap(TRACE, (100, 100.9)) == 0.2
    assert trace.longest_gap(TRACE, (101, 101.5)) == 3.5
    assert trace.longest_gap(TRACE, (0, 1)) is None
    assert trace.move_gap(TRACE) == 17.25
    assert trace.move_gap(TRACE[:-2]) is None


def test_slowdown() -> None:
    found = trace.slowdown(TRACE, "pages", (100, 100.991), (101, 101.495))
    assert found == pytest.approx(0.5, abs=0.01)
    assert trace.slowdown(TRACE, "work", (100, 101), (101, 102)) is None
    assert trace.slowdown(TRACE, "pages", (100, 101), (101.51, 102)) is None


def test_windows_come_from_the_events(tmp_path: Path) -> None:
    events = tmp_path / "events"
    line = '2026-01-01T00:00:{:02d}.500000+00:00 {{"event":"state","state":"{}","detail":""}}\n'
    states = ("examining", "pre-copy", "freezing", "freezing", "live")
    events.write_text("".join(line.format(5 * i, state) for i, state in enumerate(states)))
    found = measure._windows(events, 10.0, 20.0)
    assert found["idle"] == (10.0 - measure.BASELINE, 10.0) and found["move"] == (10.0, 20.0)
    assert found["precopy"] == (1767225605.5, 1767225610.5)


# --- one move ---

REPORT = {
    "outcome": "migrated",
    "pause_ms": 9.5,
    "longest_stop_ms": 1.5,
    "total_s": 2.5,
    "memory_bytes": 4 << 20,
    "bytes_sent": 5 << 20,
    "rounds": [{"bytes": 1 << 20, "seconds": 0.5}, {"bytes": 10, "seconds": 0.1}],
    "phases": [{"name": "stop", "ms": 0.5, "where": "source"}],
}


def test_a_report_becomes_a_sample() -> None:
    found = measure._reported(REPORT)
    assert (found.pause_ms, found.stop_ms, found.total_s, found.rounds) == (9.5, 1.5, 2.5, 2)
    assert (found.memory, found.sent) == (4 << 20, 5 << 20)
    assert (found.throughput, found.link_rate) == (8 << 20, 2 << 20)
    assert found.phases == (Phase("stop", "source", 0.5),)


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            {"error": {"where": "source", "kind": "timeout", "message": "too long"}},
            "source: timeout: too long",
        ),
        ({"blockers": [{"kind": "a", "why": "b"}, {"kind": "c", "why": "d"}]}, "a: b; c: d"),
        ({}, "it fell over"),
    ],
)
def test_what_failed_is_said(report: dict[str, Any], text: str) -> None:
    assert measure._error(report, "it fell over\n") == text


def test_cpu_is_for_each_gibibyte() -> None:
    sample = moved(1, memory=512 << 20, cpu_source_s=1.0, cpu_destination_s=0.5)
    assert table._cpu(sample) == 3.0
    assert table._cpu(moved(1, cpu_source_s=1.0)) is None


# --- the matrix ---


def test_the_matrix() -> None:
    names = [each.name for each in matrix.cases()]
    assert len(set(names)) == len(names) and set(matrix.QUICK) < set(names)
    loads = [each.workload for each in matrix.cases()]
    assert {(load.megabytes, load.rate) for load in loads} >= {
        (m, r) for m in (64, 256, 1024, 4096) for r in (0, 50, 500)
    }
    assert {load.threads for load in loads} == {1, 10, 100, 1000}
    assert {load.mappings for load in loads} >= {50, 5000}
    assert {load.connections for load in loads} >= {1, 100, 1000}
    assert {each.bandwidth for each in matrix.cases()} == {None, "1gbit", "100mbit"}


def test_cases_are_chosen_by_name() -> None:
    assert [each.name for each in matrix.chosen(("threads",), False)] == [
        f"threads/{n}" for n in (1, 10, 100, 1000)
    ]
    assert [each.name for each in matrix.chosen(("memory/4GiB/0", "links/1*"), True)] == [
        "memory/4GiB/0",
        "links/100mbit",
        "links/1gbit",
    ]
    assert [each.name for each in matrix.chosen((), True)] == [
        n for n in names_in_order() if n in matrix.QUICK
    ]
    with pytest.raises(ValueError, match="thread"):
        matrix.chosen(("thread",), False)


def names_in_order() -> list[str]:
    return [each.name for each in matrix.cases()]


def test_cases_of_one_link_share_a_lab() -> None:
    links = [link for link, _ in cli.by_link(matrix.cases())]
    assert links == [None, "100mbit", "1gbit"] or len(links) <= len(set(links)) + 1


# --- the command line ---


class Failing:
    """A move of which every so many fail."""

    def __init__(self, *outcomes: str) -> None:
        self.outcomes = list(outcomes)

    def __call__(self, hosts: object, of: Case) -> Sample:
        outcome = self.outcomes.pop(0)
        return moved(1.0, total_s=1.0) if outcome == "migrated" else Sample(outcome=outcome, error="why")


@pytest.mark.parametrize(
    ("outcomes", "taken"),
    [
        (["migrated"] * 3, 3),
        (["migrated", "error", "migrated"], 3),
        (["rolled-back", "error"], 2),
    ],
)
def test_a_case_that_fails_twice_is_left(
    outcomes: list[str], taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "sample", Failing(*outcomes))
    found = cli.samples(None, case("threads/1"), 3, cli.Progress())  # type: ignore[arg-type]
    assert [each.outcome for each in found.samples] == outcomes and len(found.samples) == taken
    said = capsys.readouterr().err
    limited = msgspec.structs.replace(case("threads/1"), at_most=1)
    monkeypatch.setattr(cli, "sample", Failing(*outcomes))
    assert len(cli.samples(None, limited, 3, cli.Progress()).samples) == 1  # type: ignore[arg-type]
    assert said.count("threads/1") == taken and ("why" in said) == (outcomes != ["migrated"] * 3)


def test_the_list_and_wrong_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == names_in_order()
    assert cli.main(["--only", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


# --- tables ---

WITH_FAILURE = case(
    "threads/10", moved(10), moved(30), Sample(outcome="rolled-back", error="no Ready"), moved(20)
)


def test_moves_are_medians_and_failures_are_said() -> None:
    found = table.moves("threads", [case("threads/1", moved(8, wait_ms=7)), WITH_FAILURE])
    assert found.header[:4] == ["threads", "samples", "longest gap, ms", "client waits, ms"]
    assert found.rows[0][:4] == ["1", "1", "8.00", "7.00"]
    assert found.rows[1][:4] == ["10", "3", "20.0 (10.0..30.0)", "–"]
    assert found.notes == ["threads/10: 1 of 4 failed, rolled-back: no Ready"]
    assert "CPU, s" not in found.header


def test_a_case_of_which_nothing_moved_has_dashes() -> None:
    found = table.moves(
        "threads", [case("threads/1", moved(8)), case("threads/10", Sample(outcome="error", error="x"))]
    )
    assert found.rows[1][1] == "0" and set(found.rows[1][2:]) == {"–"} and found.notes


def test_steps_are_those_of_the_source() -> None:
    found = table.phases("threads", [WITH_FAILURE])
    assert found is not None
    assert found.header == ["threads", "stop", "commit"] and found.rows == [["10", "5.00", "10.0"]]
    assert table.phases("threads", [case("threads/1", Sample(outcome="error"))]) is None


def test_text_is_aligned_and_markdown_is_a_table() -> None:
    shown = table.Table("title", ["a", "two words"], [["long cell", "1"], ["b|c", "22"]], ["a note"])
    assert table.text(shown).splitlines() == [
        "title",
        "a          two",
        "           words",
        "---------  -----",
        "long cell  1",
        "b|c        22",
        "a note",
    ]
    assert "| a | two words |\n| --- | --- |\n| long cell | 1 |\n| b/c | 22 |" in table.markdown(shown)


def test_a_limit_that_failed_says_why() -> None:
    found = table.limits([Limit(name="criu", unit="", values=(), error="it does not start")])
    assert found.rows == [["criu", "it does not start", "", ""]]


# --- aims ---


def aim_of(name: str, run: Run) -> tuple[str, str]:
    (row,) = [row for row in aims.table(run).rows if row[0].startswith(name)]
    return row[2], row[3]


def test_aims_are_judged_by_the_figures() -> None:
    run = a_run(case("memory/1GiB/50", moved(19), moved(21), moved(20)), case("threads/1000", moved(151)))
    assert aim_of("1 GiB, 50 MB/s written: longest", run) == ("20.0 ms", "yes")
    assert aim_of("1,000 threads", run) == ("151 ms", "**no**")
    assert aim_of("1,000 connections: longest", run) == (aims.MEASURED, "–")


def test_an_aim_without_a_single_move_is_not_measured() -> None:
    run = a_run(case("threads/1000", Sample(outcome="rolled-back", error="late")))
    assert aim_of("1,000 threads", run) == (aims.MEASURED, "–")


def test_growth() -> None:
    run = a_run(case("memory/64MiB/50", moved(10)), case("memory/4GiB/50", moved(10 + 9 * (4 - 1 / 16))))
    assert aim_of("each GiB more", run) == ("9.00 ms", "**no**")


def test_throughput_is_a_share_of_the_faster_ssh() -> None:
    pipes = (
        Limit(name="ssh, unlimited", unit="MB/s", values=(100, 200, 150)),
        Limit(name="ssh aes128-gcm, unlimited", unit="MB/s", values=(400,)),
    )
    run = a_run(case("content/incompressible", moved(1, throughput=330e6)), limits=pipes)
    assert aim_of("incompressible memory", run) == ("82.5 %", "yes")
    assert aim_of("compressible memory", run) == (aims.MEASURED, "–")
    assert aim_of("incompressible memory", a_run(*run.cases)) == (aims.MEASURED, "–")


# --- the file, the page, the pictures ---


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    run = a_run(WITH_FAILURE, limits=(Limit(name="ssh", unit="MB/s", values=(1.5,)),))
    save(run, tmp_path / "new" / "bench.json")
    assert load(tmp_path / "new" / "bench.json") == run
    save(msgspec.structs.replace(run, format=2), tmp_path / "bench.json")
    with pytest.raises(msgspec.ValidationError, match="format"):
        load(tmp_path / "bench.json")


def test_the_page_is_what_the_committed_run_gives() -> None:
    assert docs.current(), "run: make bench-docs"


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    page, run = tmp_path / "page.md", tmp_path / "run.json"
    page.write_text(f"by hand\n{docs.BEGIN}old{docs.END}by hand too\n")
    save(a_run(case("threads/1", moved(8))), run)
    assert not docs.current(page, run)
    docs.write(page, run)
    assert docs.current(page, run)
    text = page.read_text()
    assert text.startswith("by hand\n") and text.endswith("by hand too\n") and "| 1 | 1 | 8.00 |" in text
    save(a_run(case("threads/1", moved(9))), run)
    assert not docs.current(page, run)
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        docs.write(page, run)


def test_pictures(tmp_path: Path) -> None:
    run = a_run(case("threads/1", moved(8)), WITH_FAILURE, case("links/1gbit", Sample(outcome="error")))
    assert [path.name for path in pictures.draw(run, tmp_path)] == ["threads.svg"]
    assert "<svg" in (tmp_path / "threads.svg").read_text()


# --- the machine ---


def test_the_cpu_has_a_name_where_it_is_hidden() -> None:
    assert (
        machine._cpu("vendor_id\t: Maker\ncpu family\t: 6\nmodel\t\t: 17\nmodel name\t: Fast 9\n\n")
        == "Fast 9"
    )
    assert machine._cpu("vendor_id\t: Maker\ncpu family\t: 6\nmodel\t\t: 17\nmodel name\t: 17\n\n") == (
        "vendor_id Maker cpu family 6 model 17"
    )


def test_an_account_counts_what_its_process_starts() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    shell = f"read line; python3 -c '{burn}'; read line"
    with subprocess.Popen(["sh", "-c", shell], stdin=subprocess.PIPE, bufsize=0) as process:
        account = machine.Account("test", process.pid)
        try:
            before = account.seconds()
            assert process.stdin is not None
            process.stdin.write(b"\n")
            until(lambda: account.seconds() - before >= 0.3, "its child's CPU time")
            assert machine.process_seconds(process.pid) < 0.3
        finally:
            process.kill()
            process.wait()
            account.close()
    assert not account._path.exists()


# --- criu ---


@contextmanager
def criu_that(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    program = directory / "criu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        yield


def test_criu_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = criu.limits(1)
    assert found.error == "there is none on PATH" and not found.values


def test_criu_that_does_not_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        'echo "Version: 3.1"; echo "Error (x.c:1): exited, status=1"; '
        'echo "Error (v.c:2): vdso: no" >&2; exit 1'
    )
    with criu_that(tmp_path, script, monkeypatch):
        (found,) = criu.limits(1)
    assert (found.name, found.error) == ("criu 3.1", "Error (v.c:2): vdso: no")


def test_criu_that_fails_to_dump_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criu, "CASES", ((8, 0),))
    script = 'case $1 in dump) echo "Error (d.c:1): no rights"; exit 1;; *) echo "Version: 4.9";; esac'
    before = set(criu.TMPFS.iterdir())
    with criu_that(tmp_path, script, monkeypatch):
        (found,) = criu.limits(1)
    assert found.error == "criu dump: Error (d.c:1): no rights" and not found.values
    assert not {
        path.name for path in set(criu.TMPFS.iterdir()) - before if path.name.startswith("bench-criu-")
    }


# --- the workloads ---


def test_a_workload_with_company_traces_itself(tmp_path: Path) -> None:
    load = (
        *("--megabytes", "8", "--working-set", "4", "--fill", "sparse"),
        *("--rate", "5", "--sleepers", "30", "--spin"),
    )
    files = ("--trace", str(tmp_path / "trace"), "--log", str(tmp_path / "log"))
    command = [str(PROGRAMS / "heartbeat"), *load, "--seconds", "2", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    status = msgspec.json.decode(done.stdout)
    assert all(status["counters"][name] > 0 for name in ("pages-written", "work", "wakeups"))
    records = trace.read(tmp_path / "trace")
    assert records[0].host == socket.gethostname() and len(records) > 20
    assert all(before.at < after.at for before, after in itertools.pairwise(records))
    assert records[-1].pages > records[0].pages and records[-1].work > records[0].work
    assert trace.longest_gap(records, (0, 1e12)) == pytest.approx(status["longest_gap_ms"], rel=0.5)


def popen(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([str(PROGRAMS / program), *arguments], stdout=subprocess.PIPE, text=True)


@contextmanager
def talking(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str], Path]]:
    """A server and its clients; the clients' status."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    status, server_status = tmp_path / "callers.status", tmp_path / "server.status"
    serving = ("--megabytes", "1", "--listen", f"127.0.0.1:{port}", "--status", str(server_status))
    calling = ("127.0.0.1", str(port), "--connections", "20", "--interval", "0.02")
    files = ("--status", str(status), "--log", str(tmp_path / "callers.log"))
    with popen("heartbeat", *serving) as server:
        wait_for_status(server_status)
        with popen("callers", *calling, *files) as callers:
            try:
                until(lambda: wait_for_status(status)["counters"]["answers"] > 100, "answers")
                yield server, callers, status
            finally:
                server.kill()
                callers.kill()


def test_clients_are_content(tmp_path: Path) -> None:
    with talking(tmp_path) as (server, callers, status):
        callers.terminate()
        assert callers.wait(30) == 0
        said = read_status(status)
        assert said is not None and said["complaints"] == 0 and said["counters"]["longest-us"] > 0
        server.terminate()
        assert server.wait(30) == 0


def test_clients_notice_a_stall_and_a_lost_server(tmp_path: Path) -> None:
    with talking(tmp_path) as (server, callers, status):
        server.send_signal(signal.SIGSTOP)
        until(lambda: stopped(server.pid), "the server stands still")
        asked = wait_for_status(status)["counters"]["requests"]
        until(lambda: all_wait(status, asked), "every client waits")
        server.send_signal(signal.SIGCONT)
        until(lambda: wait_for_status(status)["counters"]["longest-us"] > 50_000, "the stall is noticed")
        server.kill()
        until(lambda: wait_for_status(status)["complaints"] >= 20, "every client complains")
        callers.terminate()
        assert callers.wait(30) == 1


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def all_wait(status: Path, asked: int) -> bool:
    """No request since a status of some time ago, and one under way for each client."""
    first = wait_for_status(status)
    second = wait_for_status(status, later_than=first["seq"] + 1)
    counters = second["counters"]
    return bool(counters["requests"] == first["counters"]["requests"] == counters["answers"] + 20)
