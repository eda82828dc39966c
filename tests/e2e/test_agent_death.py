"""An agent killed at any moment of pre-copy leaves the process unharmed, and what it leaves can be undone.

Each test has an engine of its own, forked, which dies at its n-th step inside the process: for every n there
is, in CI for every third. The programs check themselves: registers, stacks, masks, waits, clocks.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.support import FULL
from lab.fixture import until
from programs.status import build, read_status, wait_for_status

from agent import cleanup, scratch, tracee, visit
from agent.descriptors import SourceProcess
from agent.kernel import pidfd, procfs, ptrace
from agent.kernel.memory import RemoteMemory
from agent.link import Link
from agent.resources.mappings import FileTable
from agent.rounds import Rounds
from transport.codec import Encoder

PROGRAMS = build()
DONE = 42
# all in `make test-all`; a stride that shares no divisor with the parts of a visit,
# so that none is always passed over
STRIDE, KILLS = (1, 25) if FULL else (3, 10)


class Program:
    """One of tests/programs at work."""

    def __init__(self, name: str, directory: Path, *arguments: str) -> None:
        self.status = directory / "status"
        words = (PROGRAMS / name, "--status", self.status, "--log", directory / "log", *arguments)
        command = [str(word) for word in words]
        self.process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        self.pid = self.process.pid
        wait_for_status(self.status)
        self.before = self.picture()

    def picture(self) -> tuple[object, ...]:
        """Some of what must be as it was afterwards."""
        maps = [(m.start, m.end, m.protection, m.name) for m in procfs.maps(self.pid) if m.inode]
        return maps, scratch.USERFAULTFD in procfs.fds(self.pid).values(), procfs.status(self.pid)["SigBlk"]

    def assert_well(self) -> dict[str, Any]:
        before = read_status(self.status)
        status = wait_for_status(self.status, later_than=before["seq"] + 1 if before else 0)
        assert self.process.poll() is None
        assert status["complaints"] == 0, status["first_complaint"]
        for found in procfs.each_thread(self.pid, lambda tid: procfs.status(self.pid, tid)):
            assert found["TracerPid"] == "0"
            assert not (int(found["SigPnd"], 16) | int(found["ShdPnd"], 16)) & 1 << (signal.SIGTRAP - 1)
        return status

    def assert_nothing_of_ours(self) -> None:
        memory = RemoteMemory(self.pid)
        assert not cleanup.look(self.pid, memory)
        memory.close()

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0, read_status(self.status)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def selfcheck(directory: Path, *more: str) -> Program:
    (directory / "files").mkdir()
    # each death may hold up a thread until it waits for its tracer no more, and it may be the same each time
    options = ("--megabytes", "16", "--threads", "2", "--max-gap", "100", *more)
    return Program("selfcheck", directory, "--dir", str(directory / "files"), *options)


def interruptible(directory: Path) -> Program:
    """A death in the 0.1 ms between the stop and the next step shows as EINTR (docs/architecture.md)."""
    return selfcheck(directory, "--interruptible")


def coroutines(directory: Path) -> Program:
    return Program("coroutines", directory)


@pytest.fixture(params=[interruptible, coroutines])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Program]:
    found = request.param(tmp_path)
    try:
        yield found
    finally:
        found.close()


# --- an engine, and its death ---


def rounds_of(pid: int) -> Rounds:
    ours, _ = socket.socketpair()
    return Rounds(SourceProcess(pid), Link(ours), Encoder("none", 0), FileTable(pid))


def whole_visit(pid: int) -> None:
    """What pre-copy does in a process when it begins, and when it is rolled back."""
    rounds = rounds_of(pid)
    rounds.start_tracking()
    rounds.watch()
    rounds.remove_scratch()
    rounds.close()


class Countdown:
    """Kills this process before its n-th step: whatever it does to another process."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.paused = False

    def step(self) -> None:
        if not self.paused:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.step()
            return original(*arguments, **options)

        setattr(holder, name, call)

    def once(self, holder: Any, name: str) -> None:
        """Something that asks again and again is one step."""
        original = getattr(holder, name)

        def call(*arguments: Any) -> Any:
            self.step()
            self.paused, before = True, self.paused
            try:
                return original(*arguments)
            finally:
                self.paused = before

        setattr(holder, name, call)

    def arm(self) -> None:
        self.before(ptrace, "_call")
        self.before(pidfd, "getfd")
        self.before(RemoteMemory, "write")
        self.before(RemoteMemory, "read")
        self.before(RemoteMemory, "_transfer")
        for holder in (tracee, visit):
            for name in ("wait_until", "wait_event_stop"):
                if hasattr(holder, name):
                    self.once(holder, name)
        self.once(tracee.Tracee, "_await_flag")


