"""The commit as the engines make it: in the order that was explored (tests/model), and cut short after each
step.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from unit.children import gone, wait_for
from unit.moving import Destination, Move, Program, running

from agent import hold, journal, recovery, settle, shadow, states
from agent.api import MoveOptions, Outcome, Report, SshOptions
from agent.destination import Incoming
from agent.freeze import FrozenProcess
from agent.journal import Arrival, Departure, Entry
from agent.kernel import procfs
from agent.link import Link
from agent.network import DestinationNetwork
from transport.process import ProcessEnd

COUNTS = r"""
#include <stdio.h>
#include <time.h>
int main(void) {
    puts("ready");
    for (long n = 0;; n++) {
        printf("%ld\n", n);
        fflush(stdout);
        nanosleep(&(struct timespec){0, 5000000}, NULL);
    }
}
"""
Watch = Callable[[str], None]


def watch(patch: pytest.MonkeyPatch, see: Watch) -> None:
    """Let `see` have the name of each step of either role right before it is made."""

    def before(holder: Any, name: str, step: Callable[..., str | None]) -> None:
        original = getattr(holder, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if (what := step(*arguments)) is not None:
                see(what)
            return original(*arguments, **options)

        patch.setattr(holder, name, call)

    def sent(_: Any, message: Any) -> str | None:
        name = type(message).__name__
        if name == "Late" and not message.last:
            return None
        return f"send {name}" if name in ("Commit", "Live", "Late", "Done") else None

    before(Entry, "to", lambda entry, state: f"journal {state}")
    before(Entry, "remove", lambda entry: "forget")
    before(hold, "put", lambda pid: "hold")
    before(hold, "put_each", lambda pid, tids: "hold")
    before(hold, "lift", lambda tid: "lift")
    before(Link, "send", sent)
    before(FrozenProcess, "bury", lambda frozen: "bury" if frozen.tids else None)
    before(DestinationNetwork, "take_over", lambda network, sockets: "activate")
    before(shadow.Shadow, "outlive_us", lambda made: "outlive")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with running(tmp_path, COUNTS) as found:
        yield found


def test_the_steps_are_those_that_were_explored(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    there = tmp_path / "steps"

    def in_destination() -> None:
        """A fork: what the test patched for itself is patched there."""
        steps.clear()
        program_steps = there.open("a", buffering=1)
        watch(monkeypatch, lambda step: print(step, file=program_steps))

    watch(monkeypatch, steps.append)
    assert Move(program, MoveOptions(), prepare=in_destination).migrated
    assert steps == [step for step in states.SOURCE_COMMITS if not step.startswith("await")]
    found = there.read_text().split("\n")[:-1]
    # holding and outliving are one call, and the shadow's own part of it is seen first
    expected = [step for step in states.DESTINATION_COMMITS if not step.startswith("await")]
    assert sorted(found) == sorted(expected)
    found.remove("outlive")
    expected.remove("outlive")
    assert found == expected


@contextlib.asynccontextmanager
async def ask_here(
    _: str, options: SshOptions, migration: str, boot: str
) -> AsyncIterator[recovery.Asked]:
    """The destination is on this host."""
    ended: asyncio.Future[ProcessEnd] = asyncio.get_running_loop().create_future()
    ended.set_result(ProcessEnd(host="here", status=0))
    yield recovery.Asked(settle.settle(migration, boot), lambda: settle.forget(migration), ended)


def moved(program: Program, directory: Path, **options: Any) -> tuple[str, Report]:
    """By an engine of its own process, which has ended then: the migration's name and the report."""
    name, said = directory / "name", directory / "report"
    engine = os.fork()
    if engine == 0:
        try:
            move = Move(program, **options)
            name.write_text(move.name)
            said.write_bytes(msgspec.json.encode(move.report))
        finally:
            os._exit(0)
    os.waitpid(engine, 0)
    report = msgspec.json.decode(said.read_bytes(), type=Report)
    program.copies += [report.destination.pid or 0]
    return name.read_text(), report


DESTINATION_STEPS = [step for step in states.DESTINATION_COMMITS if not step.startswith("await")]
VOID = ("journal committed", "hold", "outlive")  # until then, the death of its agent is the shadow's


@pytest.mark.parametrize("fatal", DESTINATION_STEPS)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "alone"])
def test_the_destination_dies_before_a_step(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: str, guarded: bool
) -> None:
    """Whoever comes then, its guardian or the source that asks: one copy goes on, where it got to."""

    def in_destination() -> None:
        def see(step: str) -> None:
            if step == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        if not guarded:
            monkeypatch.setattr("agent.guardian._watch", lambda *_: None)
        watch(monkeypatch, see)

    monkeypatch.setattr(recovery, "_verdict", ask_here)
    name, report = moved(program, tmp_path, options=MoveOptions(), prepare=in_destination)
    outcome = recovery.recover(name).outcome or report.outcome
    copy = report.destination.pid or 0
    assert outcome is (Outcome.ROLLED_BACK if fatal in VOID else Outcome.MIGRATED)
    if fatal in VOID:
        wait_for(lambda: gone(copy), "the shadow to end")
    else:
        wait_for(lambda: program.process.poll() is not None, "the source copy to end")
    program.progress()
    assert journal.find(Departure, name) is None
    assert journal.find(Arrival, name) is None


def test_a_destination_that_hangs_is_asked(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has heard COMMIT. The source copy stands still meanwhile; the answer ends the one that hangs."""

    def in_destination() -> None:
        def see(step: str) -> None:
            if step == "journal committed":
                os.kill(os.getpid(), signal.SIGSTOP)

        watch(monkeypatch, see)

    monkeypatch.setattr(recovery, "_verdict", ask_here)
    monkeypatch.setattr(Destination, "close", lambda destination: None)
    options = MoveOptions(freeze_timeout_ms=300)
    name, report = moved(program, tmp_path, options=options, prepare=in_destination)
    assert report.outcome is Outcome.IN_DOUBT
    assert procfs.stat(program.pid).state == "T"
    assert recovery.recover(name).outcome is Outcome.ROLLED_BACK
    assert gone(report.destination.pid or 0)
    program.progress()


def test_a_rollback_that_fails_is_ended_by_the_guardian(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is held by then: nobody else would let it go on."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOMEM, "not now")

    def in_destination() -> None:
        monkeypatch.setattr(Incoming, "_complete", fails)

    monkeypatch.setattr(FrozenProcess, "thaw", fails)
    name, report = moved(program, tmp_path, options=MoveOptions(), prepare=in_destination)
    assert report.outcome is Outcome.ROLLED_BACK
    wait_for(lambda: journal.find(Departure, name) is None, "the guardian")
    program.progress()
