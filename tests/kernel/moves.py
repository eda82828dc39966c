"""Moves within one host, of programs that check themselves: for a guest, where there is no lab.

Not collected by itself; tests/kernel/test_guest.py runs it in one. It runs on any kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs.status import BUILD, read_status, wait_for_status
from unit.children import ended, gone, wait_for
from unit.moving import try_to_move

from agent.api import Outcome, Report
from agent.kernel.errors import check, libc

PATIENCE = 120.0  # seconds, for an emulated machine
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000


class Program:
    """A workload that says how it is (tests/programs)."""

    def __init__(self, directory: Path, name: str, *options: object) -> None:
        self.status = directory / "status"
        self.log = directory / "log"
        words = [BUILD / name, "--status", self.status, "--log", self.log, "--dir", directory, *options]
        with (directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [str(w) for w in words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.now()

    def now(self) -> dict[str, Any]:
        """What it says from now on; it has nothing to complain about."""
        before = read_status(self.status)
        status = wait_for_status(self.status, before["seq"] + 1 if before else 0, PATIENCE)
        assert not self.complaints()
        return status

    def complaints(self) -> list[str]:
        """Coarse clocks only go on with the timer interrupt, which an emulator on a busy host delays."""
        text = self.log.read_text() if self.log.exists() else ""
        return [line for line in text.splitlines() if "COMPLAINT" in line and "_COARSE stepped" not in line]

    def move(self, prepare: Callable[[], None] = lambda: None) -> Report:
        """Move it, everything compared."""
        report = try_to_move(self.pid, prepare, verify=True, freeze_timeout_ms=1000 * PATIENCE)
        failed = (report.error, report.blockers, self._process.poll(), self.complaints())
        assert report.outcome is Outcome.MIGRATED and report.destination.pid, failed
        assert report.verified_pages
        wait_for(lambda: ended(self.pid), "the original to end")
        self.pid = report.destination.pid
        return report

    def check(self) -> None:
        """It compares all it has with what it should have, at once."""
        os.kill(self.pid, signal.SIGUSR1)
        self.now()

    def end(self) -> None:
        """It checks everything once more, and ends by itself."""
        os.kill(self.pid, signal.SIGTERM)
        wait_for(lambda: ended(self.pid), "its end")
        assert not self.complaints()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        wait_for(lambda: gone(self.pid), "its end")


@contextlib.contextmanager
def program(directory: Path, name: str, *options: object) -> Iterator[Program]:
    started = Program(directory, name, *options)
    try:
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("seed", range(1, 9))
def test_churn(tmp_path: Path, seed: int) -> None:
    """The address space changes all the time."""
    options = ["--seed", seed, "--megabytes", 16, "--threads", 1 + seed % 3, "--rate", 5]
    with program(tmp_path, "churn", *options) as churn:
        for _ in range(2):
            before = churn.now()["counters"]
            report = churn.move()
            assert len(report.rounds) > 1
            churn.check()
            after = churn.now()["counters"]
            assert all(after[name] >= before[name] for name in before if name.startswith("checked"))
        churn.end()


def test_selfcheck(tmp_path: Path) -> None:
    """Every kind of thing that a process has. The destination has its own FIFO by the original's name."""
    place = tmp_path / "place"
    place.mkdir()
    os.mkfifo(place / "fifo")

    def own_place() -> None:
        check(libc.unshare(CLONE_NEWNS), "unshare")
        check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "/")
        check(libc.mount(b"none", bytes(place), b"tmpfs", ctypes.c_ulong(0), None), str(place))
        os.mkfifo(place / "fifo")

    with program(tmp_path, "selfcheck", "--fifo", place / "fifo", "--max-gap", 60) as selfcheck:
        selfcheck.move(own_place)
        selfcheck.now()
        selfcheck.end()
