"""What a process does between check and the end of its freeze: seen, carried along, or a clean roll back."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.children import ended, gone, wait_for
from unit.moving import Move, Moving

from agent import inventory
from agent.api import Blocker, MoveOptions, Outcome
from agent.kernel import clone, procfs

# Does what the file "command" says, and says that it did; counts, and tells of each signal.
OBEYER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static char *area;
static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)context;
    dprintf(1, "signal %d %d %d\n", number, info->si_code, info->si_value.sival_int);
}
static void map_anew(void)
{
    munmap(area, 1 << 20);
    area = mmap(area, 1 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    memset(area, 'n', 1 << 20);
    madvise(area, 1 << 19, MADV_DONTDUMP);
}
static void filter(void)
{
    struct sock_filter allow = {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW};
    struct sock_fprog program = {1, &allow};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
static void obey(const char *word, char **arguments, int file)
{
    if (!strcmp(word, "seccomp"))
        filter();
    else if (!strcmp(word, "chroot"))
        chroot(arguments[1]);
    else if (!strcmp(word, "lease"))
        fcntl(file, F_SETLEASE, F_WRLCK);
    else if (!strcmp(word, "release"))
        fcntl(file, F_SETLEASE, F_UNLCK);
    else if (!strcmp(word, "exec"))
        execv("/proc/self/exe", arguments);
    else if (!strcmp(word, "write"))
        pwrite(file, "other", 5, 0);
    else if (!strcmp(word, "map"))
        map_anew();
    else if (!strcmp(word, "fork") && !fork()) {
        usleep(1500000);
        _exit(0);
    } else if (!strcmp(word, "vfork") && !vfork()) {
        usleep(1500000);
        _exit(0);
    }
    waitpid(-1, 0, 0);
    dprintf(1, "did %s\n", word);
}
int main(int count, char **arguments)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct timespec time = {0, 3000000};
    char word[32];
    int directory = open(arguments[1], O_DIRECTORY), file = openat(directory, "file", O_RDWR);
    sigaction(SIGUSR1, &action, 0);
    sigaction(SIGRTMIN, &action, 0);
    area = mmap(0, 4 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(area, 'o', 4 << 20);
    dprintf(1, "area %lx\n", (long)area);
    for (long round = 0;; round++) {
        int command = openat(directory, "command", O_RDONLY);
        if (command >= 0) {
            long size = read(command, word, sizeof word - 1);
            close(command);
            if (size > 0) {
                word[size] = 0;
                unlinkat(directory, "command", 0);
                obey(word, arguments, file);
            }
        }
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""


class Obeyer(Moving):
    """The program, with a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "file").write_text("first")
        super().__init__(directory, OBEYER, directory)
        self.progress()

    def obey(self, word: str) -> None:
        self.tell(word)
        wait_for(lambda: f"did {word}" in self.lines(), f"the program to {word}")

    def tell(self, word: str) -> None:
        (self.directory / ".command").write_text(word)
        (self.directory / ".command").rename(self.directory / "command")

    @property
    def area(self) -> int:
        return int(self.lines()[0].split()[1], 16)

    def assert_runs_on(self) -> None:
        """The source, with nothing of ours left in it."""
        self.progress()
        assert procfs.stat(self.pid).state in "SR"
        assert procfs.status(self.pid)["TracerPid"] == "0"
        assert procfs.status(self.pid)["SigBlk"] == "0" * 16
        assert not [m for m in procfs.maps(self.pid) if m.protection == 5 and not m.name]


@pytest.fixture
def obeyer(tmp_path: Path) -> Iterator[Obeyer]:
    found = Obeyer(tmp_path)
    yield found
    found.close()


def in_state(wanted: str, action: Callable[[], object]) -> Callable[[Move, str], None]:
    def on_state(_: Move, state: str) -> None:
        if state == wanted:
            action()

    return on_state


@pytest.mark.parametrize(
    ("word", "kind"), [("seccomp", "seccomp"), ("chroot", "chroot"), ("lease", "file-lock")]
)
def test_what_the_check_would_refuse(obeyer: Obeyer, word: str, kind: str) -> None:
    move = Move(obeyer, MoveOptions(), in_state("pre-copy", lambda: obeyer.obey(word)))
    move.rolled_back(kind, "source")
    obeyer.assert_runs_on()


