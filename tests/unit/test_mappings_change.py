"""Mappings that change while memory is copied: the destination has them as they were in the freeze."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from unit.moving import Move, Moving

from agent.api import MoveOptions
from agent.freeze import FrozenProcess
from agent.kernel import procfs
from agent.kernel.memory import RemoteMemory
from agent.unmovable import NotStill

# An area between two fences, so that it is a mapping of its own; each signal changes it in another way.
FENCED = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
static char *area;
static long size = 4 << 20, page = 4096;
static void on_signal(int number)
{
    if (number == SIGUSR1) {
        madvise(area, size, MADV_DONTFORK);
    } else if (number == SIGUSR2) {
        mlock(area, size);
    } else if (number == SIGALRM) {
        mmap(0, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    } else if (number == SIGHUP) {
        munmap(area + size / 2, size / 2);
    } else if (number == SIGURG) {
        madvise(area + size / 2, size / 2, MADV_HUGEPAGE);
    } else if (number == SIGWINCH) {
        madvise(area, size / 2, MADV_HUGEPAGE);
    } else if (number == SIGXCPU) {
        madvise(area + 8 * page, page, 102); /* MADV_GUARD_INSTALL */
    } else {
        mremap(area, size / 2, size, 0);
        memset(area + size / 2, 'n', size / 2);
    }
    dprintf(1, "did %d\n", number);
}
int main(void)
{
    struct timespec time = {0, 3000000};
    area = mmap(0, size + 2 * page, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    area += page;
    mprotect(area, size, 3);
    memset(area, 'o', size);
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
    signal(SIGALRM, on_signal);
    signal(SIGHUP, on_signal);
    signal(SIGTERM, on_signal);
    signal(SIGURG, on_signal);
    signal(SIGWINCH, on_signal);
    signal(SIGXCPU, on_signal);
    dprintf(1, "area %lx\n", (long)area);
    for (long round = 0;; round++) {
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""


class Fenced(Moving):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory, FENCED)
        self.progress()

    @property
    def area(self) -> int:
        return int(self.lines()[0].split()[1], 16)

    def do(self, number: int) -> None:
        before = self.lines().count(f"did {number}")
        self.process.send_signal(number)
        self.until(lambda: self.lines().count(f"did {number}") > before)

    def mapping(self) -> procfs.MapsLine:
        """The area, in the copy."""
        return next(m for m in procfs.smaps(self.copies[-1]) if m.start == self.area)


@pytest.fixture
def fenced(tmp_path: Path) -> Iterator[Fenced]:
    found = Fenced(tmp_path)
    yield found
    found.close()


def once(action: Callable[[], object]) -> Callable[[Move], bool]:
    """Done while the first round is sent."""
    left = [action]

    def look(move: Move) -> bool:
        if move.states[-1] == "pre-copy" and left:
            left.pop()()
        return False

    return look


def test_advice_to_a_whole_mapping(fenced: Fenced) -> None:
    """It shows in smaps only."""
    assert Move(fenced, MoveOptions(), aborted=once(lambda: fenced.do(signal.SIGUSR1))).migrated
    assert "dc" in fenced.mapping().vmflags
    fenced.progress()


def test_a_whole_mapping_is_locked_right_before_the_freeze(fenced: Fenced) -> None:
    def lock(_: Move, state: str) -> None:
        if state == "freezing":
            fenced.do(signal.SIGUSR2)

    assert Move(fenced, MoveOptions(), lock).migrated
    assert "lo" in fenced.mapping().vmflags
    fenced.progress()


def test_a_mapping_becomes_part_of_another_right_before_the_freeze(fenced: Fenced) -> None:
    """By advice, which only smaps shows: until that is read, the second half seems to have lost its own."""
    fenced.do(signal.SIGURG)

    def join(_: Move, state: str) -> None:
        if state == "freezing":
            fenced.do(signal.SIGWINCH)

    assert Move(fenced, MoveOptions(verify=True), join).migrated
    assert "hg" in fenced.mapping().vmflags
    assert fenced.mapping().end - fenced.area == 4 << 20
    fenced.progress()


def is_guarded(pid: int, address: int) -> bool:
    memory = RemoteMemory(pid)
    try:
        memory.read(address, 1)
    except OSError:
        return True
    finally:
        memory.close()
    return False


def test_a_guard_page(fenced: Fenced) -> None:
    """smaps may show that there are some; the scans find them."""
    fenced.do(signal.SIGXCPU)
    guard = fenced.area + 8 * 4096
    if not is_guarded(fenced.process.pid, guard):
        pytest.skip("this kernel has no guard pages (Linux 6.13)")
    assert Move(fenced, MoveOptions(verify=True)).migrated
    assert is_guarded(fenced.copies[-1], guard)
    assert not is_guarded(fenced.copies[-1], guard - 1) and not is_guarded(fenced.copies[-1], guard + 4096)
    fenced.progress()


@pytest.mark.parametrize("when", ["at once", "freezing"])
def test_a_mapping_that_shrinks_between_two_readings_and_is_whole_again(
    fenced: Fenced, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The lines of maps are the same in the end, but they were not those that the layout is made of."""
    original, shrinking = procfs.read_smaps, list[bool]()

    def another_mapping() -> None:
        fenced.do(signal.SIGALRM)
        shrinking.append(True)

    def read_smaps(pid: int) -> bytes:
        here = threading.current_thread() is threading.main_thread()
        if not (here and shrinking and shrinking.pop()):
            return original(pid)
        fenced.do(signal.SIGHUP)  # it has looked at maps, and goes on to smaps
        found = original(pid)
        if when == "at once":
            fenced.do(signal.SIGTERM)
        return found

    def whole_again(_: Move, state: str) -> None:
        if state == when:
            fenced.do(signal.SIGTERM)

    monkeypatch.setattr(procfs, "read_smaps", read_smaps)
    # one round, or another one without the half, while it is there again
    options = MoveOptions(verify=True, max_rounds=1 if when == "freezing" else 2, downtime_limit_ms=1)
    assert Move(fenced, options, whole_again, aborted=once(another_mapping)).migrated
    assert f"did {signal.SIGHUP}" in fenced.lines() and not shrinking
    assert fenced.mapping().end - fenced.area == 4 << 20
    fenced.progress()


def test_a_freeze_that_is_tried_again_looks_again(fenced: Fenced, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first attempt has read of mappings that are new is no longer true."""
    again, thaw = FrozenProcess._look_again, FrozenProcess.thaw
    attempts: list[FrozenProcess] = []

    def new_mapping(_: Move, state: str) -> None:
        if state == "freezing":
            fenced.do(signal.SIGALRM)

    def not_still_once(frozen: FrozenProcess) -> None:
        again(frozen)
        attempts.append(frozen)
        if len(attempts) == 1:
            raise NotStill("tcp-connecting", "once")

    def runs_on(frozen: FrozenProcess) -> None:
        thaw(frozen)
        fenced.do(signal.SIGUSR1)

    monkeypatch.setattr(FrozenProcess, "_look_again", not_still_once)
    monkeypatch.setattr(FrozenProcess, "thaw", runs_on)
    assert Move(fenced, MoveOptions(verify=True), new_mapping).migrated
    assert len(attempts) == 2
    assert "dc" in fenced.mapping().vmflags
    fenced.progress()
