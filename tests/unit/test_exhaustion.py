"""A host that runs out of something: one clear error, the process runs on, and nothing is left anywhere."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from unit.cgroups import Cgroup, limited
from unit.children import wait_for
from unit.moving import Move, Moving

from agent import journal
from agent.api import Blocker, MoveOptions, Outcome
from agent.kernel import clone, procfs
from agent.kernel.errors import check, libc
from agent.server.places import RUNTIME_VARIABLE

MNT_DETACH = 2
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, and limits of others, are root's")

# Holds so many MiB, threads and descriptors, from a given number on, and the files that it is told; looks
# at its memory all the time.
HOLDER = r"""
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static void *idle(void *none)
{
    for (;;)
        pause();
    return none;
}
int main(int count, char **arguments)
{
    long size = atol(arguments[1]) << 20;
    char *area = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct timespec time = {0, 3000000};
    pthread_t thread;
    memset(area, 7, size);
    for (int n = atoi(arguments[2]); n; n--)
        pthread_create(&thread, 0, idle, 0);
    for (int n = atoi(arguments[3]); n; n--)
        fcntl(0, F_DUPFD, atoi(arguments[4]));
    for (int n = 5; n < count; n++)
        open(arguments[n], O_RDONLY);
    for (long round = 0;; round++) {
        for (long n = 0; n < size; n += 4096)
            if (area[n] != 7)
                dprintf(1, "wrong page %ld\n", n / 4096);
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""
Holding = Callable[..., Moving]


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Holding]:
    made: list[Moving] = []

    def start(mebibytes: int = 1, threads: int = 0, fds: int = 0, first: int = 3, *files: Path) -> Moving:
        made.append(Moving(tmp_path, HOLDER, *map(str, (mebibytes, threads, fds, first, *files))))
        made[-1].progress()
        return made[-1]

    yield start
    for program in made:
        program.close()


def assert_untouched(program: Moving) -> None:
    program.progress()
    assert not [line for line in program.lines() if line.startswith("wrong")]
    status = procfs.status(program.pid)
    assert (status["TracerPid"], status["SigBlk"]) == ("0", "0" * 16)
    assert not [m for m in procfs.maps(program.pid) if m.protection == 5 and not m.name]


def refused(program: Moving, prepare: Callable[[], None]) -> Blocker:
    """The one thing that stood in the way."""
    report = Move(program, MoveOptions(), prepare=prepare).report
    assert report is not None and report.outcome is Outcome.REFUSED, report
    (blocker,) = report.blockers
    return blocker


def join(group: Cgroup) -> Callable[[], None]:
    """For a destination: be in it."""
    return lambda: group.take(os.getpid())


def shadow_of(move: Move) -> int:
    arrival = journal.find(journal.Arrival, move.name)
    assert arrival is not None
    return arrival.content.process.pid


def mounted(place: Path, size: int, *, full: bool = False) -> None:
    """A file system of so many bytes there, for this process and what it starts."""
    clone.unshare(clone.CLONE_NEWNS)
    clone.mount("none", "/", "none", clone.MS_REC | clone.MS_SLAVE)
    mount(place, size, full=full)


def mount(place: Path, size: int, *, full: bool) -> None:
    options = f"size={size},mode=700".encode()
    check(libc.mount(b"none", bytes(place), b"tmpfs", ctypes.c_ulong(0), options), f"mount {place}")
    if full:
        (place / "filler").write_bytes(bytes(size))


# --- memory ---


def test_the_destination_has_too_little_memory(holding: Holding) -> None:
    program = holding(mebibytes=96)
    with limited("memory", 64 << 20) as group:
        blocker = refused(program, join(group))
        assert blocker.kind == "memory" and str(group.path) in blocker.why and "raise" in blocker.hint
        assert_untouched(program)
    with limited("memory", 160 << 20) as group:
        assert Move(program, MoveOptions(), prepare=join(group)).migrated
        program.progress()
        program.close()


def test_the_destinations_memory_runs_out(holding: Holding) -> None:
    """After it was asked. Only the shadow is limited: its agent is not there for the kernel to choose."""
    program = holding(mebibytes=96)

    def limit(move: Move, state: str) -> None:
        if state == "pre-copy":
            group.take(shadow_of(move))

    with limited("memory", 48 << 20) as group:
        move = Move(program, MoveOptions(), on_state=limit)
        message = move.rolled_back("out-of-memory", "destination")
        assert message.startswith("the destination ran out of memory") and "cgroup" in message
        assert_untouched(program)


@pytest.mark.parametrize("score", [0, 300])
def test_a_shadow_is_the_first_to_go(holding: Holding, score: int) -> None:
    """Until it is alive: then it is what the process was."""
    program = holding()
    Path(f"/proc/{program.pid}/oom_score_adj").write_text(str(score))
    seen: list[str] = []

    def look(move: Move, state: str) -> None:
        if state == "pre-copy":
            seen.append(Path(f"/proc/{shadow_of(move)}/oom_score_adj").read_text())

    report = Move(program, MoveOptions(), on_state=look).migrated
    assert seen == ["1000\n"]
    assert Path(f"/proc/{report.destination.pid}/oom_score_adj").read_text() == f"{score}\n"
    assert not report.notices


def test_a_shadow_that_somebody_kills(holding: Holding) -> None:
    program = holding(mebibytes=8)

    def kill(move: Move, state: str) -> None:
        if state == "pre-copy":
            os.kill(shadow_of(move), signal.SIGKILL)

    message = Move(program, MoveOptions(), on_state=kill).rolled_back("shadow-killed", "destination")
    assert message.startswith("somebody killed process")
    assert_untouched(program)


# --- processes and threads ---


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 20])
def test_the_destination_may_have_too_few_processes(holding: Holding, processes: int) -> None:
    """From the first fork on to the shadow's threads; the guardian is one, too."""
    program = holding(threads=40)
    with limited("pids", processes) as group:
        move = Move(program, MoveOptions(), prepare=join(group))
        assert "pids.max" in move.rolled_back("process-limit", "destination")
        assert_untouched(program)