def engine(pid: int, work: Callable[[int], None], death: int = 0) -> int:
    """Do it in a process that dies before its step number `death`; its pid."""
    child = os.fork()
    if child:
        return child
    try:
        vars(tracee)["PARK_SECONDS"] = 1
        Countdown(death).arm()
        work(pid)
        os._exit(DONE)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(child: int) -> bool:
    """Whether an engine came to its end; otherwise it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == DONE:
        return True
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the engine failed: {status:#x}"
    return False


@pytest.mark.timeout(900)
def test_at_every_step(program: Program) -> None:
    death = 0
    while True:
        death += STRIDE
        if ended(engine(program.pid, whole_visit, death)):
            break
        cleanup.clean(program.pid)
        program.assert_nothing_of_ours()
        program.assert_well()
    assert death > 60
    program.assert_nothing_of_ours()
    assert program.picture() == program.before
    program.end()


def again_and_again(pid: int) -> None:
    while True:
        whole_visit(pid)


def test_at_any_time(program: Program) -> None:
    """By a signal from outside, not only between two steps."""
    chance = random.Random(7)
    for _ in range(KILLS):
        child = engine(program.pid, again_and_again)
        time.sleep(chance.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        assert not ended(child)
        cleanup.clean(program.pid)
        program.assert_nothing_of_ours()
        program.assert_well()
    assert program.picture() == program.before
    program.end()


def test_a_death_that_nobody_cleans_up_after(program: Program) -> None:
    """The process lives with it, and the next migration works all the same."""
    for death in (25, 45, 70):
        assert not ended(engine(program.pid, whole_visit, death))
    program.assert_well()
    cleanup.clean(program.pid)
    program.assert_nothing_of_ours()
    assert ended(engine(program.pid, whole_visit))
    program.end()


# --- other things that come in between ---


def visits(pid: int) -> None:
    for _ in range(40):
        whole_visit(pid)


def test_stopped_and_continued_meanwhile(tmp_path: Path) -> None:
    """Job control: SIGSTOP cannot be blocked, so it arrives in the middle of everything.

    Only this program: the other one has calls that fail with EINTR after any stop, signal(7).
    """
    program = coroutines(tmp_path)
    chance = random.Random(11)
    child = engine(program.pid, visits)
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            os.kill(program.pid, number)
            time.sleep(chance.uniform(0, 0.004))
    assert ended(child)
    program.assert_nothing_of_ours()
    os.kill(program.pid, signal.SIGSTOP)
    until(lambda: procfs.stat(program.pid).state == "T", "the process to stop")
    os.kill(program.pid, signal.SIGCONT)
    program.assert_well()
    program.end()


def held_up(pid: int) -> None:
    """An agent that is not scheduled for longer than a thread waits for it."""
    original = tracee.Tracee._await_flag

    def late(self: tracee.Tracee, tid: int, control: int) -> None:
        original(self, tid, control)
        time.sleep(tracee.PARK_SECONDS + 0.5)

    tracee.Tracee._await_flag = late  # type: ignore[method-assign]
    with contextlib.suppress(TimeoutError):
        whole_visit(pid)
        os._exit(1)


@pytest.mark.parametrize("program", [selfcheck, coroutines], indirect=True)
def test_an_agent_that_comes_too_late(program: Program) -> None:
    """The thread went on without it, and must not be thrown back to where it was, nor see the second stop."""
    assert ended(engine(program.pid, held_up))
    program.assert_well()
    cleanup.clean(program.pid)
    program.assert_nothing_of_ours()
    program.end()