def test_a_lease_that_is_given_up_again(obeyer: Obeyer) -> None:
    """The freeze is tried again, for a while; stops that were given up count as stops."""
    obeyer_at: list[float] = []

    def during(move: Move, state: str) -> None:
        if state == "pre-copy":
            obeyer.obey("lease")
        elif state == "freezing":
            obeyer.tell("release")
            obeyer_at.append(time.monotonic())

    move = Move(obeyer, MoveOptions(), during)
    assert move.migrated
    assert obeyer_at and "did release" in obeyer.lines()
    obeyer.progress()


@pytest.mark.parametrize("state", ["offering", "preparing", "pre-copy", "freezing"])
def test_another_program(obeyer: Obeyer, state: str) -> None:
    """From the first look at it on: what was found belongs to a program that is gone."""
    move = Move(obeyer, MoveOptions(), in_state(state, lambda: exec_again(obeyer)))
    message = move.rolled_back("process-executed", "source")
    assert "execve" in message
    obeyer.assert_runs_on()


def exec_again(obeyer: Obeyer) -> None:
    obeyer.tell("exec")
    wait_for(
        lambda: sum(line.startswith("area") for line in obeyer.lines()) == 2, "the program to start again"
    )


def test_stopped_by_a_signal(obeyer: Obeyer) -> None:
    move = Move(obeyer, MoveOptions(), in_state("pre-copy", lambda: stop(obeyer)))
    move.rolled_back("stopped", "source")
    assert procfs.stat(obeyer.pid).state == "T"
    os.kill(obeyer.pid, signal.SIGCONT)
    obeyer.assert_runs_on()


def stop(obeyer: Obeyer) -> None:
    os.kill(obeyer.pid, signal.SIGSTOP)
    wait_for(lambda: procfs.stat(obeyer.pid).state == "T", "the program to stop")


def test_a_child_that_ends_soon(obeyer: Obeyer) -> None:
    """The freeze waits for it."""

    def fork(move: Move, state: str) -> None:
        if state == "freezing":
            obeyer.tell("vfork")
            wait_for(lambda: bool(procfs.children(obeyer.pid)), "the child")

    move = Move(obeyer, MoveOptions(), fork)
    assert move.migrated
    obeyer.progress()


@pytest.mark.parametrize(("word", "kind"), [("fork", "child-processes"), ("seccomp", "seccomp")])
def test_what_comes_after_the_last_look_and_before_the_stop(
    obeyer: Obeyer, monkeypatch: pytest.MonkeyPatch, word: str, kind: str
) -> None:
    """It is asked once more in the freeze, of those threads that have run since."""
    original, armed = inventory.lasting_blockers, list[bool]()

    def look(*arguments: Any) -> list[Blocker]:
        found = original(*arguments)
        if armed and armed.pop():
            obeyer.tell(word)
            if word == "fork":
                wait_for(lambda: bool(procfs.children(obeyer.pid)), "the child")
            else:
                wait_for(lambda: f"did {word}" in obeyer.lines(), "the filter")
        return found

    monkeypatch.setattr(inventory, "lasting_blockers", look)
    move = Move(obeyer, MoveOptions(), lambda _, state: armed.append(True) if state == "freezing" else None)
    move.rolled_back(kind, "source")
    assert not armed
    obeyer.progress()


def test_asleep_where_nothing_interrupts_it(obeyer: Obeyer, monkeypatch: pytest.MonkeyPatch) -> None:
    """vfork(2) waits for its child so, and the child may come right after we have looked.

    The freeze gives up in time, the roll back still ends in a report.
    """
    monkeypatch.setattr(inventory, "lasting_blockers", lambda *_: [])

    def wait(move: Move, state: str) -> None:
        if state == "freezing":
            obeyer.tell("vfork")
            wait_for(lambda: procfs.stat(obeyer.pid).state == "D", "the program to wait")

    Move(obeyer, MoveOptions(freeze_timeout_ms=300), wait).rolled_back("timeout", "source")
    obeyer.assert_runs_on()


def hide(path: Path) -> Callable[[], None]:
    """The destination gets a file of its own there: same content, not shared."""

    def in_destination() -> None:
        clone.unshare(clone.CLONE_NEWNS)
        clone.mount("none", "/", "none", clone.MS_REC | clone.MS_SLAVE)
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        clone.mount(str(other), str(path), "none", MS_BIND)

    return in_destination


MS_BIND = 0x1000


