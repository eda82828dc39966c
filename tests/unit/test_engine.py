"""One whole migration between two processes of one host: no ssh, no network, the real engine at either end.

The number is taken here, so the copy comes to life in a pid namespace of its own.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from unit.children import ended, gone, wait_for
from unit.moving import Move, Moving

from agent import finishing, protocol
from agent.api import (
    MoveOptions,
    Outcome,
)
from agent.dirty_tracking import mechanism
from agent.kernel import procfs
from agent.kernel.memory import RemoteMemory
from agent.link import Link

PAGE = 4096
MIB = 1 << 20

# Says a number each round, while one buffer is checked and changes, and another is given back page by page.
# It ends when the file that it is told about appears.
TICKER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
int main(int count, char **arguments)
{
    long size = 8 << 20, words = size / sizeof(long);
    long *buffer = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *returned = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct timespec time = {0, 5000000}, now;
    long long before = 0;
    memset(returned, 1, size);
    for (long n = 0; n < words; n++)
        buffer[n] = n * 0x9e3779b97f4a7c15;
    for (long round = 0; access(arguments[1], F_OK); round++) {
        buffer[round * 512 % words] = round * 512 % words * 0x9e3779b97f4a7c15;
        for (long n = 0; n < words; n += 511)
            if (buffer[n] != n * 0x9e3779b97f4a7c15)
                dprintf(1, "wrong word %ld\n", n);
        madvise(returned + round * 4096 % size, 4096, MADV_DONTNEED);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec * 1000000000ll + now.tv_nsec < before)
            dprintf(1, "wrong time\n");
        before = now.tv_sec * 1000000000ll + now.tv_nsec;
        dprintf(1, "%ld %lx %lx\n", round, (long)buffer, (long)returned);
        nanosleep(&time, 0);
    }
    return 0;
}
"""


class Ticker(Moving):
    """The program that is moved."""

    def __init__(self, directory: Path) -> None:
        self._end = directory / "end"
        super().__init__(directory, TICKER, self._end)
        self.progress()
        self.before = self.picture()

    def progress(self) -> None:
        """It goes on, and has nothing to complain about."""
        super().progress()
        found = self.lines()
        assert not [line for line in found if "wrong" in line]
        steps = [int(line.split()[0]) for line in found]
        assert steps == list(range(len(found)))  # no step lost or done twice

    @property
    def buffer(self) -> int:
        return int(self.lines()[-1].split()[1], 16)

    @property
    def returned(self) -> int:
        return int(self.lines()[-1].split()[2], 16)

    def end(self) -> None:
        """Let it end by itself, and wait for that."""
        self._end.touch()
        wait_for(lambda: ended(self.pid), "the program to end")

    def picture(self) -> tuple[object, ...]:
        """What a rolled back migration must leave as it was."""
        flags = {(m.start, m.end, m.protection, m.vmflags - {"sd"}) for m in procfs.smaps(self.pid)}
        status = procfs.status(self.pid)
        return flags, procfs.fds(self.pid), status["SigBlk"], status["TracerPid"]

    def assert_untouched(self) -> None:
        self.progress()
        assert self.picture() == self.before


@pytest.fixture
def ticker(tmp_path: Path) -> Iterator[Ticker]:
    found = Ticker(tmp_path)
    yield found
    found.close()


# --- as it should be ---


def test_a_program_moves_and_goes_on(ticker: Ticker) -> None:
    move = Move(ticker, MoveOptions(verify=True))
    report = move.report
    assert report is not None and report.error is None
    assert report.outcome is Outcome.MIGRATED
    assert move.states == [
        *("examining", "offering", "preparing", "pre-copy", "freezing"),
        *("committing", "committed", "live", "migrated"),
    ]
    ticker.process.wait(10)  # the original is dead
    assert ticker.process.returncode in (-signal.SIGKILL, 0)
    copy = report.destination.pid
    assert copy is not None and copy != ticker.pid
    assert procfs.status(copy)["NSpid"].split() == [str(copy), str(ticker.pid)]
    assert procfs.status(copy)["TracerPid"] == "0"
    assert procfs.namespace(copy, "pid") != procfs.namespace(os.getpid(), "pid")
    ticker.progress()
    assert report.verified_pages is not None and report.verified_pages >= 8 * MIB // PAGE
    assert sum(r.pages_sent for r in report.rounds) >= 8 * MIB // PAGE - 1
    assert report.pause_ms is not None and report.longest_stop_ms is not None
    assert {p.where for p in report.phases} == {"source", "destination"}
    assert report.bytes_sent >= sum(r.bytes for r in report.rounds) > 0
    os.kill(copy, signal.SIGTERM)
    wait_for(lambda: gone(copy), "the copy to die like any process")