# --- descriptors ---


@pytest.mark.parametrize(("limit", "fds", "first"), [(64, 100, 3), (512, 4, 3), (2048, 3, 4000)])
def test_the_destination_may_have_too_few_descriptors(
    holding: Holding, limit: int, fds: int, first: int
) -> None:
    """Or only lower numbers. That is known before anything is touched."""
    program = holding(fds=fds, first=first)

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    blocker = refused(program, prepare)
    assert (blocker.kind, str(limit) in blocker.why) == ("descriptor-limit", True)
    assert "RLIMIT_NOFILE" in blocker.hint
    assert_untouched(program)


# --- disks ---


def test_no_room_for_a_file_that_is_copied(holding: Holding, tmp_path: Path) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    file = directory / "file"
    file.write_bytes(os.urandom(1 << 20))
    program = holding(1, 0, 0, 3, file)
    left: list[str] = []

    def prepare() -> None:
        mounted(directory, 64 << 10)

    def look(move: Move, state: str) -> None:
        if state in ("refused", "rolled-back"):
            left[:] = os.listdir(f"/proc/{move.destination.pid}/root{directory}")

    move = Move(program, MoveOptions(copy_files=True), prepare=prepare, on_state=look)
    report = move.report
    assert report is not None and report.error is not None
    assert report.outcome in (Outcome.REFUSED, Outcome.ROLLED_BACK)  # it may hear of it a little later
    assert (report.error.kind, report.error.where) == ("disk-full", "destination")
    assert report.error.message.startswith(f"{file}: no space")
    assert left == []
    assert_untouched(program)


def test_no_room_for_the_destinations_journal(holding: Holding, journals: Path) -> None:
    program = holding()
    full = Move(program, MoveOptions(), prepare=lambda: mounted(journals, 16 << 10, full=True))
    message = full.rolled_back("disk-full", "destination")
    assert str(journals) in message and "free some" in message
    assert_untouched(program)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Mounted for all: a process in another mount namespace than its agent is not moved."""
    place = tmp_path / "run"
    place.mkdir()
    mount(place, 16 << 10, full=True)
    yield place
    check(libc.umount2(bytes(place), MNT_DETACH), f"unmount {place}")


def test_no_room_for_the_sources_journal(
    holding: Holding, journals: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = holding()
    monkeypatch.setenv(RUNTIME_VARIABLE, str(full))
    there = {RUNTIME_VARIABLE: str(journals)}
    move = Move(program, MoveOptions(), prepare=lambda: os.environ.update(there))
    message = move.rolled_back("disk-full", "source")
    assert message.startswith(f"{full}/outgoing") and "free some" in message
    assert_untouched(program)
    left = partial((journals / "incoming").glob, f"{move.name}.*")
    wait_for(lambda: not list(left()), "the destination's journal to go")