def test_a_file_of_its_own_is_not_moved_when_it_was_written(obeyer: Obeyer) -> None:
    file = obeyer.directory / "file"
    move = Move(obeyer, MoveOptions(), in_state("pre-copy", lambda: obeyer.obey("write")), prepare=hide(file))
    assert str(file) in move.rolled_back("file-changed", "source")
    obeyer.assert_runs_on()


def test_a_file_of_its_own_is_not_moved_when_the_destinations_was_written(obeyer: Obeyer) -> None:
    file = obeyer.directory / "file"
    other = in_state("pre-copy", lambda: file.with_name("other").write_bytes(b"other"))
    move = Move(obeyer, MoveOptions(), other, prepare=hide(file))
    assert str(file) in move.rolled_back("file-changed", "destination")
    obeyer.assert_runs_on()


def test_a_shared_file_may_be_written(obeyer: Obeyer) -> None:
    move = Move(obeyer, MoveOptions(), in_state("pre-copy", lambda: obeyer.obey("write")))
    assert move.migrated
    obeyer.progress()


@pytest.mark.parametrize("state", ["freezing", "committing", "committed"])
def test_signals_are_never_lost(obeyer: Obeyer, state: str) -> None:
    """kill(2) and sigqueue(3), before the capture, after it, and after the point of no return."""

    def send() -> None:
        os.kill(obeyer.pid, signal.SIGUSR1)
        for value in (7, 8):
            assert ctypes.CDLL(None).sigqueue(obeyer.pid, signal.SIGRTMIN, ctypes.c_void_p(value)) == 0

    move = Move(obeyer, MoveOptions(), in_state(state, send))
    assert move.migrated
    wait_for(lambda: sum(line.startswith("signal") for line in obeyer.lines()) == 3, "all three signals")
    words = sorted(line.split()[1:] for line in obeyer.lines() if line.startswith("signal"))
    queued = [[str(int(signal.SIGRTMIN)), "-1", value] for value in ("7", "8")]
    assert words[0][:2] == [str(int(signal.SIGUSR1)), "0"] and words[1:] == queued
    obeyer.progress()


def test_a_stop_signal_before_commit_stops_the_copy(obeyer: Obeyer) -> None:
    move = Move(obeyer, MoveOptions(), in_state("committing", lambda: os.kill(obeyer.pid, signal.SIGSTOP)))
    copy = move.migrated.destination.pid or 0
    wait_for(lambda: procfs.stat(copy).state == "T", "the copy to stop")
    os.kill(copy, signal.SIGCONT)
    obeyer.progress()


@pytest.mark.parametrize("state", ["examining", "offering", "preparing", "pre-copy", "freezing"])
def test_killed_in(obeyer: Obeyer, state: str) -> None:
    """Somebody's SIGKILL before the point of no return means the program: no copy may live."""

    def kill() -> None:
        obeyer.process.kill()
        wait_for(lambda: ended(obeyer.pid), "the program to end")

    report = Move(obeyer, MoveOptions(), in_state(state, kill)).report
    assert report is not None
    touched = state not in ("examining", "offering")
    assert report.outcome is (Outcome.ROLLED_BACK if touched else Outcome.REFUSED)
    if state == "examining":  # a zombie by then
        assert [b.kind for b in report.blockers] == ["zombie"]
        return
    assert report.error is not None and (report.error.kind, report.error.where) == ("process-ended", "source")
    assert report.error.message == f"process {obeyer.pid} ended by itself during the migration"
    shadow = report.destination.pid
    if shadow is not None:
        wait_for(lambda: gone(shadow), "the shadow to end")


def test_mappings_made_right_before_the_freeze(obeyer: Obeyer) -> None:
    """Their flags become known late: what is of another kind is made anew, with its pages."""
    move = Move(obeyer, MoveOptions(verify=True), in_state("freezing", lambda: obeyer.obey("map")))
    copy = move.migrated.destination.pid or 0
    lines = [m for m in procfs.smaps(copy) if obeyer.area <= m.start < obeyer.area + (1 << 20)]
    flags = {m.start - obeyer.area: m.vmflags & {"nr", "dd"} for m in lines}
    assert flags == {0: {"nr", "dd"}, 1 << 19: {"nr"}}
    memory = Path(f"/proc/{copy}/mem").open("rb", buffering=0)
    with memory:
        memory.seek(obeyer.area)
        assert memory.read(1 << 20) == b"n" * (1 << 20)
        assert memory.read(1 << 20) == b"o" * (1 << 20)
    obeyer.progress()