def test_pages_given_back_in_pre_copy_stay_gone(ticker: Ticker) -> None:
    went_on: list[bool] = []

    def wait(move: Move) -> bool:
        if move.states[-1] == "pre-copy" and len(went_on) < 3:
            went_on.append(True)
            ticker.progress()
        return False

    report = Move(ticker, MoveOptions(verify=True), aborted=wait).report
    assert report is not None and report.outcome is Outcome.MIGRATED, report
    assert sum(r.pages_discarded for r in report.rounds) >= 3
    # looked at from outside: a read by the program itself would make a page of it
    count = len(ticker.lines()) - 1
    memory = RemoteMemory(report.destination.pid or 0)
    content = memory.read(ticker.returned, 8 * MIB)
    memory.close()
    assert content[: count * PAGE] == bytes(count * PAGE)
    assert content[-PAGE:] == b"\1" * PAGE
    ticker.progress()


def test_left_stopped(ticker: Ticker) -> None:
    report = Move(ticker, MoveOptions(leave_stopped=True)).report
    assert report is not None and report.outcome is Outcome.MIGRATED and report.destination.pid is not None
    wait_for(lambda: procfs.stat(report.destination.pid or 0).state == "T", "the copy to be stopped")
    os.kill(report.destination.pid, signal.SIGCONT)
    ticker.progress()


def test_check_touches_nothing(ticker: Ticker) -> None:
    move = Move(ticker, MoveOptions(), operation="check")
    assert move.checked is not None and move.report is None
    assert move.checked.blockers == ()
    assert move.checked.memory_bytes > 8 * MIB
    assert (move.checked.threads, move.checked.dirty_tracking) == (1, str(mechanism()))
    ticker.assert_untouched()


# --- the check that must be able to fail ---


