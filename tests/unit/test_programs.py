"""The workloads standing alone: nothing wrong is found where nothing is, and each checker can complain."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from programs.status import build, wait_for_status

PROGRAMS = build()
KINDS = subprocess.check_output([PROGRAMS / "selfcheck", "--list-breaks"], text=True).split()
# A pause that a busy machine may make of its own; more would only make the tests longer.
MAX_GAP = "1.0"


def run(program: str, directory: Path, *arguments: str) -> tuple[int, str]:
    """Exit status, and the status's line together with the complaints."""
    command = [str(PROGRAMS / program), "--status", str(directory / "status"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("selfcheck", ("--dir", "{}")),
        ("churn", ("--dir", "{}", "--seed", "7")),
        ("churn", ("--dir", "{}", "--seed", "8", "--threads", "4", "--rate", "100")),
        ("heartbeat", ("--fill", "random", "--threads", "3", "--mappings", "7")),
        ("heartbeat", ("--fill", "text", "--sweep")),
        ("heartbeat", ("--fill", "zero")),
    ],
)
def test_runs_without_complaint(program: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, output = run(program, tmp_path, "--seconds", "2", *(word.format(tmp_path) for word in arguments))
    assert code == 0, output
    status = wait_for_status(tmp_path / "status")
    assert status["complaints"] == 0
    assert all(count > 0 for name, count in status["counters"].items() if not name.startswith("failed"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[tuple[int, str]]]]:
    """A run with each kind of damage, a few at a time: they mostly sleep."""

    def run_damaged(kind: str) -> tuple[int, str]:
        directory = tmp_path_factory.mktemp(kind)
        options = ("--dir", str(directory), "--max-gap", MAX_GAP, "--seconds", "3")
        return run("selfcheck", directory, *options, "--break-after", "1", kind)

    with ThreadPoolExecutor(8) as pool:
        yield {kind: pool.submit(run_damaged, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_selfcheck_notices(kind: str, damaged: dict[str, Future[tuple[int, str]]]) -> None:
    code, output = damaged[kind].result()
    assert code == 1, output
    assert "COMPLAINT" in output


def test_churn_notices_a_dropped_page(tmp_path: Path) -> None:
    code, output = run("churn", tmp_path, "--dir", str(tmp_path), "--seconds", "2", "--break-after", "1")
    assert code == 1, output
    assert "wrong at byte" in output


@pytest.mark.parametrize("program", ["selfcheck", "churn", "heartbeat"])
def test_answers_signals(program: str, tmp_path: Path) -> None:
    """SIGUSR1 prints the status, and the program runs on; SIGTERM ends it with the verdict."""
    directory = [] if program == "heartbeat" else ["--dir", str(tmp_path)]
    path = tmp_path / "status"
    command = [str(PROGRAMS / program), "--status", str(path), *directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            before = wait_for_status(path)
            assert before["pid"] == process.pid
            process.send_signal(signal.SIGUSR1)
            wait_for_status(path, later_than=before["seq"] + 1)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_wrong_usage() -> None:
    for program in ("selfcheck", "churn", "heartbeat"):
        done = subprocess.run([PROGRAMS / program, "--nonsense"], capture_output=True, check=False)
        assert done.returncode == 2