def test_a_page_that_was_dropped_is_named(ticker: Ticker, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ticker.buffer + 1000 * PAGE
    monkeypatch.setenv("MIGRATE_TEST_DROP_PAGE", hex(page))
    move = Move(ticker, MoveOptions(verify=True))
    assert f"page {page:#x} of mapping" in move.rolled_back("mismatch", "source")
    ticker.assert_untouched()
    monkeypatch.delenv("MIGRATE_TEST_DROP_PAGE")
    again = Move(ticker, MoveOptions(verify=True))
    assert again.report is not None and again.report.outcome is Outcome.MIGRATED
    ticker.progress()


def test_without_the_check_nobody_notices(ticker: Ticker, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the dropped page is really missing, and it is --verify that finds it."""
    monkeypatch.setenv("MIGRATE_TEST_DROP_PAGE", hex(ticker.buffer + 1000 * PAGE))
    report = Move(ticker, MoveOptions()).report
    assert report is not None and report.outcome is Outcome.MIGRATED
    wait_for(lambda: any("wrong word" in line for line in ticker.lines()), "the program to complain")


# --- given up ---


@pytest.mark.parametrize("state", ["pre-copy", "freezing"])
def test_aborted(ticker: Ticker, state: str) -> None:
    """In pre-copy between two chunks; in the freeze when the copy is ready and the commit is due."""
    move = Move(ticker, MoveOptions(), aborted=lambda m: m.states[-1] == state)
    assert "aborted" in move.rolled_back("aborted", "coordinator")
    assert move.states[-2:] == [state, "rolled-back"]
    ticker.assert_untouched()


def test_the_destination_dies_in_pre_copy(ticker: Ticker) -> None:
    def kill(move: Move, state: str) -> None:
        if state == "pre-copy":
            move.destination.kill()

    move = Move(ticker, MoveOptions(), on_state=kill)
    move.rolled_back("link-closed", "link")
    ticker.assert_untouched()


def test_the_destination_dies_in_the_middle_of_a_round(ticker: Ticker) -> None:
    killed: list[int] = []

    def kill(move: Move) -> bool:
        if move.states[-1] == "pre-copy" and not killed:
            killed.append(move.destination.pid)
            move.destination.kill()
        return False

    move = Move(ticker, MoveOptions(compression="none"), aborted=kill)
    move.rolled_back("link-closed", "link")
    ticker.assert_untouched()


def dies_after_sending(kind: type[protocol.Message]) -> Callable[[], None]:
    """For the destination's process: its last act is to send such a message."""

    def prepare() -> None:
        send = Link.send

        def deadly(link: Link, message: protocol.Message) -> None:
            send(link, message)
            if isinstance(message, kind):
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(Link, "send", deadly)  # noqa: B010 (mypy)

    return prepare


@pytest.mark.parametrize("kind", [protocol.Answer, protocol.Prepared, protocol.RoundDone])
def test_the_destination_dies_on_its_way(ticker: Ticker, kind: type[protocol.Message]) -> None:
    move = Move(ticker, MoveOptions(), prepare=dies_after_sending(kind))
    move.rolled_back("link-closed", "link")
    ticker.assert_untouched()


@pytest.mark.parametrize("verify", [False, True])
def test_the_destination_dies_between_ready_and_commit(ticker: Ticker, verify: bool) -> None:
    def wait_for_death(move: Move) -> bool:
        if move.states[-1] == "freezing":  # asked once there, when the copy is ready
            wait_for(lambda: ended(move.destination.pid), "the destination to end")
        return False

    prepare = dies_after_sending(protocol.Ready)
    move = Move(ticker, MoveOptions(verify=verify), aborted=wait_for_death, prepare=prepare)
    move.rolled_back("link-closed", "link")
    ticker.assert_untouched()


def test_the_destination_fails_in_the_freeze(ticker: Ticker) -> None:
    def prepare() -> None:
        def fail(*_: object) -> None:
            raise ValueError("something is wrong here")

        setattr(finishing.Finish, "begin", fail)  # noqa: B010

    move = Move(ticker, MoveOptions(), prepare=prepare)
    assert "something is wrong here" in move.rolled_back("valueerror", "destination")
    ticker.assert_untouched()


def test_the_destination_does_not_answer_in_the_freeze(ticker: Ticker) -> None:
    def prepare() -> None:
        setattr(finishing.Finish, "end", lambda *_: select.select([], [], [], 600))  # noqa: B010

    def kill(move: Move, state: str) -> None:
        if state == "rolled-back":
            move.destination.kill()

    move = Move(ticker, MoveOptions(freeze_timeout_ms=300), prepare=prepare, on_state=kill)
    assert "no Ready" in move.rolled_back("timeout", "source")
    ticker.assert_untouched()


# --- the program itself ---


@pytest.mark.parametrize("state", ["preparing", "pre-copy", "freezing"])
def test_the_program_ends_by_itself(ticker: Ticker, state: str) -> None:
    def end(move: Move, entered: str) -> None:
        if entered == state:
            ticker.end()

    move = Move(ticker, MoveOptions(), on_state=end)
    message = move.rolled_back("process-ended", "source")
    assert message == f"process {ticker.pid} ended by itself during the migration"


def test_the_program_ends_in_the_middle_of_a_round(ticker: Ticker) -> None:
    def end(move: Move) -> bool:
        if move.states[-1] == "pre-copy":
            ticker.end()
        return False

    move = Move(ticker, MoveOptions(), aborted=end)
    assert "ended by itself" in move.rolled_back("process-ended", "source")


def test_no_such_process(ticker: Ticker) -> None:
    ticker.end()
    ticker.process.wait()
    report = Move(ticker, MoveOptions()).report
    assert report is not None and report.outcome is Outcome.REFUSED
    assert [b.kind for b in report.blockers] == ["no-such-process"]
